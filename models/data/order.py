"""Which image is read when: a permutation an epoch, cut into global batches, ranks and micro-batches.

The order depends on the seed, the epoch and the global batch alone. Ranks and micro-batches are consecutive
slices of one global batch, so one process or eight see the same images in the same step, and any step can be
resumed at.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nestloop.models.errors import RecipeError
from nestloop.models.seeding import Purpose, generator

Place = tuple[int, int]  # (epoch, image)


class TrainOrder:
    """Iterates over the micro-batches of one rank and epoch, from any step on.

    length: images of the split. batch: images of a global batch. The images left over by the last full
    batch of an epoch are not seen in that epoch.
    """

    def __init__(self, length: int, batch: int, rank: int = 0, world: int = 1, accumulate: int = 1, seed: int = 0):
        if batch % (world * accumulate):
            raise RecipeError(
                f"a batch of {batch} does not split evenly",
                given=f"batch {batch}, {world} processes, {accumulate} micro-batches each",
                need="a batch that processes x micro-batches divides",
                fix=f"--batch {max(1, batch // (world * accumulate)) * world * accumulate}",
            )
        if batch > length:
            raise RecipeError(
                "a batch is larger than the train split",
                given=f"batch {batch}, {length} images",
                need="at least one full batch an epoch",
                fix=f"--batch {length // (world * accumulate) * world * accumulate or world * accumulate}",
            )
        self.length, self.batch, self.seed = length, batch, seed
        self.rank, self.accumulate = rank, accumulate
        self.micro = batch // (world * accumulate)
        self.steps_per_epoch = length // batch
        self.epoch = self.first_step = 0

    def start_at(self, epoch: int, step: int = 0) -> None:
        """The next iteration yields this epoch from this step on."""
        self.epoch, self.first_step = epoch, step

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.first_step) * self.accumulate

    def __iter__(self) -> Iterator[list[Place]]:
        epoch = self.epoch
        permutation = torch.randperm(self.length, generator=generator(self.seed, Purpose.ORDER, epoch)).tolist()
        for step in range(self.first_step, self.steps_per_epoch):
            for part in range(self.accumulate):
                start = step * self.batch + (self.rank * self.accumulate + part) * self.micro
                yield [(epoch, index) for index in permutation[start : start + self.micro]]


class EvalOrder:
    """Every image once, over all ranks together: rank r reads r, r + world, r + 2 world, ..."""

    def __init__(self, length: int, batch: int, rank: int = 0, world: int = 1) -> None:
        self.indices, self.batch = range(rank, length, world), batch

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch)

    def __iter__(self) -> Iterator[list[Place]]:
        for start in range(0, len(self.indices), self.batch):
            yield [(0, index) for index in self.indices[start : start + self.batch]]
