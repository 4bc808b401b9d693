"""Memory of what an op gives: results of their own, laid out as callers see them, and cotangents that nobody reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def owned(
    made: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
    strides: Sequence[Sequence[int] | None],
    dtypes: Sequence[torch.dtype],
    inputs: Sequence[Tensor],
) -> list[Tensor]:
    """Results with memory of their own, with these strides or None for contiguous: an op's results alias neither its
    inputs nor each other. Those that code has written as the op says are taken as they are."""
    taken = {t.untyped_storage().data_ptr() for t in inputs}
    made_own = []
    for tensor, shape, wanted, dtype in zip(made, shapes, strides, dtypes, strict=True):
        if tensor.shape != shape:
            tensor = tensor.expand(shape)
        laid = tensor.is_contiguous() if wanted is None else _has_strides(tensor, wanted)
        memory = tensor.untyped_storage().data_ptr()
        if not laid or tensor.dtype != dtype or memory in taken:
            like = {"dtype": dtype, "device": tensor.device}
            fresh = torch.empty(shape, **like) if wanted is None else torch.empty_strided(shape, wanted, **like)
            tensor = fresh.copy_(tensor)
            memory = tensor.untyped_storage().data_ptr()
        taken.add(memory)
        made_own.append(tensor)
    return made_own


def _has_strides(tensor: Tensor, wanted: Sequence[int]) -> bool:
    """Whether a tensor's strides are these where they mean something."""
    strides = tensor.stride()
    return strides == wanted or all(n == 1 or a == b for n, a, b in zip(tensor.shape, strides, wanted, strict=True))


@lru_cache(maxsize=256)
def strides_like(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Those that `empty_like` gives a tensor."""
    return torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()


def with_zeros(
    grads: Sequence[Tensor | None], results: Sequence[tuple[torch.Size, torch.dtype]], like: Tensor
) -> list[Tensor]:
    """Cotangents of results, those that nobody reads zero: one tile of zeros, for all states, heads and sequences."""
    most: dict[torch.dtype, int] = {}
    for grad, (shape, dtype) in zip(grads, results, strict=True):
        if grad is None:
            most[dtype] = max(most.get(dtype, 0), math.prod(shape[2:]))
    zeros = {dtype: like.new_zeros(size, dtype=dtype) for dtype, size in most.items()}
    given = []
    for grad, (shape, dtype) in zip(grads, results, strict=True):
        if grad is None:
            within = [math.prod(shape[axis + 1 :]) for axis in range(2, len(shape))]
            grad = zeros[dtype].as_strided(shape, (0, 0, *within))
        given.append(grad)
    return given
