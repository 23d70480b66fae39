"""What the version before tasks wrote is read as ever: a run's folder, its resume point, its options.

`older/cut` is a run that was killed in its second epoch, `older/whole.safetensors` the last weights of the same run
undisturbed: 2 epochs of 4 batches of generated scenes, at 32 px.
"""

import json
import shutil
from pathlib import Path

import pytest
from helpers import mistake, output

from glmix.models import load
from glmix.models.weights import read_checkpoint
from glmix.tasks import options_of

OLDER = Path(__file__).parent / "older"


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    shutil.copytree(OLDER / "cut", tmp_path / "run")
    return tmp_path / "run"


def test_a_run_goes_on_to_the_weights_it_would_have_had(cut: Path, capsys: pytest.CaptureFixture):
    output(capsys, "train", "--resume", "--out", cut)
    begun, found, expected = (
        read_checkpoint(path)[1] for path in (OLDER / "cut", cut / "last_ema.safetensors", OLDER / "whole.safetensors")
    )
    assert found.keys() == expected.keys()
    # biases in front of a BatchNorm have no gradient but rounding, which processors do in different orders
    names = [
        n for n, v in expected.items() if v.is_floating_point() and not n.startswith("stem") and "downsample" not in n
    ]
    apart = sum(float((found[n] - expected[n]).square().sum()) for n in names)
    learned = sum(float((begun[n] - expected[n]).square().sum()) for n in names)
    assert apart < 1e-4 * learned
    rows = (cut / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "1", "2"]
    # that version kept the average alone, under the names that are now of the weights themselves
    assert {path.stem for path in cut.glob("*.safetensors")} == {"best", "best_ema", "last", "last_ema"}


def test_it_keeps_its_options_and_refuses_others(cut: Path, capsys: pytest.CaptureFixture):
    assert "was begun with lr 0.002, not 0.1" in mistake(capsys, "train", "--resume", "--out", cut, "--lr", 0.1)


def test_its_weights_are_a_classifier(cut: Path, capsys: pytest.CaptureFixture):
    description, _ = read_checkpoint(cut)
    assert (description.task, description.model, len(description.classes)) == ("classify", "glnet_pico", 8)
    assert description.preparation is not None and description.preparation.size == (32, 32)
    assert description.preparation.crop == 1.0
    scores = json.loads(output(capsys, "eval", "--checkpoint", cut, "--data", "scenes", "--limit", 16, "--json"))
    assert scores["images"] == 16
    model, _ = load(cut)
    assert model.slot_mixers()["stages.0.blocks.0"].seeds.slot_grid == (2, 3)


@pytest.mark.parametrize(("labels", "task"), [("", "classify"), ("maps", "token-label")])
def test_options_of_before_there_were_tasks(labels: str, task: str):
    options = options_of({"epochs": 3, "token_labels": labels, "dense_weight": 0.5, "mixup": 0.0, "cutmix": 0.0})
    assert (options.task, options.epochs) == (task, 3)
    assert getattr(options, "token_labels", "") == labels
