"""Token labels: written by a teacher, read with the images they belong to, and learned from."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import ImageNetInfo

from glmix.cli import main
from glmix.commands import label_tokens as command
from glmix.commands.label_tokens import DenseTeacher, class_columns, label_tokens, load_teacher
from glmix.commands.train import prepare
from glmix.data.images import load_split
from glmix.data.loading import seeded
from glmix.data.token_labels import (
    TokenBatch,
    TokenLabels,
    TokenTransform,
    collate_tokens,
    dense_target,
    digest_of,
    open_token_labels,
    prepare_tokens,
)
from glmix.errors import UserError
from glmix.models import create_model
from glmix.models.weights import Checkpoint, read_checkpoint, write_checkpoint
from glmix.options import TrainOptions
from glmix.tasks.token_labeling import TokenLabeler, mixed_targets, random_box

PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1), "interpolation": "bilinear"}  # tensors are the pixels / 255
WHOLE = 0.0, 0.0, 1.0, 1.0


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a timm teacher of two classes."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    model = timm.create_model("test_resnet", num_classes=2)
    torch.nn.init.normal_(model.fc.weight)  # decided scores, that differ from place to place
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def labels(photos: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of `photos`, in shards of 10, 10 and 4 images."""
    out = tmp_path_factory.mktemp("labels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "SHARD", 10)
        label(photos, out, weights)
    return out


def label(photos: Path, out: Path, weights: Path, **more) -> None:
    label_tokens("test_resnet", str(photos), str(out), size=96, weights=str(weights), workers=0, **more)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def random_map(rows: int, columns: int, classes: int, top: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    scores = -np.sort(-rng.dirichlet(np.ones(classes), (rows, columns)), -1)
    order = rng.permuted(np.tile(np.arange(classes), (rows, columns, 1)), axis=-1)
    return order[..., :top].astype(np.int64), scores[..., :top].astype(np.float32)


# --------------------------------------------------------------------------------------------------------- the command


def test_labels_are_what_the_teacher_sees(photos: Path, labels: Path, weights: Path):
    images = load_split(photos, "train")
    tokens = open_token_labels(labels, images)
    assert (tokens.grid, tokens.top, tokens.images, len(tokens.shards)) == ((3, 3), 2, 24, 3)
    model, _, config = load_teacher("test_resnet", str(weights))
    for index in (0, 9, 10, 23):
        image = images.read(index).resize((96, 96), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(config[k])[:, None, None] for k in ("mean", "std"))
        with torch.inference_mode():
            grid = model.eval().forward_features(
                ((pixels - mean) / std)[None]
            )  # what the command must do, without its means
            logits = torch.einsum("bchw,kc->bhwk", grid, model.fc.weight) + model.fc.bias
        assert torch.allclose(dense_target(tokens.read(index), WHOLE, (3, 3), 2), logits[0].softmax(-1), atol=2e-3)


def test_a_killed_command_goes_on(photos: Path, labels: Path, weights: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(command, "SHARD", 10)
    whole, number = TokenLabels.write, []

    def cut(self, *arguments):
        number.append(1)
        if len(number) == 2:
            (self.root / ".00001.safetensors.part").write_bytes(b"half of")
            raise KeyboardInterrupt
        whole(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TokenLabels, "write", cut)
        with pytest.raises(KeyboardInterrupt):
            label(photos, tmp_path, weights)
    with pytest.raises(UserError, match=r"2 of 3 shards missing or damaged \(first: 00001"):
        open_token_labels(tmp_path, load_split(photos, "train"))
    first = (tmp_path / "00000.safetensors").stat().st_mtime_ns
    label(photos, tmp_path, weights)
    assert content(tmp_path) == content(labels)
    assert (tmp_path / "00000.safetensors").stat().st_mtime_ns == first


@pytest.mark.parametrize("damage", ["truncated", "a byte", "empty", "swapped", "no header"])
def test_damage_is_noticed_and_mended(damage: str, photos: Path, labels: Path, weights: Path, tmp_path: Path):
    broken = tmp_path / "labels"
    shutil.copytree(labels, broken)
    shard, header = broken / "00002.safetensors", broken / "labels.json"
    data = bytearray(shard.read_bytes())
    if damage == "swapped":
        shutil.copy(broken / "00000.safetensors", shard)
    elif damage == "no header":
        header.write_bytes(header.read_bytes()[:40])
    else:
        data[-7] ^= 4
        shard.write_bytes({"truncated": data[:-100], "a byte": data, "empty": b""}[damage])
    with pytest.raises(UserError, match="damaged"):
        open_token_labels(broken, load_split(photos, "train"))
    if damage == "no header":
        header.unlink()
        shutil.copy(labels / "labels.json", header)
    label(photos, broken, weights)
    assert content(broken) == content(labels)


def test_labels_of_other_data_are_refused(photos: Path, labels: Path, weights: Path, tmp_path: Path):
    images = load_split(photos, "train")
    others = load_split(photos, "val")
    moved = replace(images, root=tmp_path / "elsewhere")
    renamed = replace(images, classes=["a", "b"])
    swapped = replace(images, labels=[1 - label for label in images.labels])
    for wrong in (others, moved, renamed, swapped, images.take(list(range(23)))):
        with pytest.raises(UserError, match="labels of other images"):
            open_token_labels(labels, wrong)
    shutil.copytree(photos, tmp_path / "copy")
    assert digest_of(load_split(tmp_path / "copy", "train")) == digest_of(images)
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="no token labels here"):
            open_token_labels(path, images)
    with pytest.raises(UserError, match="another teacher"):
        label(photos, labels, weights, top=1)
    tensors = torch.load(weights)
    tensors["fc.bias"] += 1e-3
    torch.save(tensors, tmp_path / "trained on.pth")
    with pytest.raises(UserError, match="another teacher"):
        label(photos, labels, tmp_path / "trained on.pth")


def test_a_glmix_checkpoint_teaches(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    (data / "train" / "red_thing" / "text.jpg").write_text("not an image")
    model = create_model("glnet_pico", num_classes=3)
    image = {
        "input_size": (3, 64, 64),
        "mean": (0.5,) * 3,
        "std": (0.2,) * 3,
        "interpolation": "bicubic",
        "crop_pct": 1,
    }
    classes = ["red_thing", "other", "blue_thing"]
    write_checkpoint(
        tmp_path / "t.safetensors", Checkpoint(model.state_dict(), "glnet_pico", {}, classes, classes, image)
    )
    label_tokens(str(tmp_path / "t.safetensors"), str(data), str(tmp_path / "out"), workers=0, top=5)
    assert "skipped 1 unusable" in capsys.readouterr().out
    images = load_split(data, "train")
    tokens = open_token_labels(tmp_path / "out", images)
    assert tokens.grid == (2, 2)
    assert tokens.top == 2
    transform = TokenTransform(TrainOptions(image_size=64), PLAIN, (2, 2), 2)
    prepared = prepare_tokens(images, tokens, transform, seed=0)
    bad = images.files.index("train/red_thing/text.jpg")
    pair, _, skipped = prepared[0, bad, 0]
    assert pair is not None
    assert "text.jpg" in skipped[0]
    # by name: red is the teacher's first class and the data's second, and the two kept sum to 1
    read = model.eval().forward_features
    with torch.inference_mode():
        pixels = torch.from_numpy(np.array(images.read(0).resize((64, 64), Image.Resampling.BICUBIC))).permute(2, 0, 1)
        logits = model.head.fc(read((pixels[None] / 255 - 0.5) / 0.2).permute(0, 2, 3, 1))[0][..., [2, 0]]
    assert torch.allclose(dense_target(tokens.read(0), WHOLE, (2, 2), 2), logits.softmax(-1), atol=2e-3)


def test_classes_by_name_or_index():
    imagenet = ImageNetInfo().label_names()
    assert class_columns("t", imagenet, 1000, ["n01443537", "n01440764"]) == [1, 0]
    assert class_columns("t", None, 2, ["cat", "dog"]) == [0, 1]
    for names, count in ((imagenet, 1000), (None, 3), (["dog", "emu"], 2)):
        with pytest.raises(UserError, match="cat"):
            class_columns("t", names, count, ["cat", "dog"])


@pytest.mark.parametrize(
    ("teacher", "more", "says"),
    [
        ("resnet_none", {}, "no such run folder, checkpoint or timm model"),
        ("test_resnet", {"weights": "none.pth"}, "no weights"),
        ("test_byobnet", {"weights": "{weights}"}, "no weights"),
        ("glnet_16g_tklb", {}, "no trained weights exist"),
        ("test_resnet", {"weights": "{weights}", "size": 32}, "single place"),
        ("test_resnet", {"top": 0}, "at least 1"),
    ],
)
def test_mistakes(teacher: str, more: dict, says: str, photos: Path, weights: Path, tmp_path: Path):
    more = {k: v.format(weights=weights) if isinstance(v, str) else v for k, v in more.items()}
    with pytest.raises(UserError, match=says) as caught:
        label_tokens(teacher, str(photos), str(tmp_path / "out"), workers=0, **more)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "side", "grid"), [("test_efficientnet", 96, 3), ("test_vit2", 160, 10)])
def test_kinds_of_teachers(name: str, side: int, grid: int):
    """A grid (B, H, W, C) and tokens with a prefix; a grid (B, C, H, W) is compared in numbers above."""
    teacher = DenseTeacher(name, timm.create_model(name, num_classes=4), [3, 0], side)
    scores = teacher.label(torch.randn(2, 3, side, side))
    assert scores.shape == (2, grid, grid, 2)
    assert teacher.grid == (grid, grid)
    assert torch.allclose(scores.sum(-1), torch.ones(2, grid, grid))


# ----------------------------------------------------------------------------------------------------------- transform


def encoded(scores: np.ndarray, cell: int) -> Image.Image:
    """An image whose red, green and blue are the scores of three classes, a square of `cell` pixels for each place."""
    return Image.fromarray(np.kron((255 * scores).round().astype(np.uint8), np.ones((cell, cell, 1), np.uint8)))


def places(image_CHW: torch.Tensor, grid: int) -> torch.Tensor:
    """Mean colour of each place of a grid over an image: what the image says that the dense target must be."""
    return F.adaptive_avg_pool2d(image_CHW, grid).permute(1, 2, 0)


@pytest.fixture(scope="module")
def three() -> tuple[np.ndarray, np.ndarray]:
    """A map of 8 x 8 places and three classes, all kept, as scores in the order of the classes."""
    indices, scores = random_map(8, 8, 3, 3)
    plain = np.zeros_like(scores)
    np.put_along_axis(plain, indices, scores, -1)
    return np.broadcast_to(np.arange(3), plain.shape).copy(), plain


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("crop", [(0, 0, 4, 4), (3, 2, 4, 4), (4, 4, 2, 2), (0, 0, 8, 8), (2, 0, 4, 8)], ids=str)
def test_a_map_goes_where_its_image_goes(crop: tuple[int, ...], flip: float, three):
    """Crops along the map's own lines: each place of the target is the mean colour of that place of the image."""
    transform = TokenTransform(TrainOptions(image_size=128, hflip=flip), PLAIN, (min(crop[2:]),) * 2, 3)
    transform.crop.get_params = lambda *_: tuple(16 * c for c in crop)
    image, dense = transform((encoded(three[1], 16), three))
    assert torch.allclose(dense.sum(-1), torch.ones(dense.shape[:2]))
    # enlarged pixels blend over the lines between places (bilinear), up to a tenth of a place
    enlarged = min(crop[2:]) < 8
    assert (places(image, dense.shape[0]) - dense).abs().max() < (0.06 if enlarged else 0.003)
    assert enlarged or crop[2] != crop[3] or flip or np.allclose(dense, three[1], atol=1e-6)


def test_random_crops_and_flips_fit_too():
    """Scores that grow linearly over image and map, so that any crop can be compared, all over."""
    rows = columns = (np.arange(256) + 0.5) / 256
    plane = np.stack(
        np.broadcast_arrays(0.2 + 0.3 * rows[:, None], 0.1 + 0.3 * columns, 0.7 - 0.3 * (rows[:, None] + columns)), -1
    )
    scores = plane.reshape(16, 16, 16, 16, 3).mean((1, 3)).astype(np.float32)
    tokens = np.broadcast_to(np.arange(3), scores.shape).copy(), scores
    transform = TokenTransform(TrainOptions(image_size=96, crop_scale=0.1, random_interpolation=True), PLAIN, (3, 3), 3)
    boxes = set()
    for seed in range(20):
        with seeded(seed):
            image, dense = transform((Image.fromarray((255 * plane).round().astype(np.uint8)), tokens))
        assert (places(image, 3) - dense).abs().max() < 0.01
        boxes.add(tuple(dense.flatten().tolist()))
        with seeded(seed):
            again = transform((Image.fromarray((255 * plane).round().astype(np.uint8)), tokens))
        assert torch.equal(again[0], image)
        assert torch.equal(again[1], dense)
    assert len(boxes) == 20


def test_what_is_not_kept_is_spread_evenly():
    indices, scores = random_map(7, 7, 50, 5)
    target = dense_target((indices, scores), WHOLE, (7, 7), 50)
    assert torch.allclose(target.sum(-1), torch.ones(7, 7), atol=1e-5)
    rest = (1 - scores.sum(-1, keepdims=True)) / 50
    assert np.allclose(np.take_along_axis(target.numpy(), indices, -1), scores + rest, atol=1e-6)
    assert torch.allclose(target.amin(-1), torch.from_numpy(rest)[..., 0], atol=1e-6)


def test_policies_change_colours_alone(three):
    transform = TokenTransform(TrainOptions(image_size=64, auto_augment="rand-m9-mstd0.5-inc1"), PLAIN, (2, 2), 3)
    names = {op.name for op in transform.colours.transforms[0].ops}
    assert len(names) == 10
    assert "Equalize" in names
    assert not any(n.startswith(("Shear", "Tra", "Rot")) for n in names)
    transform((encoded(three[1], 8), three))
    with pytest.raises(UserError, match="rand-"):
        TokenTransform(TrainOptions(auto_augment="original"), PLAIN, (2, 2), 3)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture
def options(photos: Path, labels: Path, tmp_path: Path) -> TrainOptions:
    return TrainOptions(
        data=str(photos),
        out=str(tmp_path / "run"),
        token_labels=str(labels),
        model_args={"token_labeling": True},
        image_size=64,
        batch_size=8,
        epochs=2,
        mixup=0,
        cutmix=0,
        drop_path=0,
        workers=0,
        precision="fp32",
    )


def test_training_from_the_command_line(photos: Path, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Growing images, a moving average, and 6 steps of Lightning's trainer; cut and gone on with, the same weights."""
    given = "--batch-size 8 --mixup 0 --cutmix 0 --workers 0 --precision fp32"
    given += " --image-size 64 --start-size 32 --ema 0.9 --drop-path 0.1 --random-interpolation --epochs 2"
    given += f" --data {photos} --token-labels {labels} --model_args"
    command = ["train", *given.split(), "{token_labeling: true}"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    whole = read_checkpoint(tmp_path / "run" / "last.safetensors")
    fresh = create_model("glnet_pico", num_classes=2, token_labeling=True).state_dict()
    assert whole.info["epoch"] == 2
    assert whole.state_dict.keys() == fresh.keys()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenLabeler, "on_validation_epoch_end", lambda self: 1 // 0 if self.current_epoch else None)
        with pytest.raises(ZeroDivisionError):
            main([*command, "--out", str(tmp_path / "cut")])
    assert main([*command, "--out", str(tmp_path / "cut"), "--resume"]) == 0, capsys.readouterr().err
    again = read_checkpoint(tmp_path / "cut" / "last.safetensors").state_dict
    assert all(torch.equal(again[k], v) for k, v in whole.state_dict.items())


def test_a_few_images_are_learned(options: TrainOptions):
    task, (loader, _) = prepare(replace(options, crop_scale=1.0, hflip=0.0, ema=0))
    batch = next(iter(loader))
    batch.dense = F.one_hot(torch.arange(32).reshape(8, 2, 2) % 2, 2).float()  # the left half and the right half differ
    batch.dense[::2] = batch.dense[::2].flip(2)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=2e-3)
    losses = []
    for step in range(25):
        with seeded(step):
            loss = task.loss_of(batch.images, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5]), losses


def test_the_loss_is_that_of_the_formula(options: TrainOptions, monkeypatch: pytest.MonkeyPatch):
    task, (loader, _) = prepare(options)
    batch = next(iter(loader))
    assert isinstance(batch, TokenBatch)
    assert batch.dense.shape == (8, 2, 2, 2)
    box = (0, 1, 2, 2)
    monkeypatch.setattr("glmix.tasks.token_labeling.random_box", lambda *_: box)
    logits, places = task.model.forward_mixtoken(batch.images, box)
    classes = (batch.dense.mean((1, 2)) + batch.dense.mean((1, 2)).flip(0)) / 2
    expected = -(classes * logits.log_softmax(-1)).sum(-1).mean()
    expected += 0.5 * -(batch.dense.flatten(1, 2) * places.log_softmax(-1)).sum(-1).mean()
    assert task.loss_of(batch.images, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_box_and_the_targets_agree():
    """A target is the mean over the places that the mixed image is made of, where those of an image are alike."""
    rng = np.random.default_rng(0)
    areas = set()
    for seed in range(200):
        with seeded(seed):
            top, left, bottom, right = box = random_box(7, 7)
        assert 0 <= top <= bottom <= 7
        assert 0 <= left <= right <= 7
        even = torch.from_numpy(rng.dirichlet(np.ones(5), 6)).float()[:, None, None].repeat(1, 7, 7, 1)
        mixed = even.clone()
        mixed[:, top:bottom, left:right] = even.flip(0)[:, top:bottom, left:right]
        assert torch.allclose(mixed_targets(even, box), mixed.mean((1, 2)), atol=1e-6)
        areas.add((bottom - top) * (right - left))
    assert len(areas) > 8
    assert min(areas) == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_args": {}}, "_tklb"),
        ({"mixup": 0.2}, "mixup and cutmix to 0"),
        ({"image_size": 80}, "multiple of 32"),
        ({"token_labels": "none"}, "none: no token labels here"),
        ({"data": "scenes"}, "labels of other images"),
    ],
    ids=str,
)
def test_mistakes_of_training(change: dict, says: str, options: TrainOptions):
    with pytest.raises(UserError, match=says):
        prepare(replace(options, **change))


def test_batches_of_nothing_usable():
    batch = collate_tokens([(None, -1, ["a: empty file"])]).to("cpu")
    assert (len(batch.labels), len(batch.dense), batch.skipped) == (0, 0, ["a: empty file"])
