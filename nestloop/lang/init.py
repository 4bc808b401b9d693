"""Initialisers of fast and slow weights, by name: one line each, PyTorch's own underneath.

A weight of dims (a, b) is read as a map from a to b (`x @ w`): fan-in a, fan-out b, per head. Names may carry
one number, as in "normal(0.02)".
"""

from __future__ import annotations

import inspect
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

# Log decays that differ from head to head, (h, H, number) -> value: RetNet's, and two of Lightning Attention, as
# released and as in flash-linear-attention, whose number is the layer's share of the depth, 0 to 1.
DECAYS: dict[str, Callable[..., float]] = {
    "retention_decay": lambda head, heads: math.log(1 - 2.0 ** (-5 - head)),
    "alibi_decay": lambda head, heads, depth: -_alibi_slope(head, heads) * (1 - depth + 1e-5),
    "lightning_decay": lambda head, heads, depth: -8 / heads * (1 - depth) * head,
}


def _alibi_slope(head: int, heads: int) -> float:
    """ALiBi's slopes: 2^(-8 (h+1) / H); for an H that is no power of two, those of the next lower one, then every other
    one of the next higher."""
    power = 1 << (heads.bit_length() - 1)
    return 2.0 ** (-8 * (head + 1) / power) if head < power else 2.0 ** (-8 * (2 * (head - power) + 1) / (2 * power))


# The fewest axes of a weight that each can fill, where it matters.
_AXES = {"xavier_uniform": 1, "lecun_normal": 1, "eye": 2}

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_CALL = re.compile(rf"(?P<name>[a-z_]+)(?:\((?P<value>{_NUMBER})\))?")


def check(init: str, axes: int, where: Location | None) -> str:
    """The name as given, if it is an initialiser of a weight with this many axes.

    Raises:
        UnknownInitError: it is not, or a number is missing or superfluous.
    """
    match = _CALL.fullmatch(init) if isinstance(init, str) else None
    if match is None or match["name"] not in {**INITIALISERS, **DECAYS} or not _takes(match["name"], match["value"]):
        raise UnknownInitError(
            "The initialiser is not one nestloop knows.",
            where=where,
            given=repr(init),
            need="one of " + ", ".join(map(_usage, [*INITIALISERS, *DECAYS])),
            fix='write init="zeros" or init="normal(0.02)"',
        )
    if axes < _AXES.get(match["name"], 0):
        raise UnknownInitError(
            f"The initialiser {match['name']} does not fit a weight with so few axes.",
            where=where,
            given=f"{init!r} for {axes or 'no'} {'axis' if axes == 1 else 'axes'}",
            need=f"{_AXES[match['name']]} axes or more" if _AXES[match["name"]] > 1 else "an axis",
            fix='write init="zeros", init="ones" or init="normal(0.02)"',
        )
    return init


def _parameters(name: str) -> list[inspect.Parameter]:
    """What an initialiser takes beside the tile, or a decay beside the head."""
    if name in DECAYS:
        return list(inspect.signature(DECAYS[name]).parameters.values())[2:]
    return list(inspect.signature(INITIALISERS[name]).parameters.values())[1:]


def _takes(name: str, value: str | None) -> bool:
    parameters = _parameters(name)
    return bool(parameters) if value else all(p.default is not p.empty for p in parameters)


def _usage(name: str) -> str:
    """An initialiser with its number as it may be written: constant(VALUE), normal or normal(0.02)."""
    (parameter,) = _parameters(name) or (None,)
    if parameter is None:
        return name
    if parameter.default is parameter.empty:
        return f"{name}({parameter.name})"
    return f"{name} = {name}({parameter.default})"


@torch.no_grad()
def fill(tensor: Tensor, init: str, per_head: bool) -> Tensor:
    """Initialise `tensor` in place, head by head when its first axis is the heads."""
    match = _CALL.fullmatch(init)
    assert match is not None, init
    arguments = [float(match["value"])] if match["value"] else []
    tiles = tensor if per_head else (tensor,)
    for head, tile in enumerate(tiles):
        if match["name"] in DECAYS:
            tile.fill_(DECAYS[match["name"]](head, len(tiles), *arguments))
        else:
            INITIALISERS[match["name"]](tile, *arguments)
    return tensor
