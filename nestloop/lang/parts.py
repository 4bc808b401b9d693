"""A fast weight in parts along an axis: the compiler works on each, bodies go on reading the whole.

Where a loop declares nl.fast("dk", "dv + 1"), dv columns of values and one of ones, tiles of dv columns and of one are
less than a tile of dv + 1, whose next power of two is twice dv.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


class StaysWhole(Exception):
    """A body takes a fast weight as a whole, or what is made of it; its text says what does."""


@dataclass(frozen=True)
class Parts:
    """What one fast weight is apart.

    Attributes:
        whole: its name.
        axis: of its dims, counted from the last: -1, -2, ...
        names: of the parts, in order.
        sizes: of their axis.
    """

    whole: str
    axis: int
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def join(self, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """Tensors by name, the whole in the place of its parts: of the weight, and of what is as it is ("w__momentum").

        prefix: of all names.
        """
        first, *others = (prefix + name for name in self.names)
        made = dict(values)
        for name in values:
            tail = _tail(name, first)
            if tail is not None:
                parts = [made.pop(one + tail) for one in (first, *others)]
                made[prefix + self.whole + tail] = torch.cat(parts, self.axis)
        return made

    def take_apart(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The other way around: views of the whole."""
        made: dict[str, Any] = {}
        for name, value in values.items():
            tail = _tail(name, self.whole)
            if tail is None:
                made[name] = value
            else:
                pieces = value.split(self.sizes, self.axis)
                made |= {part + tail: piece for part, piece in zip(self.names, pieces, strict=True)}
        return made


def _tail(name: str, weight: str) -> str | None:
    """What follows a weight's name in that of a tensor which is as it is; None where that is of another."""
    tail = name.removeprefix(weight)
    return tail if name.startswith(weight) and (not tail or tail.startswith("__")) else None


def joined(parts: Sequence[Parts], values: Mapping[str, Any], prefix: str = "") -> Mapping[str, Any]:
    """Tensors by name, all that was taken apart whole again; `parts` in the order in which that was done."""
    for one in reversed(parts):
        values = one.join(values, prefix)
    return values


def apart(parts: Sequence[Parts], values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Tensors by name, all in parts."""
    for one in parts:
        values = one.take_apart(values)
    return values
