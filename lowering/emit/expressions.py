"""Places and numbers in generated code, as text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from nestloop.lowering.ops.strided import ONE, ZERO, Extent, extent
from nestloop.lowering.schedule.values import CPP, Language


def numbers(node: fx.Node, language: Language = CPP) -> list[str]:
    """The arguments of an op that reads no tensor."""

    def text(value: object) -> str:
        if isinstance(value, fx.Node):
            return "" if isinstance(value.meta["val"], torch.Tensor) else language.size(extent(value))
        return "" if isinstance(value, (list, tuple)) else language.number(value)

    return [text(a) for a in node.args]


def offset(offset: Extent, index: Sequence[str], strides: Sequence[Extent]) -> str:
    """The place of an element in a strided array."""
    terms = [] if offset == ZERO else [str(offset)]
    for name, stride in zip(index, strides, strict=True):
        if stride != ZERO:
            terms.append(name if stride == ONE else f"{name} * {stride if not stride.is_sum else f'({stride})'}")
    return " + ".join(terms) or "0"


def plus(offset: Extent) -> str:
    """A term that is left out where it is zero."""
    return "" if offset == ZERO else f" + {offset}"


def rows(size: Extent) -> str:
    """A size for a tile of `rows` tokens."""
    return str(size).replace("n", "rows")


def scaled(text: str, factor: float) -> str:
    """A term of a sum with its factor."""
    return text if factor == 1 else f"-({text})" if factor == -1 else f"S({factor!r}) * ({text})"
