"""`glmix embed`, and what frozen features are worth."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import mistake, output
from PIL import Image

import glmix
from glmix.cli import main
from glmix.data.images import read_image
from glmix.models import load
from glmix.use.features import regions_of


def test_pooled_features_are_those_of_the_model(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    output(capsys, "embed", photos / "val", "--checkpoint", run, "--out", tmp_path / "a.npz", "--batch-size", 3)
    found = np.load(tmp_path / "a.npz")
    model, described = load(run)
    assert found["features"].shape == (8, model.num_features) and found["features"].dtype == np.float32
    images = torch.stack([described.prepared(read_image(path)) for path in found["paths"].tolist()])
    with torch.no_grad():
        wanted = model.forward_head(model.forward_features(images), pre_logits=True)
        stage = model.forward_intermediates(images, indices=[2], intermediates_only=True)[0].mean((2, 3))
    assert torch.allclose(torch.from_numpy(found["features"]), wanted, atol=1e-5)
    output(capsys, "embed", photos / "val", "--checkpoint", run, "--out", tmp_path / "b.npz", "--layer", "stage2")
    assert torch.allclose(torch.from_numpy(np.load(tmp_path / "b.npz")["features"]), stage, atol=1e-5)


def test_parquet_has_the_same(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    import pyarrow.parquet as pq

    shutil.copytree(photos / "val", tmp_path / "val")
    (tmp_path / "val" / "blue_thing" / "1x.png").write_text("no image")
    for name in ("a.npz", "a.parquet"):
        assert main(["embed", str(tmp_path / "val"), "--checkpoint", str(run), "--out", str(tmp_path / name)]) == 1
        said = capsys.readouterr().out
        assert "8 images" in said and "1x.png: not an image" in said
    table = pq.read_table(tmp_path / "a.parquet")
    found = np.load(tmp_path / "a.npz")
    assert table["path"].to_pylist() == found["paths"].tolist()
    assert np.array_equal(np.array(table["features"].to_pylist(), np.float32), found["features"])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_slots_are_vectors_of_parts(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Of a picture that is red on the left and blue on the right, with the weights that ship."""
    import pyarrow.parquet as pq

    pixels = np.zeros((120, 240, 3), np.uint8)
    pixels[:, :120, 0] = pixels[:, 120:, 2] = 220
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for ending in ("npz", "parquet"):
        output(capsys, "embed", tmp_path / "a.png", "--slots", "--block", 0, "--out", tmp_path / f"a.{ending}")
    found = np.load(tmp_path / "a.npz")
    slots = glmix.create_model("glnet_pico_tklb", checkpoint="glnet_pico_tklb.imagenette").slot_mixers()[
        "stages.0.blocks.0"
    ]
    count = slots.seeds.slot_grid[0] * slots.seeds.slot_grid[1]
    assert found["features"].shape[:2] == (1, count) and found["boxes"].shape == (1, count, 4)
    assert found["areas"].sum() == pytest.approx(1)
    there = found["areas"][0] > 0
    assert np.isnan(found["boxes"][0][~there]).all()
    x, y, width, height = found["boxes"][0][there].T
    assert (
        (x >= 0).all() and (x + width <= 240.01).all() and (y + height <= 120.01).all() and (width * height > 0).all()
    )
    assert (found["areas"][0][there] * 240 * 120 <= width * height + 0.5).all()
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert [row["slot"] for row in rows] == list(range(count))
    assert rows[int(there.argmin())]["x"] is None or there.all()
    first = int(there.argmax())
    assert (rows[first]["x"], rows[first]["height"]) == (found["boxes"][0, first, 0], found["boxes"][0, first, 3])
    assert np.array_equal(np.array(rows[first]["features"], np.float32), found["features"][0, first])


def test_regions_of_slots():
    assignment = np.zeros((3, 2, 4))
    assignment[0], assignment[1, :, 3], assignment[2, 1, 0] = 0.5, 0.9, 0.8
    boxes, areas = regions_of(assignment)
    assert areas.tolist() == [5 / 8, 2 / 8, 1 / 8]
    assert boxes.tolist() == [[0, 0, 0.75, 1], [0.75, 0, 0.25, 1], [0, 0.5, 0.25, 0.5]]
    boxes, areas = regions_of(assignment * [[[1]], [[1]], [[0]]])
    assert areas[2] == 0 and np.isnan(boxes[2]).all()


@pytest.mark.parametrize(("words", "says"), [
    (["--out", "a.csv"], "there are .parquet, .npz"),
    (["--out", "a.npz", "--layer", "stage7"], "--layer stage7: there are head, stage0, stage1, stage2, stage3"),
    (["--out", "a.npz", "--slots", "--layer", "stage1"], "of no use with --slots"),
    (["--out", "a.npz", "--slots", "--block", 70], "GLMix blocks, counted from 0"),
], ids=lambda words: " ".join(map(str, words)) if isinstance(words, list) else "")  # fmt: skip
def test_mistakes(words: list, says: str, photos: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    assert says in mistake(capsys, "embed", photos, *words)


def test_what_frozen_features_are_worth(photos: Path, run: Path, capsys: pytest.CaptureFixture):
    """Red and blue are told apart by any network; labels that mean nothing are not."""
    command = ["eval", "--data", photos, "--checkpoint", run, "--knn", "--linear", "--json"]
    scores = json.loads(output(capsys, *command))
    assert scores == {"knn": 100, "linear": 100, "images": 8, "training_images": 24}
    assert "linear top-1 100.00 % on 8 images" in output(capsys, *command[:-2], "--linear")
    assert "leave out" in mistake(capsys, *command, "--shuffle-slots")


def test_neighbours_vote_by_likeness():
    """One near neighbour against two far ones."""
    from glmix.use.probes import Labelled, linear, nearest

    train = Labelled(np.array([[1, 0], [0, 1], [0.1, 1]], np.float32), np.array([0, 1, 1]), [])
    val = Labelled(np.array([[1, 0.3], [0.3, 1]], np.float32), np.array([0, 1]), [])
    assert nearest(train, val) == 100
    rng = np.random.default_rng(0)
    points = rng.normal(size=(200, 3)).astype(np.float32)
    halves = Labelled(points, (points[:, 1] > 0).astype(int), [])
    assert linear(halves, halves) > 90
