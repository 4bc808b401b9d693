"""Tiles that registers hold: how many tokens one has, which axis is walked in blocks, how many warps share it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import fx

from nestloop.lowering.emit.triton import TritonFunction
from nestloop.lowering.ops.strided import Extent, NoSpelling
from nestloop.lowering.schedule.apart import Block
from nestloop.lowering.schedule.roofline import TILE_REGISTERS

TALL = 64  # tokens of a tile whose products, where they follow one another, take 4 warps and no more
# Elements of tiles alive at once, at which tiles are made shorter; of tall ones half of it.
ALIVE = 8 * 32 * TILE_REGISTERS
SHORTEST_BLOCKED = 128  # an axis that is shorter is never walked in blocks


class Fitting:
    """Chooses among the tiles that a function may have."""

    @staticmethod
    def warps_for(alive: int, each: int = TILE_REGISTERS) -> int:
        """As many as hold so many elements, a thread's share in so many registers; with more than 8 it has too few."""
        return 4 if alive <= 4 * 32 * each else 8

    def fitting(
        self,
        of_tile: Callable[[int, Block | None, Sequence[str]], TritonFunction],
        module: fx.GraphModule,
        tiles: Sequence[tuple[int, int]],
        sums: Sequence[Sequence[str]],
        axis: Block | None = None,
    ) -> TritonFunction:
        """The function on the first tiles that fit registers; on those that come closest where none do.

        Args:
            of_tile: (tokens of a tile, an axis that is walked in blocks, sums that stay in registers) -> it.
            tiles: tokens, and the length of a block (0: all of the axis), the best first.
            sums: what may stay in registers from tile to tile, the best first.
            axis: one that is told apart from others of its size, the first to be walked in blocks, none of which is
                shorter than its own.

        Raises:
            NoSpelling: it has no spelling on any.
        """
        lengths = {
            size
            for node in module.graph.nodes
            if isinstance(node.meta.get("val"), torch.Tensor)
            for size in node.meta["val"].shape
            if isinstance(size, int) and size >= SHORTEST_BLOCKED
        }

        def blocks(length: int) -> list[Block | None]:
            if not length:
                return [None]
            first = []
            if axis is not None and axis.length <= length < axis.size.constant:
                first = [replace(axis, length=length)]
            return [*first, *[Block(Extent(0, size), length) for size in sorted(lengths) if not size % length]]

        found: dict[TritonFunction, int] = {}
        refused = None
        for carried in sums:
            for height, length in tiles:
                for block in blocks(length):
                    try:
                        function = of_tile(height, block, carried)
                    except NoSpelling as reason:
                        refused = refused or reason
                        continue
                    found[function] = function.alive + (function.kept if carried else 0)
                    if self.fits(function, found[function]):
                        return function
        if not found:
            assert refused is not None
            raise refused
        return min(found, key=found.__getitem__)

    def fits(self, function: TritonFunction, alive: int) -> bool:
        """Whether registers hold so many elements of a function's tiles, and of what it hands on."""
        return alive <= (ALIVE // 2 if function.longest >= TALL else ALIVE)
