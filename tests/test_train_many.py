"""scripts/train_many.py, without the GPU that it is for."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def many():
    spec = importlib.util.spec_from_file_location("train_many", ROOT / "scripts" / "train_many.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder, chance = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    for split, count in (("train", 34), ("val", 2)):
        for name in ("tench", "church"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = chance.integers(0, 255, (6, 7 + i % 3, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((180 + i, 160)).save(folder / split / name / f"{i}.png")
    return folder


def test_crops_are_what_pillow_cuts(many, photos):
    path = photos / "train" / "church" / "5.png"
    image, (height, width) = many.canvas(path)
    assert (height, width) == (160, 185)
    box = (20, 10, 120, 110)  # left, top, right, bottom
    across = torch.tensor([100.0, 0, 2 * box[0] + 100 - many.CANVAS])
    down = torch.tensor([0, 100.0, 2 * box[1] + 100 - many.CANVAS])
    crops = torch.stack([across, down])[None] / many.CANVAS
    found = many.cropped(image[None], crops, 64)[0].permute(1, 2, 0).numpy()
    there = Image.open(path).convert("RGB").crop(box).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.abs(found - np.asarray(there, np.float32)).mean() < 2
    mirrored = crops * torch.tensor([[[-1.0, 1, 1], [1, 1, 1]]])
    assert np.abs(many.cropped(image[None], mirrored, 64)[0].permute(1, 2, 0).numpy()[:, ::-1] - found).max() < 0.1


def test_random_crops_lie_within_their_images(many):
    sizes = torch.tensor([[160.0, 240.0], [200.0, 160.0]]).repeat(200, 1)
    crops = many.drawn_crops(sizes, 0.3, torch.Generator().manual_seed(0))
    corners = torch.tensor([[-1.0, -1, 1], [1, 1, 1]]).T
    places = (crops @ corners + 1) / 2 * many.CANVAS  # (N, x and y, two corners)
    assert places.min() > -0.01 and (places <= sizes.flip(1)[:, :, None] + 0.01).all()
    area = (places[..., 1] - places[..., 0]).abs().prod(1) / sizes.prod(1)
    assert 0.25 < area.min() < 0.4 and area.max() > 0.9
    assert 0.4 < (places[:, 0, 0] > places[:, 0, 1]).float().mean() < 0.6  # flipped


def test_rows_begin_alike_and_are_compared(many, photos, tmp_path, monkeypatch, capsys):
    jobs = ["plain:stages/all,none", "short:slots/any,49"]
    command = ["train_many.py", str(photos), "--out", str(tmp_path), "--seeds", "0", "--limit", "1", "--threads", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--jobs", *jobs])
    many.main()
    told = capsys.readouterr().out
    assert "plain stages, 40 epochs, all: " in told and "; over none " in told and "by grid 2:" in told
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["setting"], line["row"]) for line in lines] == [
        ("plain", "all"), ("plain", "none"), ("short", "any"), ("short", "49")
    ]  # fmt: skip
    first, second = (
        many.Learner(many.SETTINGS["plain"], "stages", row, 0, ["church", "tench"], "cpu").model.state_dict()
        for row in ("all", "none")
    )
    assert set(second) < set(first) and all(torch.equal(value, first[key]) for key, value in second.items())


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ("plan:stages", "'plan' is none of short, plain"),
        ("plain:stages/some", "no row 'some'"),
        ("teacher:stages", "needs --teacher"),
    ],
)
def test_mistakes(many, photos, monkeypatch, capsys, job, words):
    monkeypatch.setattr(sys, "argv", ["train_many.py", str(photos), "--jobs", job])
    with pytest.raises(SystemExit):
        many.main()
    assert words in capsys.readouterr().err


def test_no_results(many, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_many.py", "--report", str(tmp_path)])
    with pytest.raises(SystemExit):
        many.main()
    assert f"{tmp_path}: no results.jsonl is there" in capsys.readouterr().err
