"""Stage `check`: every value typed by its axes, and proof that tokens do not mix, or the op that mixes them.

An axis is named by the dim it was declared with: "n" for tokens, "d", "4*d". The axis rule of an op follows from its
kind (`lowering.ops.row.Kind`). A token axis that is split (a grid's rows and columns) or joined with another stays a
token axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nestloop.errors import Location, TokenMixingError
from nestloop.lang.loop import LoopSpec
from nestloop.lang.schedule import Chunked, sees_later
from nestloop.lowering import ops
from nestloop.lowering.ops import Kind
from nestloop.lowering.ops.matrices import MATRICES
from nestloop.lowering.ops.sizes import is_less, same_size

aten = torch.ops.aten

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Mixing:
    """An op that lets one token's value reach another's."""

    op: str
    axes: Axes
    where: Location | None

    def __str__(self) -> str:
        return f"{self.op} on [{', '.join(self.axes)}]" + (f" at {self.where.short}" if self.where else "")


@dataclass(frozen=True)
class Typing:
    """The axes of every value of a graph.

    Attributes:
        axes: node -> the name of each axis.
        mixing: the ops that mix tokens, in order; empty if every token is on its own.
        counting: the first op that computes with the number of tokens, or their places; None if there is none.
    """

    axes: Mapping[fx.Node, Axes]
    mixing: tuple[Mixing, ...]
    counting: Mixing | None


def is_token(axis: str) -> bool:
    """Whether an axis runs over tokens, whole or in part."""
    return any(factor == "n" or factor.startswith("n.") for factor in axis.split("*"))


def declared_axes(spec: LoopSpec, name: str) -> Axes:
    """The axes of one tile of a declared tensor, or of its cotangent or new value; scalars have none."""
    declared = {**spec.fast, **spec.slow, **spec.inputs}
    plain = name.removeprefix("d_").removeprefix("gradient_").removesuffix("_new")
    of_tokens = plain in spec.inputs  # a gate's entry of the state is not
    plain = plain if plain in declared else plain.split("__")[0]
    if plain not in declared:
        return ()
    token = ("n",) if of_tokens else ()
    steps = (str(getattr(spec.schedule, "micro", 1)),) if of_tokens and spec.inputs[plain].micro else ()
    return (*token, *steps, *[str(e) for e in declared[plain].dims])


def type_axes(spec: LoopSpec, module: fx.GraphModule, output: Axes = ()) -> Typing:
    """Type every value of a tile graph. `output`: the axes of a read-out's cotangent."""
    axes: dict[fx.Node, Axes] = {}
    mixing: list[Mixing] = []
    read = _read(module)
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        if node.op == "placeholder":
            name = node.meta.get("declared", node.name)
            seeded = output if name == "d_z" else declared_axes(spec, name)
            if name in spec.inputs and spec.inputs[name].micro and value.ndim == len(seeded) - 1:
                seeded = (seeded[0], *seeded[2:])  # a loss sees one micro-step
            axes[node] = seeded if len(seeded) == value.ndim else _by_size(value)
        else:
            axes[node], mixes = _rule(node, axes)
            if mixes and node in read:
                source = next((axes[a] for a in node.all_input_nodes if a in axes), ())
                mixing.append(Mixing(_called(node), source, node.meta.get("where")))
    counts = _counting(module)
    counting = None if counts is None else Mixing(_called(counts), axes.get(counts, ()), counts.meta.get("where"))
    return Typing(axes, tuple(mixing), counting)


