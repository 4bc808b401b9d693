"""A wide decoder, normalised or not, under a square loss: the wide axis becomes Gram matrices of the learner's width.

Values on the wide axis D are kept as sums of terms, `row * (z G)`, `row * x v` and `row * v`: z [n, d] is the
learner's output, G [d, D] and v [D] are slow weights, x [n, D] is a view and `row` a number per token. Affine maps
along D stay sums of such terms; centring moves into the weights (z G - mean(z G) = z (G - mean G)); and a sum over D of
a product of two of them is a quadratic form, with G G^T [d, d] and x G^T [n, d] in place of anything wide:

    sum_D (z G)(z G) = z (G G^T) z^T        sum_D (z G)(x v) = z . x (v G)^T        sum_D (z G) v = z (G v)

The identity is exact. In finite precision it squares the decoder's condition number: a z that G nearly maps to nothing
(or to the opposite of a bias) leaves a small sum of large terms. So the rewrite also gives the rows that enter each
square, and the wide form of the loop is kept: at every call the weights decide between the two
(`runtime.tiles.well_conditioned`). It is left out where the learner's width is not much smaller than D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from nestloop.lowering.capture import Captured
from nestloop.lowering.recorder import Located
from nestloop.lowering.rewrites.reach import ancestors, evaluate, inputs_below
from nestloop.lowering.rewrites.rule import Rewrite
from nestloop.lowering.simplify import simplify
from nestloop.lowering.tracer import Tracer

aten = torch.ops.aten

NAME = "Gram form"
NARROWER = 2  # the wide axis goes where it is more than so many times the learner's width


class _NotThisLoss(Exception):
    """Some wide value is used in a way that is not an affine map or a sum of products."""


@dataclass(frozen=True)
class Term:
    """`factor * row * (z G)`, `factor * row * x v`, or `factor * row * v`, whichever of z, x is there.

    Attributes:
        row: [n, 1], or None for 1.
        z, weight: [n, d] and G [d, D]; weight alone is v [D], or None for 1 (with x).
        x: [n, D].
    """

    factor: float
    row: Tensor | None
    z: Tensor | None
    x: Tensor | None
    weight: Tensor | None


@dataclass(frozen=True)
class Wide:
    """A value [n, D] as a sum of terms."""

    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Product:
    """Two wide values multiplied, waiting to be summed over D."""

    left: Wide
    right: Wide


def gram_form(captured: Captured, tracer: Tracer, allowed: bool = True) -> tuple[Captured, Rewrite]:
    """Rewrite the loss, if its wide axis can go; `Captured.decoders` then tells whether its weights allow that."""
    if captured.loss is None:
        return captured, Rewrite(NAME, False, "the learner is a kernel estimator")
    if not allowed:
        return captured, Rewrite(NAME, False, "this is the plan for badly conditioned decoders")
    loss = simplify(captured.loss)
    decoders = [node for node in loss.graph.nodes if _decodes(captured, node)]
    if not decoders:
        return captured, Rewrite(
            NAME, False, f"no slow weight maps the learner's output to an axis more than {NARROWER} times as wide"
        )
    width, wide = (int(s) for s in decoders[0].args[1].meta["val"].shape)
    names = [node.name for node in loss.graph.find_nodes(op="placeholder")]
    try:
        narrow = tracer.trace(_Narrow(captured, loss, wide).run, names)
    except _NotThisLoss as reason:
        return captured, Rewrite(NAME, False, f"the axis of {wide} stays: {reason}")
    rows, squares = _decoders(captured, loss, wide, tracer)
    return replace(captured, loss=narrow, decoders=rows, squares=squares), Rewrite(
        NAME,
        True,
        f"a slow weight decodes {width} to {wide} features, and the loss only sums products over these",
        (
            "r = sum of terms row * (z G) + row * v - x       affine in z; centring by a LayerNorm is z (G - mean G)",
            "sum_D r^2 = z (G G^T) z^T + 2 z . (v G^T - x G^T) + |v - x|^2, each with its rows",
            f"G G^T is {width} x {width}, x G^T one projection of the view;",
            f"nothing of {wide} features depends on a fast weight any more",
        ),
    )


def _decoders(
    captured: Captured, loss: fx.GraphModule, wide: int, tracer: Tracer
) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """Slow weights -> the decoder's rows in each square of the loss; how many of these tiles each square has."""
    names = [node.name for node in loss.graph.find_nodes(op="placeholder")]
    narrow = _Narrow(captured, loss, wide)

    def squares(*tensors: Tensor) -> tuple[Tensor, ...]:
        narrow.run(*tensors)
        return tuple(rows for square in narrow.squares for rows in square)

    traced = tracer.trace(squares, names)
    (results,) = next(n for n in traced.graph.nodes if n.op == "output").args
    needed = set().union(*[ancestors(result) for result in results])
    slow = list(captured.spec.slow)

    def of_weights(*weights: Tensor) -> tuple[Tensor, ...]:
        env = evaluate(traced, dict(zip(slow, weights, strict=True)), {}, needed)
        return tuple(env[result] for result in results)

    rows = simplify(tracer.trace(of_weights, slow))
    return rows, tuple(map(len, narrow.squares))


