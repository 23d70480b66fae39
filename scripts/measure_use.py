"""Measurements of using a model, for a machine that does nothing else: imports, cuts, memory, speed beside timm's script.

Usage: measure_use.py imports
       measure_use.py kills FOLDER            (of images: killed three times and gone on with, is the file the same?)
       measure_use.py memory FOLDER           (peak of 400 images, and of all)
       measure_use.py speed FOLDER INFERENCE  (INFERENCE: inference.py of timm's repository)
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PYTHON = sys.executable
GLMIX = [PYTHON, "-m", "glmix.cli"]
BATCH, WORKERS = "64", "1"


def seconds(*command: str) -> float:
    begun = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    return time.monotonic() - begun


def in_turns(cases: dict[str, list[str]], rounds: int) -> dict[str, float]:
    """Medians of the seconds that commands take, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, command in cases.items():
            taken[name].append(seconds(*command))
    return {name: statistics.median(times) for name, times in taken.items()}


def imports() -> None:
    start = Path(__file__).resolve().parent.parent / "src" / "glmix_command.py"
    cases = {name: [PYTHON, "-c", f"import {name}"] for name in ("torch", "timm", "glmix")}
    found = in_turns(cases | {"glmix --help": [PYTHON, str(start), "--help"]}, 7)
    for name, time_ in found.items():
        print(f"{name:<14}{time_:6.2f} s")
    print(
        f"glmix is {found['glmix'] / found['timm']:.2f} x timm; --help {found['glmix --help'] / found['torch']:.2f} x torch"
    )


def kills(folder: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        whole, cut = Path(place) / "whole.csv", Path(place) / "cut.csv"
        command = [*GLMIX, "predict", folder, "--batch-size", BATCH, "--workers", WORKERS, "--out"]
        subprocess.run([*command, str(whole)], check=True)
        parts, killed = Path(place) / ".cut.csv.parts", 0
        while not cut.exists():
            before = sum(path.stat().st_size for path in parts.glob("*.jsonl"))
            process = subprocess.Popen([*command, str(cut)], start_new_session=True)
            while process.poll() is None:
                done = sum(path.stat().st_size for path in parts.glob("*.jsonl"))
                if killed < 3 and done > before + whole.stat().st_size / 6:
                    os.killpg(process.pid, signal.SIGKILL)
                    killed += 1
                    print(f"killed at {done} bytes")
                    break
                time.sleep(0.01)
            process.wait()
        print(
            f"killed {killed} times; the same file: {cut.read_bytes() == whole.read_bytes()}, {whole.stat().st_size} bytes"
        )


def memory(folder: str) -> None:
    images = sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())
    for count in (400, len(images)):
        with tempfile.TemporaryDirectory() as place:
            names = Path(place) / "names.txt"
            names.write_text(
                "\n".join(str(Path(image).resolve()) for image in images[:: max(1, len(images) // count)][:count])
            )
            code = (
                "import resource, sys; from glmix.cli import main; main(sys.argv[1:]);"
                "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
            )
            words = ["predict", str(names), "--batch-size", BATCH, "--workers", WORKERS, "--out", f"{place}/a.csv"]
            done = subprocess.run([PYTHON, "-c", code, *words], check=True, capture_output=True, text=True)
            print(f"{count} images: peak {int(done.stdout.split()[-1]) / 1e6:.3f} GB")


def speed(folder: str, inference: str) -> None:
    count = sum(path.is_file() for path in Path(folder).rglob("*"))
    with tempfile.TemporaryDirectory() as place:
        subprocess.run([*GLMIX, "convert", "--to", "hub", "glnet_pico_tklb.imagenette", f"{place}/hub"], check=True)
        theirs = "import glmix, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
        cases = {
            "glmix predict": [
                *GLMIX,
                "predict",
                folder,
                "--checkpoint",
                f"{place}/hub",
                "--batch-size",
                BATCH,
                "--workers",
                WORKERS,
                "--top",
                "5",
                "--out",
                f"{place}/a.csv",
            ],
            "inference.py": [
                PYTHON,
                "-c",
                theirs,
                inference,
                "--data-dir",
                folder,
                "--model",
                f"local-dir:{place}/hub",
                "--pretrained",
                "--device",
                "cpu",
                "-b",
                BATCH,
                "-j",
                WORKERS,
                "--topk",
                "5",
                "--results-dir",
                place,
                "--no-console-results",
                "--channels-last",
            ],
        }
        for name, taken in in_turns(cases, 3).items():
            print(f"{name:<14}{taken:7.1f} s  {count / taken:6.1f} images/s, with imports")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    {"imports": imports, "kills": kills, "memory": memory, "speed": speed}[sys.argv[1]](*sys.argv[2:])
