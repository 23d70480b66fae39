"""The quickstarts from end to end, and that their networks have learned shapes, not colours. Slow: some twenty minutes."""

import json
import os
import re
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


def test_what_the_quickstarts_need_is_installed_for_them() -> None:
    """By `make`, into an environment that has nothing else."""
    (installs,) = re.findall(r"install .*-e '\.\[(.*)\]'\n\ttouch \$@\n", (ROOT / "Makefile").read_text())
    assert set(installs.split(",")) == {"train", "detect"}


def test_a_training_that_fails_ends_the_quickstart_of_both(tmp_path: Path) -> None:
    (tmp_path / "glmix").write_text('#!/bin/sh\ncase "$*" in *scenes_detect*) echo no; exit 2;; esac\nexec sleep 60\n')
    (tmp_path / "glmix").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["scripts/quickstart_dense.sh", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "detector:  no" in done.stdout and "Measuring" not in done.stdout


@pytest.mark.slow
def test_quickstart_of_dense_tasks(tmp_path: Path) -> None:
    out = run("quickstart_dense.sh", tmp_path / "quickstart")
    assert len(list((out / "objects").glob("*.objects.png"))) == 8
    assert len(list((out / "classes").glob("*.classes.png"))) == 8
    assert list((out / "slots").glob("*.slots.png"))
    for part, figure, least in (("detector", "box_AP50", 0.75), ("segmenter", "miou", 85)):
        scores = scores_of(out / part)
        assert scores[figure] >= least, scores
