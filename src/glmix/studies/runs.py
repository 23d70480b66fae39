"""The runs of a study: rows times seeds, each a `glmix train` in a folder of its own, `out/row/seed`.

`out/study.json` holds what all of them share; whoever goes on with other data, code or budget is refused. A run that is
done has `done.json` beside all that `glmix train` wrote, and it is written last.
"""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import timm
import torch

from glmix import __version__
from glmix.console import say
from glmix.data.token_labels import read_header
from glmix.errors import Stopped, UserError, needs
from glmix.files import written_whole
from glmix.models import build
from glmix.models.description import Description
from glmix.models.load import weights_file
from glmix.models.weights import checkpoint_file
from glmix.studies.rows import Row
from glmix.tasks import task_named
from glmix.training.grids import check_grids, finest_places, own_grid
from glmix.training.options import TrainOptions, usual_precision

with needs("train"):
    from glmix.training.progress import read_rows
    from glmix.training.resuming import SIGHUP, Occupied, occupied
    from glmix.training.run import git_state

SETTINGS, MARK, LOG, BEGUN = "study.json", "done.json", "train.log", "config.yaml"
# of a run's options, what changes none of its figures, or differs from run to run
UNRELATED = {"data", "out", "resume", "seed", "val_every", "checkpoint_steps", "workers"}

# what is noted as a digest or a list, of which a person has no use in a message
CONTENTS = ("training images", "validation images", "classes", "weights of init", "header of token_labels")

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
        return [*found, "--resume"] if (self.folder / BEGUN).exists() else found


def planned(rows: dict[str, Row], seeds: int, options: TrainOptions) -> list[Run]:
    """The runs of `rows` with `seeds` seeds from that of `options` on, seed by seed, so that pairs are there soon.

    Raises:
        UserError: a seed beyond those there are.
    """
    runs = []
    for seed in range(options.seed, options.seed + seeds):
        for name, row in rows.items():
            model_args = row.options if row.model else options.model_args | row.options
            model = row.model or options.model
            out = str(Path(options.out) / name / str(seed))
            try:
                own = replace(options, seed=seed, out=out, model=model, model_args=model_args)
            except ValueError as error:
                raise UserError(f"--seed {options.seed}, and {seeds} from there on: {error}") from error
            runs.append(Run(name, seed, own))
    return runs


def check_rows(runs: list[Run]) -> None:
    """Refuse, before anything is begun, networks that cannot be built, or have a larger slot grid than a map.

    Raises:
        UserError: which row, and why.
    """
    for run in {run.row: run for run in runs}.values():
        options: Any = run.options
        try:
            with torch.device("meta"):
                net = build(Description(options.task, options.model, options.model_args, ["0", "1"]))
            least = options.start_size or options.image_size
            if options.slot_grids:
                check_grids(net, options.slot_grids, least)
        except UserError as error:
            raise UserError(f"row {run.row}: {error}") from error
        grid, finest = own_grid(net), finest_places(net, least)
        if grid is not None and max(grid) > finest:
            raise UserError(
                f"row {run.row}: a slot grid of {grid[0]} x {grid[1]}, and images of {least} px have {finest} x {finest} "
                "places in the finest map; choose other --rows, or larger images by --image-size"
            )


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
        **contents_of(options),
        "classes": learned.classes,
        "training images": learned.digest(),
        "validation images": held_out.digest(),
        "glmix": f"{__version__} {git_state()}".strip(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def contents_of(options: Any) -> dict[str, Any]:
    """What lies in files that the options name: other weights or labels may lie there under the same name later."""
    found: dict[str, Any] = {}
    if options.init:
        found["weights of init"] = hashlib.sha256(checkpoint_file(weights_file(options.init)).read_bytes()).hexdigest()
    labels = getattr(options, "token_labels", "")
    if labels and (header := read_header(labels)):
        found["header of token_labels"] = {k: v for k, v in asdict(header).items() if k != "root"}
    return found


def begin(out: Path, settings: dict[str, Any]) -> None:
    """Note the settings of a study in its folder, or hold them to those that it was begun with.

    Those of a study of which no run was begun yet are written over: they are of a first try that went wrong.

    Raises:
        UserError: they are others; names the first. Or there are runs, and no settings.
    """
    settings = json.loads(json.dumps(settings))
    runs = any((folder / name).exists() for folder in out.glob("*/*") for name in (BEGUN, MARK))
    if runs and not (out / SETTINGS).exists():
        raise UserError(f"{out}: runs are there, without the {SETTINGS} that says what they share; bring it back, or give "
                        "another --out")  # fmt: skip
    if not runs:
        with written_whole(out / SETTINGS, "w", encoding="utf-8") as file:
            json.dump(settings, file, indent=1)
        return
    begun = read_settings(out)
    for name in dict.fromkeys([*begun, *settings]):
        before, now = begun.get(name), settings.get(name)
        if before != now:
            told = "others" if name in CONTENTS else f"{before}, not {now}"
            raise UserError(f"{out}: this study was begun with {name} {told}; give it another --out")


def read_settings(out: Path) -> dict[str, Any]:
    """The settings of a study.

    Raises:
        UserError: no study is there, or it cannot be read.
    """
    try:
        found = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
        if not isinstance(found, dict) or "study" not in found:
            raise ValueError("names no study")
    except FileNotFoundError as error:
        raise UserError(f"{out}: no study is there (it has no {SETTINGS})") from error
    except ValueError as error:
        raise UserError(
            f"{out / SETTINGS}: damaged ({error}); bring it back, or begin anew with another --out"
        ) from error
    return found


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


def read_mark(folder: Path) -> dict[str, Any]:
    """Of a run that is done, its `seed`, `figure`, `best` and `memory_gb`.

    Raises:
        UserError: what is written there cannot be read.
    """
    path = folder / MARK
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        numbers = {name: float(found[name]) for name in ("figure", "best", "memory_gb")}
        return {"seed": int(found["seed"]), **numbers}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: damaged ({type(error).__name__}: {error}); delete it, and the study's command writes it anew"
        ) from error


def train_all(runs: list[Run], jobs: int, start: Start) -> dict[str, str]:
    """Train what is not done of `runs`, so many at a time, and mark it.

    Returns:
        Why, by name, of the runs that failed.

    Raises:
        Stopped: by `start`, once what was under way has stopped too.
        UserError: the mark of a run that is done cannot be read; before any is trained.
    """
    failed: dict[str, str] = {}
    for run in runs:
        if run.done:
            read_mark(run.folder)
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
        self.wait_for_others(run)
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

    def wait_for_others(self, run: Run) -> None:
        """Until no other process trains in the run's folder, as one does that a killed study has left behind."""
        told = False
        while not self.signal:
            try:
                with occupied(run.folder):
                    return
            except Occupied:
                if not told:
                    say(f"{run}: another process trains there still; waiting for it to end")
                told = True
                time.sleep(1)

    def stopped(self, run: Run) -> Stopped:
        return Stopped(f"{run}: stopped; the same command goes on", 128 + self.signal)

    def stop(self, number: int, frame: Any = None) -> None:
        """Let the runs under way stop, each after its step, and begin no other."""
        self.signal = number
        for process in list(self._running):
            process.terminate()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it Ctrl-C, SIGTERM and a closed terminal (unless nohup ignores it) stop the runs."""
        listened = [signal.SIGINT, signal.SIGTERM]
        if SIGHUP and signal.getsignal(SIGHUP) is not signal.SIG_IGN:
            listened.append(SIGHUP)
        before = {number: signal.signal(number, self.stop) for number in listened}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
