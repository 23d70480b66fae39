"""Every recipe: loaded, built at full settings without memory, held against a table, and run for two real steps."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from glmix.cli import main, parse
from glmix.commands.label_tokens import label_tokens
from glmix.data.loading import EpochOrder
from glmix.data.prepare import training_transform
from glmix.data.samples import Sample
from glmix.models.description import Description
from glmix.tasks import task_named
from glmix.training.optim import parameter_groups
from glmix.training.options import TrainOptions
from glmix.training.run import in_epochs

ROOT = Path(__file__).parent.parent / "recipes"
ALL = {str(p.relative_to(ROOT).with_suffix("")): p for p in sorted(ROOT.rglob("*.yaml"))}
RECIPES = {name: path for name, path in ALL.items() if not name.startswith("dense")}  # the others: below
IMAGENET, IMAGENETTE, SCENES, TINY, OWN = 1_281_167, 9_469, 4_000, 100_000, 2_000

# (images, classes, processes), peak lr, optimiser steps in all, drop path, EMA
TABLE = {
    "imagenet1k/glnet_stl": ((IMAGENET, 1000, 8), 2e-3, 625 * 300, 0.1, 0.9999),
    "imagenet1k/glnet_stl_paramslot": ((IMAGENET, 1000, 8), 2e-3, 625 * 300, 0.1, 0.9999),
    "imagenet1k/glnet_4g": ((IMAGENET, 1000, 8), 2e-3, 625 * 300, 0.15, 0.9999),
    "imagenet1k/glnet_9g": ((IMAGENET, 1000, 8), 2e-3, 625 * 300, 0.3, 0.9999),
    "imagenet1k/glnet_16g": ((IMAGENET, 1000, 8), 2e-3, 625 * 300, 0.4, 0.9999),
    "imagenet1k/glnet_4g_tklb": ((IMAGENET, 1000, 8), 2e-3, 625 * 310, 0.1, 0.0),
    "imagenet1k/glnet_9g_tklb": ((IMAGENET, 1000, 8), 2e-3, 625 * 310, 0.1, 0.0),
    "imagenet1k/glnet_16g_tklb": ((IMAGENET, 1000, 8), 2e-3, 625 * 310, 0.1, 0.0),
    "finetune/glnet_4g_384": ((IMAGENET, 1000, 8), 5e-5, 2502 * 30, 0.2, 0.9999),
    "finetune/own_images": ((OWN, 5, 1), 5e-4, 62 * 15, 0.05, 0.998),
    "finetune/linear_probe": ((OWN, 5, 1), 5e-3, 31 * 10, 0.0, 0.0),
    "small/imagenette_pico": ((IMAGENETTE, 10, 1), 2e-3, 147 * 40, 0.05, 0.999),
    "small/imagenette_pico_tokens": ((IMAGENETTE, 10, 1), 2e-3, 147 * 40, 0.05, 0.999),
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
    task = task_named(options.task)
    labels = [str(i) for i in range(classes)]
    description = Description(options.task, options.model, options.model_args, labels, labels)
    with torch.device("meta"):
        model = task.build(description, drop_path_rate=options.drop_path)
        task.start(model, options, description)
    repeats, batch = options.repeats, options.batch_size
    order = EpochOrder(images, batch, True, 0, 0, processes, repeats, options.accumulate)
    peak = options.lr * (order.step_size / options.lr_batch if options.lr_batch else 1)
    groups = parameter_groups(model, options.weight_decay, options.layer_decay, task.spare_scalars)
    assert order.steps * options.epochs == steps
    assert peak == pytest.approx(lr)
    assert (options.drop_path, options.ema) == (drop_path, ema)
    assert max(block.drop_path1.drop_prob for block in model.stages[-1].blocks) == pytest.approx(drop_path)

    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad and options.weight_decay:
            raised = (
                options.model in ("glnet_pico", "glnet_nano") or task.name == "token-label"
            ) and parameter.ndim == 0
            spared = parameter.ndim == 1 or parameter_name.endswith((".bias", ".gamma")) or raised
            assert (id(parameter) in decayed) == (not spared), parameter_name

    preparation = task.prepare(options, model)
    description.preparation = preparation
    photo = Image.new("RGB", (options.image_size + 40, options.image_size + 10), "orange")
    side = options.image_size
    assert preparation(photo).shape == (3, options.eval_size or side, options.eval_size or side)
    if task.name == "classify":
        _, transform = task.training(options, model, description, None)
        assert transform(Sample(photo, 0)).image.shape == (3, side, side)
    else:
        transform = training_transform(options, side, preparation)
    described = str(transform)
    assert ("RandAugment" in described) == bool(options.auto_augment)
    assert ("RandomErasing" in described) == (options.random_erasing > 0)
    if name.startswith("imagenet1k"):
        assert (options.weight_decay, options.min_lr, options.warmup_epochs) == (0.05, 1e-5, 5)
        assert (options.random_erasing, options.auto_augment) == (0.25, "rand-m9-mstd0.5-inc1")
        if name.endswith("tklb"):
            assert (options.mixup, options.cutmix, options.random_interpolation) == (0, 0, True)
            assert (options.dense_weight, options.repeats, options.eval_crop) == (0.5, 1, 0.96)
        else:
            assert (options.mixup, options.cutmix, options.mix_prob, options.repeats) == (0.8, 1.0, 1.0, 3)
            assert options.eval_crop == 0.875
        assert (options.clip_grad, options.label_smoothing, order.step_size) == (5.0, 0.1, 2048)


def tables(page: str) -> list[list[dict[str, str]]]:
    """The tables of a Markdown page, as rows by column."""
    found: list[list[dict[str, str]]] = []
    header: list[str] = []
    for line in page.splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = cells
            found.append([])
        elif set(line) - set("|-: "):
            found[-1].append(dict(zip(header, cells, strict=True)))
    return found


PUBLISHED = [name for name in RECIPES if name.startswith("imagenet1k")]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name: str):
    """Each recipe has what the page on fidelity says, and nothing that the page does not speak of."""
    page = (ROOT.parent / "docs" / "fidelity.md").read_text()
    settings = next(table for table in tables(page) if "option" in table[0])
    drop_paths = next(table for table in tables(page) if "drop path" in table[0])
    kind = "token labels" if name.endswith("_tklb") else "plain"
    model = name.split("glnet_")[1].removesuffix("_tklb")
    options = options_of(RECIPES[name])
    stated = {row["option"]: row[kind] for row in settings if row[kind]}
    stated["drop_path"] = next(row[model] for row in drop_paths if row["drop path"] == kind)
    for option, value in stated.items():
        # YAML 1.1 takes 2e-3 for a text
        expected = yaml.safe_load(value) if not re.fullmatch(r"[\d.]+e-?\d+", value) else float(value)
        assert getattr(options, option) == expected, option
    beside = {"data", "task", "model", "token_labels", "eval_size"}
    assert set(yaml.safe_load(RECIPES[name].read_text())) - beside <= set(stated)
    assert len(stated) > 20


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
    if options.task == "token-label":
        label_tokens(teacher=str(run), data=str(photos), out=str(tmp_path / "labels"), size=64)
        more += ["--token-labels", str(tmp_path / "labels")]
    command = ["train", "--config", str(RECIPES[name]), "--data", str(photos), "--out", str(tmp_path / "run")]
    assert main([*command, *SMALL, *more]) == 0
    assert (tmp_path / "run" / "best.safetensors").exists()


# --- dense tasks: images, batch of all processes, steps in all, peak lr, decay, drop path, schedule, as common practice is
COCO = 118_287
DENSE = {
    "dense/ade20k_semantic_fpn_4g": (20_210, 8, 16, 80_000, 2e-4, 1e-4, 0.15, "poly"),
    "dense/ade20k_upernet_4g": (20_210, 8, 16, 160_000, 6e-5, 0.01, 0.3, "poly"),
    "dense/camvid_semantic_fpn_pico": (367, 1, 8, 45 * 60, 1e-3, 0.05, 0.05, "poly"),
    "dense/camvid_upernet_pico": (367, 1, 8, 45 * 60, 1e-3, 0.05, 0.05, "poly"),
    "dense/bccd_retinanet_pico": (184, 1, 4, 46 * 30, 1e-3, 0.05, 0.05, "cosine"),
    "dense/nuclei_mask_rcnn_pico": (186, 1, 4, 46 * 20, 1e-3, 0.05, 0.05, "cosine"),
    "dense/scenes_segment": (4000, 1, 8, 500 * 7, 1e-3, 0.05, 0.0, "cosine"),
    "dense/scenes_detect": (4000, 1, 8, 500 * 4, 1e-3, 0.05, 0.0, "cosine"),
    "dense/retinanet_glnet_4g_1x": (COCO, 8, 16, COCO // 16 * 12, 1e-4, 1e-4, 0.2, "step"),
    "dense/retinanet_glnet_4g_3x": (COCO, 8, 16, COCO // 16 * 36, 1e-4, 1e-4, 0.2, "step"),
    "dense/mask_rcnn_glnet_4g_1x": (COCO, 8, 16, COCO // 16 * 12, 1e-4, 0.05, 0.2, "step"),
    "dense/mask_rcnn_glnet_4g_3x": (COCO, 8, 16, COCO // 16 * 36, 1e-4, 0.05, 0.2, "step"),
}


def test_table_of_dense_recipes_is_complete():
    assert set(DENSE) == set(ALL) - set(RECIPES)


@pytest.mark.parametrize("name", DENSE)
def test_dense_recipes_at_full_settings(name: str):
    options = options_of(ALL[name])
    images, processes, batch, steps, lr, decay, drop_path, schedule = DENSE[name]
    options, order = in_epochs(
        options, lambda limit: EpochOrder(images, options.batch_size, True, processes=processes, limit=limit)
    )
    assert order.step_size == batch
    assert 0 <= order.steps * options.epochs - steps < options.epochs
    assert options.lr * (order.step_size / options.lr_batch if options.lr_batch else 1) == pytest.approx(lr)
    assert (options.weight_decay, options.drop_path, options.schedule) == (decay, drop_path, schedule)
    labels = [str(i) for i in range(150)]
    task = task_named(options.task)
    description = Description(options.task, options.model, options.model_args, labels, labels)
    description.head = options.described_head()
    options.init, options.backbone_norm, options.freeze_stages = "", "train", 0
    with torch.device("meta"):
        model = task.build(description, drop_path_rate=options.drop_path)
        task.start(model, options, description)
    width = {"upernet": 512, "semantic-fpn": 256, "retinanet": 256, "mask-rcnn": 256}[options.head]
    width = options.head_channels or (64 if options.model in ("glnet_pico", "glnet_nano") else width)
    convs = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d) and not n.startswith("backbone")]
    assert width in {conv.out_channels for conv in convs}
    assert max(block.drop_path1.drop_prob for block in model.backbone.stages[-1].blocks) == pytest.approx(drop_path)
