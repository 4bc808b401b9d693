"""The pieces of a loop of batches as Triton functions on a tile of tokens: what each reads and writes itself, and how
many tokens its tile has.

Sums over tokens stay in registers from one tile to the next where they are few, and else are added up in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import fx

from nestloop.lowering.axes import Axes, type_axes
from nestloop.lowering.capture import Captured
from nestloop.lowering.differentiate import Piece
from nestloop.lowering.emit.batches import Batches
from nestloop.lowering.emit.torch import TITLES
from nestloop.lowering.emit.triton import TritonFunction
from nestloop.lowering.emit.triton_fitting import ALIVE, TALL
from nestloop.lowering.emit.triton_kernels import TritonKernels
from nestloop.lowering.emit.triton_tiles import Rows
from nestloop.lowering.emit.triton_work import fewest_warps
from nestloop.lowering.ops.strided import NoSpelling, extent
from nestloop.lowering.schedule.apart import Block
from nestloop.lowering.schedule.interchange import Interchanged, interchanged
from nestloop.lowering.schedule.roofline import FORWARD_REGISTERS, WIDE_REGISTERS

HEIGHTS = (64, 32, 16)  # tokens of a tile
# Tokens of a tile, and the length of a block of a long axis (0: all of it), best first: with fewer tokens weights are
# read more often, and products have fewer rows.
TILES = ((64, 0), (64, 32), (32, 0), (32, 64), (32, 32), (16, 0), (16, 64), (16, 32), (16, 16))
# The same, of sums with blocks outside: with shorter ones tokens are read more often, and half of 8 warps would do.
BLOCKS = ((64, 64), (32, 64), (64, 32), (32, 32), (16, 64), (16, 32), (16, 16))
# Elements alive at once, as NVIDIA's assembler held them in registers (sm_90): what is computed once a tile may spill a
# few, since most is done in blocks; where a call is a block, it takes elements one after the other.
ALIVE_ONCE = ALIVE * 5 // 4
ALIVE_BLOCK = ALIVE * 2
CARRIED = ALIVE // 2  # elements of sums that stay in registers from one tile of tokens to the next
SUMS = ("loss_sum", "loss_after")


_IN_BLOCKS = "What {} sums over tokens that has a long axis, of one block of it."


@dataclass(frozen=True)
class TileGraph:
    """A graph that becomes a function: fields as the arguments of `TritonFunction`."""

    name: str
    module: fx.GraphModule
    results: Sequence[str | None]
    tokens: tuple[str, ...]
    doc: str
    axes: Mapping[fx.Node, Axes]
    rows: Mapping[str, Rows]
    ordered: bool

    def without(self, carried: Sequence[str]) -> TileGraph:
        """The same, which hands on some of its results in registers."""
        return replace(self, rows={n: row for n, row in self.rows.items() if n not in carried})

    def function(
        self, height: int, identifier: Callable[[str], str], block: Block | None, outside: bool = False
    ) -> TritonFunction:
        """Its function on tiles of so many tokens."""
        given = (self.axes, height, self.rows, identifier, self.ordered, block, outside)
        named = (self.name, self.module, self.results, self.tokens, self.doc)
        return TritonFunction(*named, *given, in_turns=True)


class TritonPieces(Batches, TritonKernels):
    """The functions of one lowered loop.

    Args:
        heights: tokens that a tile may have; the first at which a function's tiles fit registers, else the last.
        decided: whether it is one of two forms between which the weights of a call decide, on the device.

    Attributes:
        handed_rows: of functions in two, by name: what the first part hands to the second, a row a token, and whether
            it is only ever a factor of products.

    Raises:
        NoSpelling: something in it has no Triton; the text is the reason.
    """

    handed_rows: dict[str, dict[str, bool]]
    prefixes = ("", "d_", "gradient_", "d_gradient_", "end_", "between_")

    def __init__(
        self,
        captured: Captured,
        pieces: dict[str, Piece],
        losses: bool,
        carried: bool,
        heights: Sequence[int] = HEIGHTS,
        decided: bool = False,
    ) -> None:
        super().__init__(captured, pieces, losses, carried, str)  # `names.safe` has made them fit
        self.heights, self.decided = heights, decided
        self._check_tiles()
        self.shapes = {n: tuple(size for size in tile if size != 1) for n, tile in self.tiles().items()}
        self.ordered = self.spec.schedule.needs_order
        self.used = set()
        self.functions = {}
        self.handed_rows = {}
        for name, piece in self.pieces.items():
            self._add(name, name, [self.name(r) for r in piece.results])
        for name, piece in self.pieces.items():
            self._add(f"{name}_vjp", name, [f"d_{self.name(n)}" for n in piece.wrt])

    def _check_tiles(self) -> None:
        if self.whole:
            raise NoSpelling("its tokens mix, and generated Triton takes some of them at a time")
        for piece in self.pieces.values():
            for node in piece.backward.graph.find_nodes(op="placeholder"):
                if not self.walks(self.name(node.name)) or (size := extent(node.meta["val"].shape[0])).has_tokens:
                    continue
                if not size.is_one:
                    raise NoSpelling("its graphs hold for one number of tokens, and a tile has another")
                self.heights = (1,)  # a call with one token: a tile is that token, and has no axis of them

    def _add(self, name: str, of: str, results: list[str]) -> None:
        """A piece's function, or its backward's."""
        pulls = name.endswith("_vjp")
        piece = self.pieces[of]
        module = piece.backward if pulls else piece.forward
        doc = f"Cotangents of the inputs of {of}." if pulls else f"{TITLES[of]}. Makes {', '.join(results)}."
        summed = self._summed(name, results)
        rows: dict[str, Rows] = {n: Rows() for n in [*self.shapes, *results]}
        rows |= {n: Rows(added=True) for n in summed}
        rows |= {f"d_{n}": Rows(added=added) for n, added in self._added(of).items()} if pulls else {}
        handed = [*SUMS, "d_loss_sum", "d_loss_after"]
        if of.endswith("update"):  # of the gradient: where the sum of it is
            step = self.functions[of.replace("update", "gradient")]
            handed += [f"gradient_{n}" for n in self.fast if f"gradient_{n}" not in step.rows]
        rows = {n: row for n, row in rows.items() if n not in handed}
        axes = type_axes(self.spec, module, self.captured.readout_axes).axes
        tokens, ordered = (*self.tokens, "d_z"), self.ordered and of.endswith("gradient")
        graph = TileGraph(name, module, results, tokens, doc, axes, rows, ordered)
        carried = summed if sum(map(self.tile_elements, summed)) <= CARRIED else []
        function = self._tiled(graph, [carried, []] if carried else [[]])
        self.functions[name] = function
        if function.block is None or self.heights == (1,) or of.endswith("update"):
            return
        cut = interchanged(module, results, summed, function.block.size.constant, f"{name}_row_")
        try:
            self.functions |= {} if cut is None else self._in_two(graph, cut, summed, function.block.size.constant)
        except NoSpelling:
            return

    def _tiled(self, graph: TileGraph, sums: Sequence[Sequence[str]]) -> TritonFunction:
        """A function on a tile of tokens; `sums`: what may stay in registers from tile to tile, the best first."""

        def of_tile(height: int, block: Block | None, carried: Sequence[str]) -> TritonFunction:
            return graph.without(carried).function(height, self.name, block)

        tiles = [tile for tile in TILES if tile[0] in self.heights]
        if self.heights == (1,):
            tiles = [(1, length) for height, length in TILES if height == HEIGHTS[-1]]
        return self.fitting(of_tile, graph.module, tiles, sums)

    def _in_two(
        self, graph: TileGraph, cut: Interchanged, summed: Sequence[str], size: int
    ) -> dict[str, TritonFunction]:
        """A function in two, one of rows of tokens, and one of sums with blocks of an axis of a size outside."""
        for node in cut.sums.graph.find_nodes(op="placeholder"):
            if node.name in cut.handed:
                self.shapes[node.name] = tuple(int(n) for n in node.meta["val"].shape[1:] if n != 1)
        stay = [None if moved else r for r, moved in zip(graph.results, cut.moved, strict=True)]
        added = [r if moved else None for r, moved in zip(graph.results, cut.moved, strict=True)]
        axes = {node: graph.axes[source] for node, source in cut.sources.items() if source in graph.axes}
        tokens, rows = (*graph.tokens, *cut.handed), {**graph.rows, **dict.fromkeys(cut.handed, Rows())}
        kept = replace(graph, module=cut.rows, results=[*stay, *cut.handed], tokens=tokens, axes=axes, rows=rows)

        # What has the axis is in registers; a row that blocks add up is added to what is there, but for the first.
        sums = [r for r in added if r in summed]
        weights = [n for n in rows if n not in tokens and size in self.shapes.get(n, ())]
        own = {n: row for n, row in rows.items() if n not in (*sums, *weights)}
        own |= {r: own[r]._replace(added=own[r].added or "again") for r in added if r in own}
        name, doc = f"sums_{graph.name}", _IN_BLOCKS.format(graph.name)
        blocked = replace(kept, name=name, doc=doc, module=cut.sums, results=added, rows=own)

        def of_block(height: int, block: Block | None, carried: Sequence[str]) -> TritonFunction:
            if block is None or block.size.constant != size:
                raise NoSpelling(f"blocks of an axis of {size} are wanted")
            return blocked.function(height, self.name, block, outside=True)

        function = self._tiled(kept, [[]])
        of_blocks = [tile for tile in BLOCKS if tile[0] in self.heights]
        made = self.fitting(of_block, cut.sums, of_blocks, [[r for r in sums if r is not None]])
        self.handed_rows[graph.name] = {n: n in made.factors for n in cut.handed}
        return {graph.name: function, blocked.name: made}

    def _summed(self, name: str, results: Sequence[str]) -> list[str]:
        """Results that tiles, and steps, add up."""
        if name.endswith("update_vjp"):
            return [f"d_{n}" for n in self.slow if f"d_{n}" in results]
        if name.endswith("_vjp"):
            reached = [f"d_{n}" for n in self.reached(name.removesuffix("_vjp")) if n not in self.tokens]
            return [r for r in results if r in reached]
        return [r for r in results if name.endswith("gradient") and r not in SUMS]

    def _added(self, piece: str) -> dict[str, bool | Literal["again"]]:
        """Of tokens, whether a cotangent is added to what an earlier piece, or "again" an earlier step, has written."""
        seen = [n for n in self.tokens if n in self.reached(piece)]
        if piece == "readout":
            return dict.fromkeys(seen, False)
        written = set(self.reached("readout"))
        if piece.endswith("gradient"):
            written |= {*self.cleared, *(self.reached("final_loss") if self.losses else [])}
        steps = piece.endswith("gradient") and not self.ordered and self.spec.schedule.steps > 1
        again: Literal["again", False] = "again" if steps else False
        return {n: True if n in written else again for n in seen}

    @property
    def cleared(self) -> list[str]:
        """Tokens with a cotangent from some steps only, which is zero from the start."""
        seen = [set(self.reached(f"{v}gradient")) for v in self.variants]
        before = {*self.reached("readout"), *(self.reached("final_loss") if self.losses else [])}
        return [n for n in self.tokens if n in set.union(*seen) - set.intersection(*seen) - before]

    @property
    def rounded(self) -> list[str]:
        """Views, and products that PyTorch takes, whose cotangent is whole when it is written, and nothing is added to
        it."""
        added = {n for name in self.pieces for n, added in self._added(name).items() if added}
        low = [n for n in self.tokens if n in self.declared or n in self.low]
        return [n for n in self.gradients if n in low and n not in {*added, *self.outside}]

    def fits(self, function: TritonFunction, alive: int) -> bool:
        if function.outside:
            return alive <= (ALIVE_BLOCK // 2 if function.longest >= TALL else ALIVE_BLOCK)
        if function.block is None:
            return super().fits(function, alive)
        return alive <= ALIVE_ONCE and super().fits(function, function.inside)

    def functions_of(self, which: str) -> list[TritonFunction]:
        """The functions of a direction; `backward` sums the gradient again."""
        pulls = which == "backward"
        return [f for n, f in self.functions.items() if n.endswith("_vjp") == pulls or (pulls and "gradient" in n)]

    def alive(self, functions: Sequence[TritonFunction]) -> int:
        """Elements of the tiles that are alive at once, those that the tiles of tokens hand on among them."""
        return max((f.alive + f.kept for f in functions), default=0)

    def warps_of(self, functions: Sequence[TritonFunction]) -> int:
        """Warps of a program that calls functions: as many as the most demanding takes."""
        return fewest_warps(max(map(self._warps, functions), default=4), functions)

    def _warps(self, function: TritonFunction) -> int:
        few = WIDE_REGISTERS if function.name.endswith("_vjp") else FORWARD_REGISTERS
        if function.packed <= 4 * 32 * few:  # 8 would take more instructions
            return 4
        if function.outside:
            return 4 if function.longest >= TALL or function.alive + function.kept <= ALIVE_BLOCK // 2 else 8
        if function.block is not None and function.longest >= TALL:
            return 4
        return self.warps_for(function.alive + function.kept)
