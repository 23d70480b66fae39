"""What several tests share."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a network; read when it is imported

import numpy as np
import pytest
import torch
from PIL import Image

import glmix  # noqa: F401  (registers the variants)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two class folders under train/ and val/: red and blue noise, 12 and 4 images each."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for channel, name in ((0, "red_thing"), (2, "blue_thing")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (48, 56, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of `glmix train` on `photos`."""
    from glmix.cli import main

    out = tmp_path_factory.mktemp("runs") / "run"
    options = "--epochs 2 --batch-size 8 --image-size 32 --workers 0 --precision fp32 --lr 1e-3 --seed 3".split()
    assert main(["train", "--data", str(photos), "--out", str(out), *options]) == 0
    return out


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.stats.get("skipped", []):
        terminalreporter.write_line(f"skipped: {report.nodeid}: {report.longrepr[2]}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With GLMIX_NO_SKIPS set, as in .ci/run, a test that was skipped is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("GLMIX_NO_SKIPS") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
