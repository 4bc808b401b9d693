"""The modules that a branch's maps need, and the walk through them: from x [B, N, D] to views and gates, and from
read-outs outwards.

A module that has parameters is called and reads them as its attributes: what others do to modules (hooks,
parametrizations, pruning, adapters, sharding, another module in one's place) is seen.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nestloop.errors import InputError, Location, ShapeMismatchError
from nestloop.lang import init
from nestloop.lang.declare import caller
from nestloop.lang.maps import Call, Map, Place, Shape, applied, is_source
from nestloop.layer.starts import begin


class Parameters(nn.Module):
    """The parameters of one map, each under its own name."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        super().__init__()
        for name, (shape, _, _) in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        begin(self, {name: partial(init.fill, init=start, per_head=each) for name, (_, start, each) in shapes.items()})

    def forward(self, x: Tensor, one: Map, call: Call) -> Tensor:
        """`one` on x [B, N, G, f], with these parameters."""
        return one(x, self, call)

    def extra_repr(self) -> str:
        return ", ".join(f"{name} {list(p.shape)}" for name, p in self.named_parameters(recurse=False))


def module_of(one: Map, shapes: Mapping[str, Shape]) -> nn.Module:
    """The module of a map with parameters of these shapes: a linear map is PyTorch's own, as others expect it."""
    if not one.linear:
        return Parameters(shapes)
    parts: dict[str, nn.Module] = {}
    for name in (name for name in shapes if name.endswith("weight")):
        label = name.removesuffix("weight")
        (rows, columns), start, _ = shapes[name]
        part = nn.Linear(columns, rows, bias=f"{label}bias" in shapes, device="meta")  # which draws nothing
        part.to_empty(device=torch.get_default_device())
        begin(part, {"weight": partial(init.fill, init=start, per_head=False), "bias": nn.init.zeros_})
        parts[label.rstrip(".")] = part
    return parts[""] if "" in parts else nn.Sequential(OrderedDict(parts))


def free_label(container: nn.Module, name: str, reserved: Sequence[str] = ()) -> str:
    """The name for a child that is declared as `name`: that, or with underscores after it until nothing has it.

    PyTorch finds children as attributes (`functional_call`, `get_submodule`, adapters), so `keys` cannot be the name of
    one in a dict that has the method; `keys_` can.
    """
    while hasattr(container, name) or name in reserved:
        name += "_"
    return name


class Shared(nn.ModuleDict):
    """The maps that a loop names: one module each, under their name in the class body (or `free_label`)."""

    def __init__(self) -> None:
        super().__init__()
        self.declared: dict[str, Any] = {}  # the line each was declared on, and the shapes of its parameters
        self.labels: dict[str, str] = {}  # the names that modules have here

    def claim(self, one: Map, place: Place) -> None:
        """The module of `one`, made when it is first met; whoever meets it again must stand in a like place.

        Raises:
            ShapeMismatchError: it stands where it needs others, or its name is another map's.
        """
        shapes = one.parameters(place)
        known = self.declared.setdefault(one.name, (one.where, shapes))
        if known != (one.where, shapes):
            raise ShapeMismatchError(
                f"The map '{one.name}' does not fit everywhere it is used.",
                where=one.where,
                given=f"{_sizes(shapes)} here, {_sizes(known[1])} at {known[0]}",
                need="as many features in every place",
                fix="declare one map for each, under a name of its own",
            )
        if shapes and one.name not in self.labels:
            self.labels[one.name] = free_label(self, one.name)
            self[self.labels[one.name]] = module_of(one, shapes)


def _sizes(shapes: Mapping[str, tuple[list[int], str, bool]]) -> str:
    return ", ".join(f"{name} {shape}" for name, (shape, _, _) in shapes.items()) or "no parameters"


