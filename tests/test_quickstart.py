"""The quickstarts from end to end, and that their networks have learned shapes, not colours. Slow: some twenty minutes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_scenes import colour_accuracy

from glmix.data.scenes import scene_split

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    out = tmp_path / "quickstart"
    subprocess.run(["scripts/quickstart.sh", str(out)], cwd=ROOT, env=environment, check=True)
    assert len(list((out / "slots").glob("*.slots.png"))) == 4
    assert (out / "slots" / "report.html").stat().st_size > 100_000
    command = ["glmix", "eval", "--checkpoint", str(out / "run"), "--data", "scenes", "--json"]
    scores = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    colours = colour_accuracy(scene_split("train", size=64), scene_split("val", size=64))
    assert scores["top1"] >= 100 * colours + 25, f"{scores['top1']:.1f} %, from colours alone {colours:.1%}"
    assert scores["top1"] >= 70


@pytest.mark.slow
def test_quickstart_of_dense_tasks(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    out = tmp_path / "quickstart"
    subprocess.run(["scripts/quickstart_dense.sh", str(out)], cwd=ROOT, env=environment, check=True)
    assert len(list((out / "objects").glob("*.objects.png"))) == 8
    assert len(list((out / "classes").glob("*.classes.png"))) == 8
    assert list((out / "slots").glob("*.slots.png"))
    for part, figure, least in (("detector", "box_AP50", 0.8), ("segmenter", "miou", 85)):
        command = ["glmix", "eval", "--checkpoint", str(out / part), "--data", "scenes", "--json"]
        scores = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
        assert scores[figure] >= least, scores