def _decodes(captured: Captured, node: fx.Node) -> bool:
    """Whether a node is (learner's output) @ (slow weight) onto a much wider axis."""
    if node.target is not aten.mm.default:
        return False
    z, weight = node.args
    inner, outer = weight.meta["val"].shape
    if not isinstance(inner, int) or not isinstance(outer, int) or outer <= NARROWER * inner:
        return False
    learned = not set(inputs_below(z)).isdisjoint(captured.spec.fast)
    return learned and set(inputs_below(weight)) <= set(captured.spec.slow)


class _Narrow(Located):
    """Runs the loss with wide values as terms."""

    def __init__(self, captured: Captured, module: fx.GraphModule, wide: int) -> None:
        super().__init__(module)
        self.captured, self.wide = captured, wide
        self.means: list[tuple[Tensor, Wide]] = []
        self.squares: list[list[Tensor]] = []

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args = self.fetch_args_kwargs_from_env(n)[0]
        if _decodes(self.captured, n) and n.meta["val"].shape[1] == self.wide:
            return Wide((Term(1.0, None, args[0], None, args[1]),))
        if not any(isinstance(a, (Wide, Product)) for a in args):
            return super().run_node(n)
        handler = _HANDLERS.get(n.target)
        if handler is None or n.kwargs:
            raise _NotThisLoss(f"{str(n.target).removeprefix('aten.')} is not an affine map or a sum of products")
        return handler(self, n, *args)

    def kind(self, value: Any, node: Any) -> str:
        """How a value enters a wide one: number, row [n, 1], column [D], or view [n, D]."""
        if not isinstance(value, Tensor):
            return "number"
        reached = set(inputs_below(node))
        wide = value.ndim > 0 and value.shape[-1] == self.wide and self.wide != 1
        if wide and reached <= set(self.captured.spec.slow) and value.numel() == self.wide:
            return "column"
        if wide and not reached & set(self.captured.spec.fast) and value.ndim == 2:
            return "view"
        if value.ndim == 0 or (value.ndim == 2 and value.shape[-1] == 1):
            return "row"
        raise _NotThisLoss("a wide value meets one that depends on a fast weight in another way")

    def lift(self, value: Any, node: Any, like: Wide) -> Wide:
        """Anything that is added to a wide value, as one."""
        if isinstance(value, Wide):
            return value
        kind = self.kind(value, node)
        if kind == "column":
            return Wide((Term(1.0, None, None, None, value.reshape(-1)),))
        if kind == "view":
            return Wide((Term(1.0, None, None, value, None),))
        known = next(t for t in like.terms if t.weight is not None)
        assert known.weight is not None
        ones = torch.ones_like(known.weight.reshape(-1, self.wide)[0])
        return Wide(
            (Term(float(value) if kind == "number" else 1.0, value if kind == "row" else None, None, None, ones),)
        )

    def add(self, n: fx.Node, a: Any, b: Any, sign: float = 1.0) -> Wide:
        like = a if isinstance(a, Wide) else b
        if isinstance(a, Product) or isinstance(b, Product):
            raise _NotThisLoss("a product is added to before it is summed")
        mean_of = next((w for t, w in self.means if t is b), None)
        if sign < 0 and mean_of is not None and mean_of is a:
            return Wide(tuple(_centred(t) for t in a.terms))
        left, right = self.lift(a, n.args[0], like), self.lift(b, n.args[1], like)
        return Wide((*left.terms, *(replace(t, factor=sign * t.factor) for t in right.terms)))

    def scale(self, n: fx.Node, a: Any, b: Any, divide: bool = False) -> Wide | Product:
        if isinstance(a, Wide) and isinstance(b, Wide) and not divide:
            return Product(a, b)
        if (not isinstance(a, Wide) and divide) or (not isinstance(a, Wide) and not isinstance(b, Wide)):
            raise _NotThisLoss("a product is scaled before it is summed")
        wide, other, node = (a, b, n.args[1]) if isinstance(a, Wide) else (b, a, n.args[0])
        kind = self.kind(other, node)
        if divide:
            other = 1 / other
        if kind == "number":
            return Wide(tuple(replace(t, factor=t.factor * other) for t in wide.terms))
        if kind == "row":
            row = other.reshape(1, 1) if other.ndim == 0 else other
            return Wide(tuple(replace(t, row=row if t.row is None else t.row * row) for t in wide.terms))
        if kind == "column":
            column = other.reshape(-1)
            return Wide(tuple(replace(t, weight=column if t.weight is None else t.weight * column) for t in wide.terms))
        raise _NotThisLoss("the learner's decoded output is multiplied by a view")

    def reduce(self, n: fx.Node, a: Any, dims: Any = None, keep: bool = False, mean: bool = False) -> Tensor:
        rank = 2
        if dims is None or [d % rank for d in dims] != [1]:
            raise _NotThisLoss("it is summed over tokens too")
        if isinstance(a, Product) and a.left is a.right and any(t.z is not None for t in a.left.terms):
            self.squares.append(_rows(a.left))
        total = _dot(a.left, a.right) if isinstance(a, Product) else _total(a)
        total = total / self.wide if mean else total
        if isinstance(a, Wide) and mean and keep:
            self.means.append((total, a))
        return total if keep else total.squeeze(1)


