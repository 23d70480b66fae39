"""Measurements of using a model, for a machine that does nothing else: imports, cuts, memory, speed beside timm's script.

Usage: measure_use.py imports [ROUNDS]
       measure_use.py kills FOLDER            (of images: killed three times and gone on with, is the file the same?)
       measure_use.py memory FOLDER           (peak of 400 images, and of all)
       measure_use.py speed FOLDER [ROUNDS]   (beside the same by timm's functions, in turns)
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
BATCH, WORKERS, TOP = "64", "1", 5


def seconds(*command: str) -> tuple[float, float]:
    """By the clock, and of the processors; the latter is hardly longer where others use them too."""
    begun, before = time.monotonic(), os.times()
    subprocess.run(command, check=True, capture_output=True)
    after = os.times()
    busy = after.children_user + after.children_system - before.children_user - before.children_system
    return time.monotonic() - begun, busy


def in_turns(cases: dict[str, list[str]], rounds: int) -> dict[str, tuple[float, float]]:
    """Medians of the seconds that commands take, in turns; of both kinds."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, command in cases.items():
            taken[name].append(seconds(*command))
            print(f"{name}: {taken[name][-1][0]:.2f} s", file=sys.stderr, flush=True)
    return {name: tuple(map(statistics.median, zip(*times, strict=True))) for name, times in taken.items()}


def imports(rounds: str = "7") -> None:
    start = Path(__file__).resolve().parent.parent / "src" / "glmix_command.py"
    cases = {name: [PYTHON, "-c", f"import {name}"] for name in ("torch", "timm", "glmix")}
    found = in_turns(cases | {"glmix --help": [PYTHON, str(start), "--help"]}, int(rounds))
    for name, times in found.items():
        print(f"{name:<14}{times[0]:6.2f} s, {times[1]:6.2f} s of the processors")
    for kind, what in enumerate(("by the clock", "of the processors")):
        glmix, helped = found["glmix"][kind] / found["timm"][kind], found["glmix --help"][kind] / found["torch"][kind]
        print(f"{what}: glmix is {glmix:.2f} x timm; --help {helped:.2f} x torch")


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
                "print(*[resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)])"
            )
            words = ["predict", str(names), "--batch-size", BATCH, "--workers", WORKERS, "--out", f"{place}/a.csv"]
            done = subprocess.run([PYTHON, "-c", code, *words], check=True, capture_output=True, text=True)
            own, loading = (int(word) / 1e6 for word in done.stdout.split()[-2:])
            print(f"{count} images: peak {own:.3f} GB, of the loading process {loading:.3f} GB")


def speed(folder: str, rounds: str = "3") -> None:
    count = sum(path.is_file() for path in Path(folder).rglob("*"))
    with tempfile.TemporaryDirectory() as place:
        hub = f"{place}/hub"
        subprocess.run([*GLMIX, "convert", "--to", "hub", "glnet_pico_tklb.imagenette", hub], check=True)
        options = ["--checkpoint", hub, "--batch-size", BATCH, "--workers", WORKERS, "--top", str(TOP)]
        cases = {
            "glmix predict": [*GLMIX, "predict", folder, *options, "--out", f"{place}/a.csv"],
            "timm": [PYTHON, __file__, "by_timm", folder, hub, f"{place}/b.csv"],
        }
        for name, taken in in_turns(cases, int(rounds)).items():
            told = [f"{time_:7.1f} s {count / time_:6.1f} images/s" for time_ in taken]
            print(f"{name:<14}{told[0]} by the clock, {told[1]} of the processors, with imports")


def by_timm(folder: str, hub: str, out: str) -> None:
    """What inference.py of timm's repository does to a folder, by the same functions of timm: the best classes as CSV."""
    import numpy as np
    import pandas as pd
    import timm
    import torch
    from timm.data import (
        CustomDatasetInfo,
        DatasetInfoLabelMapper,
        create_dataset,
        create_loader,
        resolve_input_data_config,
    )

    import glmix  # noqa: F401  (registers the architecture)

    model = timm.create_model(f"local-dir:{hub}", pretrained=True).eval().to(memory_format=torch.channels_last)
    known, config = model.pretrained_cfg, resolve_input_data_config(model, {}, use_test_size=True)
    data = create_dataset("", root=folder, split="validation")
    device = torch.device("cpu")
    loader = create_loader(
        data, batch_size=int(BATCH), num_workers=int(WORKERS), use_prefetcher=True, device=device, **config
    )
    names = DatasetInfoLabelMapper(CustomDatasetInfo(known["label_names"], known["label_descriptions"]))
    named = np.vectorize(names, otypes=[object])
    labels, shares = [], []
    with torch.inference_mode():
        for images, _ in loader:
            best = model(images).softmax(-1).topk(TOP)
            labels.append(named(best.indices.numpy()))
            shares.append(best.values.float().numpy())
    rows = {"filename": data.filenames(basename=True), "label": list(np.concatenate(labels))}
    pd.DataFrame(rows | {"prob": list(np.concatenate(shares))}).to_csv(out, index=False)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    {"imports": imports, "kills": kills, "memory": memory, "speed": speed, "by_timm": by_timm}[sys.argv[1]](
        *sys.argv[2:]
    )
