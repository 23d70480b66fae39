"""What a classifier got right and wrong on labelled images, as files and a page; and two classifiers compared."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

from glmix.data.images import BadImage
from glmix.data.loading import Batch
from glmix.data.samples import Source
from glmix.errors import needs
from glmix.files import readable, written_whole
from glmix.fonts import draw_figure
from glmix.models.description import Description
from glmix.page import heading, image, paragraph, table, write_page
from glmix.training.processes import gathered
from glmix.training.task import Task
from glmix.use.sheets import Cell, draw_sheet, thumbnail

WORST = 48  # mistakes, and differences, that are shown
BINS = 15  # of the reliability diagram
NAMED = 60  # classes up to which their names stand at the confusion matrix


@dataclass
class Answers:
    """What a classifier said of labelled images.

    Attributes:
        names: of the images, in the data.
        given: (N,) their classes.
        seen: (N,) the likeliest class of each.
        sure: (N,) its probability.
    """

    names: list[str] = field(default_factory=list)
    given: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    seen: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    sure: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    @property
    def right(self) -> NDArray[np.bool_]:
        return self.seen == self.given

    def add(self, names: list[str], given: Any, seen: Any, sure: Any) -> None:
        self.names = self.names + names
        self.given, self.seen = np.append(self.given, given), np.append(self.seen, seen)
        self.sure = np.append(self.sure, sure)

    def everywhere(self) -> "Answers":
        """Those of all processes, in the order of the names, each once."""
        whole = Answers()
        for part in gathered(self):
            whole.add(part.names, part.given, part.seen, part.sure)
        order = sorted({name: i for i, name in enumerate(whole.names)}.items())
        at = np.array([i for _, i in order], int)
        return Answers([name for name, _ in order], whole.given[at], whole.seen[at], whole.sure[at])


def recording(task: Task, answers: Answers) -> Task:
    """The same task, which notes what is answered while it is evaluated."""

    def forward(model: nn.Module, batch: Batch) -> Any:
        outputs = task.forward(model, batch)
        best = outputs.float().softmax(1).max(1)
        answers.add(batch.names, batch.targets.cpu().numpy(), best.indices.cpu().numpy(), best.values.cpu().numpy())
        return outputs

    return replace(task, forward=forward)


# --- figures


def interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, in percent."""
    with needs("evaluate"):
        from scipy.stats import binomtest
    found = binomtest(right, count).proportion_ci(0.95, "wilson")
    return 100 * float(found.low), 100 * float(found.high)


def calibration_error(answers: Answers) -> float:
    """Expected calibration error: how far, on average, sureness is from accuracy, over `BINS` bins of sureness."""
    from torchmetrics.functional.classification import binary_calibration_error

    sure, right = torch.from_numpy(answers.sure), torch.from_numpy(answers.right.astype(np.int64))
    return float(binary_calibration_error(sure.clamp(0, 1), right, n_bins=BINS, norm="l1"))