def _centred(term: Term) -> Term:
    """A term less its mean over D."""
    if term.x is not None:
        x = term.x if term.weight is None else term.x * term.weight
        return replace(term, x=x - x.mean(-1, keepdim=True), weight=None)
    assert term.weight is not None
    return replace(term, weight=term.weight - term.weight.mean(-1, keepdim=True))


def _rows(wide: Wide) -> list[Tensor]:
    """The rows [*, D] of which a value is a combination; where no view is subtracted, its constants [D] are rows too:
    a combination of all of them may be small."""
    views = any(t.x is not None for t in wide.terms)
    rows = [t.weight for t in wide.terms if t.weight is not None and (t.z is not None or not views)]
    return [row.reshape(-1, row.shape[-1]) for row in rows]


def _with_row(value: Tensor, factor: float, *rows: Tensor | None) -> Tensor:
    for row in rows:
        value = value if row is None else value * row
    return value if factor == 1 else value * factor


def _total(wide: Wide) -> Tensor:
    """Sum over D [n, 1]."""
    parts = []
    for t in wide.terms:
        if t.z is not None:
            assert t.weight is not None
            inside = t.z @ t.weight.sum(-1, keepdim=True)
        elif t.x is not None:
            inside = (t.x if t.weight is None else t.x * t.weight).sum(-1, keepdim=True)
        else:
            assert t.weight is not None
            inside = t.weight.sum().reshape(1, 1)
        parts.append(_with_row(inside, t.factor, t.row))
    return _sum(parts)


def _dot(left: Wide, right: Wide) -> Tensor:
    """Sum over D of a product [n, 1]. What multiplies one z with the same rows is added up first."""
    if left is right:
        terms = left.terms
        pairs = [(a, b, 1.0 if i == j else 2.0) for i, a in enumerate(terms) for j, b in enumerate(terms) if i <= j]
    else:
        pairs = [(a, b, 1.0) for a in left.terms for b in right.terms]
    along: dict[tuple[int, ...], list[tuple[Tensor, tuple[Tensor | None, ...], Tensor]]] = {}
    parts = []
    for a, b, count in pairs:
        factor = a.factor * b.factor * count
        if a.z is None and b.z is None:
            parts.append(_with_row(_plain(a, b), factor, a.row, b.row))
            continue
        first, second = (a, b) if a.z is not None else (b, a)
        assert first.z is not None and first.weight is not None
        other = _against(first.weight, second)
        rows: tuple[Tensor | None, ...] = (a.row, b.row)
        key = (id(first.z), *sorted(id(r) for r in rows if r is not None))
        along.setdefault(key, []).append((first.z, rows, other if factor == 1 else other * factor))
    for group in along.values():
        z, rows, _ = group[0]
        parts.append(_with_row((z * _sum([other for _, _, other in group])).sum(-1, keepdim=True), 1.0, *rows))
    return _sum(parts)


def _against(weight: Tensor, term: Term) -> Tensor:
    """What z is multiplied with: sum over D of G times a term, [n, d] or [1, d]."""
    if term.z is not None:
        assert term.weight is not None
        return term.z @ (term.weight @ weight.T)  # z (G G^T)
    if term.x is not None:
        scaled = weight if term.weight is None else weight * term.weight
        return term.x @ scaled.T
    assert term.weight is not None
    return (weight * term.weight).sum(-1).reshape(1, -1)


def _plain(a: Term, b: Term) -> Tensor:
    """Sum over D of two terms without z, [n, 1] or [1, 1]."""
    factors = [f for t in (a, b) for f in (t.x, t.weight) if f is not None]
    views, columns = [f for f in factors if f.ndim == 2], [f for f in factors if f.ndim == 1]
    if len(views) == 1 and columns:
        column = columns[0]
        for f in columns[1:]:
            column = column * f
        return views[0] @ column.reshape(-1, 1)
    product = factors[0]
    for f in factors[1:]:
        product = product * f
    return product.sum(-1, keepdim=True).reshape(-1, 1)


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


_Handler = Callable[..., Any]
_HANDLERS: dict[Any, _Handler] = {
    aten.add.Tensor: lambda s, n, a, b: s.add(n, a, b),
    aten.sub.Tensor: lambda s, n, a, b: s.add(n, a, b, -1.0),
    aten.neg.default: lambda s, n, a: Wide(tuple(replace(t, factor=-t.factor) for t in a.terms)),
    aten.mul.Tensor: lambda s, n, a, b: s.scale(n, a, b),
    aten.div.Tensor: lambda s, n, a, b: s.scale(n, a, b, divide=True),
    aten.sum.dim_IntList: lambda s, n, a, d, k=False: s.reduce(n, a, d, k),
    aten.mean.dim: lambda s, n, a, d, k=False: s.reduce(n, a, d, k, mean=True),
}
