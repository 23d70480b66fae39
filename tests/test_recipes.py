"""Every recipe: loaded, built at full settings without memory, held against a table, and run for two real steps."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from glmix.cli import main, parse
from glmix.commands.label_tokens import label_tokens
from glmix.commands.train import make_model
from glmix.data.loading import EpochOrder
from glmix.data.transforms import evaluation_transform, training_transform
from glmix.models import config_of
from glmix.options import TrainOptions
from glmix.tasks.optim import cosine, parameter_groups

ROOT = Path(__file__).parent.parent / "recipes"
RECIPES = {str(p.relative_to(ROOT).with_suffix("")): p for p in sorted(ROOT.rglob("*.yaml"))}
IMAGENET, IMAGENETTE, SCENES, TINY, OWN = 1_281_167, 9_469, 4_000, 100_000, 2_000

# (images, classes, processes), peak lr, optimiser steps in all, drop path, EMA
TABLE = {
    "imagenet1k/glnet_stl": ((IMAGENET, 1000, 8), 2e-3, 625 * 300, 0.1, 0.9999),
    "imagenet1k/glnet_stl_paramslot": ((IMAGENET, 1000, 8), 2e-3, 625 * 300, 0.1, 0.9999),
    "imagenet1k/glnet_4g": ((IMAGENET, 1000, 8), 2e-3, 625 * 300, 0.15, 0.9999),
    "imagenet1k/glnet_9g": ((IMAGENET, 1000, 8), 2e-3, 625 * 300, 0.3, 0.9999),
    "imagenet1k/glnet_16g": ((IMAGENET, 1000, 8), 2e-3, 625 * 300, 0.4, 0.9999),
    "imagenet1k/glnet_4g_tklb": ((IMAGENET, 1000, 8), 1e-3, 1251 * 310, 0.1, 0.0),
    "imagenet1k/glnet_9g_tklb": ((IMAGENET, 1000, 8), 1e-3, 1251 * 310, 0.1, 0.0),
    "imagenet1k/glnet_16g_tklb": ((IMAGENET, 1000, 8), 1e-3, 1251 * 310, 0.1, 0.0),
    "finetune/glnet_4g_384": ((IMAGENET, 1000, 8), 5e-5, 2502 * 30, 0.2, 0.9999),
    "finetune/own_images": ((OWN, 5, 1), 5e-4, 62 * 15, 0.05, 0.998),
    "finetune/linear_probe": ((OWN, 5, 1), 5e-3, 31 * 10, 0.0, 0.0),
    "small/imagenette_pico": ((IMAGENETTE, 10, 1), 2e-3, 147 * 40, 0.05, 0.999),
    "small/tiny_imagenet_pico": ((TINY, 200, 1), 2e-3, 781 * 60, 0.1, 0.9995),
    "small/scenes": ((SCENES, 8, 1), 1.5e-3, 125 * 8, 0.0, 0.99),
}


def options_of(recipe: Path) -> TrainOptions:
    return parse("train", ["--config", str(recipe)])[1]


def test_table_is_complete():
    assert set(TABLE) == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_built_at_full_settings(name: str):
    options = options_of(RECIPES[name])
    (images, classes, processes), lr, steps, drop_path, ema = TABLE[name]
    options.init = ""
    with torch.device("meta"):
        model = make_model(options, classes)
    order = EpochOrder(images, True, 0, 0, processes, options.repeats, options.batch_size)
    per_epoch = len(order) // options.batch_size // options.accumulate
    global_batch = options.batch_size * options.accumulate * processes
    peak = options.lr * (global_batch / options.lr_batch if options.lr_batch else 1)
    groups = parameter_groups(model, options.weight_decay, options.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=peak)
    schedule = cosine(optimizer, options.epochs, per_epoch, options.warmup_epochs, options.min_lr)
    assert per_epoch * options.epochs == steps
    assert peak == pytest.approx(lr)
    assert (options.drop_path, options.ema) == (drop_path, ema)

    head = [g for g in optimizer.param_groups if g["lr_scale"] == 1]
    schedule.step_update(options.warmup_epochs * per_epoch + 1)
    assert max(g["lr"] for g in head) == pytest.approx(peak, rel=5e-2)  # the cosine has begun under the warm-up
    schedule.step_update(options.epochs * per_epoch)
    assert max(g["lr"] for g in head) == pytest.approx(options.min_lr, rel=0.1)

    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad and options.weight_decay:
            raised = options.model in ("glnet_pico", "glnet_nano") and parameter.ndim == 0
            spared = parameter.ndim == 1 or parameter_name.endswith((".bias", ".gamma")) or raised
            assert (id(parameter) in decayed) == (not spared), parameter_name

    cfg = config_of(model)
    image = {"input_size": (3, options.image_size, options.image_size), "crop_pct": options.eval_crop}
    image |= {k: cfg[k] for k in ("mean", "std", "interpolation")}
    photo = Image.new("RGB", (options.image_size + 40, options.image_size + 10), "orange")
    side = options.image_size
    assert evaluation_transform(image)(photo).shape == (3, side, side)
    transform = training_transform(options, image)
    assert transform(photo).shape == (3, side, side)
    described = str(transform)
    assert ("RandAugment" in described) == bool(options.auto_augment)
    assert ("RandomErasing" in described) == (options.random_erasing > 0)
    if name.startswith("imagenet1k"):
        assert (options.weight_decay, options.min_lr, options.warmup_epochs) == (0.05, 1e-5, 5)
        assert (options.random_erasing, options.auto_augment) == (0.25, "rand-m9-mstd0.5-inc1")
        if name.endswith("tklb"):
            assert (options.mixup, options.cutmix, options.random_interpolation) == (0, 0, True)
            assert (options.dense_weight, options.repeats, options.clip_grad, options.eval_crop) == (0.5, 1, 0, 0.96)
        else:
            assert (options.mixup, options.cutmix, options.mix_prob, options.repeats) == (0.8, 1.0, 1.0, 3)
            assert (options.clip_grad, options.label_smoothing, options.eval_crop) == (5.0, 0.1, 0.875)
            assert global_batch == 2048


SMALL = "--epochs 1 --batch-size 4 --limit-train-batches 2 --image-size 64 --eval-size 64 --start-size 0 --workers 0 --val-every 1".split()


@pytest.mark.parametrize("name", RECIPES)
def test_two_real_steps(name: str, run: Path, photos: Path, tmp_path: Path):
    options = options_of(RECIPES[name])
    more = ["--warmup-epochs", "0", "--limit-val-batches", "1", "--accumulate", "1", "--lr-batch", "0"]
    if options.model not in ("glnet_pico", "glnet_nano"):
        small = "{dims: [32, 64, 96, 128], depths: [1, 1, 2, 1]}"
        more += ["--model_args", small, "--init", ""]
    elif options.init:
        more += ["--init", str(run)]
    if options.token_labels:
        label_tokens(teacher=str(run), data=str(photos), out=str(tmp_path / "labels"), size=64)
        more += ["--token-labels", str(tmp_path / "labels")]
    command = ["train", "--config", str(RECIPES[name]), "--data", str(photos), "--out", str(tmp_path / "run")]
    assert main([*command, *SMALL, *more]) == 0
    assert (tmp_path / "run" / "best.safetensors").exists()
