"""A run does what its options say: followed into optimiser, model and batches, by what really happens in it."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

from glmix.data.loading import Batch, EpochOrder, seeded
from glmix.data.samples import Sample
from glmix.models import create_model
from glmix.models.weights import read_checkpoint
from glmix.tasks.classify import CLASSIFY, ClassifyLoss, ClassifyOptions
from glmix.training.module import Trained
from glmix.training.progress import read_rows
from glmix.training.run import fit, prepare

TINY = {"dims": [32, 32, 32, 32], "depths": [1, 1, 1, 1], "slot_grid": [2, 2]}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that a mirror exchanges: bright on the left, bright on the right; 24 and 8 images of 40 x 40."""
    return write_sides(tmp_path_factory.mktemp("sides"))


def write_sides(root: Path, shuffled: bool = False) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name in ("left", "right"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 90, (40, 40, 3), dtype=np.uint8)
                bright = ("left", "right")[rng.integers(2)] if shuffled else name
                pixels[:, slice(0, 20) if bright == "left" else slice(20, 40)] += 120
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def options(data: Path, out: Path, **more: Any) -> ClassifyOptions:
    usual = {
        "epochs": 2, "batch_size": 4, "image_size": 32, "workers": 0, "precision": "fp32", "warmup_epochs": 0,
        "hflip": 0.0, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "ema": 0.0, "crop_scale": 0.8, "model_args": TINY,
    }  # fmt: skip
    return ClassifyOptions(data=str(data), out=str(out), **usual | more)


@dataclass
class Step:
    """What the optimiser did: learning rate and decay by parameter (its id), the gradient's norm."""

    lr: dict[int, float]
    decay: dict[int, float]
    norm: float


@contextmanager
def watched() -> Iterator[list[Step]]:
    """Within it every optimiser step is written down."""
    steps: list[Step] = []

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        by = {
            key: {id(p): g[key] for g in optimizer.param_groups for p in g["params"]} for key in ("lr", "weight_decay")
        }
        gradients = [p.grad.norm() for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        steps.append(Step(by["lr"], by["weight_decay"], float(torch.stack(gradients).norm())))

    handle = register_optimizer_step_post_hook(after)
    try:
        yield steps
    finally:
        handle.remove()


def watched_run(asked: ClassifyOptions) -> tuple[Trained, list[Step]]:
    with watched() as steps:
        return fit(CLASSIFY, asked), steps


def recorded_run(asked: ClassifyOptions) -> tuple[Trained, list[tuple[int, Batch]]]:
    """A run, and every batch that its loss was asked for, with its epoch."""
    batches: list[tuple[int, Batch]] = []

    class Recording(ClassifyLoss):
        def __call__(self, model: Any, batch: Batch, epoch: int) -> torch.Tensor:
            batches.append((epoch, batch))
            return super().__call__(model, batch, epoch)

    return fit(replace(CLASSIFY, loss=Recording), asked), batches


# --- optimisation


def test_the_learning_rate_of_every_step(sides: Path, tmp_path: Path):
    """24 images in batches of 4 are 6 steps an epoch; 2 of 5 epochs warm up from 0, a half cosine lies over the rest."""
    _, steps = watched_run(options(sides, tmp_path, epochs=5, warmup_epochs=2, lr=1e-3, min_lr=1e-5))
    found = [next(iter(step.lr.values())) for step in steps]
    assert all(len(set(step.lr.values())) == 1 for step in steps)
    warming = [i * 1e-3 / 12 for i in range(12)]
    falling = [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * i / 18)) / 2 for i in range(18)]
    assert found == pytest.approx(warming + falling, rel=1e-6)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (
            {"warmup_prefix": False, "warmup_lr": 1e-6, "warmup_epochs": 1},  # as with token labels
            [1e-6 + i * (1e-3 - 1e-6) / 6 for i in range(6)]
            + [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * i / 18)) / 2 for i in range(6, 18)],
        ),
        (
            {"schedule": "step", "milestones": [1, 2], "warmup_steps": 3},
            [i * 1e-3 / 3 for i in range(3)] + [1e-3] * 3 + [1e-4] * 6 + [1e-5] * 6,
        ),
        (
            {"schedule": "poly", "warmup_steps": 3, "poly_power": 0.9, "min_lr": 0.0},
            [i * 1e-3 / 3 for i in range(3)] + [1e-3 * (1 - i / 15) ** 0.9 for i in range(15)],
        ),
    ],
)
def test_other_schedules(sides: Path, tmp_path: Path, asked: dict[str, Any], expected: list[float]):
    usual = {"epochs": 3, "lr": 1e-3, "min_lr": 1e-5}
    _, steps = watched_run(options(sides, tmp_path, **usual | asked))
    assert [next(iter(step.lr.values())) for step in steps] == pytest.approx(expected, rel=1e-6)


