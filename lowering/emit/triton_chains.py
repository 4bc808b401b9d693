"""Products of a function that follow one another, and how many warps are worth while for them (`schedule.spread`)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from nestloop.lowering import ops
from nestloop.lowering.schedule.devices import DEVICES, Device
from nestloop.lowering.schedule.order import with_last
from nestloop.lowering.schedule.repeats import Repeat
from nestloop.lowering.schedule.roofline import TILE_REGISTERS
from nestloop.lowering.schedule.spread import BOTH, Spread, along, copies, has_wide
from nestloop.lowering.schedule.values import Value

if TYPE_CHECKING:
    from nestloop.lowering.emit.triton import TritonFunction

# Half of the warps where twice as many compute products this much oftener. Compiled for sm_90, that left each thread
# 1.1 to 1.3 times the instructions, and hence a program 0.55 to 0.65 of them. Most programs spilled fewer bytes, too.
REPEATED = 1.6
WARPS = 4  # for which products are put in order: of most kernels
MOST_REGISTERS = 4 * TILE_REGISTERS  # that the tiles of a thread may want, then


def spreads(function: TritonFunction) -> dict[Value, Spread]:
    """The tile of every product of a function, and where the warps of its chain lie: with wide instructions,
    all narrow products of a region, which a walk over blocks and a loop are for themselves. A triangular system ends
    with the product of its inverse and what it is solved for."""
    found: dict[Value, Spread] = {}

    def region(values: Sequence[Value]) -> None:
        tiles = {}
        for value in values:
            if isinstance(value, Repeat):
                region(value.body)
            elif (tile := _tile(function, value)) is not None:
                tiles[value] = tile
        found.update(_chained(tiles, None))

    region([value for phase in function.phases for value in phase.once])
    for phase in function.phases:
        region(phase.blocks)
    return found


def with_fewest_copies(
    function: TritonFunction, values: list[Value], most_alive: Callable[[Sequence[Value]], int]
) -> list[Value]:
    """The values of a region with another product last, where its axis is a better one for the others: where warps
    compute the same, each holds the tiles of all.

    Args:
        values: in an order in which operands come first.
        most_alive: an order -> elements of tiles that are alive at once.
    """
    tiles = {value: tile for value in values if (tile := _tile(function, value)) is not None}
    if len(tiles) < 2:
        return values
    terms = {value: _terms(function, value) for value in tiles}

    def computed(order: Sequence[Value], device: Device | None) -> float:
        products: Counter[Spread] = Counter()
        for value, spread in _chained({value: tiles[value] for value in order if value in tiles}, device).items():
            products[spread] += terms[value]
        return float(copies(products, WARPS, device))

    # With wide instructions no warp may hold more for it; without, narrow products and all others are one chain.
    wide, narrow = computed(values, None), computed(values, DEVICES["a100"])
    alive = most_alive(values)
    found, least = values, alive * (wide + narrow)
    for order in (with_last(values, value) for value in tiles):
        again = computed(order, None), computed(order, DEVICES["a100"])
        if sum(again) >= wide + narrow:
            continue
        now = most_alive(order)
        if now * again[0] <= alive * wide and now * sum(again) < least:
            found, least = order, now * sum(again)
    return found


def _chained(tiles: Mapping[Value, tuple[int, int]], device: Device | None) -> dict[Value, Spread]:
    """The spreads of a region's products, in order. Where there are wide instructions, narrow products are a chain of
    their own."""
    chains = [tiles]
    if has_wide(device):
        narrow = {value: tile for value, tile in tiles.items() if Spread(*tile).is_narrow}
        chains = [narrow, {value: tile for value, tile in tiles.items() if value not in narrow}]
    found: dict[Value, Spread] = {}
    for chain in chains:
        axis = along(*list(chain.values())[-1]) if len(chain) > 1 else BOTH
        found.update({value: Spread(*tile, axis) for value, tile in chain.items()})
    return found


def _terms(function: TritonFunction, value: Value) -> int:
    """Multiply-adds of a product's tile, padding included; of a system, of its inverse and right side."""
    sizes = value.reads[0].shape[-1:] if value.kind == "system" else value.factors[0].shape[-1:]
    return math.prod(map(function.padded, [*value.shape, *sizes]))


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
