"""Initialisers of fast and slow weights, by name: one line each, PyTorch's own underneath.

A weight of dims (a, b) is read as a map from a to b (`x @ w`): fan-in a, fan-out b, per head. Names may carry
one number, as in "normal(0.02)".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor

from nestloop.errors import Location, UnknownInitError


def _fans(tile: Tensor) -> tuple[int, int]:
    """Fan-in and fan-out of one head's weight [in, out, ...]; kernels [out, in, *window] count the window."""
    if tile.ndim <= 2:
        return tile.shape[0], tile.shape[-1]
    window = math.prod(tile.shape[2:])
    return tile.shape[1] * window, tile.shape[0] * window


def _xavier_uniform(tile: Tensor, gain: float = 1.0) -> None:
    bound = gain * math.sqrt(6 / sum(_fans(tile)))
    tile.uniform_(-bound, bound)


def _lecun_normal(tile: Tensor, gain: float = 1.0) -> None:
    tile.normal_(0, gain / math.sqrt(_fans(tile)[0]))


def _eye(tile: Tensor, scale: float = 1.0) -> None:
    tile.zero_()
    tile.diagonal(dim1=-2, dim2=-1).fill_(scale)


INITIALISERS: dict[str, Callable[..., object]] = {
    "zeros": lambda tile: tile.zero_(),
    "ones": lambda tile: tile.fill_(1.0),
    "constant": lambda tile, value: tile.fill_(value),
    "xavier_uniform": _xavier_uniform,
    "lecun_normal": _lecun_normal,
    "normal": lambda tile, std=0.02: tile.normal_(0, std),
    "trunc_normal": lambda tile, std=0.02: torch.nn.init.trunc_normal_(tile, std=std),
    "eye": _eye,
}

_CALL = re.compile(r"(?P<name>[a-z_]+)(?:\((?P<value>[-+.\deE]+)\))?")


def check(init: str, where: Location | None) -> str:
    """The name as given, if it is an initialiser. Raises `UnknownInitError` otherwise."""
    match = _CALL.fullmatch(init) if isinstance(init, str) else None
    if match is None or match["name"] not in INITIALISERS:
        raise UnknownInitError(
            "The initialiser is not one nestloop knows.",
            where=where,
            given=repr(init),
            need=f"one of {', '.join(INITIALISERS)}, with one number in parentheses where it takes one",
            fix='write init="zeros" or init="normal(0.02)"',
        )
    return init


@torch.no_grad()
def fill(tensor: Tensor, init: str, per_head: bool) -> Tensor:
    """Initialise `tensor` in place, head by head when its first axis is the heads."""
    match = _CALL.fullmatch(init)
    assert match is not None, init
    arguments = [float(match["value"])] if match["value"] else []
    for tile in tensor if per_head else (tensor,):
        INITIALISERS[match["name"]](tile, *arguments)
    return tensor
