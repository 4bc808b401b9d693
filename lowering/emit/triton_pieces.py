"""The pieces of a loop of batches as Triton functions on a tile of tokens: what each reads and writes itself, and how
many tokens its tile has.

Sums over tokens stay in registers from one tile to the next where they are few, and else are added up in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from nestloop.lowering.axes import readout_axes, type_axes
from nestloop.lowering.capture import Captured
from nestloop.lowering.differentiate import Piece
from nestloop.lowering.emit.batches import Batches
from nestloop.lowering.emit.torch import TITLES
from nestloop.lowering.emit.triton import TritonFunction
from nestloop.lowering.emit.triton_kernels import ALIVE, TritonKernels
from nestloop.lowering.ops.strided import NoSpelling, extent
from nestloop.lowering.schedule.apart import Block

HEIGHTS = (64, 32, 16)  # tokens of a tile
# Tokens of a tile, and the length of a block of a long axis (0: all of it), best first: with fewer tokens weights are
# read more often, and products have fewer rows.
TILES = ((64, 0), (64, 32), (32, 0), (32, 32), (16, 0), (16, 32), (16, 16))
CARRIED = ALIVE // 2  # elements of sums that stay in registers from one tile of tokens to the next
SUMS = ("loss_sum", "loss_after")


class TritonPieces(Batches, TritonKernels):
    """The functions of one lowered loop.

    Args:
        heights: tokens that a tile may have; the first at which a function's tiles fit registers, else the last.
        decided: whether it is one of two forms between which the weights of a call decide, on the device.

    Raises:
        NoSpelling: something in it has no Triton; the text is the reason.
    """

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
        for name, piece in self.pieces.items():
            self._add(name, name, [self.name(r) for r in piece.results])
        for name, piece in self.pieces.items():
            self._add(f"{name}_vjp", name, [f"d_{self.name(n)}" for n in piece.wrt])

    def _check_tiles(self) -> None:
        if self.whole:
            raise NoSpelling("its tokens mix, and a tile of all of them is more than registers hold")
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
        rows: dict[str, tuple[int, bool | str]] = {n: (0, False) for n in [*self.shapes, *results]}
        rows |= {n: (0, True) for n in summed}
        rows |= {f"d_{n}": (0, added) for n, added in self._added(of).items()} if pulls else {}
        handed = [*SUMS, "d_loss_sum", "d_loss_after"]
        if of.endswith("update"):  # of the gradient: where the sum of it is
            step = self.functions[of.replace("update", "gradient")]
            handed += [f"gradient_{n}" for n in self.fast if f"gradient_{n}" not in step.rows]
        axes = type_axes(self.spec, module, readout_axes(self.captured)).axes
        tokens = [*self.tokens, "d_z"]
        ordered = self.ordered and of.endswith("gradient")

        def of_tile(height: int, block: Block | None, carried: Sequence[str]) -> TritonFunction:
            own = {n: row for n, row in rows.items() if n not in (*carried, *handed)}
            given = (axes, height, own, self.name, ordered, block)
            return TritonFunction(name, module, results, tokens, doc, *given)

        carried = summed if sum(map(self.tile_elements, summed)) <= CARRIED else []
        tiles = [tile for tile in TILES if tile[0] in self.heights]
        if self.heights == (1,):
            tiles = [(1, length) for height, length in TILES if height == HEIGHTS[-1]]
        self.functions[name] = self.fitting(of_tile, module, tiles, [carried, []] if carried else [[]])

    def _summed(self, name: str, results: Sequence[str]) -> list[str]:
        """Results that tiles, and steps, add up."""
        if name.endswith("update_vjp"):
            return [f"d_{n}" for n in self.slow if f"d_{n}" in results]
        if name.endswith("_vjp"):
            reached = [f"d_{n}" for n in self.reached(name.removesuffix("_vjp")) if n not in self.tokens]
            return [r for r in results if r in reached]
        return [r for r in results if name.endswith("gradient") and r not in SUMS]

    def _added(self, piece: str) -> dict[str, bool | str]:
        """Of tokens, whether a cotangent is added to what an earlier piece, or "again" an earlier step, has written."""
        seen = [n for n in self.tokens if n in self.reached(piece)]
        if piece == "readout":
            return dict.fromkeys(seen, False)
        written = set(self.reached("readout"))
        if piece.endswith("gradient"):
            written |= {*self.cleared, *(self.reached("final_loss") if self.losses else [])}
        again = piece.endswith("gradient") and not self.ordered and self.spec.schedule.steps > 1 and "again"
        return {n: True if n in written else again for n in seen}

    @property
    def cleared(self) -> list[str]:
        """Tokens with a cotangent from some steps only, which is zero from the start."""
        seen = [set(self.reached(f"{v}gradient")) for v in self.variants]
        before = {*self.reached("readout"), *(self.reached("final_loss") if self.losses else [])}
        return [n for n in self.tokens if n in set.union(*seen) - set.intersection(*seen) - before]

    @property
    def rounded(self) -> list[str]:
        """Views whose cotangent is whole when it is written, and nothing is added to it."""
        added = {n for name in self.pieces for n, added in self._added(name).items() if added}
        views = [n for n in self.tokens if n in self.declared]
        return [n for n in self.gradients if n in views and n not in {*added, *self.outside}]

    def functions_of(self, which: str) -> list[TritonFunction]:
        """The functions of a direction; `backward` sums the gradient again."""
        pulls = which == "backward"
        return [f for n, f in self.functions.items() if n.endswith("_vjp") == pulls or (pulls and "gradient" in n)]

    def alive(self, functions: Sequence[TritonFunction]) -> int:
        """Elements of the tiles that are alive at once, those that the tiles of tokens hand on among them."""
        handed = {f: sum(self.tile_elements(r) for r in f.returned if r not in SUMS) for f in functions}
        return max((f.alive + more for f, more in handed.items()), default=0)
