"""What came out of a study, from its folders alone: also while runs are missing, which it says.

Accuracy is that of a run's last epoch. Intervals are Student's, of 95 %, over seeds. Differences to the base are of pairs,
runs of one seed, which see the same images in the same order: what that does to both drops out. First weights are the same
only where rows have the same layers. Two or three seeds tell little of a row's own error, so the rows' common one stands beside
it, as in a randomised block design.
"""

import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from glmix import page
from glmix.console import aligned
from glmix.errors import UserError, needs
from glmix.export.measure import Case, in_turns, multiply_adds, saved_activations
from glmix.files import written_whole
from glmix.models.load import load
from glmix.slots.figures import save_figure
from glmix.studies.rows import study_named
from glmix.studies.runs import MARK, read_mark

with needs("train"):
    from scipy.stats import t as student

TIMED = 16  # images of a pass whose time is taken
KEPT = 2  # images of the pass whose memory is counted


@dataclass
class Cost:
    """What a row's network costs, by its own weights.

    Attributes:
        params_m: parameters, millions.
        gmacs: billions of multiply-adds of an image at the size of validation.
        kept_mib: MiB that training keeps of an image for the backward pass, fp32.
        ratio: how many times as fast as the base in use, of passes in turns; None where it was not measured.
    """

    params_m: float
    gmacs: float
    kept_mib: float
    ratio: float | None = None


@dataclass
class Result:
    """A row of a study.

    Attributes:
        figures: top-1 in percent of the last epoch, by seed.
        best: that of the best epoch, by seed.
        memory_gb: largest memory of a training process.
        mean, interval: of the figures; the interval is half its width, None of a single run.
        difference, difference_interval: to the base, of the seeds that both have; None without such.
        pairs: how many these are.
        cost: None while no run is done.
    """

    row: str
    figures: dict[int, float] = field(default_factory=dict)
    best: dict[int, float] = field(default_factory=dict)
    memory_gb: float | None = None
    mean: float | None = None
    interval: float | None = None
    difference: float | None = None
    difference_interval: float | None = None
    pairs: int = 0
    cost: Cost | None = None


def mean_and_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean, and half the width of its 95 % interval by Student's t; None for what so few values do not tell."""
    if not values:
        return None, None
    if len(values) == 1:
        return values[0], None
    width = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), width


def read_results(out: Path, rows: Sequence[str], base: str) -> dict[str, Result]:
    """The results of `rows`, of whatever runs are done in `out`."""
    results = {row: Result(row) for row in rows}
    for row, result in results.items():
        marks = [read_mark(path.parent) for path in (out / row).glob(f"*/{MARK}")]
        for found in sorted(marks, key=lambda found: found["seed"]):
            result.figures[found["seed"]] = found["figure"]
            result.best[found["seed"]] = found["best"]
            result.memory_gb = max(result.memory_gb or 0.0, found["memory_gb"])
        result.mean, result.interval = mean_and_interval(list(result.figures.values()))
    first = results[base].figures if base in results else {}
    for row, result in results.items():
        shared = [seed for seed in result.figures if seed in first and row != base]
        result.pairs = len(shared)
        result.difference, result.difference_interval = mean_and_interval(
            [result.figures[seed] - first[seed] for seed in shared]
        )
    return results


def least_difference(results: dict[str, Result]) -> tuple[float, int, list[int]] | None:
    """The difference between two rows beyond which it is none of chance (95 %), if all rows have the same error.

    Fisher's, of rows and seeds without their interaction: what is left when the means of row and seed are taken off.

    Returns:
        Points, degrees of freedom, and the seeds that it is of, those that all rows have; None of fewer than two rows or
        seeds.
    """
    figures = [result.figures for result in results.values() if result.figures]
    seeds = sorted(set.intersection(*map(set, figures))) if figures else []
    if len(figures) < 2 or len(seeds) < 2:
        return None
    of_row = [statistics.fmean(found[seed] for seed in seeds) for found in figures]
    of_seed = {seed: statistics.fmean(found[seed] for found in figures) for seed in seeds}
    mean = statistics.fmean(of_row)
    squares = sum(
        (found[seed] - row - of_seed[seed] + mean) ** 2
        for found, row in zip(figures, of_row, strict=True)
        for seed in seeds
    )
    freedom = (len(figures) - 1) * (len(seeds) - 1)
    points = float(student.ppf(0.975, freedom)) * (2 * squares / freedom / len(seeds)) ** 0.5
    return points, freedom, seeds


