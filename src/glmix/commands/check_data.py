"""`glmix check-data`."""

from typing import Literal

from glmix.data.check import Checked, check_samples, gaps
from glmix.data.samples import LOST, OTHER_SPLITS, Skipped
from glmix.errors import UserError
from glmix.tasks import task_named

USED = (" kept", "cut to it")  # words of reasons that tell of what is used all the same


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
        absent += each if found.reason in LOST else []
        for one in each:
            print(f"{'note' if any(word in one.reason for word in USED) else 'not used'}: {one}")
    parts = {split: whole.take(indices) for split, indices in opened.named.items()} or {"": whole}
    checks = {split: (meant.check or check_samples)(source) for split, source in parts.items()}
    unusable = [found for checked in checks.values() for found in checked.unusable]
    for found in unusable:
        print(f"unusable: {found}")
    for note in [note for checked in checks.values() for note in checked.notes] + lacking(whole.classes, checks):
        print(f"note: {note}")
    problems = absent + unusable
    counts = ", ".join(f"{len(indices)} {split}" for split, indices in opened.named.items())
    print(f"{len(whole)} images{f' ({counts})' if counts else ''}, {len(whole.classes)} classes")
    if problems:
        raise UserError(
            f"{data}: {len(problems)} of {len(whole) + len(absent)} images cannot be used (first: {problems[0]})"
        )


def lacking(classes: list[str], checks: dict[str, Checked]) -> list[Skipped]:
    """The classes that are not in the images, where the check of the splits, or of all, tells it."""
    learned, *held_out = [checks[split].classes for split in ("train", "val", "") if split in checks]
    return gaps(classes, learned, *held_out) if learned else []
