"""Polynomials by Horner's rule, in several variables: what they share is written once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nestloop.lowering.polynomials import Function, Half, Monomial, Polynomial, Ring, multiplied

aten = torch.ops.aten


@dataclass(frozen=True, eq=False, repr=False)
class Expression:
    """A number, a node, or an op on expressions, of which equal ones are one."""

    op: Any
    operands: tuple[Any, ...] = ()

    @property
    def is_number(self) -> bool:
        return self.op is float


class Spelling:
    """Polynomials as expressions."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.made: dict[Any, Expression] = {}
        self.polynomials: dict[Any, Expression] = {}

    def of(self, p: Polynomial) -> Expression:
        key = frozenset(p.items())
        if key not in self.polynomials:
            self.polynomials[key] = self._sum(p)
        return self.polynomials[key]

    def _make(self, op: Any, *operands: Any) -> Expression:
        return self.made.setdefault((op, operands), Expression(op, operands))

    def _number(self, value: float) -> Expression:
        return self._make(float, value)

    def _product(self, a: Expression, b: Expression) -> Expression:
        """a b, numbers last."""
        if a.is_number:
            a, b = b, a
        if not b.is_number:
            return self._make(aten.mul.Tensor, a, b)
        factor = b.operands[0]
        if a.is_number:
            return self._number(a.operands[0] * factor)
        return (
            a if factor == 1 else self._make(aten.neg.default, a) if factor == -1 else self._make(aten.mul.Tensor, a, b)
        )

    def _total(self, a: Expression, b: Expression) -> Expression:
        """a + b, numbers last."""
        if a.is_number:
            a, b = b, a
        if b.is_number and not b.operands[0]:
            return a
        if b.op is aten.neg.default:
            return self._make(aten.sub.Tensor, a, b.operands[0])
        return (
            self._make(aten.sub.Tensor, b, a.operands[0])
            if a.op is aten.neg.default
            else self._make(aten.add.Tensor, a, b)
        )

    def _sum(self, p: Polynomial) -> Expression:
        if not p:
            return self._number(0.0)
        found = Counter(index for monomial in p for index, _ in monomial)
        shared = tuple((i, e) for i in sorted(found) if (e := min(dict(m).get(i, 0) for m in p)))
        # Cotangents are taken out first: what they are multiplied with is written once for all of them.
        out = tuple((i, e) for i, e in shared if i in self.ring.linear) or shared
        if out:
            rest = {multiplied(m, tuple((i, -e) for i, e in out)): f for m, f in p.items()}
            return self._scaled(self.of(rest), out) if len(rest) > 1 or out != shared else self._term(rest, out)
        if found.keys() <= {0}:
            return self._horner(p)
        index = max(found, key=lambda i: (i in self.ring.linear, found[i], i))
        inside = {multiplied(m, ((index, -1),)): f for m, f in p.items() if index in dict(m)}
        outside = {m: f for m, f in p.items() if index not in dict(m)}
        return self._total(self._product(self.of(inside), self._generator(index)), self.of(outside))

    def _term(self, rest: Polynomial, powers: Monomial) -> Expression:
        """One term, with its number last."""
        (factor,) = rest.values()
        return self._product(self._scaled(self._number(1.0), powers), self._number(factor))

    def _scaled(self, made: Expression, powers: Monomial) -> Expression:
        """A product with powers of generators: slopes first, since what they are multiplied with stays in range."""
        for index, power in sorted(powers, reverse=True):
            one = self._generator(index)
            for _ in range(power // 2):
                made = self._product(made, self._make(aten.mul.Tensor, one, one))
            if power % 2:
                made = self._product(made, one)
        return made

    def _horner(self, p: Polynomial) -> Expression:
        """A polynomial in the value, with a constant term."""
        factors = {dict(m).get(0, 0): f for m, f in p.items()}
        x = self._generator(0)
        step = 2 if all(power % 2 == 0 for power in factors) else 1
        by = self._make(aten.mul.Tensor, x, x) if step == 2 else x
        top = max(factors)
        made = self._number(factors[top])
        for power in range(top - step, -1, -step):
            made = self._total(self._product(by, made), self._number(factors.get(power, 0.0)))
        return made

    def _generator(self, index: int) -> Expression:
        key = self.ring.generators[index]
        if isinstance(key, fx.Node):
            return self._make(fx.Node, key)
        if index in self.ring.halved:
            return self._total(self._product(self._half(key), self._number(2.0)), self._number(-1.0))
        if isinstance(key, Half):
            return self._half(self.ring.generators[key.of])
        if isinstance(key, Function):
            return self._make(key.target, self.of(dict(key.of)))
        f, one = self._generator(key.of), self._number(1)
        if self.ring.generators[key.of].target is aten.tanh.default:
            return self._make(aten.sub.Tensor, one, self._make(aten.mul.Tensor, f, f))
        return self._make(aten.mul.Tensor, f, self._make(aten.sub.Tensor, one, f))

    def _half(self, tanh: Function) -> Expression:
        return self._make(aten.sigmoid.default, self.of({monomial: 2 * factor for monomial, factor in tanh.of}))
