"""`glmix check-data`."""

from typing import Literal

from glmix.data.check import check_samples
from glmix.data.samples import NOT_THERE, OTHER_SPLITS, Skipped
from glmix.errors import UserError
from glmix.tasks import task_named


def check_data(data: str, task: Literal["segment", "detect", "classify"]) -> None:
    """Read all of a data set, and name what of it cannot be used, and why; the status is 2 where there is any.

    Args:
        data: as for `glmix train`.
        task: what it is to be used for.
    """
    meant = task_named(task)
    opened = meant.open(data)
    whole = opened.whole
    absent: list[Skipped] = []
    for found in opened.left_out:
        every = [] if found.reason.startswith(OTHER_SPLITS) else getattr(found, "every", [])
        each = [Skipped(name, found.reason) for name in every] or [found]
        absent += each if found.reason == NOT_THERE else []
        for one in each:
            print(f"not used: {one}")
    unusable = (meant.check or check_samples)(whole)
    for found in unusable:
        print(f"unusable: {found}")
    problems = absent + unusable
    parts = ", ".join(f"{len(indices)} {split}" for split, indices in opened.named.items())
    print(f"{len(whole)} images{f' ({parts})' if parts else ''}, {len(whole.classes)} classes")
    if problems:
        raise UserError(
            f"{data}: {len(problems)} of {len(whole) + len(absent)} images cannot be used (first: {problems[0]})"
        )