def test_a_run_in_steps(sides: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """13 steps are three epochs, of 5 steps each in place of 6; the schedule is theirs."""
    _, steps = watched_run(options(sides, tmp_path, steps=13, min_lr=0.0))
    assert "13 steps are 3 epochs of 5" in capsys.readouterr().err
    assert [next(iter(s.lr.values())) for s in steps] == pytest.approx(
        [2e-3 * (1 + math.cos(math.pi * i / 15)) / 2 for i in range(15)], rel=1e-6
    )


def test_lr_is_scaled_to_the_batch(sides: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    _, plain = watched_run(options(sides, tmp_path / "plain"))
    _, scaled = watched_run(options(sides, tmp_path / "scaled", lr_batch=16, accumulate=2))
    assert "lr 0.002 for a batch of 16 becomes 0.001 for 8" in capsys.readouterr().err
    assert max(plain[0].lr.values()) == pytest.approx(2e-3)
    assert max(scaled[0].lr.values()) == pytest.approx(1e-3)
    assert (len(plain), len(scaled)) == (12, 6)


def test_layers_learn_at_their_own_rate(sides: Path, tmp_path: Path):
    """Head and norm at the full rate, each layer before at 0.5 of the next: 1-1-1-1 blocks and 3 transitions, a stem."""
    trained, steps = watched_run(options(sides, tmp_path, layer_decay=0.5, epochs=1))
    model, rates = trained.model, steps[0].lr
    top = rates[id(model.head.fc.weight)]
    assert top == pytest.approx(2e-3)
    parts = [model.stages[3].blocks, model.stages[2].blocks, model.stages[1].blocks, model.stages[0].blocks, model.stem]
    factors = [rates[id(next(part.parameters()))] / top for part in parts]
    assert all(later > earlier for later, earlier in pairwise(factors))
    assert all(math.log2(factor) == pytest.approx(round(math.log2(factor))) for factor in factors)
    assert factors[-1] <= 0.5**4


def test_weights_decay_and_biases_do_not(sides: Path, tmp_path: Path):
    trained, steps = watched_run(options(sides, tmp_path, weight_decay=0.07, epochs=1))
    for name, parameter in trained.model.named_parameters():
        spared = parameter.ndim < 2  # slot scales too: pico starts them high
        assert steps[0].decay[id(parameter)] == (0 if spared else 0.07), name


def test_gradients_are_clipped(sides: Path, tmp_path: Path):
    _, free = watched_run(options(sides, tmp_path / "free", clip_grad=0.0, epochs=1))
    _, clipped = watched_run(options(sides, tmp_path / "clipped", clip_grad=0.01, epochs=1))
    assert min(step.norm for step in free) > 0.02
    assert [step.norm for step in clipped] == pytest.approx([0.01] * 6, rel=1e-2)


def test_accumulated_batches_are_one_step(sides: Path, tmp_path: Path):
    """Of 24 images, 3 batches of 4 to a step leave 2 steps: what does not fill one is left out, and nothing is half."""
    trained, steps = watched_run(options(sides, tmp_path, accumulate=5, batch_size=2, epochs=3))
    assert len(steps) == 3 * 2
    assert trained.global_step == 6


def test_drop_path_reaches_the_model(sides: Path, tmp_path: Path):
    trained, _ = watched_run(options(sides, tmp_path, drop_path=0.3, epochs=1))
    rates = [stage.blocks[0].drop_path1.drop_prob for stage in trained.model.stages]
    assert rates[0] == 0 and rates == sorted(rates) and rates[-1] == pytest.approx(0.3)


def test_the_average_is_of_every_step(sides: Path, tmp_path: Path):
    states: list[torch.Tensor] = []
    handle = register_optimizer_step_post_hook(
        lambda optimizer, *_: states.append(optimizer.param_groups[0]["params"][0].detach().clone())
    )
    try:
        trained, steps = watched_run(options(sides, tmp_path, ema=0.6, ema_warmup=False, epochs=1))
    finally:
        handle.remove()
    first = trained.optimizers().param_groups[0]["params"][0]  # type: ignore[union-attr]
    name = next(n for n, p in trained.model.named_parameters() if p is first)
    average = states[0]  # it begins with the first step's weights
    for state in states[1:]:
        average = 0.6 * average + 0.4 * state
    assert len(states) == len(steps) == 6
    assert torch.allclose(trained.averaged.get_parameter(name), average, atol=1e-7)
    assert not torch.allclose(trained.averaged.get_parameter(name), states[-1], atol=1e-5)
    kept = read_checkpoint(tmp_path / "last_ema.safetensors")[1]
    assert torch.equal(kept[name], trained.averaged.state_dict()[name])


# --- batches


def test_other_orders_and_other_crops_every_epoch(sides: Path, tmp_path: Path):
    _, batches = recorded_run(options(sides, tmp_path, epochs=3))
    orders = [torch.cat([b.targets for e, b in batches if e == epoch]).tolist() for epoch in range(3)]
    assert all(sorted(order) == [0] * 12 + [1] * 12 for order in orders)
    assert len({tuple(order) for order in orders}) == 3 and sorted(orders[0]) not in orders
    seen = [{image.numpy().tobytes() for e, b in batches if e == epoch for image in b.images} for epoch in range(3)]
    assert [len(images) for images in seen] == [24] * 3
    assert not seen[0] & seen[1] and not seen[1] & seen[2]


def test_repeats_are_the_same_images_augmented_otherwise(tmp_path: Path):
    """Images of one colour each, different from image to image, so that crops do not hide which one it is."""
    for i in range(24):
        path = tmp_path / "data" / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (10 * i, 0, 0)).save(path)
        (tmp_path / "data" / "val" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "data" / "val" / "ab"[i % 2] / "1.png")
    asked = options(tmp_path / "data", tmp_path / "run", repeats=3, epochs=1, random_erasing=1.0)
    _, batches = recorded_run(asked)
    images = torch.cat([batch.images for _, batch in batches])
    # erasing leaves most pixels alone: the median of the red ones tells the image
    colours = ((images[:, 0].flatten(1).median(1).values * STD[0] + MEAN[0]) * 25.5).round().int().tolist()
    assert len(images) == 24 and len(set(colours)) == 8
    assert all(colours.count(colour) == 3 for colour in set(colours))
    assert len({image.numpy().tobytes() for image in images}) == 24


@pytest.mark.parametrize(("processes", "accumulate"), [(4, 1), (2, 2), (1, 4)])
def test_copies_of_an_image_are_dealt_to_the_batches_of_a_step(processes: int, accumulate: int):
    """3 copies each, 4 batches a step: every batch has as many images as places, and all together 3 of each."""
    orders = [EpochOrder(72, 6, True, 0, rank, processes, 3, accumulate) for rank in range(processes)]
    keys = [list(order) for order in orders]
    batches = [part[i : i + 6] for part in keys for i in range(0, len(part), 6)]
    assert len(batches) == 12
    assert all(len({index for _, index, _ in batch}) == 6 for batch in batches)
    counts = Counter((index, repeat) for part in keys for _, index, repeat in part)
    assert set(counts.values()) == {1} and len({index for index, _ in counts}) == 24
    steps = [
        {index for part in keys for _, index, _ in part[i : i + 6 * accumulate]} for i in range(0, 18, 6 * accumulate)
    ]
    assert all(len(images) == 8 for images in steps)  # copies stay in one step


def test_validation_images_can_be_squashed(sides: Path, tmp_path: Path):
    _, (_, loader) = prepare(CLASSIFY, options(sides, tmp_path, eval_fit="squash"))
    wide = Image.new("RGB", (80, 40))
    wide.paste((255, 255, 255), (70, 0, 80, 40))  # which the middle does not show
    transform = loader.dataset.transform
    assert transform(Sample(wide, 0)).image[..., -3:].mean() > 1
    _, (_, loader) = prepare(CLASSIFY, options(sides, tmp_path))
    assert loader.dataset.transform(Sample(wide, 0)).image[..., -3:].mean() < 0


def test_a_replaced_image_brings_its_own_label(sides: Path, tmp_path: Path):
    """Two of the left ones are damaged; in their place come others, and their labels with them."""
    write_sides(tmp_path / "data")
    for number in (3, 9):  # the last of the left ones by name: a right one comes after it
        (tmp_path / "data" / "train" / "left" / f"{number}.png").write_bytes(b"no image")
    trained, batches = recorded_run(options(tmp_path / "data", tmp_path / "run", crop_scale=1.0))
    assert len({skipped.name for skipped in trained.skipped}) == 2
    for _, batch in batches:
        halves = batch.images[..., :16].mean((1, 2, 3)) < batch.images[..., 16:].mean((1, 2, 3))
        assert halves.long().equal(batch.targets)


def test_training_images_are_normalised(tmp_path: Path):
    for split in ("train", "val"):
        for name, value in (("dark", 20), ("light", 200)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (40, 40), (value,) * 3).save(tmp_path / "data" / split / name / f"{i}.png")
    _, batches = recorded_run(options(tmp_path / "data", tmp_path / "run", epochs=1))
    for _, batch in batches:
        expected = (torch.tensor([20, 200])[batch.targets, None] / 255 - MEAN) / STD
        assert torch.allclose(batch.images.mean((2, 3)), expected, atol=0.02)


# --- what it comes to


@pytest.fixture(scope="module")
def learned(sides: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    out = tmp_path_factory.mktemp("learned") / "run"
    return fit(CLASSIFY, options(sides, out, epochs=8, val_every=3, ema=0.5, weight_decay=0.0))


def test_what_can_be_learned_is(learned: Trained):
    rows = read_rows(Path(learned.options.out) / "metrics.csv")
    losses = [float(row["train_loss"]) for row in rows]
    assert losses[-1] < 0.3 < losses[0]
    assert float(rows[-1]["val_top1"]) == 100
    assert ["val_top1" in row for row in rows] == [False, False, True, False, False, True, False, True]


def test_what_cannot_be_learned_is_not(tmp_path: Path):
    data = write_sides(tmp_path / "data", shuffled=True)
    fit(CLASSIFY, options(data, tmp_path / "run", epochs=3, weight_decay=0.0))
    row = read_rows(tmp_path / "run" / "metrics.csv")[-1]
    assert float(row["train_loss"]) > 0.5 and float(row["val_top1"]) < 100


def test_validation_is_what_can_be_done_by_hand(learned: Trained, sides: Path):
    """With Pillow and a softmax: neither flips nor mixing, normalised, each image with its own label, the average's."""
    description, _ = read_checkpoint(Path(learned.options.out) / "last.safetensors")
    model = create_model("glnet_pico", checkpoint=Path(learned.options.out) / "last.safetensors").eval()
    losses, right = [], 0
    for label, name in enumerate(("left", "right")):
        for i in range(4):
            with Image.open(sides / "val" / name / f"{i}.png") as file:
                pixels = np.array(file.resize((32, 32), Image.Resampling.BICUBIC))
            image = ((torch.from_numpy(pixels) / 255 - MEAN) / STD).permute(2, 0, 1)[None]
            with torch.no_grad():
                logits = model(image)
            losses.append(F.cross_entropy(logits, torch.tensor([label])).item())
            right += int(logits.argmax()) == label
    assert description.info["val_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert description.info["val_top1"] == pytest.approx(100 * right / 8)


class Scripted(torch.nn.Module):
    """Metrics whose headline goes up, and down after its best."""

    script = (30.0, 50.0, 90.0, 70.0)

    def __init__(self, description: Any) -> None:
        super().__init__()
        self.asked = 0

    def update(self, outputs: Any, targets: Any) -> None: ...

    def compute(self) -> dict[str, float]:
        self.asked += 1
        return {"top1": self.script[self.asked - 1]}

    def reset(self) -> None: ...


def test_the_best_is_kept_beside_the_last(sides: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    from glmix.commands.train import report

    trained = fit(replace(CLASSIFY, metrics=Scripted), options(sides, tmp_path, epochs=4))
    epochs = {name: read_checkpoint(tmp_path / f"{name}.safetensors")[0].info["epoch"] for name in ("best", "last")}
    assert epochs == {"best": 3, "last": 4}
    assert read_checkpoint(tmp_path)[0].info["val_top1"] == 90  # a run's folder means its best
    assert not torch.equal(*(read_checkpoint(tmp_path / f"{n}.safetensors")[1]["head.fc.weight"] for n in epochs))
    report(trained)
    assert "best validation top-1 90.0 %" in capsys.readouterr().out


def test_what_is_random_on_a_gpu_hangs_on_the_step_too(monkeypatch: pytest.MonkeyPatch):
    """Told by a stand-in for CUDA's generator: drop path draws from it, and a cut run must repeat a step."""
    generator = torch.Generator()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "manual_seed", generator.manual_seed)
    monkeypatch.setattr(torch.cuda, "get_rng_state", generator.get_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", generator.set_state)
    before = generator.get_state()
    drawn = []
    for key in ((0, 1, 2), (0, 1, 2), (0, 1, 3)):
        with seeded(*key):
            drawn.append(torch.rand(4, generator=generator))
        assert torch.equal(generator.get_state(), before)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
