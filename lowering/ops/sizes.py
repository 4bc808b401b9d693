"""Sizes of axes compared, of which one may be a number made of n: for every n, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every n."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return a.node.values == b.node.values


def is_less(a: Any, b: Any) -> bool | None:
    """Whether a size is less than another for every n; None where that depends on n."""
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    many = (b if isinstance(a, int) else a).node
    left, right = (many.wrap_int(s).values if isinstance(s, int) else s.node.values for s in (a, b))
    found = {x < y for x, y in zip(left, right, strict=True)}
    return found.pop() if len(found) == 1 else None


def lesser(a: Any, b: Any) -> Any:
    """The lesser of two sizes.

    Raises:
        RuntimeError: that depends on n. It speaks of sizes, as those errors of PyTorch do after which each length is
            traced alone.
    """
    less = is_less(a, b)
    if less is None and not same_size(a, b):
        raise RuntimeError(f"which of the sizes {a} and {b} is less depends on the number of tokens")
    return a if less else b


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are equal for every n."""
    return len(a) == len(b) and all(map(same_size, a, b))


def broadcast(shapes: Sequence[Sequence[Any]]) -> list[Any]:
    """The shape of operands side by side; PyTorch's own words where they do not fit."""
    result: list[Any] = [1] * max(map(len, shapes), default=0)
    for shape in shapes:
        for axis in range(-len(shape), 0):
            mine, other = result[axis], shape[axis]
            if same_size(mine, 1):
                result[axis] = other
            elif not same_size(other, 1) and not same_size(mine, other) and mine != other:  # a decision, where one is n
                raise RuntimeError(
                    f"The size of tensor a ({mine}) must match the size of tensor b ({other}) "
                    f"at non-singleton dimension {axis % len(result)})"
                )
    return result
