"""Tile operations that generated PyTorch calls.

A tile [n, d] of one head and sequence is, in generated code, a tensor [H, B, n, d]: heads, sequences, then the tile. An
axis H or B of size 1 means "the same for all": the initial fast weights are [H, 1, *], the token itself [1, B, n, D].
Elementwise ops broadcast over them; what does not is here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from nestloop import products
from nestloop.lang.schedule import even


def mm(a: Tensor, b: Tensor, low: torch.dtype | None) -> Tensor:
    """Matrix product of tiles [.., n, k] @ [.., k, m].

    Where b is the same for all sequences, the rows of all sequences make one larger product. With `low` (bfloat16,
    float16) the operands are rounded to it; the result is float32 again.
    """
    made = product(a, b, low)
    return made if low is None else made.to(torch.float32)


def product(a: Tensor, b: Tensor, low: torch.dtype | None) -> Tensor:
    """The same, whose result stays as rounded as its operands."""
    if low is not None:
        a, b = a.to(low), b if _is_side_by_side(a, b) else b.to(low)
    if _is_side_by_side(a, b):
        heads, m = b.shape[0], b.shape[3]
        wide = products.product(a[0].flatten(0, 1), _dense(b[:, 0].transpose(0, 1), a.dtype).flatten(1))
        return wide.reshape(a.shape[1], a.shape[2], heads, m).permute(2, 0, 1, 3)
    if b.shape[1] == 1 and a.shape[1] > 1:
        return torch.matmul(a.flatten(1, 2), b[:, 0]).unflatten(1, a.shape[1:3])
    return torch.matmul(a, b)


def _is_side_by_side(a: Tensor, b: Tensor) -> bool:
    """Whether every head reads the same rows of a, so that heads lie side by side in one product."""
    return a.shape[0] == 1 and b.shape[1] == 1 and b.shape[0] > 1


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in one piece of memory and a dtype: one copy makes both."""
    return x.contiguous() if x.dtype == dtype else x.to(dtype, memory_format=torch.contiguous_format)


def mm_like(a: Tensor, b: Tensor, like: Tensor, low: torch.dtype | None) -> Tensor:
    """The cotangent a @ b of `like`: summed over sequences, if they share it, within the product itself."""
    made = product_like(a, b, like, low)
    return made if low is None else made.to(torch.float32)


def product_like(a: Tensor, b: Tensor, like: Tensor, low: torch.dtype | None) -> Tensor:
    """The same, whose result stays as rounded as its operands where it is the product's."""
    if like.shape[0] == 1 and a.shape[0] > 1 and a.shape[0] == b.shape[0] and b.shape[1] == 1 < like.shape[1]:
        a = a if low is None else a.to(low)
        rows = a.permute(1, 2, 0, 3).flatten(0, 1).flatten(1, 2)  # the sum over heads is part of the product
        wide = products.product(rows, _dense(b[:, 0], a.dtype).flatten(0, 1))
        return wide.unflatten(0, a.shape[1:3]).unsqueeze(0)
    if like.shape[1] == 1 and a.shape[1] > 1 and b.shape[1] > 1:
        a, b = (a, b) if low is None else (a.to(low), b.to(low))
        if a.shape[0] == 1 < b.shape[0]:  # heads side by side
            wide = products.product(a[0].mT.flatten(0, 1).mT, b.permute(1, 2, 0, 3).flatten(0, 1).flatten(1, 2))
            return like_lead(wide.unflatten(1, (b.shape[0], b.shape[3])).transpose(0, 1).unsqueeze(1), like)
        return like_lead(torch.matmul(a.mT.flatten(1, 2).mT, b.flatten(1, 2)).unsqueeze(1), like)
    made = product(a, b, low)
    if made.shape[:2] == like.shape[:2]:
        return made
    return like_lead(made if low is None else made.to(torch.float32), like)  # what is added up is not rounded


def like_lead(cotangent: Tensor, like: Tensor) -> Tensor:
    """Sum a cotangent over the heads or sequences that share `like`."""
    shared = [axis for axis in (0, 1) if like.shape[axis] == 1 and cotangent.shape[axis] != 1]
    return cotangent.sum(shared, keepdim=True) if shared else cotangent


