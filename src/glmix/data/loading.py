"""From labelled files to batches: seeded per (seed, epoch, index), so a run can be cut anywhere and repeated exactly."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from glmix.data.images import BadImage

TRIES = 1000  # images tried in place of an unusable one: a damaged folder is passed over, vanished data is not walked


class Images(Protocol):
    """Labelled images by index: files (`ImageSet`) or generated ones (`SceneSet`)."""

    @property
    def labels(self) -> list[int]: ...

    @property
    def classes(self) -> list[str]: ...

    @property
    def names(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Image.Image: ...


@dataclass
class Batch:
    """Images (B, C, H, W), labels (B,), and the names of the files that could not be used, with reasons."""

    images: Tensor
    labels: Tensor
    skipped: list[str]

    def pin_memory(self) -> "Batch":
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.skipped)

    def to(self, device: Any, **kwargs: Any) -> "Batch":
        return Batch(self.images.to(device, **kwargs), self.labels.to(device, **kwargs), self.skipped)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's (CPU) generators seeded from `key`, and put back afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seeds = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(int(seeds[2]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class Prepared(Dataset):
    """Images through a transform. Asked with (epoch, index, repeat); randomness depends on these and the seed alone.

    In training an unusable image is replaced by the next usable one of `TRIES`; in evaluation it is left out. Both are
    reported.
    """

    def __init__(self, images: Images, transform: Any, seed: int = 0, replace_bad: bool = False) -> None:
        self.images, self.transform, self.seed, self.replace_bad = images, transform, seed, replace_bad

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor | None, int, list[str]]:
        epoch, index, repeat = key
        skipped: list[str] = []
        with seeded(self.seed, epoch, index, repeat):
            for _ in range(min(len(self), TRIES) if self.replace_bad else 1):
                try:
                    return self.transform(self.images.read(index)), self.images.labels[index], skipped
                except BadImage as error:
                    skipped.append(str(error))
                    index = (index + 1) % len(self)
        return None, -1, skipped


def collate(samples: list[tuple[Tensor | None, int, list[str]]]) -> Batch:
    """Stack what is usable."""
    skipped = [name for *_, names in samples for name in names]
    usable = [(image, label) for image, label, _ in samples if image is not None]
    if not usable:
        return Batch(torch.empty(0, 3, 1, 1), torch.empty(0, dtype=torch.long), skipped)
    return Batch(torch.stack([image for image, _ in usable]), torch.tensor([label for _, label in usable]), skipped)


class EpochOrder(Sampler):
    """(epoch, index, repeat) keys, in an order fixed by (seed, epoch), for one of `replicas` processes.

    Processes take whole batches of `block` keys in turn, so several processes see the same micro-batches as one that
    accumulates their gradients. When shuffled, what does not fill a batch for every process is left out of the epoch.
    `repeats` above 1 is repeated augmentation (Hoffer et al., 2020): every image comes that often, with other
    randomness, and the epoch is cut to its usual length.
    """

    def __init__(
        self,
        length: int,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        replicas: int = 1,
        repeats: int = 1,
        block: int = 1,
    ) -> None:
        self.length, self.shuffle, self.seed, self.rank = length, shuffle, seed, rank
        self.replicas, self.repeats, self.block = replicas, repeats, block
        self.epoch = self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def resume_at(self, epoch: int, skip: int) -> None:
        """Go on within `epoch`, the first `skip` keys of this process left out once."""
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        if self.shuffle:
            return self.length // (self.block * self.replicas) * self.block
        return len(range(self.rank, self.length, self.replicas))

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
            keys = np.stack([np.repeat(order, self.repeats), np.tile(np.arange(self.repeats), self.length)], 1)
            keys = (
                keys[: len(self) * self.replicas].reshape(-1, self.replicas, self.block, 2)[:, self.rank].reshape(-1, 2)
            )
        else:
            order = np.arange(self.rank, self.length, self.replicas)
            keys = np.stack([order, np.zeros_like(order)], 1)
        skip, self.skip = self.skip, 0
        return iter([(self.epoch, index, repeat) for index, repeat in keys[skip:].tolist()])


def make_loader(
    dataset: Prepared,
    order: EpochOrder,
    batch_size: int,
    workers: int,
    drop_last: bool = False,
    gather: Callable[[list[Any]], Batch] = collate,
) -> DataLoader:
    """Batches of `dataset` in `order`."""
    return DataLoader(
        dataset,
        batch_size,
        sampler=order,
        num_workers=workers,
        collate_fn=gather,
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )
