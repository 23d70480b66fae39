"""The runs of a study: rows times seeds, each a `glmix train` in a folder of its own, `out/row/seed`.

`out/study.json` holds what all of them share; whoever goes on with other data, code or budget is refused. A run that is
done has `done.json` beside all that `glmix train` wrote, and it is written last.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import timm
import torch

from glmix import __version__
from glmix.console import say
from glmix.errors import Stopped, UserError, needs
from glmix.files import written_whole
from glmix.studies.rows import Row
from glmix.tasks import task_named
from glmix.training.options import TrainOptions, usual_precision

with needs("train"):
    from glmix.training.progress import read_rows
    from glmix.training.run import git_state

SETTINGS, MARK, LOG = "study.json", "done.json", "train.log"
# of a run's options, what changes none of its figures, or differs from run to run
UNRELATED = {"data", "out", "resume", "seed", "val_every", "checkpoint_steps", "workers"}

Start = Callable[["Run"], int]  # trains a run; the exit status of `glmix train`


@dataclass(frozen=True)
class Run:
    """One run: a row with a seed.

    Attributes:
        row: its name.
        seed: of weights, order and augmentation.
        options: of `glmix train`; `out` is the run's folder.
    """

    row: str
    seed: int
    options: TrainOptions

    def __str__(self) -> str:
        return f"{self.row}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.options.out)

    @property
    def done(self) -> bool:
        return (self.folder / MARK).exists()

    def command(self) -> list[str]:
        """Arguments of `glmix`: every option that is not as usual, and `--resume` where the run was begun."""
        usual = type(self.options)()
        found = ["train", f"--task={self.options.task}"]
        for field in fields(self.options):
            value = getattr(self.options, field.name)
            if value != getattr(usual, field.name) and field.name not in ("task", "resume"):
                text = value if isinstance(value, str) else json.dumps(value)
                found.append(f"--{field.name.replace('_', '-')}={text}")
        return [*found, "--resume"] if (self.folder / "config.yaml").exists() else found


def planned(rows: dict[str, Row], seeds: int, options: TrainOptions) -> list[Run]:
    """The runs of `rows` with `seeds` seeds from that of `options` on, seed by seed, so that pairs are there soon."""
    runs = []
    for seed in range(options.seed, options.seed + seeds):
        for name, row in rows.items():
            model_args = row.options if row.model else options.model_args | row.options
            model = row.model or options.model
            out = str(Path(options.out) / name / str(seed))
            runs.append(Run(name, seed, replace(options, seed=seed, out=out, model=model, model_args=model_args)))
    return runs


def settings_of(study: str, options: TrainOptions) -> dict[str, Any]:
    """All that the runs of a study share and that decides their figures, as plain data; reads the data through.

    Raises:
        UserError: the data cannot be used.
    """
    shared = {name: value for name, value in vars(options).items() if name not in UNRELATED and name != "given"}
    if shared["precision"] == "auto":
        shared["precision"] = usual_precision()
    data = task_named(options.task).open(options.data)
    learned, held_out = data.split("train"), data.split("val")
    return {
        "study": study,
        **shared,
        "classes": learned.classes,
        "training images": learned.digest(),
        "validation images": held_out.digest(),
        "glmix": f"{__version__} {git_state()}".strip(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def begin(out: Path, settings: dict[str, Any]) -> None:
    """Note the settings of a study in its folder, or hold them to those that it was begun with.

    Raises:
        UserError: they are others; names the first.
    """
    settings = json.loads(json.dumps(settings))
    if not (out / SETTINGS).exists():
        with written_whole(out / SETTINGS, "w", encoding="utf-8") as file:
            json.dump(settings, file, indent=1)
        return
    begun = read_settings(out)
    for name in dict.fromkeys([*begun, *settings]):
        before, now = begun.get(name), settings.get(name)
        if before != now:
            told = "others" if "images" in name or name == "classes" else f"{before}, not {now}"
            raise UserError(f"{out}: this study was begun with {name} {told}; give it another --out")


def read_settings(out: Path) -> dict[str, Any]:
    """The settings of a study.

    Raises:
        UserError: no study is there.
    """
    try:
        return json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{out}: no study is there (it has no {SETTINGS})") from error
    except ValueError as error:
        raise UserError(f"{out / SETTINGS}: damaged ({error})") from error


def mark(run: Run) -> dict[str, Any]:
    """Write that a run is done, with its figures: those of its last epoch, which nothing chose.

    Of a run with a moving average, the average's count.

    Raises:
        UserError: its last epoch has no figures.
    """
    headline = task_named(run.options.task).headline
    column = f"val{'_ema' if run.options.ema else ''}_{headline}"
    rows = read_rows(run.folder / "metrics.csv")
    if not rows or column not in rows[-1]:
        raise UserError(f"{run}: ended without a last validation; see {run.folder / LOG}")
    found = {
        "row": run.row,
        "seed": run.seed,
        "epochs": int(rows[-1]["epoch"]),
        "figure": float(rows[-1][column]),
        "best": max(float(row[column]) for row in rows if column in row),
        "images_per_second": sum(float(row["images_per_second"]) for row in rows) / len(rows),
        "memory_gb": max(float(row["memory_gb"]) for row in rows),
    }
    with written_whole(run.folder / MARK, "w", encoding="utf-8") as file:
        json.dump(found, file, indent=1)
    return found


def train_all(runs: list[Run], jobs: int, start: Start) -> dict[str, str]:
    """Train what is not done of `runs`, so many at a time, and mark it.

    Returns:
        Why, by name, of the runs that failed.

    Raises:
        Stopped: by `start`, once what was under way has stopped too.
    """
    failed: dict[str, str] = {}
    waiting = [run for run in runs if not run.done]
    done = len(runs) - len(waiting)
    if done:
        say(f"{done} of {len(runs)} runs are done already")
    stopped: list[Stopped] = []

    def attempt(run: Run) -> int:
        if stopped:
            raise CancelledError
        try:
            return start(run)
        except Stopped as error:
            stopped.append(error)
            raise

    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(attempt, run): run for run in waiting}
        for future in as_completed(futures):
            run = futures[future]
            try:
                status = future.result()
                if status:
                    raise UserError(last_words(run, status))
                figure = mark(run)["figure"]
            except (CancelledError, Stopped):
                continue
            except UserError as error:
                failed[str(run)] = str(error)
                say(f"{run}: failed: {error}")
            else:
                done += 1
                say(f"{run}: {figure:.2f} ({done} of {len(runs)})")
    if stopped:
        raise stopped[0]
    return failed


def last_words(run: Run, status: int) -> str:
    """Why a run ended: the last line that it said, and where all are."""
    path = run.folder / LOG
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.exists() else []
    told = lines[-1].removeprefix("glmix: ")[:300] if lines else "it said nothing"
    return f"{told} (status {status}; {path})"


class Trainings:
    """`glmix train` in a process of its own for each run: its memory is its own, and what it does ends nothing else.

    Args:
        jobs: how many run at a time, and share the cores.
    """

    def __init__(self, jobs: int) -> None:
        self.environment = dict(os.environ)
        if jobs > 1:
            self.environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
        self.signal = 0
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()

    def __call__(self, run: Run) -> int:
        """The exit status; below 0 the signal that killed it.

        Raises:
            Stopped: as the study was told to.
        """
        run.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "glmix.cli", *run.command()]
        with open(run.folder / LOG, "ab") as log:
            log.write(f"{shlex.join(['glmix', *command[3:]])}\n".encode(errors="surrogateescape"))
            log.flush()
            with self._lock:
                if self.signal:
                    raise self.stopped(run)
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment
                )
                self._running.add(process)
            if self.signal:  # which came before the process was among those that `stop` knows
                process.terminate()
            status = process.wait()
        with self._lock:
            self._running.discard(process)
        if self.signal and status:
            raise self.stopped(run)
        return status

    def stopped(self, run: Run) -> Stopped:
        return Stopped(f"{run}: stopped; the same command goes on", 128 + self.signal)

    def stop(self, number: int, frame: Any = None) -> None:
        """Let the runs under way stop, each after its step, and begin no other."""
        self.signal = number
        for process in list(self._running):
            process.terminate()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it Ctrl-C and SIGTERM stop the runs."""
        before = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
