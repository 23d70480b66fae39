"""Checks of a built wheel and sdist: what is in them, and what a fresh environment without extras does with the wheel.

Usage: check_package.py FOLDER [--install]
"""

import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

NEEDED = ("glmix_command.py", "glmix/cli.py", "glmix/py.typed", "glmix/slots/report.html", "glmix/shipped/README.md")
EXTRAS = {  # a command that needs each, and the name that it must tell
    "train": (["train", "--data", "scenes"], "lightning"),
    "tables": (["predict", "PHOTO", "--out", "a.parquet"], "pyarrow"),
    "evaluate": (["eval", "--data", "scenes", "--knn"], "sklearn"),
    "segment": (["slots", "--data", "scenes", "--limit", "1"], "skimage"),
    "export": (["export", "a.onnx"], "onnx"),
}


def main(folder: Path, install: bool) -> None:
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    inside = zipfile.ZipFile(wheel).namelist()
    missing = [name for name in NEEDED if name not in inside]
    weights = [name for name in inside if name.endswith(".safetensors")]
    others = [name for name in inside if not name.startswith(("glmix/", "glmix_command.py", "glmix-"))]
    assert not missing and weights and not others, (missing, weights, others)
    with tarfile.open(sdist) as tar:
        told = {name.partition("/")[2] for name in tar.getnames()}
    for name in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "src/glmix/cli.py",
        "tests/conftest.py",
        "docs/use.md",
    ):
        assert name in told, name
    ours = {f"src/{name}" for name in inside if not name.startswith("glmix-")}
    assert ours <= told, ours - told
    print(f"{wheel.name}: {len(inside)} files, {wheel.stat().st_size / 1e6:.1f} MB; {sdist.name}: {len(told)} files")
    if install:
        in_fresh_environment(wheel)


def in_fresh_environment(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        venv.create(place, with_pip=True)
        programs = Path(place) / ("Scripts" if sys.platform == "win32" else "bin")
        subprocess.run([programs / "pip", "install", "--quiet", "torch", "torchvision", wheel], check=True)

        def glmix(*arguments: str) -> subprocess.CompletedProcess:
            return subprocess.run([programs / "glmix", *arguments], cwd=place, capture_output=True, text=True)

        assert "doctor" in glmix("--help").stdout
        assert glmix("scenes", "--out", "photos", "--count", "2").returncode == 0
        photo = str(next((Path(place) / "photos").rglob("*.png")))
        assert glmix("predict", photo).returncode == 0
        for extra, (command, name) in EXTRAS.items():
            done = glmix(*[photo if word == "PHOTO" else word for word in command])
            assert done.returncode == 2 and f"glmix: {name}" in done.stderr and f"glmix[{extra}]" in done.stderr, done
            assert len(done.stderr.splitlines()) == 1, done.stderr
        print("works in a fresh environment, and tells what it lacks")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--install" in sys.argv)
