"""The quickstart from end to end, and that its network has learned shapes, not colours. Slow: some six minutes."""

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
