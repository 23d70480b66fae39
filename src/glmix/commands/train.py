"""`glmix train`."""

import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from glmix.console import say
from glmix.errors import UserError, needs
from glmix.slots.look import is_idle
from glmix.tasks import TASKS, options_of, task_named
from glmix.training.options import TrainOptions

with needs("train"):
    from glmix.training.module import Trained
    from glmix.training.run import fit


def train(options: TrainOptions) -> None:
    """Train a model on your images.

    Args:
        options: those of a task, see TrainOptions.
    """
    options = as_begun(options) if options.resume else options
    trained = fit(task_named(options.task), options)
    if trained.trainer.is_global_zero:
        report(trained)


def schema_of(asked: dict[str, str]) -> type[TrainOptions]:
    """The options of the task that a command line asks for: by --task, by a recipe, or by the run that it goes on with.

    Args:
        asked: what it gives for `task`, `config`, and `out` and `resume` together.
    """
    places = [Path(asked["config"])] if "config" in asked else []
    places += [Path(asked["out"]) / "config.yaml"] if "out" in asked and "resume" in asked else []
    if "task" in asked:
        return task_named(asked["task"]).options
    if "token_labels" in asked:
        return TASKS["token-label"].options
    for path in places:
        content = read_config(path) if path.is_file() else {}
        if isinstance(content, dict) and ("task" in content or content.get("token_labels")):
            return task_named(str(content.get("task", "token-label"))).options
    return TASKS["classify"].options


def read_config(path: Path) -> Any:
    """What a YAML file holds; None where it is none: who needs it says so."""
    try:
        return yaml.safe_load(path.read_text("utf-8", "surrogateescape"))
    except yaml.YAMLError:
        return None


def as_begun(options: TrainOptions) -> TrainOptions:
    """The options that a run was begun with, and of those given now the ones that are free to change.

    Raises:
        UserError: another option was given that would make it another run.
    """
    path = Path(options.out) / "config.yaml"
    if not path.exists():
        return options
    try:
        begun = options_of(read_config(path))
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged ({str(error).splitlines()[0]}); give all options anew, and remove it"
        ) from error
    usual = type(options)
    names = options.given or {f.name for f in fields(options) if getattr(options, f.name) != getattr(usual(), f.name)}
    changed = {}
    for name in sorted(names - {"resume", "out"}):
        value = getattr(options, name)
        if value != getattr(begun, name, None):
            if name not in begun.FREE:
                raise UserError(
                    f"{options.out}: was begun with {name} {getattr(begun, name, None)}, not {value}; leave that option "
                    "out, or start another run by another --out"
                )
            changed[name] = value
    if "epochs" in changed:
        changed.setdefault("steps", 0)
    return replace(begun, **changed, out=options.out, resume=True)


def tell(text: str) -> None:
    """A line of the report; a reader that went away spoils no training."""
    say(text, sys.stdout)


def report(trained: Trained) -> None:
    """What came out of the run, and what to type next."""
    options, out = trained.options, trained.options.out
    health = trained.slot_health.items()
    idle = [k.split("/")[1] for k, entropy in health if k.endswith("assignment_entropy") and is_idle(entropy)]
    if idle:
        tell(
            f"slots are idle (assignment close to uniform) in {', '.join(idle)}: see model_args slot_scale and slot_residual"
        )
    if trained.skipped:
        tell(f"skipped {len(trained.skipped)} unusable images:")
        for skipped in sorted(trained.skipped):
            tell(f"  {skipped}")
    show = trained.task.show
    best = [show({trained.task.headline: figure}) for figure in trained.best.values()]
    tell(f"best validation {' and, of the average, '.join(best)}; weights, curves.png and logs in {out}")
    tell(f"next: glmix eval --checkpoint {shlex.quote(out)} --data {shlex.quote(options.data)}")
    tell(f"      glmix explain --checkpoint {shlex.quote(out)} --out slots IMAGE…")
