"""Parameters of maps, and the walk through them: from x [B, N, D] to views and gates, and from read-outs outwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nestloop.errors import ShapeMismatchError
from nestloop.lang import init
from nestloop.lang.maps import Call, Map, Place, is_source


class Parameters(nn.Module):
    """The parameters of one map, each under its own name."""

    def __init__(self, shapes: Mapping[str, tuple[list[int], str, bool]]) -> None:
        super().__init__()
        self.add(shapes)

    def add(self, shapes: Mapping[str, tuple[list[int], str, bool]]) -> None:
        for name, (shape, start, per_head) in shapes.items():
            self.register_parameter(name, nn.Parameter(init.fill(torch.empty(shape), start, per_head)))


class Shared(nn.ModuleDict):
    """The maps that a loop names: one set of parameters each, under their name in the class body."""

    def __init__(self) -> None:
        super().__init__()
        self.declared: dict[str, Any] = {}  # the line each was declared on, and the shapes of its parameters

    def claim(self, one: Map, place: Place) -> None:
        """The parameters of `one`, made when it is first met; whoever meets it again must stand in a like place.

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
        if shapes and one.name not in self:
            self[one.name] = Parameters(shapes)

    def own(self, one: Map) -> dict[str, Tensor]:
        """The parameters of a shared map by name."""
        return dict(self[one.name].named_parameters(recurse=False)) if one.name in self else {}


def _sizes(shapes: Mapping[str, tuple[list[int], str, bool]]) -> str:
    return ", ".join(f"{name} {shape}" for name, (shape, _, _) in shapes.items()) or "no parameters"


class Making(Parameters):
    """The parameters of one view's maps: those of its own projection by their names (`weight`, `bias`), those of every
    other map below the map's label (`conv.weight`). What is shared belongs to `Shared`."""

    def __init__(self, maps: Sequence[Any], place: Place, entry: Place, shared: Shared) -> None:
        super().__init__({})
        self.labels: list[str | None] = []
        for one, at in zip(maps, places(maps, place, entry), strict=True):
            label = None
            if isinstance(one, Map) and one.shared:
                shared.claim(one, at)
            elif isinstance(one, Map) and is_source(one):
                self.add(one.parameters(at))
                label = ""
            elif isinstance(one, Map) and (shapes := one.parameters(at)):
                label = one.label if one.label not in self._modules else f"{one.label}_{len(self.labels)}"
                self.add_module(label, Parameters(shapes))
            self.labels.append(label)

    def own(self, index: int) -> dict[str, Tensor]:
        """The parameters of the map at `index`, where it has some of its own."""
        label = self.labels[index]
        if label is None:
            return {}
        module = self if label == "" else self.get_submodule(label)
        return dict(module.named_parameters(recurse=False))


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


def walk(
    maps: Sequence[Any],
    x: Tensor,
    groups: int,
    making: Making | None,
    shared: Shared,
    call: Call,
    key: str,
    start: int = 0,
) -> Tensor:
    """x [B, N, G, f] through the maps, split into `groups` after the source.

    What shared maps make of the token is made once a call: `call.memo` has it.

    making: the parameters of maps that are not shared; None where all are. `maps` are its maps from `start` on.
    """
    trail: tuple[Any, ...] | None = ()
    for index, one in enumerate(maps, start):
        common = isinstance(one, Map) and one.shared
        trail = (*trail, one.name) if trail is not None and common else None
        if trail is not None and trail in call.memo:
            x = call.memo[trail]
        elif isinstance(one, Map):
            call.key = ".".join(trail) if trail else f"{key}.{making.labels[index] if making else one.label}"
            x = one(x, shared.own(one) if common or making is None else making.own(index), call)
            if trail is not None:
                call.memo[trail] = x
        else:
            x = one(x)
        if is_source(one):
            rows = x.shape[-1]  # a table over positions is the same for all groups
            x = x.squeeze(2).unflatten(-1, (groups, rows // groups)) if rows > 1 else x.expand(-1, -1, groups, -1)
    return x


def pool(x: Tensor, position: int, size: int, before: Tensor | None) -> tuple[Tensor, list[int], Tensor]:
    """Means of x [B, N, ...] over chunks of `size` tokens, the first of which has seen `position % size` tokens.

    Returns:
        [B, M, ...]: the mean of each chunk that x is in, as far as it has been seen; how many tokens of x are in each;
        and the sum of the last chunk where it is not complete (zero where it is), [B, ...].
    """
    seen = position % size
    first = min(size - seen, x.shape[1])
    whole, rest = divmod(x.shape[1] - first, size)
    lengths = [first, *[size] * whole, *([rest] if rest else [])]
    head = x[:, :first].sum(1, keepdim=True)
    if before is not None:
        head = head + before.to(x.dtype)[:, None]
    middle = x[:, first : first + whole * size].unflatten(1, (whole, size)).sum(2) if whole else head[:, :0]
    tail = x[:, first + whole * size :].sum(1, keepdim=True)[:, : bool(rest)]
    sums = torch.cat([head, middle, tail], 1)
    counts = torch.tensor([seen + first, *[size] * whole, *([rest] if rest else [])], device=x.device, dtype=x.dtype)
    counts = counts.clamp(min=1)  # no tokens have no mean
    complete = (position + x.shape[1]) % size == 0
    left = torch.zeros_like(sums[:, -1]) if complete else sums[:, -1]
    return sums / counts.view(1, -1, *[1] * (x.ndim - 2)), lengths, left
