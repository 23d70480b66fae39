"""What models are trained and used for: the table of tasks."""

import difflib
from collections.abc import Mapping
from typing import Any

from glmix.errors import UserError
from glmix.tasks.classify import CLASSIFY
from glmix.tasks.detect import DETECT
from glmix.tasks.segment import SEGMENT
from glmix.tasks.token_label import TOKEN_LABEL
from glmix.training.options import TrainOptions
from glmix.training.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (CLASSIFY, TOKEN_LABEL, DETECT, SEGMENT)}


def task_named(name: str) -> Task:
    """A task by its name.

    Raises:
        UserError: there is none; names those there are.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1)
        raise UserError(
            f"no task {name!r}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(TASKS)}")
        )
    return TASKS[name]


def options_of(content: Mapping[str, Any]) -> TrainOptions:
    """Options from plain data, such as the config.yaml of a run.

    Those written before there were tasks have the options of token labels always; only where labels are named were
    these used. Those written before the cosine began after the warm-up keep the schedule that they had.

    Raises:
        ValueError, TypeError: an option is unknown or out of bounds.
    """
    content = dict(content)
    if "task" not in content:
        labelled = bool(content.get("token_labels"))
        content["task"] = "token-label" if labelled else "classify"
        if not labelled:
            content.pop("token_labels", None)
            content.pop("dense_weight", None)
    if "warmup_prefix" not in content:
        content |= {"warmup_prefix": False, "warmup_lr": min(1e-6, content.get("lr", 1e-6))}
    return task_named(content["task"]).options(**content)
