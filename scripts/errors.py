"""Puts the small errors of tests/errors.yaml into a copy of the code, one at a time: the tests named there must fail.

    python scripts/errors.py [WORD ...] [--jobs 2] [--list]

Words choose the errors whose names have one of them. The exit status is 1 where an error survives.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent


def listed() -> list[dict[str, Any]]:
    """The errors: name, file, what stands there, what is put in its place, and the tests that have to fail."""
    return yaml.safe_load((ROOT / "tests" / "errors.yaml").read_text("utf-8"))


def survives(error: dict[str, Any]) -> str:
    """Why an error is not caught; '' if a test fails by it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("src", "tests", "recipes"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / part, copy / part)
        path = copy / "src" / "glmix" / error["file"]
        text = path.read_text("utf-8")
        if text.count(error["before"]) != 1:
            return f"{error['file']} holds {text.count(error['before'])} times what the error replaces"
        path.write_text(text.replace(error["before"], error["after"]), "utf-8")
        environment = os.environ | {"PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *error["tests"]]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        if (done.returncode == 1 and " failed" in done.stdout) or " error" in done.stdout.splitlines()[-1]:
            return "" if "SyntaxError" not in done.stdout else "the error is no Python"
        return f"exit status {done.returncode}: {(done.stdout + done.stderr).strip().splitlines()[-1][:150]}"


def main() -> int:
    parser = argparse.ArgumentParser(description="which small errors do the tests not catch?")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args()
    errors = [e for e in listed() if not asked.words or any(word in e["error"] for word in asked.words)]
    if asked.list:
        print(*(error["error"] for error in errors), sep="\n")
        return 0
    left = []
    with ThreadPoolExecutor(asked.jobs) as pool:
        for error, reason in zip(errors, pool.map(survives, errors), strict=True):
            print(f"{'caught' if not reason else 'SURVIVES'}  {error['error']}  {reason}", flush=True)
            left += [error["error"]] if reason else []
    print(f"{len(errors) - len(left)} of {len(errors)} caught")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
