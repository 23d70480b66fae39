"""`glmix eval --report` and `--compare`: true figures, and files that can be looked at."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import mistake, output
from PIL import Image

from glmix.models import load
from glmix.models.weights import write_checkpoint
from glmix.use.reports import Answers, calibration_error, confusion, difference, interval, per_class


def answers(given: list, seen: list, sure: list | None = None) -> Answers:
    found = Answers()
    found.add(
        [str(i) for i in range(len(given))], np.array(given), np.array(seen), np.array(sure or [1.0] * len(given))
    )
    return found


def test_interval_is_wilsons():
    """By its formula for 8 of 10 at 95 %; from Brown, Cai and DasGupta (2001): 0.490 to 0.943."""
    low, high = interval(8, 10)
    assert (round(low, 1), round(high, 1)) == (49.0, 94.3)
    assert interval(10, 10)[1] == 100 and interval(0, 10)[0] == 0


def test_calibration_error():
    """Ten answers of probability 0.9 of which half are right, ten of 0.6 of which six are: (0.4 + 0) / 2."""
    given = [0] * 20
    seen = [0] * 5 + [1] * 5 + [0] * 6 + [1] * 4
    assert calibration_error(answers(given, seen, [0.9] * 10 + [0.6] * 10)) == pytest.approx(0.2, abs=1e-6)


def test_classes():
    found = answers([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 1])
    rows = per_class(found, ["a", "b", "c", "d"])
    assert rows[0] == {"class": "a", "images": 3, "predicted": 3, "precision": 66.67, "recall": 66.67, "f1": 66.67}
    assert rows[1] == {"class": "b", "images": 2, "predicted": 3, "precision": 33.33, "recall": 50, "f1": 40}
    assert rows[3] == {"class": "d", "images": 0, "predicted": 0, "precision": 0, "recall": 0, "f1": 0}
    assert confusion(found, 4).tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_differences():
    """McNemar's exact test of 2 against 8: twice the binomial tail, 2 * (1 + 10 + 45) / 1024."""
    first = np.array([True] * 2 + [False] * 8 + [True] * 90)
    second = np.array([False] * 2 + [True] * 8 + [True] * 90)
    found = difference(first, second)
    assert (found.images, found.first, found.second, found.first_alone, found.second_alone) == (100, 92, 98, 2, 8)
    assert found.p == pytest.approx(2 * 56 / 1024)
    assert found.low < 6 < found.high and found.high - 6 == pytest.approx(1.96 * 100 * ((0.1 - 0.06**2) / 100) ** 0.5)
    assert difference(first, first).p == 1


@pytest.fixture(scope="module")
def other(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's weights, which take every picture for the second class."""
    model, described = load(run)
    with torch.no_grad():
        model.head.fc.bias += torch.tensor([-50.0, 50.0])
    return write_checkpoint(tmp_path_factory.mktemp("other") / "b.safetensors", described, model.state_dict())


def test_a_report(other: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    command = ["eval", "--data", photos, "--checkpoint", other, "--workers", 0, "--report", tmp_path / "r"]
    assert "top-1 50.00 %" in output(capsys, *command)
    with open(tmp_path / "r" / "per_class.csv", encoding="utf-8") as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert (rows["blue thing"]["recall"], rows["red thing"]["recall"]) == ("0.0", "100.0")
    assert rows["red thing"]["precision"] == "50.0" and rows["red thing"]["predicted"] == "8"
    confused = (tmp_path / "r" / "confusion.csv").read_text("utf-8").splitlines()
    assert confused == ["is \\ taken for,blue thing,red thing", "blue thing,0,4", "red thing,0,4"]
    page = (tmp_path / "r" / "report.html").read_text("utf-8")
    assert "top-1 50.00 %" in page and "of 4 mistakes" in page and "50.00 points" in page
    low, high = interval(4, 8)
    assert f"{low:.2f} to {high:.2f} % of 8 images" in page
    assert len(re.findall(r"<img src=.data:image/png;base64,", page)) == 3 and "http" not in page.replace("http-", "")
    with Image.open(tmp_path / "r" / "mistakes.png") as sheet:
        red, _, blue = sheet.crop((8, 8, 64, 56)).resize((1, 1)).getpixel((0, 0))
    assert blue > red + 30


def test_a_comparison(run: Path, other: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    scores = json.loads(output(capsys, "eval", "--data", photos, "--checkpoint", run, "--json"))
    command = ["eval", "--data", photos, "--compare", run, other, "--report", tmp_path / "c", "--workers", 0]
    said = output(capsys, *command)
    assert f"top-1 {scores['top1']:.2f} % and 50.00 % on the same 8 images" in said and "McNemar" in said
    with open(tmp_path / "c" / "differences.csv", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["path", "is", str(run), str(other)]
    assert all(row[3] == "red thing" != row[2] for row in rows[1:])
    assert "comparison.html" in said and (tmp_path / "c" / "comparison.html").exists()
    found = json.loads(output(capsys, *command, "--json"))
    assert (found["images"], found["second"]) == (8, 50)


def test_classes_in_another_order_are_compared(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    model, described = load(run)
    described.classes, described.names = described.classes[::-1], described.names[::-1]
    tensors = model.state_dict()
    tensors |= {name: tensors[name].flip(0) for name in ("head.fc.weight", "head.fc.bias")}
    turned = write_checkpoint(tmp_path / "turned.safetensors", described, tensors)
    found = json.loads(output(capsys, "eval", "--data", photos, "--compare", run, turned, "--json"))
    assert found["first"] == found["second"] and found["first_alone"] == found["second_alone"] == 0


def test_what_cannot_be_compared(run: Path, photos: Path, capsys: pytest.CaptureFixture):
    said = mistake(capsys, "eval", "--data", photos, "--compare", run, "glnet_pico_tklb.imagenette")
    assert "of other classes" in said
