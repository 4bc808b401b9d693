"""`vmap` of an op of a loop: a batched axis becomes part of the heads, which never meet each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nestloop.lowering.runtime.signature import axis_of_heads


def batching_rule(
    op: Callable[..., Any], arguments: Sequence[str], heads: int, results: Sequence[str] | None
) -> Callable[..., Any]:
    """The rule for `torch.library.register_vmap`.

    Heads are independent given their weights, so V copies of H heads are V * H heads. Every tensor with an axis of
    heads gets one of V * H; those shared by heads are repeated for each copy and stay shared within it, which the sum
    over copies below the op's own results undoes.

    Args:
        op: forward or backward of a loop, on tensors.
        arguments: names of these.
        heads: H.
        results: names of forward's results; None of backward, which gives a cotangent for each of its first arguments.
    """
    axes = [axis_of_heads(name) for name in arguments]

    def rule(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> Any:
        size = info.batch_size
        made = op(*[_fold(t, d, size, heads, axis) for t, d, axis in zip(tensors, in_dims, axes, strict=True)])
        made = made if isinstance(made, tuple) else (made,)
        unfolded = []
        for index, tensor in enumerate(made):
            axis = 0 if results is None else axis_of_heads(results[index])
            split = tensor.unflatten(axis, (size, -1)).movedim(axis, 0)
            unfolded.append(_sum_to(split, tensors[index], in_dims[index]) if results is None else split)
        out = tuple(unfolded) if len(unfolded) > 1 else unfolded[0]
        return out, tuple([0] * len(unfolded)) if len(unfolded) > 1 else 0

    return rule


def _fold(tensor: Tensor, dim: int | None, size: int, heads: int, axis: int) -> Tensor:
    batched = tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    if batched.shape[axis + 1] != heads:
        batched = batched.expand(*batched.shape[: axis + 1], heads, *batched.shape[axis + 2 :])
    return batched.movedim(0, axis).flatten(axis, axis + 1)


def _sum_to(split: Tensor, original: Tensor, dim: int | None) -> Tensor:
    """A folded cotangent [V, H, ...] for an input that had fewer heads: summed over the heads that shared it."""
    heads = (original if dim is None else original.movedim(dim, 0)[0]).shape[0]
    return split.sum(1, keepdim=True) if heads == 1 and split.shape[1] > 1 else split
