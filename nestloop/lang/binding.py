"""Binding: tensors given to a loop against its declaration, once, before anything runs.

Every axis is checked by name, so a mistake reads "axis 1 of w1 is 4*d = 64, given 60".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from torch import Tensor

from nestloop.errors import InputError, UnresolvedDimError, shown
from nestloop.lang.declare import Declaration, Gate, Slow, View
from nestloop.lang.dims import unify
from nestloop.lang.kept import Kept
from nestloop.lang.loop import LoopSpec
from nestloop.lang.order import check_order, check_permutations
from nestloop.lang.state import check_position, counts_tokens


def lead(declaration: Declaration) -> str:
    """The leading axes of a tensor as it is passed: letters of B, H and N."""
    match declaration:
        case View(shared=True):
            return "BN"
        case View() | Gate():
            return "BHN"
        case Slow(shared=True):
            return ""
    return "H"


def token_axis(view: View | Gate) -> int:
    """The axis of the tokens of a view or gate as it is passed."""
    return lead(view).index("N")


@dataclass(frozen=True)
class Binding:
    """Sizes of one call.

    Attributes:
        sequences, heads, tokens: B, H, N.
        dims: every other dim by name, `D` included where a view has it.
    """

    sequences: int
    heads: int
    tokens: int
    dims: dict[str, int]

    @property
    def sizes(self) -> dict[str, int]:
        """All dims an expression may name, the batch's n aside."""
        return {**self.dims, "B": self.sequences, "H": self.heads, "N": self.tokens}


def bind(
    spec: LoopSpec,
    views: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any] | None,
    order: Tensor | None,
    dims: Mapping[str, int],
) -> Binding:
    """Check every tensor against its declaration and give the sizes.

    Raises:
        InputError: a missing or unknown name or dim, no tensor of a floating type, a wrong rank, an axis of the wrong
            size, tensors on several devices.
        StateError: a state whose position is none, or one to go on from only elsewhere.
        OrderError: an order that is missing, superfluous or of the wrong shape.
        UnresolvedDimError: a dim whose size nothing gives.
    """
    check_dims(spec, dims)
    _same_names(spec, "views", spec.inputs, views)
    _same_names(spec, "weights", spec.weights, weights)
    carried = spec.entries
    if state is not None:
        _same_names(spec, "state", [*carried, *(["position"] if counts_tokens(spec) else [])], state)
        check_position(spec, state)
    given: list[_Given] = []
    for name, view in spec.inputs.items():
        given.append((view, _axes(spec, view), views[name]))
    given += [(weight, _Axes(lead(weight)), weights[name]) for name, weight in spec.weights.items()]
    if state is not None:
        given += [(e.like, _Axes("BH", rows=e.rows, entry=name), state[name]) for name, e in carried.items()]

    sizes = _sizes(spec, given, dims)
    for declaration, axes, tensor in given:
        wanted = axes.sizes(declaration, sizes)
        if list(tensor.shape) != wanted:
            turned = [(d, a, t.transpose(1, 2) if a.lead == "BHN" else t) for d, a, t in given]
            raise (
                _tokens_first(spec, turned)
                if _fits(spec, turned, dims)
                else _wrong_shape(declaration, axes, tensor, str(wanted), sizes)
            )
    check_order(spec, order, sizes)
    plain = {name: size for name, size in sizes.items() if name not in ("B", "H", "N", "n")}
    return Binding(sizes["B"], sizes["H"], sizes["N"], plain)


def _sizes(spec: LoopSpec, given: Sequence[_Given], dims: Mapping[str, int]) -> dict[str, int]:
    """The size of every dim, told by the first tensor that has it."""
    sizes = {**dims, "H": spec.heads} if isinstance(spec.heads, int) else dict(dims)
    device = given[0][2].device if isinstance(given[0][2], Tensor) else None
    for declaration, axes, tensor in given:
        if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
            raise _not_floating(declaration, axes, tensor)
        if tensor.device != device:
            raise _elsewhere(declaration, axes, tensor, str(device))
        rank = axes.rank + len(declaration.dims)
        if tensor.ndim != rank:
            raise _wrong_shape(declaration, axes, tensor, f"{rank} axes")
        shape = tuple(tensor.shape)
        if torch.jit.is_tracing():  # which has sizes as tensors
            shape = tuple(map(int, shape))
        unify(declaration.dims, shape[axes.rank :], sizes)
        for letter, size in zip(axes.lead, shape, strict=False):
            sizes.setdefault(letter, size * axes.group if letter == "H" else size)
    if "H" not in sizes:
        sizes["H"] = 1
    if sizes["H"] < 1:
        raise InputError(
            f"The views of {spec.name} have no heads.",
            where=spec.where,
            given="H = 0",
            need="1 head or more",
            fix="pass views [B, H, N, *]; a batch or a sequence may be empty",
        )
    sizes = {**spec.default_dims, **sizes}
    if spec.grid is not None:
        sizes.update(zip(spec.grid, grid_sizes(spec, sizes, sizes["N"]), strict=True))
    return sizes


def _fits(spec: LoopSpec, given: Sequence[_Given], dims: Mapping[str, int]) -> bool:
    try:
        sizes = _sizes(spec, given, dims)
        return all(list(tensor.shape) == axes.sizes(declaration, sizes) for declaration, axes, tensor in given)
    except InputError:
        return False


class Bindings:
    """`bind` for one loop, whose result is kept by all that it reads: a call like an earlier one is not checked again.

    Args:
        spec: the loop.
    """

    def __init__(self, spec: LoopSpec) -> None:
        self.spec = spec
        self._known: Kept[Binding] = Kept()

    def __call__(
        self,
        views: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        state: Mapping[str, Any] | None,
        order: Tensor | None,
        dims: Mapping[str, int],
    ) -> Binding:
        """Arguments, and what it raises, as for `bind`."""
        if torch.compiler.is_compiling():  # what is kept would be a condition of the graph
            return bind(self.spec, views, weights, state, order, dims)
        key = _key((views, weights, state, {"order": order}), dims)
        if state is not None and key in self._known:
            check_position(self.spec, state)
        found = self._known.of(key, lambda: bind(self.spec, views, weights, state, order, dims))
        if order is not None and order.device.type == "cpu" and has_values(order):
            check_permutations(self.spec, order)
        return found


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor's values may be looked at: no transform or mode of PyTorch's traces with it."""
    traced = torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack()
    return type(tensor) is Tensor and not traced


def _key(given: Sequence[Mapping[str, Any] | None], dims: Mapping[str, int]) -> Any:
    """All that `bind` reads of tensors by name, and the dims; None of what is no mapping, or of sizes that are unknown
    yet."""
    try:
        key = (*map(_read, given), *[(n, type(size), size) for n, size in dims.items()])
        hash(key)
    except (AttributeError, TypeError):
        return None
    return key


def _read(given: Mapping[str, Any] | None) -> Any:
    if given is None:
        return None
    tensors = [(n, t.shape, t.dtype, t.device) if isinstance(t, Tensor) else (n, type(t)) for n, t in given.items()]
    return type(given), *tensors


@dataclass(frozen=True)
class _Axes:
    """The axes of a tensor as it is passed, before its own dims.

    Attributes:
        lead: letters of B, H and N.
        group: heads that one of its heads stands for.
        micro: micro-steps, an axis after N where there are several.
        rows: tokens of a state's tail, an axis after H; 0 for none.
        entry: the key of a state's tensor; "" for any other.
    """

    lead: str
    group: int = 1
    micro: int = 0
    rows: int = 0
    entry: str = ""

    @property
    def rank(self) -> int:
        return len(self.lead) + bool(self.micro) + bool(self.rows)

    @property
    def names(self) -> list[str]:
        letters = [f"H/{self.group}" if a == "H" and self.group > 1 else a for a in self.lead]
        return [*letters, *(["micro-steps"] if self.micro else []), *(["window - 1"] if self.rows else [])]

    def sizes(self, declaration: Declaration, sizes: Mapping[str, int]) -> list[int]:
        """The shape it must have."""
        found = [sizes[letter] for letter in self.lead]
        if self.group > 1:
            at = self.lead.index("H")
            many = max(found[at] // self.group, 1) * self.group
            check_groups(declaration, found[at], self.group, f"pass the other views with {many} heads")
            found[at] //= self.group
        found += [n for n in (self.micro, self.rows) if n]
        return found + [expr.size(sizes, declaration.where) for expr in declaration.dims]


_Given = tuple[Declaration, _Axes, Tensor]


def _what(declaration: Declaration, axes: _Axes) -> tuple[str, str]:
    """What a tensor is, and the name it was passed by."""
    if axes.entry:
        return f"state's '{axes.entry}'", axes.entry
    return f"{declaration.kind} '{declaration.name}'", declaration.name


def _axes(spec: LoopSpec, view: View | Gate) -> _Axes:
    return _Axes(lead(view), view.group, getattr(spec.schedule, "micro", 1) if view.micro else 0)


def grouped_heads(spec: LoopSpec, name: str, tensor: Tensor) -> Tensor:
    """A view of fewer heads [B, H / group, N, *], repeated for every head it stands for [B, H, N, *]."""
    group = spec.inputs[name].group
    return tensor if group == 1 else tensor.repeat_interleave(group, 1)


def check_groups(view: Declaration, heads: int, group: int, fix: str) -> None:
    """Raise `InputError` where so many heads do not make groups of a view."""
    if heads % group:
        raise InputError(
            f"The heads of the view '{view.name}' do not group.",
            where=view.where,
            given=f"H = {heads}, group = {group}",
            need=f"a number of heads that is a multiple of {group}",
            fix=fix,
        )


def check_dims(spec: LoopSpec, dims: Mapping[str, int]) -> None:
    """Raise `InputError` for the size of a dim that the loop does not have, or that is no positive number."""
    for name, size in dims.items():
        if name not in spec.dim_names:
            raise InputError(
                f"{spec.name} has no dim '{name}' whose size could be given.",
                where=spec.where,
                given=f"{name}={shown(size)}",
                need=f"one of {', '.join(sorted(spec.dim_names))}",
                fix=f"remove it, or declare {name} = nl.dim() in the loop",
            )
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)) or size < 1:
            raise InputError(
                f"The size of the dim '{name}' of {spec.name} is not a positive whole number.",
                where=spec.where,
                given=f"{name}={shown(size)}",
                need="1 or more",
                fix=f"write {name}=16",
            )


def _not_floating(declaration: Declaration, axes: _Axes, value: Any) -> InputError:
    what, name = _what(declaration, axes)
    return InputError(
        f"The {what} is not a tensor of a floating type.",
        where=declaration.where,
        given=f"{value.dtype} [{', '.join(map(str, value.shape))}]" if isinstance(value, Tensor) else shown(value),
        need="a tensor of float64, float32, bfloat16 or float16",
        fix=f"pass {name}.float()" if isinstance(value, Tensor) else "pass a tensor",
    )


def _elsewhere(declaration: Declaration, axes: _Axes, value: Any, device: str) -> InputError:
    what, name = _what(declaration, axes)
    return InputError(
        f"The {what} is on another device than the first view.",
        where=declaration.where,
        given=str(value.device),
        need=device,
        fix=f"pass {name}.to({device!r})",
    )


def _same_names(spec: LoopSpec, what: str, declared: Iterable[str], given: Mapping[str, Any]) -> None:
    if not isinstance(given, Mapping):
        raise InputError(
            f"The {what} of {spec.name} are passed by name.",
            where=spec.where,
            given=f"a {type(given).__name__}",
            need=f"a dict with the keys {', '.join(declared) or '(none)'}",
            fix=f"pass {{{', '.join(f'{n!r}: ...' for n in declared)}}}",
        )
    if set(declared) == set(given):
        return
    missing, extra = [n for n in declared if n not in given], [n for n in given if n not in declared]
    raise InputError(
        f"The names of the {what} given to {spec.name} are not the declared ones.",
        where=spec.where,
        given=", ".join(map(str, given)) or "none",
        need=", ".join(declared) or "none",
        fix="; ".join(
            ([f"add {', '.join(missing)}"] if missing else [])
            + ([f"remove {', '.join(map(str, extra))}"] if extra else [])
        ),
    )


def _wrong_shape(
    declaration: Declaration, axes: _Axes, tensor: Tensor, need: str, sizes: Mapping[str, int] | None = None
) -> InputError:
    what, name = _what(declaration, axes)
    names = [*axes.names, *map(str, declaration.dims)]
    which = ""
    if sizes is not None:
        known = axes.sizes(declaration, sizes)
        wrong = [i for i, (a, b) in enumerate(zip(tensor.shape, known, strict=True)) if a != b]
        which = "; " + ", ".join(f"axis {i} is {names[i]} = {known[i]}, given {tensor.shape[i]}" for i in wrong)
    return InputError(
        f"The {what} has the wrong shape{which}.",
        where=declaration.where,
        given=f"[{', '.join(map(str, tensor.shape))}]",
        need=f"[{', '.join(names)}]" + (f" = {need}" if sizes is not None else f", {need}"),
        fix=f"pass {name} with the axes {', '.join(names) or '(none: a scalar)'}",
    )


def _tokens_first(spec: LoopSpec, turned: Sequence[_Given]) -> InputError:
    """The error of views [B, N, H, *], which fit turned."""
    views = [(d.name, list(t.transpose(1, 2).shape)) for d, a, t in turned if a.lead == "BHN"]
    return InputError(
        f"The views of {spec.name} have tokens before heads.",
        where=spec.where,
        given=", ".join(f"{name} {shape}" for name, shape in views),
        need="[B, H, N, *]: sequences, heads, tokens",
        fix="pass " + ", ".join(f"{name}.transpose(1, 2)" for name, _ in views),
    )


def grid_sizes(spec: LoopSpec, sizes: Mapping[str, int], tokens: int) -> tuple[int, ...]:
    """Rows and columns of the token grid, of which a call gives both, one or none; none where the loop has no grid.
    Raises `UnresolvedDimError` where the tokens are no such grid."""
    if spec.grid is None:
        return ()
    rows, columns = spec.grid
    height, width = sizes.get(rows), sizes.get(columns)
    if height is None and width is None:
        height = width = math.isqrt(index(tokens))
    if height is None:
        height = tokens // (width or 1)
    if width is None:
        width = tokens // (height or 1)
    if height * width != tokens:
        raise UnresolvedDimError(
            f"The {tokens} tokens of {spec.name} are not a grid of {rows} = {height} by {columns} = {width}.",
            where=spec.dims[rows].where,
            given=f"N = {tokens}",
            need=f"{rows} * {columns} = N; without sizes a square",
            fix=f"pass {rows}=..., {columns}=... with the call",
        )
    return height, width
