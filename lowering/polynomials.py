"""Polynomials in one value of a graph, functions of it, and values that it is multiplied with."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

Monomial = tuple[tuple[int, int], ...]  # generators and their exponents, in order
Polynomial = dict[Monomial, float]

TERMS = 24  # of a polynomial, at most
POWER = 8  # of the value, at most: powers of large numbers leave float32's range


@dataclass(frozen=True)
class Function:
    """f(u) as a generator; u: the polynomial, as a key."""

    target: Any
    of: frozenset[tuple[Monomial, float]]


@dataclass(frozen=True)
class Slope:
    """1 - f^2 or f (1 - f) of the generator f, tanh or sigmoid."""

    of: int


@dataclass(frozen=True)
class Half:
    """(1 + f) / 2 of the generator f, a tanh, which is a sigmoid."""

    of: int


@dataclass
class Ring:
    """Polynomials in one value and functions of it. Generator 0 is the value.

    Attributes:
        halved: generators of which `Half` is one, and which are computed from it.
        linear: generators that are no function of the value, of which a term has few: cotangents.
    """

    x: fx.Node
    halved: set[int] = field(default_factory=set)
    linear: set[int] = field(default_factory=set)
    generators: list[Any] = field(default_factory=list)
    at: dict[Any, int] = field(default_factory=dict)

    def generator(self, key: Any) -> Polynomial:
        """A node, a `Function` or a `Slope` as a polynomial."""
        if key not in self.at:
            self.at[key] = len(self.generators)
            self.generators.append(key)
        return {((self.at[key], 1),): 1.0}

    def total(self, a: Polynomial, b: Polynomial, sign: float = 1.0) -> Polynomial:
        """a + sign b."""
        made = dict(a)
        for monomial, factor in b.items():
            _add(made, monomial, sign * factor)
        return self.gathered(made)

    def product(self, a: Polynomial, b: Polynomial) -> Polynomial | None:
        """a b; None where it is not to be taken apart, as terms may cancel that the product does not have: (1 - v) w is
        as exact as v is, w - v w is not."""
        if len(a) > 1 and len(b) > 1 and not (self._is_definite(a) or self._is_definite(b)):
            return None
        if any(self._is_delicate(p) and q.keys() != {()} for p, q in ((a, b), (b, a))):
            return None
        made: Polynomial = {}
        for one, factor in a.items():
            for other, times in b.items():
                _add(made, multiplied(one, other), factor * times)
        made = self.gathered(made)
        powers = [dict(monomial).get(0, 0) for monomial in made]
        return made if len(made) <= TERMS and max(powers, default=0) <= POWER else None

    def gathered(self, p: Polynomial) -> Polynomial:
        """m - m tanh^2 and m sigmoid - m sigmoid^2 as m times the slope, and m + m tanh as m times its half."""
        made = dict(p)
        for monomial in p:
            for index, power in monomial:
                for instead, lower, sign, times in self._identities(index, power):
                    rest = multiplied(monomial, ((index, -lower),))
                    if not {monomial, rest} <= made.keys() or not math.isclose(made[rest], sign * made[monomial]):
                        continue
                    (one,) = self.generator(instead)
                    factor = times * made.pop(monomial)
                    del made[rest]
                    _add(made, multiplied(multiplied(rest, ((index, -(power - lower)),)), one), factor)
        return made

    def _identities(self, index: int, power: int) -> list[tuple[Any, int, float, float]]:
        """For f^power in a term: (a generator, how much lower the power of f is in another term, that term's sign, and
        how many times the generator replaces both)."""
        key = self.generators[index]
        if isinstance(key, Function) and key.target is aten.tanh.default and power == 2:
            return [(Slope(index), 2, -1.0, -1.0)]
        if isinstance(key, Function) and key.target is aten.sigmoid.default and power == 2:
            return [(Slope(index), 1, -1.0, -1.0)]
        return [(Half(index), 1, 1.0, 2.0)] if index in self.halved and power == 1 else []

    def _is_definite(self, p: Polynomial) -> bool:
        """Whether all terms have one sign, wherever x is, and differ in powers of x alone."""
        rest = {tuple(pair for pair in monomial if pair[0]) for monomial in p}
        parity = {dict(monomial).get(0, 0) % 2 for monomial in p}
        return len(rest) == 1 and len(parity) == 1 and len({factor > 0 for factor in p.values()}) == 1

    def _is_delicate(self, p: Polynomial) -> bool:
        """Whether it is a sum of values that are there, none rounded by a function, whose difference may be exact."""
        if len(p) < 2 or self._is_definite(p):
            return False
        return all(sum(e for _, e in m) <= 1 and all(self._is_there(g) for g, _ in m) for m in p)

    def _is_there(self, index: int) -> bool:
        return isinstance(self.generators[index], fx.Node)


def _add(p: Polynomial, monomial: Monomial, factor: float) -> None:
    """Add a term to a polynomial in place; terms that cancel are gone."""
    before = p.pop(monomial, 0.0)
    if abs(before + factor) > 1e-15 * abs(before):
        p[monomial] = before + factor


def multiplied(a: Monomial, b: Monomial) -> Monomial:
    powers = Counter(dict(a))
    for index, power in b:
        powers[index] += power
    return tuple(sorted((index, power) for index, power in powers.items() if power))
