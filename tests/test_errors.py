"""The list of small errors that tests have to catch fits the code; slow: all of them are caught."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
ERRORS = yaml.safe_load((ROOT / "tests" / "errors.yaml").read_text("utf-8"))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error["error"])
def test_an_error_can_be_put_in_and_its_tests_exist(error: dict):
    text = (ROOT / "src" / "glmix" / error["file"]).read_text("utf-8")
    assert text.count(error["before"]) == 1
    compile(text.replace(error["before"], error["after"]), error["file"], "exec")
    for test in error["tests"]:
        file, _, name = test.partition("::")
        assert re.search(rf"^def {name or 'test_'}", (ROOT / file).read_text("utf-8"), re.M), test


def test_there_are_many_and_no_two_alike():
    assert len(ERRORS) >= 40
    assert len({(error["file"], error["after"], error["before"]) for error in ERRORS}) == len(ERRORS)


@pytest.mark.slow
def test_every_error_is_caught():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "errors.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
