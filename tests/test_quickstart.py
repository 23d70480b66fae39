"""The quickstarts from end to end, and that their networks have learned shapes, not colours. Slow: some twenty minutes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_scenes import colour_accuracy

from glmix.data.scenes import scene_split

ROOT = Path(__file__).parent.parent


ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run(script: str, out: Path) -> Path:
    """What a script of the quickstarts leaves in `out`."""
    subprocess.run([f"scripts/{script}", str(out)], cwd=ROOT, env=ENVIRONMENT, check=True)
    return out


def scores_of(checkpoint: Path) -> dict[str, Any]:
    command = ["glmix", "eval", "--checkpoint", str(checkpoint), "--data", "scenes", "--json"]
    return json.loads(subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    out = run("quickstart.sh", tmp_path / "quickstart")
    assert len(list((out / "slots").glob("*.slots.png"))) == 4
    assert (out / "slots" / "report.html").stat().st_size > 100_000
    scores = scores_of(out / "run")
    colours = colour_accuracy(scene_split("train", size=64), scene_split("val", size=64))
    assert scores["top1"] >= 100 * colours + 25, f"{scores['top1']:.1f} %, from colours alone {colours:.1%}"
    assert scores["top1"] >= 70


@pytest.mark.slow
def test_quickstart_of_dense_tasks(tmp_path: Path) -> None:
    out = run("quickstart_dense.sh", tmp_path / "quickstart")
    assert len(list((out / "objects").glob("*.objects.png"))) == 8
    assert len(list((out / "classes").glob("*.classes.png"))) == 8
    assert list((out / "slots").glob("*.slots.png"))
    for part, figure, least in (("detector", "box_AP50", 0.8), ("segmenter", "miou", 85)):
        scores = scores_of(out / part)
        assert scores[figure] >= least, scores
