"""From sources to batches: seeded per (seed, epoch, index), so a run can be cut anywhere and repeated exactly."""

import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from glmix.data.images import BadImage
from glmix.data.samples import Sample, Skipped, Source

FILLED = 32  # pixels: images of a batch are filled up to multiples of the network's stride
TRIES = 1000  # images tried in place of an unusable one: a damaged folder is passed over, vanished data is not walked

Item = tuple[Sample | None, list[Skipped]]  # of tensors; None where the image cannot be used
Transform = Callable[[Sample], Sample]


@dataclass
class Batch:
    """Images (B, C, H, W), what is to be learned of them, and what could not be used.

    Attributes:
        images: of the usable samples.
        targets: of the task's kind, such as class indices (B,): a tensor, or tuples, lists and dictionaries of them.
        skipped: unusable samples, which are not among the images.
        names: of the samples, in the data set.
        sizes: heights and widths of the images before they were padded to one size; empty where none was.
    """

    images: Tensor
    targets: Any
    skipped: list[Skipped]
    names: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> "Batch":
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: Any, **kwargs: Any) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, **kwargs))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        def changed(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(changed(part) for part in value)
            if isinstance(value, dict):
                return {key: changed(part) for key, part in value.items()}
            return change(value) if isinstance(value, Tensor) else value

        return replace(self, images=change(self.images), targets=changed(self.targets))


def alike(batch: Batch, multiple: int = FILLED) -> Iterator[tuple[Tensor, list[tuple[int, int]]]]:
    """Images (B, C, H, W) of a batch and their sizes: all at once if of one size, else one by one, filled up as if alone.

    With what an image is filled up by to the size of others, slots would change.
    """
    if len(set(batch.sizes)) == 1:
        yield batch.images, batch.sizes
        return
    for image, size in zip(batch.images, batch.sizes, strict=True):
        height, width = (-(-side // multiple) * multiple for side in size)
        yield image[None, :, :height, :width], [size]


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's generators seeded from `key`, and put back afterwards.

    PyTorch's are the CPU's and, where this process uses CUDA (a loading process does not), the present GPU's: drop path
    and dropout draw from it.
    """
    on_gpu = torch.cuda.is_initialized()
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    before_on_gpu = torch.cuda.get_rng_state() if on_gpu else None
    seeds = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(int(seeds[2]))
    if on_gpu:
        torch.cuda.manual_seed(int(seeds[2]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        if before_on_gpu is not None:
            torch.cuda.set_rng_state(before_on_gpu)


class Prepared(Dataset):
    """A source through a transform. Asked with (epoch, index, repeat); randomness depends on these and the seed alone.

    In training an unusable sample is replaced by the next usable one of `TRIES`, image and target alike; in evaluation
    it is left out. Both are reported.
    """

    def __init__(self, source: Source, transform: Transform, seed: int = 0, replace_bad: bool = False) -> None:
        self.source, self.transform, self.seed, self.replace_bad = source, transform, seed, replace_bad

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int, int]) -> Item:
        epoch, index, repeat = key
        skipped: list[Skipped] = []
        with seeded(self.seed, epoch, index, repeat):
            for _ in range(min(len(self), TRIES) if self.replace_bad else 1):
                try:
                    sample = self.source.read(index)
                    return self.transform(sample)._replace(name=sample.name), skipped
                except BadImage as error:
                    skipped.append(Skipped(error.name, error.reason))
                    index = (index + 1) % len(self)
        return None, skipped


@dataclass(frozen=True)
class OfImage:
    """A transform of a sample's image alone; its target stays."""

    transform: Callable[[Any], Tensor]

    def __call__(self, sample: Sample) -> Sample:
        return sample._replace(image=self.transform(sample.image))


def stack(items: list[Item]) -> Batch:
    """A batch of what is usable; the samples' targets are numbers or tensors of one shape, or tuples of such."""
    skipped = [found for _, names in items for found in names]
    samples = [sample for sample, _ in items if sample is not None]
    if not samples:
        return Batch(torch.empty(0, 3, 1, 1), torch.empty(0, dtype=torch.long), skipped)
    images = torch.stack([s.image for s in samples])
    return Batch(images, _stacked([s.target for s in samples]), skipped, [s.name for s in samples])


def padded(items: list[Item], multiple: int = FILLED) -> Batch:
    """A batch of images of any sizes, filled with zeros to the right and below; the targets stay a list."""
    skipped = [found for _, names in items for found in names]
    samples = [sample for sample, _ in items if sample is not None]
    if not samples:
        return Batch(torch.empty(0, 3, 1, 1), [], skipped)
    sizes = [tuple(sample.image.shape[-2:]) for sample in samples]
    height, width = (-(-max(side) // multiple) * multiple for side in zip(*sizes, strict=True))
    images = samples[0].image.new_zeros(len(samples), samples[0].image.shape[0], height, width)
    for place, sample in zip(images, samples, strict=True):
        place[:, : sample.image.shape[-2], : sample.image.shape[-1]] = sample.image
    return Batch(images, [s.target for s in samples], skipped, [s.name for s in samples], sizes)


def _stacked(targets: list[Any]) -> Any:
    if targets[0] is None:  # images to predict
        return None
    if isinstance(targets[0], tuple):
        return tuple(_stacked(list(parts)) for parts in zip(*targets, strict=True))
    return torch.stack(targets) if isinstance(targets[0], Tensor) else torch.tensor(targets)


class EpochOrder(Sampler):
    """(epoch, index, repeat) keys, in an order fixed by (seed, epoch), for one of `processes`.

    The one place that counts batches and steps. When shuffled (training), an epoch is whole optimiser steps: what does
    not fill `accumulate` batches of every process is left out of it, other images each time. Processes take whole
    batches in turn, so several processes see the same micro-batches as one that accumulates their gradients. `repeats`
    above 1 is repeated augmentation (Hoffer et al., 2020): every image comes that often, with other randomness, and the
    epoch is cut to its usual length. Its copies are dealt in turn to the batches of a step, as in the reference to the
    processes, so that BatchNorm sees as many images as a batch has where a step has as many batches.

    Unshuffled (evaluation), all images come once, in one fixed mixed order: data is sorted by class, and any beginning
    of it, such as the first batch or `limit` images, is to stand for the whole.

    Args:
        length: number of images.
        batch_size: images of a batch, of one process.
        shuffle: for training.
        seed: of the order.
        rank, processes: which of how many processes this is.
        repeats: see above.
        accumulate: batches of an optimiser step.
        limit: batches of an epoch at most, of one process; 0 for all.

    Attributes:
        batches: of an epoch, of this process.
        steps: of the optimiser, in an epoch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
        repeats: int = 1,
        accumulate: int = 1,
        limit: int = 0,
    ) -> None:
        self.length, self.batch_size, self.shuffle, self.seed = length, batch_size, shuffle, seed
        self.rank, self.processes, self.repeats, self.accumulate, self.limit = (
            rank,
            processes,
            repeats,
            accumulate,
            limit,
        )
        self.epoch = self.skip = 0
        if shuffle:
            batches = length // (batch_size * processes)
            self.steps = (min(batches, limit) if limit else batches) // accumulate
            self.batches = self.steps * accumulate
        else:
            self.steps = 0
            self.batches = -(-len(self) // batch_size)

    @property
    def step_size(self) -> int:
        """Images of an optimiser step, of all processes."""
        return self.batch_size * self.processes * self.accumulate

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def resume_at(self, epoch: int, images: int) -> int:
        """Go on within `epoch`, of which all processes together have done `images`; those are left out once.

        A step that is only partly done, as processes or batches were others then, is done again: no image is missed.

        Returns:
            The batches of this process that are done.
        """
        steps = images // self.step_size
        self.epoch, self.skip = epoch, steps * self.accumulate * self.batch_size
        return steps * self.accumulate

    def __len__(self) -> int:
        if self.shuffle:
            return self.batches * self.batch_size
        mine = len(range(self.rank, self.length, self.processes))
        return min(mine, self.limit * self.batch_size) if self.limit else mine

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
            keys = np.stack([np.repeat(order, self.repeats), np.tile(np.arange(self.repeats), self.length)], 1)
            keys = keys[: len(self) * self.processes]
            if self.repeats > 1:
                dealt = keys.reshape(self.steps, self.batch_size, self.processes * self.accumulate, 2)
                keys = dealt.swapaxes(1, 2)
            keys = keys.reshape(-1, self.processes, self.batch_size, 2)[:, self.rank].reshape(-1, 2)
        else:
            order = np.random.default_rng(self.seed).permutation(self.length)[self.rank :: self.processes]
            keys = np.stack([order, np.zeros_like(order)], 1)[: len(self)]
        skip, self.skip = self.skip, 0
        return iter([(self.epoch, index, repeat) for index, repeat in keys[skip:].tolist()])


def default_workers() -> int:
    """Processes that load images: half of the cores, at most 8."""
    return min(8, max(1, (os.cpu_count() or 1) // 2))


def leave_to_the_run(worker: int) -> None:
    """What stops a run may reach all of its processes (`timeout`, SLURM, a closed terminal): that they load for decides.

    A second signal ends the worker as always, so nobody waits for one that hangs.
    """

    def once(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)

    for name in ("SIGTERM", "SIGHUP", "SIGUSR1"):
        if number := getattr(signal, name, None):  # some are not on Windows
            signal.signal(number, once)


def make_loader(
    prepared: Prepared, order: EpochOrder, workers: int, collate: Callable[[list[Item]], Batch] = stack
) -> DataLoader:
    """Batches of `prepared` in `order`."""
    return DataLoader(
        prepared,
        order.batch_size,
        sampler=order,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=leave_to_the_run,
        persistent_workers=workers > 0,
    )
