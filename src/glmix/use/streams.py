"""A model over as many images as there are: in batches, in their order, with the next ones loading meanwhile."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from glmix.console import progress
from glmix.data.loading import Batch, Item, Prepared, Transform, default_workers
from glmix.data.prepare import Preparation
from glmix.data.samples import Source
from glmix.errors import Stopped, UserError
from glmix.journal import Journal
from glmix.training.processes import Processes

BATCH, PIXELS = 64, 224 * 224  # images of a usual batch, of so many pixels or fewer

Answer = Callable[[Batch], Sequence[Any]]  # plain data for each image of a batch on its device


def usual_batch(preparation: Preparation) -> int:
    """Images of a batch: fewer where they are large."""
    height, width = preparation.size
    return max(1, min(BATCH, BATCH * PIXELS // (height * width)))


class Runs(Sampler):
    """Batches of consecutive images, by number."""

    def __init__(self, length: int, size: int, numbers: Sequence[int]) -> None:
        self.length, self.size, self.numbers = length, size, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def images(self, number: int) -> range:
        return range(number * self.size, min((number + 1) * self.size, self.length))

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        return ([(0, index, 0) for index in self.images(number)] for number in self.numbers)


@dataclass(frozen=True)
class WithReasons:
    """A collate that also tells of each image why it is not in the batch; '' of those that are."""

    collate: Callable[[list[Item]], Batch]

    def __call__(self, items: list[Item]) -> tuple[Batch, list[str]]:
        return self.collate(items), ["" if sample is not None else skipped[0].reason for sample, skipped in items]


@dataclass(frozen=True)
class Stream:
    """Images on their way through a model.

    Attributes:
        source: the images.
        transform: of each.
        collate: to batches.
        answer: what is wanted of a batch.
        device: where the model is.
        batch_size: images of a batch; the same whenever the same answers are to come out.
        workers: processes that load images; -1 chooses.
    """

    source: Source
    transform: Transform
    collate: Callable[[list[Item]], Batch]
    answer: Answer
    device: torch.device
    batch_size: int
    workers: int = -1

    @property
    def batches(self) -> int:
        return -(-len(self.source) // self.batch_size)

    @torch.inference_mode()
    def records(self, numbers: Sequence[int] | None = None) -> Iterator[dict[int, Any]]:
        """For each of the batches (all, if none are listed): by image {"answer": …}, or {"error": reason}."""
        runs = Runs(len(self.source), self.batch_size, range(self.batches) if numbers is None else numbers)
        workers = self.workers if self.workers >= 0 else default_workers() * (len(runs) > 1)
        loader = DataLoader(
            Prepared(self.source, self.transform),
            batch_sampler=runs,
            num_workers=workers,
            collate_fn=WithReasons(self.collate),
            pin_memory=torch.cuda.is_available(),
        )
        batch: Batch
        for number, (batch, reasons) in zip(runs.numbers, loader, strict=True):
            answers = iter(self.answer(batch.to(self.device, non_blocking=True)) if len(batch) else ())
            images = runs.images(number)
            yield {
                image: {"error": reason} if reason else {"answer": next(answers)}
                for image, reason in zip(images, reasons, strict=True)
            }

    def kept(self, out: Path, settings: dict[str, Any], processes: Processes) -> Journal:
        """All records, in a journal beside `out`: those that are missing are made, each process its share.

        Raises:
            UserError: another command was begun for `out`; or none of the images can be read, and nothing is kept.
            Stopped: by Ctrl-C; what is done is kept.
        """
        settings = settings | {"images": self.source.digest(), "batch_size": self.batch_size}
        if processes.first:
            journal = Journal(out, settings, len(self.source))
        processes.wait()
        if not processes.first:
            journal = Journal(out, settings, len(self.source))
        marks = journal.done()
        processes.wait()  # all have seen the same before any adds to it
        runs = Runs(len(self.source), self.batch_size, [])
        missing = [n for n in range(self.batches) if not all(marks[i] for i in runs.images(n))]
        begun, before = time.monotonic(), sum(marks)
        done = before
        try:
            for records in self.records(missing[processes.rank :: processes.count]):
                journal.add(records)
                done += len(records) * processes.count
                if processes.first:
                    rate = (done - before) / (time.monotonic() - begun)
                    progress(min(done, len(self.source)), len(self.source), f"images, {rate:.0f} images/s")
        except KeyboardInterrupt as error:
            raise Stopped(f"{out}: stopped; the same command goes on", 130) from error
        finally:
            journal.close()
        processes.wait()
        if processes.first and not any("answer" in record for _, record in journal.merged()):
            (number, record), *_ = journal.merged()
            journal.remove()
            raise nothing_read(self.source, number, record["error"])
        return journal


def nothing_read(source: Source, number: int, reason: str) -> UserError:
    """That none of a source's images can be used, with the reason of one."""
    return UserError(f"none of {len(source)} images could be read (first: {source.files[number]}: {reason})")
