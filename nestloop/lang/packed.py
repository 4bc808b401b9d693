"""Packed sequences: several of any length, one after another on one token axis, as `cu_seqlens` cuts them.

Each is run as if it were alone; those of equal length, and in equal places of their chunks, as one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nestloop.errors import InputError, StateError
from nestloop.lang.declaration import caller, is_whole

Bounds = list[tuple[int, int]]


def bounds_of(cu_seqlens: Any, sequences: int, tokens: int) -> Bounds:
    """(start, stop) of each sequence.

    Raises:
        InputError: `cu_seqlens` is not [0, ..., tokens], never falling; or more than one row of tokens.
    """
    cuts: Any = cu_seqlens.tolist() if hasattr(cu_seqlens, "tolist") else cu_seqlens  # a tensor, or an array of numpy's
    cuts = list(cuts) if isinstance(cuts, Iterable) else [cuts]
    whole = all(is_whole(cut, 0) for cut in cuts)
    if not whole or len(cuts) < 2 or cuts[0] != 0 or cuts[-1] != tokens or cuts != sorted(cuts):
        raise InputError(
            "cu_seqlens does not cut the tokens into sequences.",
            where=caller(),
            given=f"{cuts}, {tokens} tokens",
            need=f"whole numbers that begin with 0, never fall and end with {tokens}",
            fix="cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)",
        )
    if sequences != 1:
        raise InputError(
            "Packed sequences are one row of tokens.",
            where=caller(),
            given=f"{sequences} rows",
            need="1: all sequences one after another",
            fix="pass x.flatten(0, 1)[None], or leave cu_seqlens out",
        )
    return list(pairwise(cuts))


def each(
    bounds: Bounds, states: Any, run: Callable[[Bounds, Any], tuple[Tensor, Tensor | None, Any]]
) -> list[tuple[Tensor, Tensor | None, Any]]:
    """Every sequence's output, losses and state, with a leading axis of 1.

    Args:
        states: one for each sequence, or None.
        run: (bounds of sequences that run as one batch, their state) -> outputs, losses and state of the batch.

    Raises:
        StateError: not as many states as sequences.
    """
    if states is not None and (not isinstance(states, (list, tuple)) or len(states) != len(bounds)):
        raise StateError(
            "Packed sequences go on from one state each.",
            where=caller(),
            given=f"{len(states)} states" if isinstance(states, (list, tuple)) else f"a {type(states).__name__}",
            need=f"a list of {len(bounds)}",
            fix="pass the list that a call with cu_seqlens returned",
        )
    batches: dict[Any, list[int]] = {}
    for index, (start, stop) in enumerate(bounds):
        places = () if states is None else tuple(_numbers(states[index]))
        batches.setdefault((stop - start, places), []).append(index)
    made: dict[int, tuple[Tensor, Tensor | None, Any]] = {}
    for indices in batches.values():
        state = None if states is None else join([states[index] for index in indices])
        out, losses, end = run([bounds[index] for index in indices], state)
        for row, index in enumerate(indices):
            own = None if losses is None else losses[row : row + 1]
            made[index] = (out[row : row + 1], own, part(end, row))
    return [made[index] for index in range(len(bounds))]


def _numbers(state: Any) -> list[int]:
    if isinstance(state, dict):
        return [number for item in state.values() for number in _numbers(item)]
    if isinstance(state, (list, tuple)):
        return [number for item in state for number in _numbers(item)]
    return [state] if isinstance(state, int) else []


def join(states: Sequence[Any]) -> Any:
    """States in equal places as one state, sequences along the first axis of every tensor."""
    first = states[0]
    if isinstance(first, dict):
        return {name: join([state[name] for state in states]) for name in first}
    if isinstance(first, (list, tuple)):
        return [join(items) for items in zip(*states, strict=True)]
    return torch.cat(list(states)) if isinstance(first, Tensor) else first


def part(state: Any, row: int) -> Any:
    """The state of one sequence of several."""
    if isinstance(state, dict):
        return {name: part(item, row) for name, item in state.items()}
    if isinstance(state, (list, tuple)):
        return [part(item, row) for item in state]
    return state[row : row + 1] if isinstance(state, Tensor) else state
