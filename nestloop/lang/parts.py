"""A fast weight in parts, along an axis or as matrices: the compiler works on each, bodies go on reading the whole.

Where a loop declares nl.fast("dk", "dv + 1"), dv columns of values and one of ones, tiles of dv columns and of one are
less than a tile of dv + 1, whose next power of two is twice dv.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


class StaysWhole(Exception):
    """A body takes a fast weight as a whole, or what is made of it; its text says what does."""


class Apart(ABC):
    """One fast weight, and what it is apart.

    Attributes:
        whole: its name.
        names: of the parts, in order.
    """

    whole: str
    names: tuple[str, ...]

    @abstractmethod
    def _joined(self, parts: list[Any]) -> Any:
        """The whole of its parts."""

    @abstractmethod
    def _taken(self, value: Any) -> Sequence[Any]:
        """The parts of the whole."""

    def join(self, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """Tensors by name, the whole in the place of its parts: of the weight, and of what is as it is ("w__momentum").

        prefix: of all names.
        """
        first, *others = names = [prefix + name for name in self.names]
        made = {}
        for name, value in values.items():
            tail = _tail(name, first)
            if tail is not None:
                made[prefix + self.whole + tail] = self._joined([values[one + tail] for one in names])
            elif all(_tail(name, other) is None for other in others):
                made[name] = value
        return made

    def take_apart(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The other way around."""
        made: dict[str, Any] = {}
        for name, value in values.items():
            tail = _tail(name, self.whole)
            if tail is None:
                made[name] = value
            else:
                made |= {part + tail: piece for part, piece in zip(self.names, self._taken(value), strict=True)}
        return made


@dataclass(frozen=True)
class Parts(Apart):
    """A fast weight in parts along an axis.

    Attributes:
        axis: of its dims, counted from the last: -1, -2, ...
        sizes: of the parts' axis.
    """

    whole: str
    axis: int
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def _joined(self, parts: list[Any]) -> Any:
        return torch.cat(parts, self.axis)

    def _taken(self, value: Any) -> Sequence[Any]:
        return value.split(self.sizes, self.axis)


@dataclass(frozen=True)
class Stack(Apart):
    """A fast weight of several axes as what it is to the bodies: matrices, one for each place along some of its axes.

    Attributes:
        names: of the matrices, the last axis of `over` the fastest; that of the weight where it is one matrix.
        shape: of the weight.
        over: its axes, of those there is a matrix for each place of; maybe none.
        rows, columns: those that a matrix's rows and columns run along.
    """

    whole: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    over: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    def _joined(self, parts: list[Any]) -> Any:
        stacked = torch.stack(parts, -3)
        order, lead = (*self.over, *self.rows, *self.columns), stacked.shape[:-3]
        split = stacked.reshape(*lead, *(self.shape[axis] for axis in order))
        return split.permute(*range(len(lead)), *(len(lead) + order.index(axis) for axis in range(len(order))))

    def _taken(self, value: Any) -> Sequence[Any]:
        lead = value.ndim - len(self.shape)
        turned = value.permute(*range(lead), *(lead + d for d in (*self.over, *self.rows, *self.columns)))
        sizes = [self._size(axes) for axes in (self.over, self.rows, self.columns)]
        return turned.reshape(*value.shape[:lead], *sizes).unbind(-3)

    def _size(self, axes: tuple[int, ...]) -> int:
        size = 1
        for axis in axes:  # which torch.compile follows, unlike a product of what a generator gives
            size *= self.shape[axis]
        return size


def _tail(name: str, weight: str) -> str | None:
    """What follows a weight's name in that of a tensor which is as it is; None where that is of another."""
    tail = name.removeprefix(weight)
    return tail if name.startswith(weight) and (not tail or tail.startswith("__")) else None


def joined(parts: Sequence[Apart], values: Mapping[str, Any], prefix: str = "") -> Mapping[str, Any]:
    """Tensors by name, all that was taken apart whole again; `parts` in the order in which that was done."""
    for one in reversed(parts):
        values = one.join(values, prefix)
    return values


def apart(parts: Sequence[Apart], values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Tensors by name, all in parts."""
    for one in parts:
        values = one.take_apart(values)
    return values
