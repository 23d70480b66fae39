#!/usr/bin/env bash
# The main job in small, on generated scenes: train, evaluate, predict, look into the slots.
set -euo pipefail
out=${1:-quickstart}
rm -rf "$out"

echo "1. Training a small GLNet on generated scenes (textured shapes on textured grounds)"
glmix train --config recipes/small/scenes.yaml --out "$out/run"

echo; echo "2. Evaluating it"
glmix eval --checkpoint "$out/run" --data scenes

echo; echo "3. Predicting: the folder's name is what the scene shows"
glmix scenes --out "$out/scenes" --count 8 --seed 7
find "$out/scenes" -name '*.png' | sort | xargs glmix predict --checkpoint "$out/run" --top 2

echo; echo "4. Looking into its slots"
find "$out/scenes" -name '*.png' | sort | head -4 | xargs glmix explain --checkpoint "$out/run" --out "$out/slots" --report

echo
echo "Pictures of the slots are in $out/slots (open report.html there), the curves in $out/run/curves.png."
echo "Now with your own images, in one folder per class:"
echo "  .venv/bin/glmix train --data DIR --epochs 30 --out runs/mine"
echo "  .venv/bin/glmix eval --checkpoint runs/mine --data DIR"
echo "  .venv/bin/glmix predict --checkpoint runs/mine photo.jpg"
echo "  .venv/bin/glmix explain --checkpoint runs/mine --out slots --report photo.jpg"
