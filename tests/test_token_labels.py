"""Token labels: written by a teacher, read with the images they belong to, and learned from."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from reference import FOLDER
from timm.data import ImageNetInfo

from glmix.cli import main
from glmix.commands.label_tokens import label_tokens
from glmix.data.loading import Batch, Prepared, seeded, stack
from glmix.data.prepare import Augmentation, Preparation
from glmix.data.samples import Sample, Skipped
from glmix.data.sources import open_split
from glmix.data.token_labels import PairedTargets, TokenLabels, TokenTransform, open_token_labels, token_targets
from glmix.errors import UserError
from glmix.models import GLNet, create_model, load
from glmix.models.description import Description
from glmix.models.teacher import DenseTeacher, class_columns, load_teacher
from glmix.models.weights import read_checkpoint, write_checkpoint
from glmix.tasks import labelling
from glmix.tasks.token_label import TOKEN_LABEL, TokenLabelOptions, mixed_targets, random_box
from glmix.training.module import Trained
from glmix.training.run import prepare

PLAIN = Preparation(interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1))  # tensors are the pixels / 255
WHOLE = 0.0, 0.0, 1.0, 1.0
POLICY = "rand-m9-mstd0.5-inc1"


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
        patch.setattr(labelling, "SHARD", 10)
        label(photos, out, weights)
    return out


def label(photos: Path, out: Path, weights: Path, **more) -> None:
    label_tokens("test_resnet", str(photos), str(out), size=96, weights=str(weights), workers=0, **more)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def random_map(rows: int, columns: int, classes: int, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Class indices and scores (top, rows, columns), best first; the scores of all classes sum to 1 at each place."""
    rng = np.random.default_rng(0)
    scores = -np.sort(-rng.dirichlet(np.ones(classes), (rows, columns)), -1)
    order = rng.permuted(np.tile(np.arange(classes), (rows, columns, 1)), axis=-1)
    return np.moveaxis(order[..., :top], -1, 0), np.moveaxis(scores[..., :top], -1, 0).astype(np.float32)


