"""`glmix study`."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any, ClassVar

from glmix.commands.train import schema_of as training_schema_of
from glmix.console import say
from glmix.errors import UserError, needs
from glmix.files import check_folder
from glmix.models import MODEL_NAMES
from glmix.ranges import NonNegativeInt, PositiveInt
from glmix.studies.rows import chosen_rows, study_named
from glmix.tasks import TASKS, task_named
from glmix.training.options import TrainOptions

with needs("train"):
    from glmix.studies.report import write_report
    from glmix.studies.runs import MARK, Trainings, begin, check_rows, planned, read_settings, settings_of, train_all
    from glmix.training.resuming import occupied


@dataclass
class StudyOptions:
    """Options of `glmix study` beside those of `glmix train`, which are of each run.

    Args:
        study: integration, clustering, kernel, slots, attention, stages, road or cost.
        seeds: runs of each row, from --seed on.
        rows: of the study, with commas between; left out, all.
        base: row that the others are compared with; left out, the study's own.
        jobs: runs at a time, which share the cores.
        dry_run: print the runs' commands, and do nothing.
        report: train nothing; the report of what is there.
        rounds: passes of each network whose times are taken in turns, for the report; 0 for no times.
    """

    study: str = ""
    seeds: PositiveInt = 3
    rows: str = ""
    base: str = ""
    jobs: PositiveInt = 1
    dry_run: bool = False
    report: bool = False
    rounds: NonNegativeInt = 15
    given: ClassVar[frozenset[str]] = frozenset()  # as of the options of a training, which stand beside these


def schema_of(asked: dict[str, str]) -> Any:
    """The options of a study, and of the trainings that a command line asks for."""
    task = training_schema_of({name: value for name, value in asked.items() if name != "out"})
    if task not in (TASKS["classify"].options, TASKS["token-label"].options):
        raise UserError("a study is of classifiers: --task classify or token-label")
    own = {
        "__doc__": "Options of `glmix study`.",
        "GROUPS": task.GROUPS | {"study": "the study"},
    }
    return make_dataclass("Options", [], bases=(StudyOptions, task), namespace=own)


def study(options: StudyOptions) -> int:
    """Train the rows of a study side by side, as `glmix train` would one by one, and compare them.

    Args:
        options: those of the study, and of `glmix train` for its runs; `out` is the folder of all.
    """
    training = training_of(options)
    out = Path(training.out)
    rows = chosen_rows(options.study, [row.strip() for row in options.rows.split(",") if row.strip()])
    base = options.base or study_named(options.study).base
    chosen_rows(options.study, [base])
    seeds: Sequence[int] = range(training.seed, training.seed + options.seeds)
    runs = planned(rows, options.seeds, training)
    check_folder("--out", training.out)
    if options.dry_run and options.report:
        raise UserError("--dry-run prints what would be trained, and --report trains nothing; leave one out")
    if not options.report:
        check_rows(runs)
    others = [name for name, row in rows.items() if row.model]
    if training.model_args and others and not options.report:
        say(f"--model-args are not for {', '.join(others)}, which are other networks")
    if options.dry_run:
        for run in runs:
            print(shlex.join(["glmix", *run.command()]) + ("  # done" if run.done else ""))
        return 0
    failed: dict[str, str] = {}
    if not options.report:
        settings = settings_of(options.study, training)
        start = Trainings(options.jobs)
        with occupied(out), start.listening():
            begin(out, settings)
            failed = train_all(runs, options.jobs, start)
    settings = read_settings(out)
    if settings["study"] != options.study:
        raise UserError(f"{out}: there lies the study {settings['study']}, not {options.study}")
    if failed and not any(run.done for run in runs):
        raise UserError(f"all runs failed; {next(iter(failed))}: {next(iter(failed.values()))}")
    shown = list(rows)
    if base not in rows and any(out.glob(f"{base}/*/{MARK}")):
        shown.insert(0, base)  # of runs before, what those of now are compared with
    if options.report and "seeds" not in options.given:
        seeds = seeds_begun(out, shown) or seeds
    print(write_report(out, settings, shown, seeds, base, options.rounds))
    for name, why in failed.items():
        print(f"failed: {name}: {why}")
    return 1 if failed else 0


def seeds_begun(out: Path, rows: Iterable[str]) -> list[int]:
    """The seeds of which any of the rows has a run, done or not."""
    return sorted({int(folder.name) for row in rows for folder in out.glob(f"{row}/*") if folder.name.isdigit()})


def training_of(options: Any) -> TrainOptions:
    """The options that the trainings of a study share.

    Raises:
        UserError: of a network that the study is not of.
    """
    task = task_named(options.task).options
    training = task(**{field.name: getattr(options, field.name) for field in fields(task)})
    training.resume = False
    fixed = study_named(options.study).model
    if fixed and "model" in options.given and options.model != fixed:
        raise UserError(f"the study {options.study} is of {fixed}, not {options.model}; leave --model out")
    training.model = fixed or training.model
    if training.model.split(".")[0] not in MODEL_NAMES:
        raise UserError(f"--model {training.model}: the rows of a study are of a GLNet (`glmix models` lists all)")
    others = [row.model for row in study_named(options.study).rows.values() if row.model]
    if others and options.task == "token-label":
        raise UserError(f"the study {options.study}: {others[0]} has no head for token labels; --task classify")
    return training