def measure_costs(out: Path, results: dict[str, Result], base: str, rounds: int) -> None:
    """Fill in what the networks of the rows cost; times are taken in turns, if the base is there and `rounds` are asked."""
    models: dict[str, nn.Module] = {}
    size = 0
    for row, result in results.items():
        if result.figures:
            model, described = load(out / row / str(min(result.figures)))
            model = model.to(memory_format=torch.channels_last)
            models[row], size = model, described.prepared.size[0]
            result.cost = Cost(
                sum(p.numel() for p in model.parameters()) / 1e6, multiply_adds(model, size), kept(model, size)
            )
    if rounds and base in models:
        cases = {row: Case(row, "eager", "fp32", size, TIMED) for row in models}
        runs = {cases[row]: channels_last(model) for row, model in models.items()}
        times = in_turns(runs, cases[base], rounds)
        for row, case in cases.items():
            cost = results[row].cost
            assert cost is not None
            cost.ratio = times[case].ratio


def channels_last(model: nn.Module) -> Any:
    return lambda images: model(images.contiguous(memory_format=torch.channels_last))


def kept(model: nn.Module, size: int) -> float:
    """MiB that a forward pass of training keeps of an image; attention as it is trained on a CPU."""
    images = torch.zeros(KEPT, 3, size, size).contiguous(memory_format=torch.channels_last)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with sdpa_kernel(SDPBackend.MATH):
        found = saved_activations(lambda: model.train()(images), model) / KEPT
    for name, value in model.eval().named_buffers():  # statistics of norms, which the pass moved
        value.copy_(buffers[name])
    return found


def missing(results: dict[str, Result], seeds: Sequence[int]) -> list[str]:
    """Runs that are not done, by name."""
    return [f"{row} {seed}" for row, result in results.items() for seed in seeds if seed not in result.figures]