def targets_of(tokens, box=WHOLE, grid=(1, 1), classes=3, smoothing=0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_targets` of one image: (classes) and (rows, columns, classes)."""
    indices, scores = (torch.from_numpy(np.ascontiguousarray(array))[None] for array in tokens)
    whole, dense = token_targets(indices, scores, torch.tensor([box]), grid, classes, smoothing)
    return whole[0], dense[0]


def scores_in(target: torch.Tensor, total: float = 1.0) -> torch.Tensor:
    """The scores that a target (..., classes) is the softmax of, if they sum to `total`."""
    logs = target.log()
    return logs - logs.mean(-1, keepdim=True) + total / target.shape[-1]


# --------------------------------------------------------------------------------------------------------- the command


def test_labels_are_what_the_teacher_sees(photos: Path, labels: Path, weights: Path):
    images = open_split(photos, "train")
    tokens = open_token_labels(labels, images)
    assert (tokens.grid, tokens.top, tokens.images, len(tokens.shards)) == ((3, 3), 2, 24, 3)
    model, _, preparation = load_teacher("test_resnet", str(weights))
    for index in (0, 9, 10, 23):
        image = images.read(index).image.resize((96, 96), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (preparation.mean, preparation.std))
        with torch.inference_mode():
            grid = model.eval().forward_features(
                ((pixels - mean) / std)[None]
            )  # what the command must do, without its means
            logits = torch.einsum("bchw,kc->bhwk", grid, model.fc.weight) + model.fc.bias
        stored = torch.zeros(2, 3, 3).scatter(0, *(torch.from_numpy(array) for array in tokens.read(index)))
        assert torch.allclose(stored.permute(1, 2, 0), logits[0], rtol=2e-3, atol=2e-3)
        dense = targets_of(tokens.read(index), WHOLE, (3, 3), 2)[1]
        assert torch.allclose(dense, logits[0].softmax(-1), atol=2e-3)


def test_a_killed_command_goes_on(photos: Path, labels: Path, weights: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(labelling, "SHARD", 10)
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
        open_token_labels(tmp_path, open_split(photos, "train"))
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
        open_token_labels(broken, open_split(photos, "train"))
    if damage == "no header":
        header.unlink()
        shutil.copy(labels / "labels.json", header)
    label(photos, broken, weights)
    assert content(broken) == content(labels)


def test_labels_of_other_data_are_refused(photos: Path, labels: Path, weights: Path, tmp_path: Path):
    images = open_split(photos, "train")
    others = open_split(photos, "val")
    moved = replace(images, pictures=replace(images.pictures.of, root=tmp_path / "elsewhere"))
    renamed = replace(images, classes=["a", "b"])
    swapped = replace(images, targets=[1 - label for label in images.targets])
    for wrong in (others, moved, renamed, swapped, images.take(list(range(23)))):
        with pytest.raises(UserError, match="labels of other images"):
            open_token_labels(labels, wrong)
    shutil.copytree(photos, tmp_path / "copy")
    assert open_split(tmp_path / "copy", "train").digest() == images.digest()
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
    preparation = Preparation((64, 64), mean=(0.5,) * 3, std=(0.2,) * 3, interpolation="bicubic", crop=1)
    classes = ["red_thing", "other", "blue_thing"]
    described = Description("classify", "glnet_pico", {}, classes, classes, preparation=preparation)
    write_checkpoint(tmp_path / "t.safetensors", described, model.state_dict())
    label_tokens(str(tmp_path / "t.safetensors"), str(data), str(tmp_path / "out"), workers=0, top=5)
    assert "skipped 1 unusable" in capsys.readouterr().out
    images = open_split(data, "train")
    tokens = open_token_labels(tmp_path / "out", images)
    assert tokens.grid == (2, 2)
    assert tokens.top == 2
    paired = replace(images, targets=PairedTargets(images.targets, tokens))
    prepared = Prepared(paired, TokenTransform(Augmentation(), 64, PLAIN), seed=0, replace_bad=True)
    bad = images.files.index("train/red_thing/text.jpg")
    sample, skipped = prepared[0, bad, 0]
    assert sample is not None
    assert "text.jpg" in skipped[0].name
    # by name: red is the teacher's first class and the data's second
    read = model.eval().forward_features
    with torch.inference_mode():
        pixels = torch.from_numpy(np.array(images.read(0).image.resize((64, 64), Image.Resampling.BICUBIC))).permute(
            2, 0, 1
        )
        logits = model.head.fc(read((pixels[None] / 255 - 0.5) / 0.2).permute(0, 2, 3, 1))[0][..., [2, 0]]
    assert torch.allclose(targets_of(tokens.read(0), WHOLE, (2, 2), 2)[1], logits.softmax(-1), atol=2e-3)


def test_probabilities_are_refused(photos: Path, labels: Path, weights: Path, tmp_path: Path):
    """Those of the first version, and those that someone wrote into this format; the message is a command."""
    images = open_split(photos, "train")
    old = tmp_path / "old"
    shutil.copytree(labels, old)
    header = json.loads((old / "labels.json").read_text())
    (old / "labels.json").write_text(json.dumps(header | {"format": "glmix token labels 1"}))
    with pytest.raises(UserError, match="probabilities.*: glmix label-tokens --teacher test_resnet --size 96 --data"):
        open_token_labels(old, images)
    with pytest.raises(UserError, match="probabilities"):
        label(photos, old, weights)
    new = tmp_path / "new"
    shutil.copytree(labels, new)
    tokens = open_token_labels(new, images)
    scores = np.random.default_rng(0).dirichlet(np.ones(2), (10, 3, 3))
    tokens.write(1, np.tile([0, 1], (10, 3, 3, 1)), scores)
    with pytest.raises(UserError, match="00001.*probabilities.*: glmix label-tokens --teacher test_resnet") as caught:
        open_token_labels(new, images)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------ published maps


@pytest.fixture
def published(photos: Path, labels: Path, tmp_path: Path) -> Path:
    """The labels once more, one file an image."""
    images, root = open_split(photos, "train"), tmp_path / "published"
    tokens = open_token_labels(labels, images)
    for i in range(len(images)):
        indices, scores = tokens.read(i)
        path = root / images.classes[images.targets[i]] / f"{Path(images.files[i]).stem}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.from_numpy(np.stack([scores, indices])).half(), path)
    return root


def test_published_maps_are_read_as_ours(published: Path, photos: Path, labels: Path):
    images = open_split(photos, "train")
    ours, theirs = open_token_labels(labels, images), open_token_labels(published, images)
    for index in range(len(images)):
        for one, other in zip(ours.read(index), theirs.read(index), strict=True):
            assert one.dtype == other.dtype
            assert np.array_equal(one, other)


def test_an_image_comes_with_its_own_map(photos: Path, tmp_path: Path):
    """Maps that say nothing but the class of their image: in every batch they say what the label says."""
    images, root = open_split(photos, "train"), tmp_path / "maps"
    for file, label in zip(images.files, images.targets, strict=True):
        path = root / images.classes[label] / f"{Path(file).stem}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.stack([torch.full((1, 4, 4), 9.0), torch.full((1, 4, 4), float(label))]).half(), path)
    options = TokenLabelOptions(
        data=str(photos), out=str(tmp_path), token_labels=str(root), model_args={"token_labeling": True}, image_size=64,
        batch_size=8, workers=0, auto_augment=POLICY,
    )  # fmt: skip
    _, (loader, _) = prepare(TOKEN_LABEL, options)
    for batch in loader:
        labels, indices, _, _ = batch.targets
        assert set(labels.tolist()) == {0, 1}
        assert (indices == labels[:, None, None, None]).all()


DAMAGES = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:400]), "damaged or cut"),
    "empty": (lambda path: path.write_bytes(b""), "damaged or cut"),
    "code": (lambda path: torch.save(Path("x"), path), "damaged or cut"),  # needs more than weights
    "a list": (lambda path: torch.save([1.0], path), "no label map"),
    "one plane": (lambda path: torch.save(torch.zeros(2, 3, 3), path), "no label map"),
    "not finite": (lambda path: torch.save(torch.full((2, 2, 3, 3), torch.nan).half(), path), "damaged"),
    "half a class": (lambda path: torch.save(torch.full((2, 2, 3, 3), 0.5).half() * 3, path), "damaged"),
    "another class": (lambda path: torch.save(torch.full((2, 2, 3, 3), 2.0).half(), path), "class 2.*2 classes"),
    "probabilities": (
        lambda path: torch.save(torch.stack([torch.full((2, 3, 3), 0.5), torch.zeros(2, 3, 3)]).half(), path),
        "probabilities",
    ),
    "another grid": (lambda path: torch.save(torch.ones(2, 2, 4, 4).half() * 9 % 8, path), "shape"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_published_maps(damage: str, published: Path, photos: Path):
    images = open_split(photos, "train")
    tokens = open_token_labels(published, images)
    harm, says = DAMAGES[damage]
    path = published / f"{images.classes[images.targets[5]]}/{Path(images.files[5]).stem}.pt"
    harm(path)
    with pytest.raises(UserError, match=says) as caught:
        tokens.read(5)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_published_maps_of_other_images(published: Path, photos: Path):
    images = open_split(photos, "train")
    others = replace(images, files=[str(Path(file).with_stem(f"other{i}")) for i, file in enumerate(images.files)])
    with pytest.raises(UserError, match="24 of 24 images have no label map"):
        open_token_labels(published, others)
    next((published / images.classes[0]).iterdir()).unlink()
    with pytest.raises(UserError, match="1 of 24 images have no label map"):
        open_token_labels(published, images)


@pytest.mark.parametrize("workers", [0, 1])
def test_training_on_published_maps(
    workers: int, published: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    command = (
        f"train --data {photos} --token-labels {published} --out {tmp_path / 'run'} --workers {workers} --epochs 1"
    )
    command += " --batch-size 8 --mixup 0 --cutmix 0 --image-size 64 --precision fp32 --limit-train-batches 1"
    command = [*command.split(), "--auto-augment", POLICY, "--model_args", "{token_labeling: true}"]
    if not workers:
        assert main(command) == 0, capsys.readouterr().err
        assert (tmp_path / "run" / "last.safetensors").exists()
        return
    for path in sorted(published.rglob("*.pt"))[1:]:  # whatever is drawn: a process that loads images finds it
        path.write_bytes(path.read_bytes()[:300])
    assert main(command) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert "damaged or cut" in said[-1]
    assert said[-1].startswith("glmix: ")
    assert not any("Traceback" in line for line in said)


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
    assert (scores.sum(-1) - 1).abs().min() > 1e-3  # no probabilities


# ----------------------------------------------------------------------------------------------------------- transform


def encoded(scores: np.ndarray, cell: int | tuple[int, int]) -> Image.Image:
    """An image whose red, green and blue are scores (rows, columns, 3), `cell` pixels (high, wide) for each place."""
    high, wide = (cell, cell) if isinstance(cell, int) else cell
    return Image.fromarray(np.kron((255 * scores).round().astype(np.uint8), np.ones((high, wide, 1), np.uint8)))


def places(image_CHW: torch.Tensor, grid: int) -> torch.Tensor:
    """Mean colour of each place of a grid over an image: what the image says that the dense target must be."""
    return F.adaptive_avg_pool2d(image_CHW, grid).permute(1, 2, 0)


@pytest.fixture(scope="module")
def three() -> tuple[np.ndarray, np.ndarray]:
    """A map of 8 x 8 places and three classes, all kept, as scores in the order of the classes."""
    indices, scores = random_map(8, 8, 3, 3)
    plain = np.zeros_like(scores)
    np.put_along_axis(plain, indices, scores, 0)
    return np.broadcast_to(np.arange(3)[:, None, None], plain.shape).copy(), plain


def picture(tokens: tuple[np.ndarray, np.ndarray], cell: int | tuple[int, int]) -> Image.Image:
    """`encoded` of a map in the order of the classes."""
    return encoded(np.moveaxis(tokens[1], 0, -1), cell)


def moved_by(transform: TokenTransform, image: Image.Image, tokens: tuple[np.ndarray, np.ndarray]) -> tuple:
    """Image, indices, scores and box that a transform makes of an image and its map."""
    sample = transform(Sample(image, (0, tokens)))
    return sample.image, *sample.target[1:]


@pytest.mark.parametrize("case", range(3))
def test_targets_are_the_published_ones(case: int):
    arrays = np.load(FOLDER / "token_targets.npz")
    indices, scores, boxes, expected = (
        torch.from_numpy(arrays[f"case{case}_{name}"]) for name in ("indices", "values", "box", "target")
    )
    whole, dense = token_targets(indices, scores, boxes, (7, 7), expected.shape[1], 0.1)
    assert (whole - expected[..., 0]).abs().max() < 1e-6
    assert (dense.flatten(1, 2).transpose(1, 2) - expected[..., 1:]).abs().max() < 1e-6
    swapped = token_targets(indices, scores, boxes[:, [1, 0, 3, 2]], (7, 7), expected.shape[1], 0.1)
    as_trained = torch.from_numpy(arrays[f"case{case}_target_as_trained"])
    assert (swapped[0] - as_trained[..., 0]).abs().max() < 1e-6  # what is known to differ, and that it does
    assert (whole - as_trained[..., 0]).abs().max() > 1e-3


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("crop", [(0, 0, 4, 4), (3, 2, 4, 4), (4, 4, 2, 2), (0, 0, 8, 8), (2, 0, 4, 8)], ids=str)
def test_a_map_goes_where_its_image_goes(crop: tuple[int, ...], flip: float, three):
    """Crops along the map's own lines: each place of the target is the mean colour of that place of the image."""
    transform = TokenTransform(Augmentation(hflip=flip), 128, PLAIN)
    transform.crop.get_params = lambda *_: tuple(16 * c for c in crop)
    image, indices, scores, box = moved_by(transform, picture(three, 16), three)
    grid = (min(crop[2:]),) * 2
    whole, dense = (
        target[0] for target in token_targets(indices[None], scores[None], box[None], grid, 3, smoothing=0.0)
    )
    assert torch.allclose(dense.sum(-1), torch.ones(dense.shape[:2]))
    # enlarged pixels blend over the lines between places (bilinear), up to a tenth of a place
    enlarged = min(crop[2:]) < 8
    assert (places(image, grid[0]) - scores_in(dense)).abs().max() < (0.06 if enlarged else 0.003)
    assert (places(image, 1)[0, 0] - scores_in(whole)).abs().max() < 0.01
    plain = torch.from_numpy(three[1]).permute(1, 2, 0)
    assert enlarged or crop[2] != crop[3] or flip or torch.allclose(scores_in(dense), plain, atol=1e-5)


def test_random_crops_and_flips_fit_too():
    """Scores that grow linearly over image and map, so that any crop can be compared, all over."""
    rows = columns = (np.arange(256) + 0.5) / 256
    plane = np.stack(
        np.broadcast_arrays(0.2 + 0.3 * rows[:, None], 0.1 + 0.3 * columns, 0.7 - 0.3 * (rows[:, None] + columns)), -1
    )
    scores = plane.reshape(16, 16, 16, 16, 3).mean((1, 3)).astype(np.float32).transpose(2, 0, 1)
    tokens = np.broadcast_to(np.arange(3)[:, None, None], scores.shape).copy(), scores
    photo = Image.fromarray((255 * plane).round().astype(np.uint8))
    transform = TokenTransform(Augmentation(crop_scale=0.1, random_interpolation=True), 96, PLAIN)
    boxes = set()
    for seed in range(20):
        with seeded(seed):
            sample = moved_by(transform, photo, tokens)
        image, *others = sample
        dense = token_targets(*(tensor[None] for tensor in others), (3, 3), 3, smoothing=0.0)[1][0]
        assert (places(image, 3) - scores_in(dense)).abs().max() < 0.01
        boxes.add(tuple(dense.flatten().tolist()))
        with seeded(seed):
            again = moved_by(transform, photo, tokens)
        assert all(torch.equal(one, other) for one, other in zip(sample, again, strict=True))
    assert len(boxes) == 20


def test_classes_that_are_not_kept_have_score_0():
    indices, scores = random_map(7, 7, 50, 5)
    whole, dense = targets_of((indices, 20 * scores), WHOLE, (7, 7), 50)
    assert torch.allclose(dense.sum(-1), torch.ones(7, 7), atol=1e-5)
    ratio = dense / dense.amin(-1, keepdim=True)  # e^score, and e^0 of the 45 others
    assert np.allclose(np.take_along_axis(ratio.log().numpy(), indices.transpose(1, 2, 0), -1),
                       20 * scores.transpose(1, 2, 0), atol=1e-4)  # fmt: skip
    assert ((ratio - 1).abs() < 1e-5).sum() == 45 * 49
    every = np.zeros((50, 7, 7))
    np.put_along_axis(every, indices, 20 * scores, 0)
    assert torch.allclose(whole.double(), torch.from_numpy(every.mean((1, 2))).softmax(-1), atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_smoothing(smoothing: float, three):
    for plain, smooth in zip(targets_of(three, grid=(4, 4)), targets_of(three, grid=(4, 4), smoothing=smoothing)):
        assert torch.allclose(smooth, plain * (1 - smoothing + smoothing / 3) + smoothing / 3, atol=1e-6)


GEOMETRIC = {"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}


def operations(policy: str) -> dict[str, object]:
    transform = TokenTransform(Augmentation(auto_augment=policy), 128, PLAIN)
    return {op.name: op for op in transform.augment.transforms[0].ops}


def test_a_policy_has_all_its_operations(three):
    assert len(operations(POLICY)) == 15
    assert operations(POLICY).keys() >= GEOMETRIC
    TokenTransform(Augmentation(auto_augment=POLICY), 64, PLAIN)(Sample(picture(three, 8), (0, three)))
    with pytest.raises(UserError, match="rand-"):
        TokenTransform(Augmentation(auto_augment="original"), 128, PLAIN)


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("cell", [(15, 15), (9, 21)], ids=str)
@pytest.mark.parametrize("name", operations(POLICY))
def test_every_operation_moves_image_and_map_alike(name: str, cell: tuple[int, int], flip: float):
    """Cell for cell: the pixel in the middle of each place says what must be there, black (score 0) from outside."""
    indices, scores = random_map(8, 8, 3, 3)
    scores = np.ceil(scores * 200) / 255  # as pixels have them, and none is black
    tokens = np.sort(indices, 0), np.take_along_axis(scores, np.argsort(indices, 0), 0).astype(np.float32)
    photo = picture(tokens, cell)
    transform = TokenTransform(Augmentation(auto_augment=POLICY, hflip=flip), 128, PLAIN)
    policy = transform.augment.transforms[0]
    policy.num_layers, policy.ops = 1, [op for op in policy.ops if op.name == name]
    policy.ops[0].prob, policy.ops[0].kwargs = 1.0, {"resample": Image.Resampling.NEAREST, "fillcolor": (0, 0, 0)}
    transform.crop.size = photo.height, photo.width
    transform.crop.get_params = lambda *_: (0, 0, photo.height, photo.width)
    before = torch.from_numpy(np.flip(tokens[1], 2).copy() if flip else tokens[1])
    moves = []
    for seed in range(6):
        with seeded(seed):
            image, *others = moved_by(transform, photo, tokens)
        moved_indices, moved_scores, box = (tensor[None] for tensor in others)
        if name in GEOMETRIC:
            expected = image[:, cell[0] // 2 :: cell[0], cell[1] // 2 :: cell[1]]
        else:
            expected = before
        assert torch.allclose(torch.zeros(3, 8, 8).scatter(0, moved_indices[0], moved_scores[0]), expected, atol=1e-6)
        dense = token_targets(moved_indices, moved_scores, box, (8, 8), 3, smoothing=0.0)[1][0]
        assert torch.allclose(dense, expected.softmax(0).permute(1, 2, 0), atol=1e-6)
        moves.append(not torch.allclose(expected, before))
    assert all(moves) if name in GEOMETRIC else not any(moves)


def test_moves_add_up(three):
    """Two operations move a map one after the other, and what left it does not come back."""
    transform = TokenTransform(Augmentation(auto_augment=POLICY, hflip=0.0), 128, PLAIN)
    policy = transform.augment.transforms[0]
    shift = next(op for op in policy.ops if op.name == "TranslateXRel")
    amounts = iter([0.25, -0.25])
    shift.prob, shift.magnitude_std, shift.level_fn = 1.0, 0, lambda *_: (next(amounts),)
    policy.num_layers, policy.ops = 2, [shift, shift]
    _, indices, scores, _ = moved_by(transform, picture(three, 8), three)
    expected = three[1].copy()
    expected[:, :, :2] = 0
    assert torch.equal(torch.zeros(3, 8, 8).scatter(0, indices, scores), torch.from_numpy(expected))


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GLNet]:
    """A teacher of three classes, two of which are those of `photos`, in another order."""
    torch.manual_seed(2)
    model = create_model("glnet_pico", num_classes=3).eval()
    torch.nn.init.normal_(model.head.fc.weight)
    classes = ["red_thing", "other", "blue_thing"]
    plain = Preparation((64, 64), interpolation="bilinear", crop=1)
    described = Description("classify", "glnet_pico", {}, classes, classes, preparation=plain)
    path = tmp_path_factory.mktemp("knowing") / "t.safetensors"
    return write_checkpoint(path, described, model.state_dict()), model


def test_the_mean_with_a_mirrored_image(knowing, photos: Path, tmp_path: Path):
    """Scores of an image and of its mirror image are averaged place by place; the labels know that they are."""
    path, model = knowing
    for out, flip in (("plain", False), ("both", True)):
        label_tokens(str(path), str(photos), str(tmp_path / out), workers=0, all_classes=True, flip=flip)
    tokens = open_token_labels(tmp_path / "both", open_split(photos, "train"))
    pixels = Preparation((64, 64), interpolation="bilinear", crop=1, resize="squash")(
        open_split(photos, "train").read(0).image
    )
    with torch.inference_mode():
        two = model.head.fc(model.forward_features(torch.stack([pixels, pixels.flip(2)])).permute(0, 2, 3, 1))
    mean = (two[0] + two[1].flip(1)) / 2
    stored = torch.zeros(3, 2, 2).scatter(0, *(torch.from_numpy(array) for array in tokens.read(0)))
    assert torch.allclose(stored.permute(1, 2, 0), mean, rtol=4e-3, atol=4e-3)
    with pytest.raises(UserError, match="another teacher"):
        label_tokens(str(path), str(photos), str(tmp_path / "plain"), workers=0, all_classes=True, flip=True)


def test_places_learn_all_of_the_teachers_classes(knowing, photos: Path, tmp_path: Path, capsys):
    """The dense head has the teacher's classes, the classifier the data's; logits are the classifier's alone."""
    label_tokens(str(knowing[0]), str(photos), str(tmp_path / "maps"), workers=0, all_classes=True)
    assert "top 3 of 3 classes" in (said := capsys.readouterr().out) and "dense_classes: 3" in said
    given = f"--image-size 64 --batch-size 8 --workers 0 --precision fp32 --epochs 1 --data {photos}"
    command = ["train", *given.split(), "--token-labels", str(tmp_path / "maps"), "--out", str(tmp_path / "run")]
    assert main([*command, "--model-args", "{token_labeling: true}"]) == 2
    assert "labels of 3 classes" in (said := capsys.readouterr().err) and "dense_classes: 3" in said
    assert main([*command, "--model-args", "{token_labeling: true, dense_classes: 3}"]) == 0
    model, description = load(tmp_path / "run")
    assert model.aux_head.out_features == 3 and description.classes == ["blue_thing", "red_thing"]
    images = torch.randn(2, 3, 64, 64)
    features = model.forward_features(images)
    assert torch.equal(model(images), model.head(features))


def test_a_crop_has_the_datas_classes_alone(three):
    """Of maps of three classes, a crop as a whole is one of the last two: softmax over these alone."""
    indices, scores, box = (
        torch.tensor([2, 0, 1]).reshape(1, 3, 1, 1),
        torch.tensor([3.0, 2.0, 1.0]).reshape(1, 3, 1, 1),
        torch.tensor([WHOLE]),
    )
    whole, dense = token_targets(indices, scores, box, (1, 1), 3, 0.1, [1, 2])
    chosen = torch.tensor([[1.0, 3.0]]).softmax(1) * (0.9 + 0.05) + 0.05
    assert torch.allclose(whole, chosen, atol=1e-6)
    everything = torch.tensor([2.0, 1.0, 3.0]).softmax(0) * (0.9 + 0.1 / 3) + 0.1 / 3
    assert torch.allclose(dense[0, 0, 0], everything, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture
def options(photos: Path, labels: Path, tmp_path: Path) -> TokenLabelOptions:
    return TokenLabelOptions(
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
    described, whole = read_checkpoint(tmp_path / "run" / "last.safetensors")
    fresh = create_model("glnet_pico", num_classes=2, token_labeling=True).state_dict()
    assert described.info["epoch"] == 2 and described.task == "token-label"
    assert whole.keys() == fresh.keys()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trained, "on_validation_epoch_end", lambda self: 1 // 0 if self.current_epoch else None)
        with pytest.raises(ZeroDivisionError):
            main([*command, "--out", str(tmp_path / "cut")])
    assert main([*command, "--out", str(tmp_path / "cut"), "--resume"]) == 0, capsys.readouterr().err
    again = read_checkpoint(tmp_path / "cut" / "last.safetensors")[1]
    assert all(torch.equal(again[k], v) for k, v in whole.items())


def test_a_few_images_are_learned(options: TokenLabelOptions):
    trained, (loader, _) = prepare(TOKEN_LABEL, replace(options, crop_scale=1.0, hflip=0.0, ema=0))
    batch = next(iter(loader))
    indices = (torch.arange(32).reshape(8, 1, 2, 2) % 2).clone()  # the left half and the right half differ
    indices[::2] = indices[::2].flip(3)
    targets = batch.targets[0], indices, torch.full((8, 1, 2, 2), 10.0), torch.tensor([WHOLE] * 8)
    batch = Batch(batch.images, targets, [])
    optimizer = torch.optim.AdamW(trained.model.parameters(), lr=2e-3)
    losses = []
    for step in range(25):
        with seeded(step):
            loss = trained.loss(trained.model, batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5]), losses


def test_the_loss_is_that_of_the_formula(options: TokenLabelOptions, monkeypatch: pytest.MonkeyPatch):
    trained, (loader, _) = prepare(TOKEN_LABEL, options)
    batch = next(iter(loader))
    _, indices, scores, boxes = batch.targets
    assert (indices.shape, scores.shape, boxes.shape) == ((8, 2, 3, 3), (8, 2, 3, 3), (8, 4))
    whole, dense = token_targets(indices, scores, boxes, (2, 2), 2, options.label_smoothing)
    box = (0, 1, 2, 2)
    monkeypatch.setattr("glmix.tasks.token_label.random_box", lambda *_: box)
    logits, places = trained.model.forward_mixtoken(batch.images, box)
    classes = (whole + whole.flip(0)) / 2
    expected = -(classes * logits.log_softmax(-1)).sum(-1).mean()
    expected += 0.5 * -(dense.flatten(1, 2) * places.log_softmax(-1)).sum(-1).mean()
    assert trained.loss(trained.model, batch, 0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_is_decayed(options: TokenLabelOptions):
    """Nothing of less than two dimensions, slot scales neither."""
    small = {"dims": [32, 64, 96, 128], "depths": [1, 1, 2, 1]}
    trained, _ = prepare(TOKEN_LABEL, replace(options, model="glnet_4g_tklb", model_args=small))
    decays = {
        id(p): group["weight_decay"]
        for group in trained.configure_optimizers()["optimizer"].param_groups
        for p in group["params"]
    }
    scales = [name for name, p in trained.model.named_parameters() if p.ndim == 0]
    assert len(scales) == 3
    for name, parameter in trained.model.named_parameters():
        assert decays[id(parameter)] == (0.05 if parameter.ndim > 1 else 0), name


def test_the_head_for_places_starts_as_any_linear_layer():
    model = create_model("glnet_4g_tklb", dims=[32, 64, 96, 256], depths=[1, 1, 1, 1])
    for _ in range(2):
        for values in (model.aux_head.weight, model.aux_head.bias):
            bound = 256**-0.5
            assert 0.95 * bound < values.abs().max() <= bound
            assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert model.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.1)
        model.reset_classifier(500)


def test_the_box_and_the_targets_agree():
    """A class target is the mean over the places that the mixed image is made of, where those of an image are alike."""
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
        assert torch.allclose(mixed_targets(even[:, 0, 0], box, (7, 7)), mixed.mean((1, 2)), atol=1e-6)
        areas.add((bottom - top) * (right - left))
    assert len(areas) > 8
    assert min(areas) == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_args": {}}, "_tklb"),
        ({"model": "resnet18", "model_args": {}}, "_tklb"),
        ({"mixup": 0.2}, "mixup and cutmix to 0"),
        ({"image_size": 80}, "multiple of 32"),
        ({"token_labels": "none"}, "none: no token labels here"),
        ({"data": "scenes"}, "labels of other images.*24 of 2 classes there, .* of 8 here"),
    ],
    ids=str,
)
def test_mistakes_of_training(change: dict, says: str, options: TokenLabelOptions):
    with pytest.raises((UserError, ValueError), match=says):
        prepare(TOKEN_LABEL, replace(options, **change))


def test_batches_of_nothing_usable():
    batch = stack([(None, [Skipped("a", "empty file")])]).to("cpu")
    assert (len(batch), len(batch.targets), batch.skipped) == (0, 0, [("a", "empty file")])
