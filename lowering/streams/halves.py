"""Decays of each channel over a tile, as matrix products: no array of rows x rows x channels is made.

The decays after row s up to row t factor into those up to a place between the two and those from there on. Blocks of
2^l rows give one such place to every pair: s and t are in one block of 2^(l+1) rows and not in one of 2^l for exactly
one l, s in its first half and t in its second, and the place is where the halves meet. (The secondary chunks of arXiv
2312.06635, section 4.3, with blocks inside blocks down to single rows.)

    C[t, s, c] = own[t, s] + sum_l pairs[l, t, s] since[l, t, c] until[l, s, c]

Each factor is a product of consecutive decays, as the recurrence itself makes it: at most 1 where they are, exactly 0
where one of them is, and never a quotient. A decay above 1 can overflow here no earlier than in beta_t, which is such a
product over all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_FORGOTTEN = -1e30  # a logarithm whose factor is 0; sums of products with -inf would be NaN


@dataclass(frozen=True)
class Halves:
    """C of a tile's rows, factored for each size of block.

    Attributes:
        since: [l, t, *c], the decays of row t and of those before it in its block of 2^l rows.
        since_above: [l, t, *c], the same without that of row t.
        until: [l, s, *c], the decays of the rows after s in its block.
        pairs: [l, t, s], 1 where the two blocks are halves of one.
        own: [t, s], 1 where t = s; None for weights without the row's own step.
        tail: [s, *c], the last row of C.
    """

    since: Tensor
    since_above: Tensor
    until: Tensor
    pairs: Tensor
    own: Tensor | None
    tail: Tensor

    def strict(self) -> Halves:
        """C without its diagonal."""
        return replace(self, own=None)

    def above(self) -> Halves:
        """C of the weights before each row's step: row t - 1 of C as row t, 0 at the first."""
        return replace(self, since=self.since_above, own=None)

    def of_rows(self, chosen: Callable[[Tensor], Tensor]) -> Halves:
        """Some of the rows t; `chosen` takes them of [t, *]."""

        def second(value: Tensor) -> Tensor:
            return chosen(value.transpose(0, 1)).transpose(0, 1)

        own = None if self.own is None else chosen(self.own)
        return replace(
            self, since=second(self.since), since_above=second(self.since_above), pairs=second(self.pairs), own=own
        )

    @property
    def mT(self) -> Halves:
        """C of a transposed matrix: its two channel axes exchanged."""
        return replace(
            self, since=self.since.mT, since_above=self.since_above.mT, until=self.until.mT, tail=self.tail.mT
        )

    def of_outputs(self) -> Halves:
        """Of channels [1, c], as [c]."""
        since, above, until = (f.squeeze(-2) for f in (self.since, self.since_above, self.until))
        return replace(self, since=since, since_above=above, until=until, tail=self.tail.squeeze(-2))

    def scores(self, x: Tensor, u: Tensor) -> Tensor:
        """sum_c x[t, c] u[s, c] C[t, s, c] with channels [c, 1]: x [t, c], u [s, c] -> [t, s]."""
        left, right = x.unsqueeze(0) * self.since.squeeze(-1), u.unsqueeze(0) * self.until.squeeze(-1)
        made = ((left @ right.mT) * self.pairs).sum(0)
        return made if self.own is None else made + (x @ u.mT) * self.own

    def mixed(self, scores: Tensor | None, values: Tensor) -> Tensor:
        """sum_s scores[t, s] C[t, s, *c] values[s, *c]: scores [t, s], or None for 1; values [s, *] -> [t, *]."""
        spread = self.until * values.unsqueeze(0)
        levels, rows, *rest = spread.shape
        weights = self.pairs if scores is None else scores.unsqueeze(0) * self.pairs
        summed = (weights @ spread.reshape(levels, rows, math.prod(rest))).reshape(levels, weights.shape[1], *rest)
        made = (summed * self.since).sum(0)
        if self.own is None:
            return made
        own = self.own if scores is None else scores * self.own
        return made + (own @ values.reshape(rows, math.prod(rest))).reshape(made.shape)


def halves(value: Tensor, logarithm: bool, longest: int) -> tuple[Halves, Tensor]:
    """The factors of running products of value [r, *c] (its exponentials where `logarithm`), and the products over all
    rows up to each, [r, *c]; `longest` is the most rows there may be, 2 at least."""
    count, shape = value.shape[0], value.shape[1:]
    position = torch.arange(count, device=value.device)
    below = (position[:, None] > position[None, :]).to(value.dtype)
    own = (position[:, None] == position[None, :]).to(value.dtype)
    levels = (longest - 1).bit_length()
    sizes = torch.exp2(torch.arange(levels + 1, device=value.device).to(value.dtype))
    # half a row off every border, so that no rounding of the quotient matters
    block = ((position.to(value.dtype) + 0.5) / sizes[:, None]).floor()
    within = (block[:, :, None] == block[:, None, :]).to(value.dtype)  # [l, t, s]
    pairs, inside = (within[1:] - within[:-1]) * below, within[:-1]
    flat = value.reshape(count, math.prod(shape))
    if logarithm:
        since, above, until, tail = _sums(flat, inside, below, own)
        base = value.cumsum(0).exp()
    else:
        since, above, until, tail, base = _products(flat, inside, pairs, below)

    def shaped(factor: Tensor) -> Tensor:
        return factor.reshape(levels, count, *shape)

    factors = Halves(shaped(since), shaped(above), shaped(until), pairs, own, tail.reshape(count, *shape))
    return factors, base.reshape(count, *shape)


def exact(left: Tensor, right: Tensor) -> Tensor:
    """A product that low precision leaves alone: a decay of 0.999 is 1 in bfloat16."""
    return torch.bmm(left.unsqueeze(0), right.unsqueeze(0)).squeeze(0)


def _sums(value: Tensor, inside: Tensor, below: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From logarithms [r, c]: `since`, `since_above` and `until` [l, r, c], and `tail` [r, c]."""
    value = value.clamp_min(_FORGOTTEN)
    levels, count = inside.shape[:2]

    def total(members: Tensor) -> Tensor:
        made = exact(members.reshape(levels * count, count), value)
        return made.reshape(levels, count, value.shape[1]).exp()

    tail = exact(below.mT, value).exp()
    return total(inside * (below + own)), total(inside * below), total(inside * below.mT), tail


def _products(value: Tensor, inside: Tensor, pairs: Tensor, below: Tensor) -> tuple[Tensor, ...]:
    """From decays [r, c]: `since`, `since_above` and `until` [l, r, c], `tail` and `base` [r, c]; each block's from its
    halves'."""
    since, above, until = value, torch.ones_like(value), torch.ones_like(value)
    found: tuple[list[Tensor], ...] = ([], [], [])
    for level in range(inside.shape[0]):
        for kept, factor in zip(found, (since, above, until), strict=True):
            kept.append(factor)
        ends = ((inside[level] * below.mT).sum(1) == 0).to(value.dtype)  # [r]: rows with none after them in their block
        first, second = pairs[level] * ends, pairs[level].mT * ends  # [r, r]: the end of the other half
        earlier = exact(first, since) + (1 - first.sum(1, keepdim=True))
        later = exact(second, since) + (1 - second.sum(1, keepdim=True))
        since, above, until = since * earlier, above * earlier, until * later
    return (*[torch.cat([one.unsqueeze(0) for one in kept]) for kept in found], until, since)