def _read(module: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose elements reach a result; of the others, as what a derivative starts from, some read the shape."""
    found: set[fx.Node] = set()
    for node in reversed(module.graph.nodes):
        created = (
            node.op == "call_function" and not ops.is_size_op(node.target) and ops.row(node.target).kind is Kind.CREATE
        )
        if node.op == "output" or (node in found and not created):
            found.update(node.all_input_nodes)
    return found


def _called(node: fx.Node) -> str:
    """What the body called an op."""
    return node.meta.get("called", ops.row(node.target).name)


def needs_all_tokens(spec: LoopSpec, module: fx.GraphModule) -> bool:
    """Whether a graph cannot be computed tile by tile: tokens mix, or a value depends on how many there are."""
    typing = type_axes(spec, module)
    return bool(typing.mixing) or typing.counting is not None


def _counting(module: fx.GraphModule) -> fx.Node | None:
    """The first op whose value depends on how many tokens there are."""
    for node in module.graph.nodes:
        if node.op == "call_function" and ops.is_size_op(node.target):
            for user in node.users:
                if user.op == "output" or ops.is_size_op(user.target):
                    continue
                if ops.row(user.target).kind not in (Kind.VIEW, Kind.CREATE) or _counts(user):
                    return user
    return None


def _counts(node: fx.Node) -> bool:
    """Whether a created value holds positions or sizes, not a constant."""
    name = node.target._schema.name.split("::")[-1]
    return name == "arange" or any(
        isinstance(a, fx.Node) for a in node.args if not isinstance(a, (list, tuple)) and name.endswith("full")
    )


def check_tokens(spec: LoopSpec, loss: Typing, readout: Typing) -> None:
    """Raise `TokenMixingError` where the schedule needs independent tokens and a body mixes them."""
    schedule = spec.schedule
    whole = sees_later(schedule)
    for name, typing in (("loss", loss), ("readout", readout)):
        if not whole and typing.mixing:
            need = "tokens that are on their own: a later one must not reach an earlier one's output"
            if name == "loss" and isinstance(schedule, Chunked):
                need = (
                    "tokens that are on their own: a chunk may come in several calls, each of which adds its gradient"
                )
            size = max(getattr(schedule, "chunk", 0), getattr(schedule, "size", 0), 16)
            fix = f'schedule = nl.Chunked({size}, "update-apply"), whose tokens see one another within a chunk'
            raise _mixes(spec, name, typing.mixing[0], need, fix)

        if not whole and typing.counting is not None:
            counts = typing.counting
            raise counting(spec, name, counts.where, f"{counts.op}, of a number of rows or of their places")


def counting(spec: LoopSpec, body: str, where: Location | None, given: str) -> TokenMixingError:
    """That a body computes with its number of rows, or their places, where it is not said which tokens these are."""
    return TokenMixingError(
        f"{spec.name} is {type(spec.schedule).__name__}, but its {body} counts its tokens.",
        where=where or spec.where,
        given=given,
        need="tokens that are on their own: how many of them a body is given at once means nothing",
        fix=f"use self.n, which is {spec.schedule.seen(0)} in each of its bodies, or pass the places as a view",
    )


def _mixes(spec: LoopSpec, body: str, first: Mixing, need: str, fix: str) -> TokenMixingError:
    kind = type(spec.schedule).__name__
    return TokenMixingError(
        f"{spec.name} is {kind}, but its {body} mixes tokens.",
        where=first.where or spec.where,
        given=f"{first.op} over the token axis of [{', '.join(first.axes)}]",
        need=need,
        fix=fix,
    )


def _by_size(value: torch.Tensor) -> Axes:
    return tuple(str(s) if isinstance(s, int) else "n" for s in value.shape)


def _rule(node: fx.Node, axes: Mapping[fx.Node, Axes]) -> tuple[Axes, bool]:
    """The axes of a node's value, and whether it mixes tokens."""
    row = ops.row(node.target)
    value = node.meta["val"]
    first = next((axes[a] for a in node.all_input_nodes if a in axes), None)
    if first is None or row.kind is Kind.CREATE:
        return _by_size(value), False
    if row.kind is Kind.POINTWISE:
        return _broadcast([(axes[a], a.meta["val"]) for a in node.all_input_nodes if a in axes], value), False
    if row.kind is Kind.PRODUCT:
        left, right = axes[node.args[0]], axes[node.args[1]]
        return (*left[:-1], right[-1]), is_token(left[-1])
    if row.kind is Kind.SOLVE:
        return axes[node.args[1]], is_token(first[-1])
    if row.kind is Kind.REDUCTION:
        return _reduce(node, first, value)
    if row.kind is Kind.MATRIX:
        *batch, rows, columns = first
        sizes = node.args[0].meta["val"].shape[-2:]
        made = MATRICES[node.target].axes(rows, columns, lambda: columns if is_less(sizes[1], sizes[0]) else rows)
        return (*batch, *made), is_token(rows) or is_token(columns)
    if row.kind is Kind.NORMALIZE:
        return first, is_token(first[node.args[1]])
    if row.kind is Kind.VIEW:
        return _view(node, first, value), False
    return _move(node, first, value, axes)


def _broadcast(operands: list[tuple[Axes, torch.Tensor]], value: torch.Tensor) -> Axes:
    """The axes of operands together. Those that are stretched, as that of a lone token may be, have no say."""
    result = []
    for position in range(1, value.ndim + 1):
        size = value.shape[-position]
        whole = [axes for axes, of in operands if len(axes) >= position and same_size(of.shape[-position], size)]
        names = [axes[-position] for axes in whole]
        fallback = "n" if not isinstance(size, int) else str(size)
        result.append(_best(names, fallback))
    return tuple(reversed(result))


def _best(names: list[str], fallback: str) -> str:
    """The most telling of the names that one axis has: a token axis, then a declared dim, then a number."""
    ranked = sorted((n for n in names if n != "1"), key=lambda n: 0 if is_token(n) else 2 if n.isdigit() else 1)
    return ranked[0] if ranked else fallback


def _reduce(node: fx.Node, source: Axes, value: torch.Tensor) -> tuple[Axes, bool]:
    given = node.args[2] if node.target is aten.linalg_vector_norm.default and len(node.args) > 2 else None
    dims = (
        given
        if given is not None
        else node.args[1]
        if len(node.args) > 1 and isinstance(node.args[1], (list, tuple))
        else []
    )
    over = {d % len(source) for d in dims} if dims and source else set(range(len(source)))
    mixes = any(is_token(source[d]) for d in over)
    if value.ndim == len(source):
        return tuple("1" if d in over else a for d, a in enumerate(source)), mixes
    return tuple(a for d, a in enumerate(source) if d not in over), mixes


def _view(node: fx.Node, source: Axes, value: torch.Tensor) -> Axes:
    if node.target is aten.permute.default:
        return tuple(source[d] for d in node.args[1])
    if node.target in (aten.t.default, aten.transpose.int):
        a, b = node.args[1:] if node.target is aten.transpose.int else (-1, -2)
        swapped = list(source)
        if len(swapped) > 1:
            swapped[a], swapped[b] = swapped[b], swapped[a]
        return tuple(swapped)
    if node.target is aten.unsqueeze.default:
        dim = node.args[1] % value.ndim
        return (*source[:dim], "1", *source[dim:])
    if node.target is aten.expand.default:
        return _broadcast([(source, node.args[0].meta["val"])], value)
    before = node.args[0].meta["val"].shape
    return regroup(source, list(before), list(value.shape))


def regroup(source: Axes, before: list[Any], after: list[Any]) -> Axes:
    """Axes after a reshape: what an axis is joined of, or split into, found from the last axis on.

    An axis joined of tokens and others is named by its factors: [n, 2, 4] as [2n, 4] is ["n*2", "4"], and split as it
    was joined, each of its parts is what it had been. Of sizes that no split explains, all are tokens if any is.
    """
    olds = [one for axis, size in zip(source, before, strict=True) for one in _factors(axis, size)]
    single = [axis for axis, size in zip(source, before, strict=True) if is_token(axis) and same_size(size, 1)]
    result: list[str] = []
    for position, size in reversed(list(enumerate(after))):
        found: list[tuple[str, Any]] = []
        rest = size
        while olds and not same_size(rest, 1):
            axis, whole = olds.pop()
            if (more := _quotient(rest, whole)) is not None:
                found, rest = [(axis, whole), *found], more
            elif (left := _quotient(whole, rest)) is not None:
                token = "n." if is_token(axis) else ""
                olds.append((f"{token}{left}", left))
                found, rest = [(f"{token}{rest}", rest), *found], 1
            else:
                mixed = any(is_token(name) for name, _ in [(axis, whole), *olds, *found])
                return (*[f"n.{s}" if mixed else str(s) for s in after[: position + 1]], *result)
        result = [_joined(found), *result]
    for position, size in enumerate(after):
        if single and same_size(size, 1):  # the axis of one token
            result[position] = single.pop(0)
    return tuple(result)


def _factors(axis: str, size: Any) -> list[tuple[str, Any]]:
    """What an axis is joined of, each with its size; itself, where that is not known. None of them of size 1."""
    names = axis.split("*") if is_token(axis) else [axis]
    numbers = [int(name) for name in names if name.isdigit()]
    tokens = _quotient(size, math.prod(numbers))
    if len(numbers) != len(names) - 1 or tokens is None:
        names, tokens = [axis], size
    found = [(name, int(name) if name.isdigit() and len(names) > 1 else tokens) for name in names]
    return [(name, one) for name, one in found if not same_size(one, 1)]


def _joined(found: list[tuple[str, Any]]) -> str:
    """The name of an axis joined of these."""
    token = any(is_token(name) for name, _ in found)
    names = [name if is_token(name) or len(found) == 1 or not token else str(size) for name, size in found]
    return "*".join(names) or "1"


def _quotient(whole: Any, part: Any) -> Any:
    """`whole` / `part` where that is a whole number for every n, else None."""
    if isinstance(whole, int) and isinstance(part, int):
        return whole // part if part and whole % part == 0 else None
    many = (whole if not isinstance(whole, int) else part).node
    wholes, parts = (many.wrap_int(s).values if isinstance(s, int) else s.node.values for s in (whole, part))
    divides = all(w is not None and p and w % p == 0 for w, p in zip(wholes, parts, strict=True))
    return whole // part if divides else None


def _move(node: fx.Node, source: Axes, value: torch.Tensor, axes: Mapping[fx.Node, Axes]) -> tuple[Axes, bool]:
    dim: Any
    if node.target is aten.slice.Tensor:
        dim = (node.args[1] if len(node.args) > 1 else 0) % len(source)
        size, whole = value.shape[dim], same_size(value.shape[dim], node.args[0].meta["val"].shape[dim])
        name = source[dim] if whole or is_token(source[dim]) else str(size) if isinstance(size, int) else "n"
        return (*source[:dim], name, *source[dim + 1 :]), is_token(source[dim]) and not whole
    if node.target is aten.select.int:
        dim = node.args[1] % len(source)
        return (*source[:dim], *source[dim + 1 :]), is_token(source[dim])
    if node.target is aten.cat.default:
        dim = (node.args[1] if len(node.args) > 1 else 0) % len(source)
        parts = [axes[a] for a in node.args[0]]
        joined = tuple(_best([p[d] for p in parts], "1") for d in range(len(source)))
        mixes = any(is_token(p[dim]) for p in parts)
        size = value.shape[dim]
        name = _best([p[dim] for p in parts], "n") if mixes else str(size) if isinstance(size, int) else "n"
        return (*joined[:dim], name, *joined[dim + 1 :]), mixes
    if node.target is aten.flip.default:
        return source, any(is_token(source[d]) for d in node.args[1])
    return source, is_token(source[-2]) or is_token(source[-1])  # tril, triu