class Route:
    """The maps of one view, gate or read-out in one call: what its `Making` is given beside x.

    No dataclass, as `Call` is none.

    Attributes:
        name: of the view or gate, before the keys of what its maps keep.
        what, where: the view, gate or read-out in an error, and the line that declares it.
        maps: from x on.
        shared: the modules of maps that have a name.
        activate: a gate's activation.
    """

    def __init__(
        self,
        name: str,
        maps: Sequence[Any],
        shared: Shared,
        call: Call,
        what: str,
        where: Location,
        activate: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.name, self.maps, self.shared, self.call, self.activate = name, maps, shared, call, activate
        self.what, self.where = what, where

    def walk(self, x: Tensor, making: Making | None, first: int = 0, stop: int | None = None) -> Tensor:
        """x [B, N, G, f] through the maps from `first` to `stop`.

        What shared maps make of the token is made once a call: `call.memo` has it.

        making: the modules of maps that are not shared; None where all are.
        """
        trail: tuple[Any, ...] | None = ()
        for index, one in enumerate(self.maps[first:stop], first):
            common = isinstance(one, Map) and one.shared
            trail = (*trail, one.name) if trail is not None and common else None
            if trail is not None and trail in self.call.memo:
                x = self.call.memo[trail]
            elif isinstance(one, Map):
                label = one.label if making is None else making.labels[index]
                self.call.key = ".".join(trail) if trail else f"{self.name}.{label}"
                x = self._apply(one, x, self._module(one, label, making))
                if trail is not None:
                    self.call.memo[trail] = x
            else:
                x = applied(one, x, f"map of {self.what}", self.where)
            if is_source(one):
                rows = x.shape[-1]  # a table over positions is the same for all groups
                groups = 1 if making is None else making.groups
                x = x.squeeze(2).unflatten(-1, (groups, rows // groups)) if rows > 1 else x.expand(-1, -1, groups, -1)
        return x

    def _module(self, one: Map, label: str | None, making: Making | None) -> nn.Module | None:
        """The module of a map, where it has one."""
        if one.shared:
            return self.shared._modules.get(self.shared.labels.get(one.name, ""))
        return None if making is None else making._modules.get(label or "")

    def _apply(self, one: Map, x: Tensor, module: nn.Module | None) -> Tensor:
        made: Tensor = one(x, module, self.call) if module is None or one.linear else module(x, one, self.call)
        return made


class Making(nn.Module):
    """What makes a view or gate of x, [B, N, D] -> [B, N, G * f], or what a read-out goes through, [B, N, H * f] both.

    Its submodules are those of its maps, below each map's label (`conv.weight`). What is shared belongs to `Shared`.
    """

    def __init__(self, maps: Sequence[Any], place: Place, entry: Place, shared: Shared) -> None:
        super().__init__()
        self.groups, self._entering = place.groups, entry.groups
        self.labels: list[str | None] = []
        for one, at in zip(maps, places(maps, place, entry), strict=True):
            label = None
            if isinstance(one, Map) and one.shared:
                shared.claim(one, at)
            elif isinstance(one, Map) and (shapes := one.parameters(at)):
                label = one.label if one.label not in self._modules else f"{one.label}_{len(self.labels)}"
                self.add_module(label, module_of(one, shapes))
            self.labels.append(label)

    def forward(self, x: Tensor, route: Route) -> Tensor:
        """x through the maps of `route`."""
        return route.walk(x.unflatten(-1, (self._entering, x.shape[-1] // self._entering)), self).flatten(2)


class Pooled(Making):
    """What makes a gate from each chunk's mean token, its activation included: the same for all tokens of a chunk.

    Inside a chunk, the mean of the tokens so far stands for it; each call makes up for what the one before gave, so
    that the gates of a chunk's tokens, however split, add up to so many times the gate of its mean.
    """

    def forward(self, x: Tensor, route: Route) -> Tensor:
        """x [B, N, D] -> [B, N, G * f]."""
        call, size, name = route.call, route.call.chunk, route.name
        at = next(i for i, m in enumerate(route.maps) if is_source(m))
        x = route.walk(x[:, :, None], self, stop=at)
        means, first, left = pool(x, call.position, size, call.carried.get(f"{name}.sum"))
        after_means = Route(name, route.maps, route.shared, call.apart(), route.what, route.where)
        made = after_means.walk(means, self, at)
        if route.activate is not None:
            made = route.activate(made)  # [B, M, G, f]
        after = (call.position + x.shape[1]) % size
        call.kept[f"{name}.sum"], call.kept[f"{name}.given"] = left, after * made[:, -1]
        seen = call.position % size
        if seen:
            given = call.carried[f"{name}.given"].to(made.dtype)[:, None]
            made = torch.cat([((seen + first) * made[:, :1] - given) / (first or 1), made[:, 1:]], 1)
        chunk = (torch.arange(x.shape[1], device=made.device) + seen) // size  # of each token
        return made[:, chunk].flatten(2)


def through(module: nn.Module, x: Tensor, route: Route, place: str) -> Tensor:
    """x through a `Making`, or through what stands in its place: what wraps one hands on all that it is given (FSDP,
    peft's modules to save), another module sees x alone.

    place: its path below the layer, for the error.

    Raises:
        InputError: it wraps one, and takes x alone.
    """
    if not any(isinstance(part, Making) for part in module.modules()):
        made: Tensor = module(x)
        return made
    if not isinstance(module, Making) and not torch.compiler.is_compiling():
        _check_wrapping(module, x, route, place)
    made = module(x, route)
    return made


def _check_wrapping(module: nn.Module, x: Tensor, route: Route, place: str) -> None:
    signature = inspect.signature(module.forward)
    try:
        signature.bind(x, route)
    except TypeError:
        raise InputError(
            f"What stands in {place} wraps what it is to make, and does not hand on all that it is given.",
            where=caller(),
            given=f"{type(module).__name__}.forward{signature}",
            need="forward(self, x, route), which calls what it wraps with both",
            fix="write def forward(self, *given): return self.inner(*given), or put a module there that has no other "
            "inside, which is given x alone",
        ) from None


def places(maps: Sequence[Any], place: Place, entry: Place) -> list[Place]:
    """Where each map stands, from the place that the last one leaves to and the one that the first one enters."""
    found: list[Place] = []
    features, at_source = place.features, False
    for one in reversed(maps):
        at = entry if at_source else replace(place, features=features)
        found.append(at)
        if is_source(one):
            at_source = True
        elif isinstance(one, Map):
            features = one.takes(features)
    return found[::-1]


def pool(x: Tensor, position: int, size: int, before: Tensor | None) -> tuple[Tensor, int, Tensor]:
    """Means of x [B, N, ...] over chunks of `size` tokens, the first of which has seen `position % size` tokens.

    While Dynamo traces a call, `position` and N are symbols: nothing here makes a list that is as long.

    Returns:
        [B, M, ...]: the mean of each chunk that x is in, as far as it has been seen; how many tokens of x are in the
        first; and the sum of the last chunk where it is not complete (zero where it is), [B, ...].
    """
    tokens, seen = x.shape[1], position % size
    first = tokens if tokens <= size - seen else size - seen
    whole, rest = (tokens - first) // size, (tokens - first) % size
    head = x[:, :first].sum(1, keepdim=True)
    if before is not None:
        head = head + before.to(x.dtype)[:, None]
    parts = [head]
    if whole:
        parts.append(x[:, first : first + whole * size].unflatten(1, (whole, size)).sum(2))
    if rest:
        parts.append(x[:, first + whole * size :].sum(1, keepdim=True))
    sums = torch.cat(parts, 1)
    begun = torch.arange(sums.shape[1], device=x.device) * size  # tokens of the chunks before each
    counts = (seen + tokens - begun).clamp(1, size).to(x.dtype)  # no tokens have no mean
    left = torch.zeros_like(sums[:, -1]) if (position + tokens) % size == 0 else sums[:, -1]
    return sums / counts.view(1, -1, *[1] * (x.ndim - 2)), first, left
