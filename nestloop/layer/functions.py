"""Plain functions among a layer's maps, tried on some tokens: they keep the shape, and take tokens one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nestloop.errors import Location, ShapeMismatchError, TokenMixingError
from nestloop.lang.binding import has_values
from nestloop.lang.maps import Gated, Map, Place

_TOKENS = 16


def check_function(one: Any, place: Place, what: str, where: Location, alone: bool) -> None:
    """Try one map, if it is a plain function, or has one.

    Args:
        place: where it stands.
        what: what it is a map of.
        where: the line of that.
        alone: whether tokens must come out the same without those after them.

    Raises:
        ShapeMismatchError: it makes another shape.
        TokenMixingError: a token comes out otherwise beside others, though it is to be `alone`.
    """
    if isinstance(one, Gated):
        gate = Place(place.width, place.chunk, place.groups, 1 if one.per_head else place.features)
        _try(one.activation, gate, "activation of nl.gated", one.where, alone)
        for inner in one.of:
            check_function(inner, Place(place.width, place.chunk, 1, place.width), "nl.gated", one.where, alone)
    elif not isinstance(one, Map):
        _try(one, place, f"map of {what}", where, alone)


def check_activation(
    activation: Callable[[Tensor], Tensor], place: Place, name: str, where: Location, alone: bool
) -> None:
    """The same of a gate's activation."""
    _try(activation, place, f"activation of the gate '{name}'", where, alone)


def _try(function: Callable[[Tensor], Tensor], place: Place, what: str, where: Location, alone: bool) -> None:
    shape = (1, _TOKENS, place.groups, place.features)
    x = torch.randn(shape, device="cpu", dtype=torch.float32, generator=torch.Generator("cpu").manual_seed(0))
    whole = _made(function, x)
    if whole is None:
        return
    if not isinstance(whole, Tensor) or whole.shape != shape:
        given = f"{list(whole.shape)} of {list(shape)}" if isinstance(whole, Tensor) else f"a {type(whole).__name__}"
        raise ShapeMismatchError(
            f"The {what} changes the shape of what it is given.",
            where=where,
            given=given,
            need="a function of [B, N, groups, features] that returns as many: views and weights have declared sizes",
            fix="declare the view with other dims and project to them, or reshape in the loop's bodies",
        )
    if not alone or not has_values(whole):
        return
    pieces = [made for part in x.split(_TOKENS // 2, 1) if isinstance(made := _made(function, part), Tensor)]
    apart = torch.cat(pieces, 1) if len(pieces) == 2 else None
    if apart is None or apart.shape != shape or not torch.allclose(apart, whole, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise TokenMixingError(
            f"The {what} mixes tokens, or is not the same each time.",
            where=where,
            given=f"{_TOKENS} tokens that come out otherwise in two pieces than at once",
            need="a function of each token alone: the schedule reads a token before those after it are there",
            fix="let it run over the last axis, the features (axis 1 has the tokens), or write nl.conv(4)",
        )


def _made(function: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    """What a function returns; None where it asks for more than these tokens are: the call in which that fails says
    so."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return function(x)
    except Exception:
        return None
