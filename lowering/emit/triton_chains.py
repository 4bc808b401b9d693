"""Products of a function that follow one another, and how many warps are worth while for them (`schedule.spread`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nestloop.lowering import ops
from nestloop.lowering.schedule.repeats import Repeat
from nestloop.lowering.schedule.roofline import TILE_REGISTERS
from nestloop.lowering.schedule.spread import BOTH, Spread, along, copies
from nestloop.lowering.schedule.values import Value

if TYPE_CHECKING:
    from nestloop.lowering.emit.triton import TritonFunction

# Half of the warps where twice as many compute products this much oftener. Compiled for sm_90, that left each thread
# 1.1 to 1.3 times the instructions, and hence a program 0.55 to 0.65 of them. Most programs spilled fewer bytes, too.
REPEATED = 1.6
MOST_REGISTERS = 4 * TILE_REGISTERS  # that the tiles of a thread may want, then


def spreads(function: TritonFunction) -> dict[Value, Spread]:
    """The tile of every product of a function, and where the warps of its chain lie: all products of a region, which a
    walk over blocks and a loop are for themselves. A triangular system ends with the product of its inverse and what it
    is solved for."""
    found: dict[Value, Spread] = {}

    def region(values: Sequence[Value]) -> None:
        tiles = {}
        for value in values:
            if isinstance(value, Repeat):
                region(value.body)
            elif (tile := _tile(function, value)) is not None:
                tiles[value] = tile
        if tiles:
            axis = along(*list(tiles.values())[-1]) if len(tiles) > 1 else BOTH
            found.update({value: Spread(*tile, axis) for value, tile in tiles.items()})

    region([value for phase in function.phases for value in phase.once])
    for phase in function.phases:
        region(phase.blocks)
    return found


def _tile(function: TritonFunction, value: Value) -> tuple[int, int] | None:
    """The rows and columns of a product of tiles, or of a system's."""
    if value.kind == "system" and ops.row(value.node.target).cpp.triangular:
        rows, columns = (max(16, function.padded(size)) for size in value.shape[-2:])
        return rows, columns
    if value.kind != "product":
        return None
    a, b = value.factors
    if function.is_dot(value):
        return function.padded(a.shape[-2]), function.padded(b.shape[-1])
    return (function.padded(a.shape[0]), 16) if function.is_of_a_factor(value) else None


def worth_while(warps: int, products: Mapping[Spread, int], alive: int) -> int:
    """As many warps, or fewer where no product is a wide one and the others would compute the same.

    Args:
        products: the FLOPs of a kernel's products by their tiles, those of systems 0.
        alive: elements of its tiles that are alive at once.
    """
    if not all(spread.is_narrow for spread in products):
        return warps
    least = max(1, -(-alive // (32 * MOST_REGISTERS)))
    while warps >= 2 * least and copies(products, warps) >= REPEATED * copies(products, warps // 2):
        warps //= 2
    return warps
