"""The optimizer as coefficients: C, beta and f of one fast weight over the rows of a tile.

A row is a token, or a micro-step of one. Products of decays are running products of the rows' own factors, by doubling,
or running sums of their logarithms: never quotients of running products, which underflow to 0 / 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestloop.lang import coefficient
from nestloop.lang.declare import Declaration
from nestloop.lang.optim import SGD
from nestloop.lowering.ops.products import exact
from nestloop.lowering.streams.halves import Halves, halves


@dataclass(frozen=True)
class Coefficients:
    """W_t = base_t W_0 - sum_o momenta_t,o S_o - sum_s mix[t, s] G_s, and S_o likewise, for rows t, s of a tile.

    Attributes:
        base: [r, *c], c being empty, or the fast weight's axes with 1 where it does not vary; None is 1.
        momenta: for each order [r, *c].
        mix: [r, r, *c], 0 above the diagonal, or its factors.
        kept: for each momentum its own (momenta [r, *c] of the orders up to it, mix [r, r, *c]).
        plain: whether `mix` is 1 on and below the diagonal.
    """

    base: Tensor | None
    momenta: tuple[Tensor, ...]
    mix: Tensor | Halves
    kept: tuple[tuple[tuple[Tensor, ...], Tensor], ...]
    plain: bool = False


@dataclass(frozen=True)
class Rows:
    """What coefficients are built from.

    Attributes:
        count: rows of the tile, r (a traced size).
        longest: the most rows a tile may have.
        value: (fast weight, coefficient) -> a number, a tensor *c shared by all rows, or [r, *c] of a gate's.
        per_row: whether a coefficient's value has a row axis.
        like: a tensor of the dtype and device.
    """

    count: Any
    longest: int
    value: Callable[[Declaration, Any], Any]
    per_row: Callable[[Any], bool]
    like: Tensor

    def position(self) -> Tensor:
        return torch.arange(self.count, device=self.like.device)

    def lower(self, strictly: bool = False) -> Tensor:
        """[r, r] of ones on and below the diagonal, or below it."""
        ones = self.like.new_ones(self.count, self.count)
        return ones.tril(-1) if strictly else ones.tril()


def coefficients(optimizer: SGD, weight: Declaration, rows: Rows, first_only: Tensor | None = None) -> Coefficients:
    """The coefficients of one fast weight.

    Args:
        first_only: [r], 1 at rows that take a decay, 0 at micro-steps after a token's first; None: all do.
    """
    mixes: list[Tensor] = []
    fresh: list[tuple[Tensor, ...]] = []
    lower = rows.lower()
    mix = lower
    starts: tuple[Tensor, ...] = ()
    for order, eta in enumerate(optimizer.momenta_of(weight.name)):
        one, start = running(rows, _per_row(rows, weight, eta, False, None), False)
        mix = one if order == 0 else combine(one, mix)
        starts = (*[applied(one, s) for s in starts], start)
        mixes.append(mix)
        fresh.append(starts)
    kept = tuple(zip(fresh, mixes, strict=True))
    decay = coefficient.of(optimizer.decays, weight.name)
    if decay is None:
        if not mixes:
            return Coefficients(None, (), lower, (), plain=True)
        return Coefficients(None, tuple(applied(lower, s) for s in starts), combine(lower, mix), kept)
    logarithm = optimizer.log_decay is not None
    value = _per_row(rows, weight, decay, logarithm, first_only)
    alone = not mixes and (optimizer.window or 1) == 1  # not to be multiplied with other coefficients
    if isinstance(value, Tensor) and value.ndim > 1 and alone and rows.longest > 1:
        factors, base = halves(value, logarithm, rows.longest)
        return Coefficients(base, (), factors, ())
    faded, base = running(rows, value, logarithm)
    if not mixes:
        return Coefficients(base, (), faded, ())
    return Coefficients(base, tuple(applied(faded, s) for s in starts), combine(faded, mix), kept)


def _per_row(rows: Rows, weight: Declaration, part: Any, logarithm: bool, first_only: Tensor | None) -> float | Tensor:
    """One coefficient of every row: [r], or [r, *c] of channels; a number, where it is one for all rows.

    first_only: 0 at rows whose factor is 1.
    """
    value = rows.value(weight, part)
    if not isinstance(value, Tensor):
        if first_only is None:
            return float(value)
        value = rows.like.new_full((rows.count,), float(value))
    elif not rows.per_row(part):
        value = value.unsqueeze(0).expand(rows.count, *value.shape)
    if all(size == 1 for size in value.shape[1:]):
        value = value.reshape(value.shape[0])
    if first_only is None:
        return value
    first = (first_only > 0).reshape(-1, *[1] * (value.ndim - 1))
    return torch.where(first, value, torch.zeros_like(value) if logarithm else torch.ones_like(value))


def running(rows: Rows, value: float | Tensor, logarithm: bool) -> tuple[Tensor, Tensor]:
    """Running products of coefficients a_q [r, *c], or one number: [r, r, *c] of prod_{s < q <= t} a_q (0 for s > t),
    and [r, *c] of prod_{q <= t} a_q."""
    if not isinstance(value, Tensor):
        if logarithm or value > 0:
            return _constant(rows, value if logarithm else math.log(value))
        value = rows.like.new_full((rows.count,), value)
    after = rows.position()[:, None] > rows.position()[None, :]  # [q, s]: s < q
    shape = (*after.shape, *[1] * (value.ndim - 1))
    after = after.reshape(shape)
    lower = rows.lower().reshape(shape)
    if logarithm:
        sums = torch.where(after, value.unsqueeze(1), torch.zeros_like(value).unsqueeze(1)).cumsum(0)
        return sums.exp() * lower, value.cumsum(0).exp()
    each = torch.where(after, value.unsqueeze(1), torch.ones_like(value).unsqueeze(1))  # [q, s, *c]
    faded = _products(rows, each.reshape(each.shape[0], each.shape[0] * math.prod(each.shape[2:])))
    base = _products(rows, value.reshape(value.shape[0], math.prod(value.shape[1:])))
    return faded.reshape(each.shape) * lower, base.reshape(value.shape)


def _products(rows: Rows, factors: Tensor) -> Tensor:
    """Running products down the rows of [r, m], by doubling."""
    step = 1
    while step < rows.longest:
        behind = (rows.position()[:, None] - rows.position()[None, :] == step).to(factors.dtype)  # [t, q]: q = t - step
        factors = factors * (exact(behind, factors) + (1 - behind.sum(1, keepdim=True)))
        step *= 2
    return factors


def _constant(rows: Rows, log: float) -> tuple[Tensor, Tensor]:
    """Powers of one number, given its logarithm."""
    position = rows.position().to(rows.like.dtype)
    distance = (position[:, None] - position[None, :]).tril()
    return (distance * log).exp().tril(), ((position + 1) * log).exp()


def combine(left: Tensor, right: Tensor) -> Tensor:
    """sum_q left[t, q, *c] right[q, s, *c]."""
    if left.ndim == 2 and right.ndim == 2:
        return exact(left, right)
    if left.ndim == 2:
        return exact(left, right.reshape(right.shape[0], math.prod(right.shape[1:]))).reshape(
            left.shape[0], *right.shape[1:]
        )
    right = right if right.ndim > 2 else right.reshape(*right.shape, *[1] * (left.ndim - 2))
    return (left.unsqueeze(2) * right.unsqueeze(0)).sum(1)


def applied(mix: Tensor, start: Tensor) -> Tensor:
    """sum_q mix[t, q, *c] start[q, *c]."""
    if mix.ndim == 2 and start.ndim == 1:
        return exact(mix, start.unsqueeze(1)).squeeze(1)
    if mix.ndim == 2:
        return exact(mix, start.reshape(start.shape[0], math.prod(start.shape[1:]))).reshape(
            mix.shape[0], *start.shape[1:]
        )
    start = start if start.ndim > 1 else start.reshape(-1, *[1] * (mix.ndim - 2))
    return (mix * start.unsqueeze(0)).sum(1)


def before(rows: Rows, c: Coefficients) -> Coefficients:
    """The coefficients of the weights before each row's step: those of the row above, W_0's at the first.

    Of ones on and below the diagonal these are the ones below it.
    """
    if c.plain:
        return Coefficients(None, (), rows.lower(strictly=True), ())
    shift = (rows.position()[:, None] - rows.position()[None, :] == 1).to(rows.like.dtype)
    first = 1 - shift.sum(1)  # [r]: 1 at row 0
    base = c.base
    if base is not None:
        moved = applied(shift, base)
        base = moved + first.reshape(-1, *[1] * (base.ndim - 1))
    momenta = tuple(applied(shift, m) for m in c.momenta)
    mix = c.mix.above() if isinstance(c.mix, Halves) else combine(shift, c.mix)
    return Coefficients(base, momenta, mix, ())


def strict(rows: Rows, c: Coefficients) -> Coefficients:
    """The coefficients of the weights that a row's decay, but not its step, has reached."""
    if isinstance(c.mix, Halves):
        return Coefficients(c.base, c.momenta, c.mix.strict(), ())
    below = rows.lower(strictly=True)
    return Coefficients(c.base, c.momenta, c.mix * below.reshape(*below.shape, *[1] * (c.mix.ndim - 2)), ())


def of_rows(c: Coefficients, chosen: Callable[[Tensor], Tensor]) -> Coefficients:
    """The coefficients of some rows; `chosen` takes them of [r, *]."""
    base = None if c.base is None else chosen(c.base)
    mix = c.mix.of_rows(chosen) if isinstance(c.mix, Halves) else chosen(c.mix)
    return Coefficients(base, tuple(map(chosen, c.momenta)), mix, ())


def last_row(mix: Tensor | Halves) -> Tensor:
    """The last row of a mix: [r, *c]."""
    return mix.tail if isinstance(mix, Halves) else last(mix)


def last(value: Tensor) -> Tensor:
    """The last row of [r, *]: as a product, whose derivative joins no blocks of r - 1 rows."""
    position = torch.arange(value.shape[0], device=value.device)
    mask = (position == value.shape[0] - 1).to(value.dtype)
    flat = value.reshape(value.shape[0], math.prod(value.shape[1:]))
    return exact(mask.unsqueeze(0), flat).reshape(value.shape[1:])