def for_each(state: Tensor, tokens: Tensor) -> Tensor:
    """A state of every sequence, where sequences may share one."""
    return state.expand(-1, tokens.shape[1], *[-1] * (state.ndim - 2))


LOST_BITS = 14  # of the 24 (float32) or 53 (float64) of a square, at most and for the worst of all vectors


def well_conditioned(rows: Sequence[Tensor], squares: Sequence[int]) -> Tensor:
    """Whether quadratic forms with the Gram matrices of these rows keep the precision of the squares they stand for:
    one element.

    Args:
        rows: tiles [H, 1, *, D], an axis H of size 1 being shared.
        squares: how many of them each square has, in order.
    """
    if len(rows) == 1:
        return independent(rows[0])
    heads, wide = max(tile.shape[0] for tile in rows), rows[0].shape[3]
    tiles = iter(rows)
    sides = [list(islice(tiles, count)) for count in squares]
    longest = max(sum(tile.shape[2] for tile in side) for side in sides)
    made = rows[0].new_zeros(len(sides), heads, longest, wide)
    for whole, side in zip(made, sides, strict=True):
        start = 0
        for tile in side:
            whole[:, start : start + tile.shape[2]] = tile[:, 0]
            start += tile.shape[2]
    return independent(made)


def independent(rows: Tensor) -> Tensor:
    """Whether each of some sets of rows [*, R, D], zeros aside, is far enough from linearly dependent: one element.

    Row i of a decoder is in z G with z_i, so the form z (G G^T) z^T is rounded like sum_i z_i^2 |G_i|^2. It is never
    smaller than this times the least eigenvalue of the correlations of the rows, which shows in whether a Cholesky
    factor of these exists below a shift: one of theirs is one of the Gram matrix, its rows scaled.
    """
    grams, kind = rows @ rows.mT, torch.finfo(rows.dtype)
    grams.diagonal(dim1=-2, dim2=-1).mul_(1 - 2.0**LOST_BITS * kind.eps).add_(kind.tiny)  # a row of zeros has a factor
    factor, failed = torch.linalg.cholesky_ex(grams)
    return ((failed == 0) & (factor[..., -1, -1] < math.inf)).all()  # what is not finite reaches the last element


def reshape(x: Tensor, *tile: int) -> Tensor:
    """The tile in another shape."""
    return x.reshape(*x.shape[:2], *tile)


def expand(x: Tensor, *tile: int) -> Tensor:
    """The tile broadcast to a shape."""
    x = x.reshape(*x.shape[:2], *[1] * (len(tile) + 2 - x.ndim), *x.shape[2:])
    return x.expand(*x.shape[:2], *tile)


