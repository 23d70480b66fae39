"""Installs the lowest versions that pyproject.toml states into an environment, and runs the tests that use them most.

Usage: lowest.py ENVIRONMENT
"""

import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = "test_golden test_load test_weights test_sources test_images test_commands test_resume test_predict test_embed"


def lowest() -> list[str]:
    """Requirements of the package and of training, each at its lowest version."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    names = ("dependencies", "train", "tables", "evaluate")
    parts = [re.search(rf"^{name} = \[(.*?)\]$", text, re.S | re.M) for name in names]
    assert all(parts)
    found = [line for part in parts if part for line in re.findall(r'"([^"]+>=[^"]+)"', part[1])]
    return [line.replace(">=", "==") for line in found]


def main(place: Path) -> None:
    venv.create(place, with_pip=True)
    programs = place / ("Scripts" if sys.platform == "win32" else "bin")
    others = ["pytest", "pytest-timeout", "hypothesis", "scikit-image", "pycocotools", "webdataset"]
    subprocess.run([programs / "pip", "install", "--quiet", *lowest(), *others], check=True)
    subprocess.run([programs / "pip", "install", "--quiet", "--no-deps", "-e", ROOT], check=True)
    files = [f"tests/{name}.py" for name in TESTS.split()]
    subprocess.run([programs / "python", "-m", "pytest", "-q", *files], cwd=ROOT, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