def per_class(answers: Answers, names: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall and F1 in percent of each class, and how many images are of it and are taken for it."""
    with needs("evaluate"):
        from sklearn.metrics import precision_recall_fscore_support
    numbers = range(len(names))
    precision, recall, f1, images = precision_recall_fscore_support(
        answers.given, answers.seen, labels=list(numbers), zero_division=0
    )
    taken = np.bincount(answers.seen, minlength=len(names))
    columns = (100 * precision, 100 * recall, 100 * f1)
    return [
        {"class": names[i], "images": int(images[i]), "predicted": int(taken[i])}
        | dict(zip(("precision", "recall", "f1"), (round(float(c[i]), 2) for c in columns), strict=True))
        for i in numbers
    ]


def confusion(answers: Answers, classes: int) -> NDArray[np.int64]:
    """(classes, classes) images: rows are what they are, columns what they are taken for."""
    with needs("evaluate"):
        from sklearn.metrics import confusion_matrix
    return confusion_matrix(answers.given, answers.seen, labels=list(range(classes)))


@dataclass(frozen=True)
class Difference:
    """Two classifiers on the same images.

    Attributes:
        images: that both were asked about.
        first, second: their top-1 in percent.
        first_alone, second_alone: images that one has right and the other wrong.
        low, high: 95 % interval of the difference second - first, in points.
        p: of McNemar's exact test: how likely such a difference is of two that are equally good.
    """

    images: int
    first: float
    second: float
    first_alone: int
    second_alone: int
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return (
            f"top-1 {self.first:.2f} % and {self.second:.2f} % on the same {self.images} images: "
            f"{self.second - self.first:+.2f} points (95 % interval {self.low:+.2f} to {self.high:+.2f}); "
            f"{self.first_alone} right by the first alone, {self.second_alone} by the second, "
            f"p {self.p:.3g} (McNemar's exact test)"
        )


def difference(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Difference:
    """Of what two classifiers have right of the same images, (N,) each; the interval is that of paired shares (Wald)."""
    with needs("evaluate"):
        from scipy.stats import binomtest
    count = len(first)
    alone, other = int((first & ~second).sum()), int((second & ~first).sum())
    points = (other - alone) / count
    spread = 1.96 * ((alone + other) / count - points**2) ** 0.5 / count**0.5
    p = binomtest(alone, alone + other).pvalue if alone + other else 1.0
    share = 100 * first.mean(), 100 * second.mean()
    low, high = 100 * (points - spread), 100 * (points + spread)
    return Difference(count, float(share[0]), float(share[1]), alone, other, low, high, float(p))


# --- files


def write_csv(path: Path, columns: Sequence[str], rows: Any) -> None:
    with written_whole(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def save(figure: Figure, path: Path) -> None:
    with written_whole(path) as file:
        draw_figure(figure, file, "png")


def draw_confusion(matrix: NDArray[np.int64], names: Sequence[str], path: Path) -> None:
    """Shares of each row as grey; names where there are few enough to be read."""
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(14.0, 4 + 0.28 * len(names))
    figure = Figure(figsize=(side + 1, side), dpi=120, layout="constrained")
    axis = figure.subplots()
    drawn = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(drawn, ax=axis, label="share of the class", shrink=0.8)
    axis.set_xlabel("taken for")
    axis.set_ylabel("is")
    if len(names) <= NAMED:
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
    if len(names) <= 20:
        for row, column in np.argwhere(matrix):
            color = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=7, color=color)
    save(figure, path)


def draw_reliability(answers: Answers, path: Path) -> None:
    """How often the classifier is right, by how sure it is; and how often it is how sure."""
    with needs("evaluate"):
        from sklearn.calibration import calibration_curve
    share, sure = calibration_curve(answers.right, answers.sure.clip(0, 1), n_bins=BINS)
    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    curve, counts = figure.subplots(1, 2)
    curve.plot([0, 1], [0, 1], color="grey", linestyle=":")
    curve.plot(sure, share, marker="o")
    curve.set_xlabel("mean probability of the answer")
    curve.set_ylabel("share that is right")
    counts.hist(answers.sure, bins=BINS, range=(0, 1))
    counts.set_xlabel("probability of the answer")
    counts.set_ylabel("images")
    for axis in (curve, counts):
        axis.grid(alpha=0.3)
    save(figure, path)


def draw_mistakes(answers: Answers, source: Source, names: Sequence[str], path: Path) -> int:
    """The surest mistakes with what they are taken for and what they are; their number in all."""
    wrong = np.flatnonzero(~answers.right)
    place = {name: i for i, name in enumerate(source.files)}
    cells = []
    for i in wrong[np.argsort(-answers.sure[wrong], kind="stable")][:WORST]:
        said = f"{names[answers.seen[i]]} {100 * answers.sure[i]:.0f} %"
        cells += cell(source, place[answers.names[i]], [said, f"is {names[answers.given[i]]}", answers.names[i]])
    draw_sheet(cells, path)
    return len(wrong)


def cell(source: Source, index: int, lines: list[str]) -> list[Cell]:
    """The picture, unless it can be read no more."""
    try:
        return [Cell(thumbnail(source.read(index).image), lines)]
    except BadImage:
        return []


def write_report(
    folder: Path, answers: Answers, scores: dict[str, float], source: Source, description: Description, about: str
) -> None:
    """`report.html`, and what it shows: per_class.csv, confusion.csv and .png, mistakes.png, reliability.png."""
    names = description.names
    low, high = interval(int(answers.right.sum()), len(answers.names))
    rows = per_class(answers, names)
    matrix = confusion(answers, len(names))
    write_csv(folder / "per_class.csv", list(rows[0]), ([readable(str(v)) for v in row.values()] for row in rows))
    write_csv(
        folder / "confusion.csv",
        ["is \\ taken for", *names],
        ([n, *row] for n, row in zip(names, matrix.tolist(), strict=True)),
    )
    draw_confusion(matrix, names, folder / "confusion.png")
    draw_reliability(answers, folder / "reliability.png")
    wrong = draw_mistakes(answers, source, names, folder / "mistakes.png")
    told = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    weakest = sorted((row for row in rows if row["images"]), key=lambda row: row["f1"])
    write_page(
        folder / "report.html",
        f"{about}: top-1 {100 * answers.right.mean():.2f} %",
        [
            paragraph(
                f"{told}. 95 % interval of top-1 (Wilson): {low:.2f} to {high:.2f} % of {len(answers.names)} images."
            ),
            heading(f"The surest of {wrong} mistakes"),
            image(folder / "mistakes.png", "Photos with what they are taken for and what they are"),
            heading("What is taken for what"),
            image(folder / "confusion.png", "Confusion matrix; numbers in confusion.csv"),
            heading("How sure, and how often right"),
            paragraph(f"Expected calibration error: {100 * calibration_error(answers):.2f} points, over {BINS} bins."),
            image(folder / "reliability.png", "Reliability diagram"),
            heading("Classes, the weakest first"),
            table(list(rows[0]), (list(row.values()) for row in weakest)),
        ],
    )


def write_comparison(
    folder: Path,
    found: Difference,
    both: tuple[Answers, Answers],
    source: Source,
    names: Sequence[str],
    about: tuple[str, str],
) -> None:
    """`comparison.html`: the difference, and pictures on which the two differ; all of them in differences.csv."""
    first, second = both
    place = {name: i for i, name in enumerate(source.files)}
    differ = [i for i in range(len(first.names)) if first.seen[i] != second.seen[i]]
    differ.sort(key=lambda i: -(first.sure[i] + second.sure[i]))
    columns = ["path", "is", about[0], about[1]]
    rows = [
        [readable(first.names[i]), *(names[c] for c in (first.given[i], first.seen[i], second.seen[i]))] for i in differ
    ]
    write_csv(folder / "differences.csv", columns, rows)
    cells = []
    for i in differ[:WORST]:
        lines = [f"1: {names[first.seen[i]]}", f"2: {names[second.seen[i]]}", f"is {names[first.given[i]]}"]
        cells += cell(source, place[first.names[i]], lines)
    draw_sheet(cells, folder / "differences.png")
    write_page(
        folder / "comparison.html",
        f"{about[0]} and {about[1]}",
        [
            paragraph(str(found)),
            heading(f"{len(differ)} images that they take for different things, the surest first"),
            image(folder / "differences.png", "Photos with both answers and what they are"),
        ],
    )
