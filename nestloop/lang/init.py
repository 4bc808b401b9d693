"""Initialisers of fast and slow weights, by name: one line each, PyTorch's own underneath.

A weight of dims (a, b) is read as a map from a to b (`x @ w`): fan-in a, fan-out b, per head. One of more axes is a
kernel [out, in, *window] where its last axis is a number, as PyTorch's are, and else maps [*, a, b], each filled as if
it were alone. Names may carry one number, as in "normal(0.02)".
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable

import torch
from torch import Tensor

from nestloop.errors import Location, UnknownInitError, shown


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


def alibi_slopes(heads: int) -> list[float]:
    """ALiBi's slope of each head: powers of 2^(-8/H), and those between where H is no power of two."""
    even = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (h + 1) / even) for h in range(even)]
    return slopes if even == heads else slopes + alibi_slopes(2 * even)[::2][: heads - even]


# Fixed decays by head, (head, heads, number) -> value. "retention": RetNet's 1 - 2^(-5 - h) (arXiv 2307.08621), which
# "log_retention" is the logarithm of. "alibi": the log decays of TNL and Lightning Attention-2 (2405.17381), the number
# being 1 - l/(L - 1) + 1e-5 in layer l of L. "lightning": those of flash-linear-attention, the number being 1 - l/L.
BY_HEAD: dict[str, Callable[..., float]] = {
    "retention": lambda head, heads, offset=5.0: 1 - 2 ** (-offset - head),
    "log_retention": lambda head, heads, offset=5.0: math.log1p(-(2 ** (-offset - head))),
    "alibi": lambda head, heads, share=1.0: -share * alibi_slopes(heads)[head],
    "lightning": lambda head, heads, share=1.0: -share * 8 / heads * head,
}

INITIALISERS: dict[str, Callable[..., object]] = {
    "zeros": lambda tile: tile.zero_(),
    "ones": lambda tile: tile.fill_(1.0),
    "constant": lambda tile, value: tile.fill_(value),
    "xavier_uniform": _xavier_uniform,
    "lecun_normal": _lecun_normal,
    "uniform": lambda tile, bound=1.0: tile.uniform_(-bound, bound),
    "normal": lambda tile, std=0.02: tile.normal_(0, std),
    "trunc_normal": lambda tile, std=0.02: torch.nn.init.trunc_normal_(tile, std=std),
    "eye": _eye,
}

# The fewest axes of a weight that each can fill, where it matters.
_AXES = {"xavier_uniform": 1, "lecun_normal": 1, "eye": 2}

_SPREAD = {"xavier_uniform", "lecun_normal", "uniform", "normal", "trunc_normal"}  # draw numbers as far as theirs says

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_CALL = re.compile(rf"(?P<name>[a-z_]+)(?:\((?P<value>{_NUMBER})\))?")


def check(init: str, axes: int, where: Location | None) -> str:
    """The name as given, if it is an initialiser of a weight with this many axes.

    Raises:
        UnknownInitError: it is not, or a number is missing or superfluous.
    """
    match = _CALL.fullmatch(init) if isinstance(init, str) else None
    if match is None or match["name"] not in {**INITIALISERS, **BY_HEAD} or not _takes(match["name"], match["value"]):
        raise UnknownInitError(
            "The initialiser is not one nestloop knows.",
            where=where,
            given=shown(init),
            need="one of " + ", ".join(map(_usage, [*INITIALISERS, *BY_HEAD])),
            fix='write init="zeros" or init="normal(0.02)"',
        )
    if match["name"] in _SPREAD and match["value"] and float(match["value"]) < 0:
        raise UnknownInitError(
            f"The initialiser {match['name']} takes no number below 0.",
            where=where,
            given=repr(init),
            need="how far the numbers it draws spread: 0 or more",
            fix=f'write init="{match["name"]}({match["value"].lstrip("-")})"',
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
    """What an initialiser takes beside the tile, or the head and their number."""
    if name in BY_HEAD:
        return list(inspect.signature(BY_HEAD[name]).parameters.values())[2:]
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
def fill(tensor: Tensor, init: str, per_head: bool, maps: bool = False) -> Tensor:
    """Initialise `tensor` in place, head by head when its first axis is the heads.

    maps: whether more than two axes of a head's are several maps (`Weight.maps`), and not a kernel.
    """
    match = _CALL.fullmatch(init)
    assert match is not None, init
    arguments = [float(match["value"])] if match["value"] else []
    tiles = list(tensor if per_head else (tensor,))
    for head, tile in enumerate(tiles):
        if match["name"] in BY_HEAD:
            tile.fill_(BY_HEAD[match["name"]](head, len(tiles), *arguments))
            continue
        for one in tile.flatten(0, -3) if maps else (tile,):
            INITIALISERS[match["name"]](one, *arguments)
    return tensor
