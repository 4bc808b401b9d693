"""Why a layer's call has failed, where that is what it was called with: found after the failure, which costs calls that
do not fail nothing, and refuses none of them (a module may move its parameters as it is called).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nestloop.errors import InputError, StateError
from nestloop.lang.declare import caller


def misfit(layer: nn.Module, x: Tensor, states: Sequence[Any], error: Exception) -> InputError | None:
    """What in a call of a layer does not go together, as an error that says so; None where all does."""
    if not isinstance(error, InputError) and type(error).__module__ != "builtins":  # too little memory, above all
        return None
    if "device" in str(error):
        found = _of_another_device(layer, x, states)
    elif "dtype" in str(error):
        found = _of_another_dtype(layer, x)
    else:
        found = None
    return found or (None if isinstance(error, InputError) else _of_other_sequences(x, states))


def _of_another_device(layer: nn.Module, x: Tensor, states: Sequence[Any]) -> InputError | None:
    devices = {name: parameter.device for name, parameter in layer.named_parameters()}
    name = next((name for name, device in devices.items() if device != x.device), None)
    if name is not None:
        one, meta = len({*devices.values()}) == 1, devices[name].type == "meta"
        return InputError(
            "The layer's input is on another device than its parameters.",
            where=caller(),
            given=f"x on {x.device}, {'they' if one else name} on {devices[name]}",
            need="one device for all",
            fix=f"layer.to_empty(device='{x.device}'), then layer.reset_parameters() or layer.load_state_dict(...)"
            if meta
            else f"pass x.to('{devices[name]}'), or move the layer: layer.to('{x.device}')"
            if one
            else f"move the layer: layer.to('{x.device}')",
        )
    other = next((tensor for tensor in _tensors(states) if tensor.device != x.device), None)
    if other is None:
        return None
    return StateError(
        "The state is on another device than the layer's input.",
        where=caller(),
        given=f"a state on {other.device}",
        need=str(x.device),
        fix=f"move its tensors to x.device; torch.load(path, map_location='{x.device}') does",
    )


def _of_another_dtype(layer: nn.Module, x: Tensor) -> InputError | None:
    linear = {name: part.weight for name, part in layer.named_modules() if isinstance(part, nn.Linear)}
    other = next((name for name, weight in linear.items() if weight.dtype != x.dtype), None)
    if other is None or torch.is_autocast_enabled(x.device.type):
        return None
    return InputError(
        "The layer's input is not of the dtype of its parameters.",
        where=caller(),
        given=f"x of {x.dtype}, {other} of {linear[other].dtype}",
        need="one dtype for x and all projections",
        fix=f"make the layer's one: layer.to({x.dtype})",
    )


def _of_other_sequences(x: Tensor, states: Sequence[Any]) -> StateError | None:
    """A state of more sequences, or fewer: what maps keep is met before the loop checks its own."""
    kept = [tensor for state in states if state is not None for tensor in _tensors(state["made"])]
    other = next((len(tensor) for tensor in kept if tensor.ndim and len(tensor) != len(x)), None)
    if other is None:
        return None
    return StateError(
        "The state is of other sequences than the layer's input.",
        where=caller(),
        given=f"a state of {other} sequences, {len(x)} in x",
        need="as many",
        fix="pass x with the sequences that the state is of, or none for new ones",
    )


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, (Mapping, list, tuple)):
        for part in given.values() if isinstance(given, Mapping) else given:
            yield from _tensors(part)
