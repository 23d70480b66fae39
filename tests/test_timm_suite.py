"""timm's own model tests (tests/test_models.py of its source distribution, of the installed version) on our variants."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm

import glmix
from glmix.models.glnet import MODEL_NAMES

TESTS = Path(__file__).parent
CACHE = TESTS.parent / ".cache" / "timm"
# forward, backward, configuration, TorchScript, features (x3), pruning, FX (forward, backward, scripted)
PER_VARIANT = 11
# of variants with weights in the package, also: loading them, whole and as features
PER_WEIGHTS = 2


@pytest.fixture(scope="session")
def timm_tests() -> Path:
    """timm's test_models.py, unpacked without the package beside it: the installed timm is what is tested."""
    folder = CACHE / f"timm-{timm.__version__}"
    tests = folder / "tests" / "test_models.py"
    if not tests.is_file():
        # one command, so that nothing but pip's own configuration says where packages come from
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "timm"]
        command += [f"timm=={timm.__version__}", "-d", str(CACHE)]
        pip = subprocess.run(command, capture_output=True, text=True)
        archives = list(CACHE.glob(f"timm-{timm.__version__}.tar.gz"))
        if not archives:
            pytest.fail(
                f"pip gave no source distribution of timm {timm.__version__}: {pip.stderr[-500:]}", pytrace=False
            )
        with tarfile.open(archives[0]) as archive:
            for name in ("tests/test_models.py", "pyproject.toml"):
                source = archive.extractfile(f"timm-{timm.__version__}/{name}")
                assert source is not None
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(source.read())
    return tests


def run_timm(tests: Path, variants: list[str]) -> None:
    """Run every test of timm that names one of `variants`; fails unless all of them were found and passed."""
    # an id ends with the name, or goes on with a tag, so that glnet_stl is not glnet_stl_paramslot
    names = " or ".join(f"{variant}] or {variant}." for variant in variants)
    # timm is imported before pytest adds the folder of its tests to the path
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "timm_plugin",
        "-p",
        "no:cacheprovider",
        "-q",
        "-k",
        names,
        tests.name,
    ]
    places = [str(TESTS), str(Path(glmix.__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run(command, cwd=tests.parent, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    assert done.returncode == 0, "\n".join(failures or lines[-30:])
    passed = re.search(r"(\d+) passed", lines[-1])
    assert passed is not None, lines[-1]
    with_weights = sum(map(timm.is_model_pretrained, variants))
    assert int(passed[1]) == PER_VARIANT * len(variants) + PER_WEIGHTS * with_weights, lines[-1]
    assert "skipped" not in lines[-1]


def test_two_variants(timm_tests: Path) -> None:
    run_timm(timm_tests, ["glnet_pico", "glnet_stl"])


@pytest.mark.slow
def test_all_variants(timm_tests: Path) -> None:
    run_timm(timm_tests, list(MODEL_NAMES))
