"""Batches of tensors, decoded in worker processes; unreadable images are left out and reported."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nestloop.models.data.order import Place
from nestloop.models.data.sources import Source
from nestloop.models.errors import TooManyUnreadableError
from nestloop.models.seeding import Purpose, derive_seed

# What Pillow raises for damaged files of the formats it reads.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
Transform = Callable[[Image.Image], Tensor]


class Batch(NamedTuple):
    """images float32 [B, C, rows, cols], labels int64 [B], valid bool [B].

    An unreadable image keeps its place as zeros with `valid` False, so that every batch has its full shape;
    `unreadable` holds (index, name, reason) of each.
    """

    images: Tensor
    labels: Tensor
    valid: Tensor
    unreadable: list[tuple[int, str, str]]

    def to(self, device: torch.device) -> Batch:
        images, labels, valid = (tensor.to(device, non_blocking=True) for tensor in self[:3])
        return Batch(images, labels, valid, self.unreadable)


class Sample(NamedTuple):
    """One image [C, rows, cols] and its label, or what went wrong with it."""

    image: Tensor | None
    label: int
    failure: tuple[int, str, str] | None


class ImageDataset(Dataset):
    """Reads and transforms one image; its random choices are seeded by (seed, epoch, index) alone.

    numbers: what the source's classes are numbered in the model, if not as in the source.
    """

    def __init__(
        self, source: Source, transform: Transform, seed: int = 0, numbers: Sequence[int] | None = None
    ) -> None:
        self.source, self.transform, self.seed, self.numbers = source, transform, seed, numbers

    def __getitem__(self, place: Place) -> Sample:
        epoch, index = place
        try:
            image, label = self.source.read(index)
        except UNREADABLE as error:
            return Sample(None, 0, (index, self.source.name(index), f"{type(error).__name__}: {error}"))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.seed, Purpose.AUGMENT, epoch, index))
            return Sample(self.transform(image), label if self.numbers is None else self.numbers[label], None)


class Collate:
    """Samples -> Batch; shape: of one image, needed where every image of a batch is unreadable."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape

    def __call__(self, samples: list[Sample]) -> Batch:
        blank = torch.zeros(self.shape)
        return Batch(
            images=torch.stack([blank if sample.image is None else sample.image for sample in samples]),
            labels=torch.tensor([sample.label for sample in samples]),
            valid=torch.tensor([sample.image is not None for sample in samples]),
            unreadable=[sample.failure for sample in samples if sample.failure is not None],
        )


def batch_loader(
    dataset: ImageDataset,
    order: Iterable[list[Place]],
    shape: tuple[int, int, int],
    workers: int,
    pin: bool = False,
) -> DataLoader:
    """Batches in the given order, decoded by `workers` lasting processes (0: in this one)."""
    return DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=Collate(shape),
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # else starting an epoch would advance the model's random numbers
    )


class UnreadableImages:
    """The unreadable images of one split met so far, each counted once.

    limit: the share of the split's images above which the run stops.
    """

    def __init__(self, split: str, length: int, limit: float) -> None:
        self.split, self.length, self.limit = split, length, limit
        self.found: dict[int, tuple[str, str]] = {}  # index -> (name, reason)

    def add(self, failures: Iterable[tuple[int, str, str]]) -> list[str]:
        """Counts failures; returns one line for each image that is new. Raises where the limit is passed."""
        lines = []
        for index, name, reason in failures:
            if index not in self.found:
                self.found[index] = (name, reason)
                lines.append(f"skipped unreadable image {name}: {reason}")
        if len(self.found) > self.limit * self.length:
            listed = "\n".join(f"    {name}: {reason}" for name, reason in self.found.values())
            raise TooManyUnreadableError(
                f"{len(self.found)} of {self.length} images of the {self.split} split cannot be read:\n{listed}",
                need=f"at most {self.limit:.3g} of the images",
                fix="repair or remove these files, or allow more with --max-unreadable SHARE",
            )
        return lines
