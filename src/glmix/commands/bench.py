"""`glmix bench`."""

import csv
import math
import platform
import re
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure

from glmix.commands.common import pick_device
from glmix.errors import UserError
from glmix.export.measure import (
    ENGINES,
    Case,
    accuracies,
    clocked,
    gmacs,
    in_turns,
    peak_memory,
    prepared,
    published_protocol,
    saved_activations,
    training_step,
    versions,
)
from glmix.files import check_folder, written_whole
from glmix.ranges import NonNegativeInt, PositiveInt
from glmix.slots.figures import save_figure

PRECISIONS = ("fp32", "bf16")
COLUMNS = ("model", "engine", "precision", "size", "batch", "ms", "spread", "ratio", "images_s", "gmacs", "peak_mib",
           "top1", "source")  # fmt: skip


def bench(
    models: str = "glnet_stl,glnet_4g",
    against: str = "",
    sizes: list[int] = [224],  # noqa: B006  (the command line needs a default it can print; never changed)
    batch: list[int] = [1],  # noqa: B006
    engines: str = "eager,fast",
    precision: str = "fp32",
    base: str = "",
    rounds: PositiveInt = 15,
    threads: NonNegativeInt = 0,
    train: bool = False,
    memory: bool = False,
    protocol: Literal["", "published"] = "",
    out: str = "bench",
) -> None:
    """Speed and memory of models, engines and precisions: all in turns, in one process, weights as first drawn.

    Args:
        models: names, with commas between.
        against: other models of timm, with commas between.
        sizes: sides of the images in pixels, such as 224 384.
        batch: images at a time, such as 1 8.
        engines: of eager, fast (glmix.optimize_for_inference), sdpa (the same with sdpa=True), compile, onnxruntime,
            openvino; with commas between.
        precision: of fp32, bf16; with commas between.
        base: what all is compared with, MODEL or MODEL:ENGINE; left out, the first model in the first engine.
        rounds: measured passes of each; their median is told, and half the distance of the quartiles.
        threads: of each engine; 0 for all cores.
        train: measure training steps and what is kept for the backward pass, instead of inference.
        memory: the peak memory of a pass as well, each in a process of its own.
        protocol: published: fp32 with TF32, math attention alone, batch 128, 10 passes before 40 measured ones.
        out: folder of the table (CSV) and the plots.
    """
    check_folder("--out", out)
    warm = 2
    if protocol:
        batch, precision, rounds, warm = [128], "fp32", 40, 10
    names = _listed("--models", models) + [n for n in against.split(",") if n]
    used = _listed("--engines", engines, ENGINES)
    kinds = _listed("--precision", precision, PRECISIONS)
    if min(sizes) < 32 or min(batch) < 1:
        raise UserError(f"--sizes {min(sizes)}, --batch {min(batch)}: at least 32 pixels, and 1 image")
    chosen_model, _, chosen_engine = (base or names[0]).partition(":")
    chosen_engine = chosen_engine or used[0]
    if chosen_model not in names or chosen_engine not in used:
        raise UserError(f"--base {base}: among what is measured there is no {chosen_model} in {chosen_engine}")
    device = pick_device().type
    threads = threads or torch.get_num_threads()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if train:
            for line in _training(names, kinds, sizes, batch, device, rounds):
                print(line, flush=True)
            return
        rows: list[dict[str, Any]] = []
        print(f"{_machine(device)}, threads {threads}, " + ", ".join(f"{k} {v}" for k, v in versions().items()))
        with ExitStack() as stack:
            if protocol:
                published_protocol(stack)
            for kind in kinds:
                for size in sizes:
                    for count in batch:
                        cases = [Case(n, e, kind, size, count) for n in names for e in used]
                        first = Case(chosen_model, chosen_engine, kind, size, count)
                        rows += _compared(cases, first, rounds, warm, threads, device, memory)
        _print_growth(rows)
        _write(rows, Path(out), device, threads)
    finally:
        torch.set_num_threads(before)


def _listed(option: str, text: str, known: tuple[str, ...] = ()) -> list[str]:
    found = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in found if known and name not in known]
    if unknown or not found:
        raise UserError(f"{option} {unknown[0] if unknown else text!r}: there are {', '.join(known) or 'none named'}")
    return list(dict.fromkeys(found))


def _machine(device: str) -> str:
    """The processor's name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _compared(
    cases: list[Case], base: Case, rounds: int, warm: int, threads: int, device: str, memory: bool
) -> list[dict[str, Any]]:
    """Measure what is of the same precision, size and batch in turns, print it, and return its rows."""
    counted = {case.model: gmacs(case.model, case.size) for case in cases}
    runs = {case: prepared(case, threads, device)[0] for case in cases}
    times = in_turns(runs, base, rounds, warm)
    del runs
    published = accuracies()
    print(f"\n{base.precision}, {base.size} px, batch {base.batch}; base {base.model} in {base.engine}")
    print(f"{'model':<30}{'engine':<13}{'ms':>9}{'+-':>7}{'images/s':>10}{'x base':>8}" + "  peak MiB" * memory)
    rows = []
    for case, found in times.items():
        top1, source = published.get(case.model, ("", ""))
        row = {
            **vars(case),
            "ms": 1000 * found.median,
            "spread": found.spread,
            "ratio": found.ratio,
            "images_s": case.batch / found.median,
            "gmacs": counted[case.model],
            "peak_mib": peak_memory(case, threads) if memory and device == "cpu" else "",
            "top1": top1,
            "source": source,
        }
        rows.append(row)
        peak = f"{row['peak_mib']:>10.0f}" if row["peak_mib"] != "" else ""
        print(
            f"{case.model:<30}{case.engine:<13}{row['ms']:>9.2f}{found.spread:>7.1%}{row['images_s']:>10.1f}"
            f"{found.ratio:>8.2f}{peak}",
            flush=True,
        )
    print(f"the base against itself: {times[base].ratio:.3f}")
    return rows


def growth(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], float]:
    """Exponent of time in pixels from the least to the largest size, of each model, engine and precision."""
    found = {}
    for key in dict.fromkeys((r["model"], r["engine"], r["precision"]) for r in rows):
        own = sorted((r["size"], r["ms"]) for r in rows if (r["model"], r["engine"], r["precision"]) == key)
        (small, fast), (large, slow) = own[0], own[-1]
        if large > small:
            found[key] = math.log(slow / fast) / math.log(large**2 / small**2)
    return found


def _print_growth(rows: list[dict[str, Any]]) -> None:
    for (model, engine, precision), exponent in growth(rows).items():
        print(f"{model} in {engine}, {precision}: time grows with pixels to the power {exponent:.2f}")


def _training(
    names: list[str], kinds: list[str], sizes: list[int], batch: list[int], device: str, rounds: int
) -> list[str]:
    """Lines on steps of training: time with AdamW plain and fused, in turns, and what is kept for the backward pass."""
    lines = []
    for name in names:
        for case in [Case(name, "eager", kind, size, count) for kind in kinds for size in sizes for count in batch]:
            forward, plain, model = training_step(case, device, fused=False)
            _, fused, _ = training_step(case, device, fused=True)
            kept = saved_activations(forward, model)
            seconds: tuple[list[float], list[float]] = ([], [])
            for round_ in range(rounds + 1):
                for into, step in zip(seconds, (plain, fused), strict=True):
                    taken = clocked(step)
                    if round_:
                        into.append(taken)
            one, other = (1000 * statistics.median(s) for s in seconds)
            lines.append(
                f"{name}, {case.precision}, {case.size} px, batch {case.batch}: step {one:.0f} ms, fused AdamW {other:.0f} ms, "
                f"kept for the backward pass {kept:.1f} MiB"
            )
    return lines


def _write(rows: list[dict[str, Any]], out: Path, device: str, threads: int) -> None:
    """The table as CSV, whose name says what it is of, and the plots."""
    made = re.sub(r"[^\w.]+", "-", _machine(device)).strip("-").lower()
    kinds = "+".join(dict.fromkeys(row["precision"] for row in rows))
    layouts = "+".join(dict.fromkeys("nchw" if row["engine"] == "eager" else row["engine"] for row in rows))
    name = f"{made}_{threads}t_{kinds}_{layouts}_" + "_".join(f"{k}{v}" for k, v in versions().items())
    path = out / f"{name[:200]}.csv"
    with written_whole(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(path)
    for kind, figure in _plots(rows).items():
        save_figure(figure, out / f"{kind}.png")
        print(out / f"{kind}.png")


def _plots(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """Accuracy against throughput and multiply-adds (where there is a source), time and memory against pixels."""
    plots: dict[str, Figure] = {}
    least = min(row["size"] for row in rows)
    known = [row for row in rows if row["top1"] != "" and row["size"] == least]
    axes = {
        "accuracy-throughput": ("images_s", "images a second", "top1", "published top-1, %", known),
        "accuracy-macs": ("gmacs", "multiply-adds, G", "top1", "published top-1, %", known),
        "time-pixels": ("size", "pixels", "ms", "ms", rows if len({r["size"] for r in rows}) > 1 else []),
        "memory-pixels": ("size", "pixels", "peak_mib", "peak MiB", [r for r in rows if r["peak_mib"] != ""]),
    }
    for kind, (x, x_label, y, y_label, points) in axes.items():
        if not points:
            continue
        figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
        axis = figure.subplots()
        for engine, precision, model in dict.fromkeys((r["engine"], r["precision"], r["model"]) for r in points):
            own = [r for r in points if (r["engine"], r["precision"], r["model"]) == (engine, precision, model)]
            across = [r[x] ** 2 if x == "size" else r[x] for r in own]
            axis.plot(across, [r[y] for r in own], "o-", label=f"{model}, {engine}, {precision}")
        if x == "size":
            axis.set(xscale="log", yscale="log")
        axis.set(xlabel=x_label, ylabel=y_label)
        axis.legend(fontsize=6)
        plots[kind] = figure
    return plots