def plus_minus(value: float | None, width: float | None, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{value:{sign}.2f}" + (f" ± {width:.2f}" if width is not None else "")


COLUMNS = ("row", "runs", "top-1, %", "over base, points", "pairs", "best epoch", "x speed", "params, M", "GMACs",
           "kept, MiB/image", "GB")  # fmt: skip


def cells(result: Result) -> list[str]:
    """A result as people read it, under `COLUMNS`."""
    cost = result.cost
    of_cost = ["", "", "", ""]
    if cost is not None:
        ratio = "" if cost.ratio is None else f"{cost.ratio:.2f}"
        of_cost = [ratio, f"{cost.params_m:.2f}", f"{cost.gmacs:.3f}", f"{cost.kept_mib:.1f}"]
    return [
        result.row,
        str(len(result.figures)),
        plus_minus(result.mean, result.interval),
        plus_minus(result.difference, result.difference_interval, "+"),
        str(result.pairs or ""),
        f"{statistics.fmean(result.best.values()):.2f}" if result.best else "",
        *of_cost,
        "" if result.memory_gb is None else f"{result.memory_gb:.2f}",
    ]


def write_csv(path: Path, results: dict[str, Result]) -> None:
    """A line a row, numbers in full; the figures of each seed one after the other."""
    rows = []
    for result in results.values():
        cost = asdict(result.cost) if result.cost is not None else {}
        plain = {k: v for k, v in asdict(result).items() if k not in ("figures", "best", "cost")}
        each = {
            "seeds": " ".join(map(str, result.figures)),
            "top1": " ".join(f"{v:.4f}" for v in result.figures.values()),
            "best_epoch": " ".join(f"{v:.4f}" for v in result.best.values()),
        }
        rows.append(plain | {name: cost.get(name) for name in Cost.__dataclass_fields__} | each)
    with written_whole(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot(results: dict[str, Result], base: str) -> Figure:
    """Each run and each row's mean with its interval, and beside it the paired differences to the base."""
    names = list(results)
    figure = Figure(figsize=(9, 1.2 + 0.42 * len(names)), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, result in enumerate(results.values()):
        seen = list(result.figures.values())
        left.plot(seen, [place] * len(seen), "o", color="0.6", markersize=4)
        if result.mean is not None:
            left.errorbar(result.mean, place, xerr=result.interval or 0, fmt="D", color="C0", capsize=3, markersize=5)
        if result.difference is not None:
            first = results[base].figures
            apart = [result.figures[seed] - first[seed] for seed in result.figures if seed in first]
            right.plot(apart, [place] * len(apart), "o", color="0.6", markersize=4)
            width = result.difference_interval or 0
            right.errorbar(result.difference, place, xerr=width, fmt="D", color="C1", capsize=3, markersize=5)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("top-1, %")
    if not any(result.pairs for result in results.values()):
        right.text(0.5, 0.5, "no pairs", transform=right.transAxes, ha="center")
    right.axvline(0, color="0.4", linewidth=0.8)
    right.set_xlabel(f"over {base}, points, in pairs of one seed")
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.3)
    return figure


def write_report(
    out: Path, settings: dict[str, Any], rows: Sequence[str], seeds: Sequence[int], base: str, rounds: int
) -> str:
    """Write `report.csv`, `report.png` and `report.html` of a study.

    Args:
        out: its folder.
        settings: what its runs share.
        rows: that the report is of.
        seeds: that each of them is to have.
        base: the row to compare with.
        rounds: passes whose times are taken.

    Returns:
        The table, and what is missing.

    Raises:
        UserError: no run is done.
    """
    results = read_results(out, rows, base)
    if not any(result.figures for result in results.values()):
        raise UserError(f"{out}: no run of {', '.join(rows)} is done, so there is nothing to report")
    measure_costs(out, results, base, rounds)
    absent = missing(results, seeds)
    lines = []
    if absent:
        lines.append(
            f"Not all is done: {len(absent)} of {len(rows) * len(seeds)} runs are missing ({', '.join(absent)})."
        )
    compared = f"Differences to {base} are of pairs of runs with one seed."
    if not any(result.pairs for result in results.values()):
        compared = f"No differences: no run of {base} has the seed of another row's; --base compares with another row."
    lines.append(
        f"Top-1 of the last epoch, mean over seeds; ± half of a 95 % interval (Student's t), of each row by itself. "
        f"{compared}"
    )
    if least := least_difference(results):
        points, freedom, shared = least
        lines.append(
            f"If all rows have one error, a difference between two of them, of the seeds {', '.join(map(str, shared))}, is beyond chance "
            f"from {points:.2f} points on (95 %, {freedom} degrees of freedom; of many rows some pass it by chance)."
        )
    lines.append(
        f"Speed: passes of {TIMED} images in turns, fp32, {torch.get_num_threads()} threads; the base against itself is the noise. Kept: for the backward pass, "
        "fp32. GB: the largest a training process had, Python and PyTorch included."
    )
    write_csv(out / "report.csv", results)
    save_figure(plot(results, base), out / "report.png")
    about = f"{settings['study']}: {study_named(settings['study']).about}"
    runs = [
        [row, seed, f"{figure:.2f}", f"{result.best[seed]:.2f}"]
        for row, result in results.items()
        for seed, figure in result.figures.items()
    ]
    parts = [page.paragraph(line) for line in lines]
    parts += [page.table(COLUMNS, map(cells, results.values()))]
    parts += [page.image(out / "report.png", "Top-1 of each row, and its difference to the base")]
    parts += [page.heading("Runs"), page.table(("row", "seed", "top-1, %", "best epoch"), runs)]
    parts += [page.heading("What all runs share"), page.listing(json.dumps(settings, indent=1))]
    page.write_page(out / "report.html", about, parts)
    table = aligned([list(COLUMNS), *map(cells, results.values())])
    return "\n".join([table, *lines, str(out / "report.html")])