def every_head(values: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Values repeated for each of the heads that the others have."""
    heads = max(t.shape[0] for t in others)
    return [v.expand(heads, *v.shape[1:]) for v in values]


def cat(tiles: Sequence[Tensor], axis: int) -> Tensor:
    """Tiles joined along an axis counted from the end."""
    heads, sequences = (max(t.shape[axis] for t in tiles) for axis in (0, 1))
    return torch.cat([t.expand(heads, sequences, *t.shape[2:]) for t in tiles], axis)


def filled(value: float, *tile: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tile of one number."""
    return torch.full((1, 1, *tile), value, dtype=dtype, device=device)


class Singular(Exception):
    """A linear system has no solution, or many; its text is the user's line, if there is one."""


class Indefinite(Exception):
    """A matrix has no Cholesky factor; its text is the user's line, if there is one."""


def solve(a: Tensor, b: Tensor, where: str) -> Tensor:
    """x of a x = b."""
    x, failed = torch.linalg.solve_ex(a, b)
    if bool(failed.any()):
        raise Singular(where)
    return x


def cholesky(a: Tensor, where: str) -> Tensor:
    """The lower triangle whose product with its transpose is a, of which the lower triangle is read. Unchecked while a
    CUDA graph is captured."""
    factor, failed = torch.linalg.cholesky_ex(a)
    if not _is_captured(a) and bool(failed.any()):
        raise Indefinite(where)
    return factor


def solve_triangle(a: Tensor, b: Tensor, where: str, *, upper: bool, left: bool) -> Tensor:
    """x of a x = b, or x a = b, for a triangle whose diagonal is in a. Unchecked while a CUDA graph is captured."""
    if not _is_captured(a) and bool((a.diagonal(dim1=-2, dim2=-1) == 0).any()):
        raise Singular(where)
    return torch.linalg.solve_triangular(a, b, upper=upper, left=left)


def _is_captured(a: Tensor) -> bool:
    return a.is_cuda and torch.cuda.is_current_stream_capturing()


def or_zero(cotangents: Sequence[Tensor | None], likes: Sequence[Tensor]) -> list[Tensor]:
    """Cotangents of which some may be None, for zero, as tensors."""
    pairs = zip(cotangents, likes, strict=True)
    return [like.new_zeros(()).expand_as(like) if c is None else c for c, like in pairs]


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Sum of two cotangents, None being zero."""
    if a is None or b is None:
        return b if a is None else a
    if a.shape != b.shape:  # one is that of a tensor which heads or sequences share, already summed over them
        smaller = a if a.numel() < b.numel() else b
        a, b = like_lead(a, smaller), like_lead(b, smaller)
    return a + b


def take(x: Tensor, index: Tensor | None, start: int, stop: int) -> Tensor:
    """The tokens of one batch: x [H, B, N, *] at start:stop of the order [H, B, N], or as they come."""
    if index is None:
        return x[:, :, start:stop]
    chosen = index[:, :, start:stop]
    chosen = chosen.reshape(*chosen.shape, *[1] * (x.ndim - 3))
    heads, sequences = torch.broadcast_shapes(x.shape[:2], chosen.shape[:2])
    source = x.expand(heads, sequences, *x.shape[2:])
    return source.gather(2, chosen.expand(heads, sequences, stop - start, *x.shape[3:]))


def untake(pieces: Sequence[Tensor], index: Tensor, like: Tensor) -> Tensor | None:
    """Cotangents of all tiles of all batches, back in the order the tokens came in; each token is in exactly one."""
    if not pieces:
        return None
    return like_lead(take(join(pieces), index.argsort(-1), 0, index.shape[-1]), like)


def join(pieces: Sequence[Tensor]) -> Tensor:
    """Tiles of consecutive tokens as one."""
    return pieces[0] if len(pieces) == 1 else cat(pieces, 2)


def tiles(start: int, stop: int, rows: int | None) -> list[tuple[int, int]]:
    """Tokens start:stop in tiles of at most `rows`, as even as can be; all in one where `rows` is None."""
    return even(start, stop, 1 if rows is None else max(1, -(-(stop - start) // rows)))


def before(rows: int, x: Tensor) -> Tensor:
    """Rows of 0 before a tile's own."""
    return torch.cat([x.new_zeros(*x.shape[:2], rows, *x.shape[3:]), x], 2)


def chunks(length: int, size: int) -> list[tuple[int, int]]:
    """Tokens in chunks of `size`, the last one shorter."""
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def spacing(count: int, *tokens: Tensor, state: Sequence[Tensor]) -> int:
    """`spacing_within` what the token inputs take, for `count` chunks with such a state."""
    heads, sequences = (max(t.shape[axis] for t in (*tokens, *state)) for axis in (0, 1))
    one = heads * sequences * sum(math.prod(t.shape[2:]) for t in state)
    return spacing_within(count, sum(math.prod(t.shape) for t in tokens), one)


def spacing_within(count: int, budget: int, state: int) -> int:
    """Chunks from one state that is kept for backward to the next.

    What is kept, and the states of one group while backward recomputes them, together take no more than `budget`
    numbers; where even the square root of the chunks takes more, that.
    """
    root = max(1, math.isqrt(count - 1) + 1) if count else 1
    for every in range(1, root):
        if (-(-count // every) - 1 + every) * state <= budget:
            return every
    return root


def stack(values: Sequence[Tensor], axis: int, like: Tensor | None = None) -> Tensor:
    """Tiles stacked along a new axis; of none, an empty stack of what `like` is."""
    if not values:
        assert like is not None
        return like.new_empty(0, *like.shape)
    return torch.stack(torch.broadcast_tensors(*values), axis)


def zeros(like: Tensor) -> Tensor:
    """The cotangent of an input that nothing depends on."""
    return torch.zeros_like(like)
