"""Decays of each channel over a tile, as matrix products: no array of rows x rows x channels is made.

The decays after row s up to row t factor into those up to a place between the two and those from there on. Blocks of
2^l rows give one such place to every pair: s and t are in one block of 2^(l+1) rows and not in one of 2^l for exactly
one l, s in its first half and t in its second, and the place is where the halves meet. (The secondary chunks of arXiv
2312.06635, section 4.3, with blocks inside blocks down to single rows.)

    C[t, s, c] = own[t, s] + sum_l pairs_l[t, s] since_l[t, c] until_l[s, c]

Each factor is a product of consecutive decays, as the recurrence itself makes it: at most 1 where they are, exactly 0
where one of them is, and never a quotient. A decay above 1 can overflow here no earlier than in beta_t, which is such a
product over all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from nestloop.lowering.ops.products import exact

_FORGOTTEN = -1e30  # a logarithm whose factor is 0; sums of products with -inf would be NaN


@dataclass(frozen=True)
class Level:
    """The pairs of rows whose blocks of 2^l rows are halves of one.

    Attributes:
        pairs: [t, s], 1 for such a pair.
        since: [t, *c], the decays of row t and of those before it in its block.
        since_above: [t, *c], the same without that of row t.
        until: [s, *c], the decays of the rows after s in its block.
    """

    pairs: Tensor
    since: Tensor
    since_above: Tensor
    until: Tensor


@dataclass(frozen=True)
class Halves:
    """C of a tile's rows, factored.

    Attributes:
        levels: for each size of block.
        own: [t, s], 1 where t = s; None for weights without the row's own step.
        tail: [s, *c], the last row of C.
    """

    levels: tuple[Level, ...]
    own: Tensor | None
    tail: Tensor

    def _each(self, change: Callable[[Level], Level]) -> tuple[Level, ...]:
        return tuple(map(change, self.levels))

    def strict(self) -> Halves:
        """C without its diagonal."""
        return replace(self, own=None)

    def above(self) -> Halves:
        """C of the weights before each row's step: row t - 1 of C as row t, 0 at the first."""
        return replace(self, levels=self._each(lambda one: replace(one, since=one.since_above)), own=None)

    def of_rows(self, chosen: Callable[[Tensor], Tensor]) -> Halves:
        """Some of the rows t; `chosen` takes them of [t, *]."""

        def few(one: Level) -> Level:
            return Level(chosen(one.pairs), chosen(one.since), chosen(one.since_above), one.until)

        return replace(self, levels=self._each(few), own=None if self.own is None else chosen(self.own))

    def with_channels(self, change: Callable[[Tensor], Tensor]) -> Halves:
        """C with other channel axes; `change` makes them of [t, *c]."""

        def changed(one: Level) -> Level:
            return Level(one.pairs, change(one.since), change(one.since_above), change(one.until))

        return replace(self, levels=self._each(changed), tail=change(self.tail))

    def scores(self, x: Tensor, u: Tensor) -> Tensor:
        """sum_c x[t, c] u[s, c] C[t, s, c] with channels [c, 1]: x [t, c], u [s, c] -> [t, s]."""
        terms = [] if self.own is None else [(x @ u.mT) * self.own]
        for one in self.levels:
            terms.append(((x * one.since.squeeze(-1)) @ (u * one.until.squeeze(-1)).mT) * one.pairs)
        return _sum(terms)

    def mixed(self, scores: Tensor | None, values: Tensor) -> Tensor:
        """sum_s scores[t, s] C[t, s, *c] values[s, *c]: scores [t, s], or None for 1; values [s, *] -> [t, *]."""

        def weighed(pairs: Tensor, rows: Tensor) -> Tensor:
            weights = pairs if scores is None else scores * pairs
            flat = rows.reshape(rows.shape[0], math.prod(rows.shape[1:]))
            return (weights @ flat).reshape(weights.shape[0], *rows.shape[1:])

        terms = [] if self.own is None else [weighed(self.own, values)]
        return _sum([*terms, *[weighed(one.pairs, one.until * values) * one.since for one in self.levels]])


def _sum(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def halves(value: Tensor, logarithm: bool, longest: int) -> tuple[Halves, Tensor]:
    """The factors of running products of value [r, *c] (its exponentials where `logarithm`), and the products over all
    rows up to each, [r, *c]; `longest` is the most rows there may be, 2 at least."""
    count, shape = value.shape[0], value.shape[1:]
    position = torch.arange(count, device=value.device)
    below = (position[:, None] > position[None, :]).to(value.dtype)
    own = (position[:, None] == position[None, :]).to(value.dtype)
    middle = position.to(value.dtype) + 0.5  # off the borders of blocks, so that no rounding of a quotient matters
    blocks = [(middle / 2**level).floor() for level in range(1, (longest - 1).bit_length())]
    within = [(block[:, None] == block[None, :]).to(value.dtype) for block in blocks]
    within = [own, *within, torch.ones_like(own)]  # blocks of one row, and at last of all
    pairs = [(outer - inner) * below for inner, outer in pairwise(within)]
    flat = value.reshape(count, math.prod(shape))
    if logarithm:
        factors, tail, base = _sums(flat, within[:-1], below, own)
    else:
        factors, tail, base = _products(flat, within[:-1], pairs, below)
    levels = [Level(one, *[f.reshape(count, *shape) for f in found]) for one, found in zip(pairs, factors, strict=True)]
    return Halves(tuple(levels), own, tail.reshape(count, *shape)), base.reshape(count, *shape)


Factors = list[tuple[Tensor, Tensor, Tensor]]  # of each level `since`, `since_above` and `until` [r, c]


def _sums(value: Tensor, within: list[Tensor], below: Tensor, own: Tensor) -> tuple[Factors, Tensor, Tensor]:
    """From logarithms [r, c]: the factors, the last row of C, and the products over all rows."""
    finite = value.clamp_min(_FORGOTTEN)

    def total(rows: Tensor) -> Tensor:
        return exact(rows, finite).exp()

    none = torch.ones_like(value)
    factors = [(value.exp(), none, none)]
    factors += [(total(one * (below + own)), total(one * below), total(one * below.mT)) for one in within[1:]]
    return factors, total(below.mT), value.cumsum(0).exp()


def _products(
    value: Tensor, within: list[Tensor], pairs: list[Tensor], below: Tensor
) -> tuple[Factors, Tensor, Tensor]:
    """From decays [r, c]: as `_sums`; a block's products are those of its halves."""
    since, above, until = value, torch.ones_like(value), torch.ones_like(value)
    factors = []
    for one, pair in zip(within, pairs, strict=True):
        factors.append((since, above, until))
        ends = ((one * below.mT).sum(1) == 0).to(value.dtype)  # [r]: rows with none after them in their block
        first, second = pair * ends, pair.mT * ends  # [r, r]: the end of the other half
        earlier = exact(first, since) + (1 - first.sum(1, keepdim=True))
        later = exact(second, since) + (1 - second.sum(1, keepdim=True))
        since, above, until = since * earlier, above * earlier, until * later
    return factors, until, since
