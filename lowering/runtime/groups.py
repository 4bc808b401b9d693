"""Generated PyTorch on groups of sequences whose tiles stay in cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from nestloop.lowering.runtime.signature import Signature, axis_of_heads

_DEVICE_ROWS = 256  # a device works on so many times more tokens at once than fit a CPU's cache


def in_groups(
    function: Callable[..., Sequence[Tensor | None]],
    signature: Signature,
    given: Mapping[str, Tensor],
    order: Tensor | None,
    low: torch.dtype | None,
    rows: int,
    shared: Sequence[str] | None,
) -> Sequence[Tensor | None]:
    """The results of generated code, of all sequences.

    A result that has one row per sequence is joined; the cotangent of what sequences share is summed.

    Args:
        function: `forward` or `backward` of a generated module.
        given: its tensors by name, [H or 1, B or 1, ...].
        order: [H or 1, B or 1, tokens], for schedules that have one.
        low: the dtype of products, None for that of the tensors.
        rows: tokens, of all sequences together, that are worked on at a time on a CPU.
        shared: of `backward`, the names of what all steps share, whose cotangents it gives too; None of `forward`.
    """
    tensors = list(given.values())
    inputs = [given[n] for n in signature.inputs]
    sequences, length = max(t.shape[1] for t in inputs), inputs[0].shape[2]
    rows = rows if inputs[0].device.type == "cpu" else rows * _DEVICE_ROWS
    size = max(1, rows // max(length, 1))
    if size >= sequences:
        return function(*tensors, order, low, rows)
    axes = [axis_of_heads(n) + 1 for n in given]
    parts = []
    for start in range(0, sequences, size):
        stop = min(start + size, sequences)
        group = [_narrow(t, axis, start, stop) for t, axis in zip(tensors, axes, strict=True)]
        parts.append(function(*group, None if order is None else _narrow(order, 1, start, stop), low, rows))
    if shared is None:
        joined = [axis_of_heads(n) + 1 for n in signature.results]
        sizes = [min(start + size, sequences) - start for start in range(0, sequences, size)]
        return [_join(p, axis, sizes) for p, axis in zip(zip(*parts, strict=True), joined, strict=False)]
    taken = [t for n, t in given.items() if n in signature.inputs or n in shared]
    gathered = zip(zip(*parts, strict=True), taken, strict=True)
    return [
        None if p[0] is None else torch.cat(p, 1) if like.shape[1] > 1 else torch.stack(p).sum(0)
        for p, like in gathered
    ]


def _narrow(tensor: Tensor, axis: int, start: int, stop: int) -> Tensor:
    """The sequences start:stop of a tensor; what they share, whole."""
    return tensor if tensor.shape[axis] == 1 else tensor.narrow(axis, start, stop - start)


def _join(parts: Sequence[Tensor], axis: int, sizes: Sequence[int]) -> Tensor:
    """Results of groups of sequences, side by side; one that does not depend on the sequence is repeated."""
    whole = [p.expand(*p.shape[:axis], n, *p.shape[axis + 1 :]) for p, n in zip(parts, sizes, strict=True)]
    return torch.cat(whole, axis)
