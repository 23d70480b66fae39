#!/usr/bin/env bash
# Detection and segmentation in small, on generated scenes: train both, measure, predict, look into the slots.
set -euo pipefail
out=${1:-quickstart-dense}
rm -rf "$out"

# each training has half of the cores: for images as small as these, two at a time take half the time of one after the other
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=$(((cores + 1) / 2))

few="--limit-train-batches 400 --workers 0"  # a fifth fewer images than the recipes': for the time that it takes
echo "1. Training a detector and a segmenter on generated scenes, side by side, from the weights that ship"
glmix train --config recipes/dense/scenes_detect.yaml --epochs 3 $few --out "$out/detector" 2>&1 | sed 's/^/detector:  /' &
detector=$!
glmix train --config recipes/dense/scenes_segment.yaml --epochs 4 $few --out "$out/segmenter" 2>&1 | sed 's/^/segmenter: /' &
segmenter=$!
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT  # what stops one stops both
wait $detector
wait $segmenter
unset OMP_NUM_THREADS

echo; echo "2. Measuring both on 800 other scenes"
glmix eval --checkpoint "$out/detector" --data scenes
glmix eval --checkpoint "$out/segmenter" --data scenes

echo; echo "3. Predicting: boxes, classes of pixels, and the slots beside them"
glmix scenes --out "$out/scenes" --count 8 --seed 7
glmix predict "$out/scenes" --checkpoint "$out/detector" --top 3 --pictures "$out/objects"
glmix predict "$out/scenes" --checkpoint "$out/segmenter" --pictures "$out/classes"
find "$out/scenes" -name '*.png' | sort | head -2 | xargs glmix explain --checkpoint "$out/segmenter" --out "$out/slots"

echo
echo "Pictures are in $out/objects, $out/classes and $out/slots, the curves in $out/detector and $out/segmenter."
echo "Now with your own images:"
echo "  .venv/bin/glmix check-data --data COCO_DIR --task detect"
echo "  .venv/bin/glmix train --task detect --head retinanet --data COCO_DIR --init glnet_pico_tklb.imagenette --image-size 300 400 --out runs/boxes"
