"""The state of a loop: what a sequence carries from one call to the next, so that any split of it is the whole.

A state is a dict. Every fast weight is there under its name, [B, H, *dims]: the weights after the last token. A stream
adds what the rest of its chunk needs, under the fast weight's name and a point, and `position`, an int: the tokens
seen. `torch.save` and `torch.load` keep it as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestloop.errors import StateError
from nestloop.lang import coefficient
from nestloop.lang.declare import Declaration, Fast, Gate
from nestloop.lang.optim import SGD, momentum_name
from nestloop.lang.schedule import Causal, Chunked, Program, Sliding, Stream

if TYPE_CHECKING:
    from nestloop.lang.loop import LoopSpec

State = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One tensor of a state.

    Attributes:
        name: its key.
        like: the declaration that has its dims.
        part: "weight", "anchor" (where gradients are taken), "update" (the scaled sum since the anchor), "momentum" (or
            another moment), "pending" (a chunk's gradient, or the sum of a gate over its tokens, so far), "tail" (last
            tokens' views), "initial" (the initial weights, of `steps_with` alone).
        rows: leading axis of tokens, for a tail.
    """

    name: str
    like: Declaration
    part: str
    rows: int = 0


def identifier(entry: str) -> str:
    """The name of an entry as an identifier, which generated code needs: "w.momentum" is w__momentum."""
    return entry.replace(".", "__")


def entries(spec: LoopSpec) -> dict[str, Entry]:
    """Every tensor of a loop's state, fast weights first."""
    optimizer, schedule = spec.optimizer, spec.schedule
    found = [Entry(name, fast, "weight") for name, fast in spec.fast.items()]
    if isinstance(schedule, Stream):
        for name, fast in spec.fast.items():
            found += _moments(optimizer, fast)
            if _has_anchor(spec):
                found.append(Entry(f"{name}.anchor", fast, "anchor"))
            if optimizer.scale is not None and isinstance(schedule, Causal):
                found.append(Entry(f"{name}.update", fast, "update"))
            if isinstance(schedule, Chunked) and schedule.order == "apply-update":
                found.append(Entry(f"{name}.pending", fast, "pending"))
        if isinstance(schedule, Chunked) and schedule.order == "apply-update":
            found += [Entry(f"{gate.name}.pending", gate, "pending") for gate in averaged_gates(spec)]
        if isinstance(schedule, Sliding) and schedule.window > 1:
            rows = schedule.window - 1
            found += [Entry(f"{name}.tail", spec.views[name], "tail", rows) for name in spec.of_keys]
        if optimizer.window is not None and optimizer.window > 1:
            rows = optimizer.window - 1
            found += [Entry(f"{name}.tail", declared, "tail", rows) for name, declared in spec.inputs.items()]
    return {entry.name: entry for entry in found}


def _moments(optimizer: SGD, fast: Fast) -> list[Entry]:
    """What an optimizer keeps of a fast weight: momenta, and moments that it declares."""
    found = [Entry(momentum_name(fast.name, order), fast, "momentum") for order in range(optimizer.orders)]
    moments = optimizer.moments.items()
    return [*found, *[Entry(f"{fast.name}.{name}", one if one.scalar else fast, "momentum") for name, one in moments]]


def momenta_among(entries: Mapping[str, Entry], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of some tensors, by entry, that are momenta and moments."""
    return {name: given[name] for name, entry in entries.items() if entry.part == "momentum"}


def steps_with(spec: LoopSpec) -> dict[str, Entry]:
    """What a step of a batch schedule reads and leaves beside the fast weights: momenta, zero before the first step,
    and for `restore` the initial weights. They are of one call, and no part of a state."""
    optimizer = spec.optimizer
    found = []
    for name, fast in spec.fast.items():
        found += _moments(optimizer, fast)
        if optimizer.restore is not None:
            found.append(Entry(f"{name}.initial", fast, "initial"))
    return {entry.name: entry for entry in found}


def state_size(spec: LoopSpec) -> str:
    """How many numbers a head's state holds, in the dims: "2 * dk * dv" for a fast weight and its momentum."""
    counts: dict[str, int] = {}
    for entry in spec.entries.values():
        dims = [*([str(entry.rows)] if entry.rows else []), *map(str, entry.like.dims)]
        text = " * ".join(f"({dim})" if " " in dim else dim for dim in dims) or "1"
        counts[text] = counts.get(text, 0) + 1
    return " + ".join(str(n) if text == "1" else f"{n} * {text}" if n > 1 else text for text, n in counts.items())


def state_numbers(spec: LoopSpec, sizes: Mapping[str, int]) -> int:
    """The value of `state_size` for these sizes."""
    shapes = [[entry.rows or 1, *[dim.size(sizes) for dim in entry.like.dims]] for entry in spec.entries.values()]
    return sum(map(math.prod, shapes))


def _has_anchor(spec: LoopSpec) -> bool:
    schedule = spec.schedule
    if isinstance(schedule, Causal):
        return schedule.chunk > 1
    return isinstance(schedule, Chunked) and schedule.anchor is not None


def averaged_gates(spec: LoopSpec) -> list[Gate]:
    """The gates that a step once a chunk reads as their mean over the chunk's tokens."""
    parts = coefficient.parts([value for name, value in spec.optimizer.every.items() if name != "lr"])
    return list({part.name: part for part in parts if isinstance(part, Gate)}.values())


def counts_tokens(spec: LoopSpec) -> bool:
    """Whether a state holds `position`."""
    return spec.streams and not isinstance(spec.schedule, Program)


def check_tokens(spec: LoopSpec, position: Any) -> None:
    """Raise `StateError` for a position in a state that is no number of tokens."""
    is_number = isinstance(position, (int, torch.SymInt)) and not isinstance(position, bool)
    if not is_number or position < 0:
        raise StateError(
            f"The position in the state of {spec.name} is not a number of tokens.",
            where=spec.where,
            given=repr(position.shape if isinstance(position, Tensor) else position),
            need="an int, 0 or more: the tokens seen",
            fix="pass the state as an earlier call returned it",
        )


def check_position(spec: LoopSpec, state: Mapping[str, Any]) -> int:
    """The position a state stands at.

    Raises:
        StateError: it is no number, or inside a chunk whose tokens see one another.
    """
    if not counts_tokens(spec):
        return 0
    position, schedule = state["position"], spec.schedule
    check_tokens(spec, position)
    if isinstance(schedule, Chunked) and schedule.order == "update-apply" and position % schedule.size:
        raise StateError(
            f"{spec.name} cannot go on inside a chunk, whose tokens see one another.",
            where=spec.where,
            given=f"a state at position {position}, chunks of {schedule.size} tokens",
            need=f"a position that is a multiple of {schedule.size}",
            fix=f"split sequences at multiples of {schedule.size} tokens",
        )
    return position
