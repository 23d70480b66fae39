"""What is there stays: sources, cards and checkpoints are not written over, a new classifier is new, dense checkpoints embed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import mistake, output
from PIL import Image

from glmix.data.prepare import Preparation
from glmix.models import create_model, load_body
from glmix.models.description import Description
from glmix.models.heads import with_head
from glmix.models.weights import write_checkpoint

SMALL = {"dims": (32, 32, 64, 64), "depths": (1, 1, 1, 1), "slot_grid": (2, 2)}


@pytest.fixture
def segmenter(tmp_path: Path) -> Path:
    """An untrained one of two classes, that sees pictures at their own aspect."""
    head = {"name": "semantic-fpn", "head_channels": 32}
    model = with_head(timm.create_model("glnet_pico", num_classes=0, **SMALL), head, 2)
    about = Description("segment", "glnet_pico", model_args=SMALL, classes=["a", "b"], names=["a", "b"], head=head)
    about = replace(about, preparation=Preparation(size=(64, 64), resize="short"))
    return write_checkpoint(tmp_path / "segmenter.safetensors", about, model.state_dict())


def test_features_of_a_dense_checkpoint_are_pooled(segmenter: Path, photos: Path, tmp_path: Path, capsys):
    for number, size in enumerate(((90, 50), (50, 90), (64, 64))):
        Image.new("RGB", size, "green").save(tmp_path / f"{number}.png")
    pictures = [tmp_path / f"{number}.png" for number in range(3)]
    output(capsys, "embed", *pictures, "--checkpoint", segmenter, "--out", tmp_path / "a.npz")
    found = np.load(tmp_path / "a.npz")["features"]
    assert found.shape == (3, 64) and np.ptp(found, axis=0).max() < 1e-5  # green is green at any aspect
    for kind in ("knn", "linear"):
        scores = json.loads(output(capsys, "eval", "--checkpoint", segmenter, "--data", photos, f"--{kind}", "--json"))
        assert scores["images"] == 8
    said = mistake(capsys, "label-tokens", "--teacher", segmenter, "--data", photos, "--out", tmp_path / "labels")
    assert "a teacher is a classifier" in said and not (tmp_path / "labels").exists()


def test_a_new_classifier_is_not_the_one_that_the_body_knows(tmp_path: Path):
    def drawn() -> torch.nn.Module:
        torch.manual_seed(0)
        return create_model("glnet_pico", num_classes=3, **SMALL)

    body = drawn()
    about = Description("classify", "glnet_pico", model_args=SMALL, classes=["a", "b", "c"], names=["a", "b", "c"])
    write_checkpoint(tmp_path / "body.safetensors", about, body.state_dict())
    heads = []
    for _ in range(2):
        model = drawn()
        assert load_body(model, tmp_path / "body.safetensors", ["d", "e", "f"]) == "classifier replaced: other classes"
        heads.append(model.get_classifier().weight)
    known = body.get_classifier().weight
    assert torch.equal(*heads)  # of one seed and body: the same
    assert torch.equal(
        heads[0].flatten().sort()[0], known.flatten().sort()[0]
    )  # drawn from what it was to be drawn from
    assert torch.cosine_similarity(heads[0], known).abs().max() < 0.5


def test_what_is_read_is_not_written_over(run: Path, photos: Path, tmp_path: Path, capsys):
    table = tmp_path / "list.csv"
    table.write_text(f"path,label\n{next(photos.rglob('*.png')).resolve()},blue_thing\n")
    text = table.read_text()
    assert "one of the sources" in mistake(capsys, "predict", table, "--checkpoint", run, "--out", table)
    assert table.read_text() == text
    own = tmp_path / "own.safetensors"
    output(capsys, "convert", run, own)
    size = own.stat().st_size
    assert "the source itself" in mistake(capsys, "convert", own, own, "--half")
    assert own.stat().st_size == size


def test_an_edited_card_stays(run: Path, tmp_path: Path, capsys):
    output(capsys, "convert", "--to", "hub", run, tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text("utf-8")
    output(capsys, "convert", "--to", "hub", run, tmp_path / "hub")
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    (tmp_path / "hub" / "README.md").write_text("mine")
    output(capsys, "convert", "--to", "hub", run, tmp_path / "hub")
    assert (tmp_path / "hub" / "README.md").read_text("utf-8") == "mine"
    assert (tmp_path / "hub" / "new-README.md").read_text("utf-8") == card


@pytest.mark.parametrize(
    "command",
    [
        "eval --data DATA --report FILE",
        "train --data DATA --out FILE",
        "label-tokens --teacher glnet_pico --data DATA --out FILE",
        "explain PICTURE --out FILE",
        "segment --weak PICTURE --out FILE",
        "bench --out FILE",
    ],
)
def test_a_file_where_a_folder_is_wanted(command: str, photos: Path, tmp_path: Path, capsys):
    file = tmp_path / "own.csv"
    file.write_text("mine")
    known = {"DATA": photos, "FILE": file, "PICTURE": next(photos.rglob("*.png"))}
    said = mistake(capsys, *(known.get(word, word) for word in command.split()))
    assert "a file; --" in said and "is a folder" in said
    assert file.read_text() == "mine"


def test_said_before_anything_is_drawn(photos: Path, tmp_path: Path, capsys):
    picture = next(photos.rglob("*.png"))
    assert "--slot: no slot 99; this block has 0 to 48" in mistake(
        capsys, "explain", picture, "--slot", 99, "--out", tmp_path / "o"
    )
    assert not (tmp_path / "o").exists()
    assert "leave it out" in mistake(
        capsys, "segment", "--weak", picture, "--labels", "golf ball", "--top", 2, "--out", tmp_path / "o"
    )
    said = mistake(capsys, "predict", picture, "--checkpoint", picture)
    assert "no readable checkpoint" in said
