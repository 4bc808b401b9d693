"""What all steps of a loop of batches share and is made of slow weights alone, in Triton: one program a head.

In PyTorch it is dozens of ops on a few small tensors, each of which a device waits for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, fx

from nestloop.lowering.axes import type_axes
from nestloop.lowering.capture import Captured
from nestloop.lowering.differentiate import Piece
from nestloop.lowering.emit.tile import used_inputs
from nestloop.lowering.emit.torch import DECODERS, TITLES
from nestloop.lowering.emit.triton import TritonFunction
from nestloop.lowering.emit.triton_kernels import TritonKernels
from nestloop.lowering.emit.triton_tiles import Rows
from nestloop.lowering.emit.triton_work import fewest_warps
from nestloop.lowering.ops.strided import NoSpelling
from nestloop.lowering.runtime.triton_plan import Launch, TritonPlan
from nestloop.lowering.schedule.apart import Block

_ROWS = 16  # no tile has tokens
_LENGTHS = (0, 64, 32, 16)  # of a block of a long axis (0: all of it), best first


class TritonShared(TritonKernels):
    """Writes a module with a kernel for each of some graphs of slow weights.

    Args:
        captured: the loop.

    Raises:
        NoSpelling: something in it has no Triton; the text is the reason.
    """

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.functions, self.shapes, self.used = {}, {}, set()
        self.results: dict[str, Mapping[str, str]] = {}

    def walks(self, name: str) -> bool:
        return False

    def step(self, name: str, made: bool = False) -> str:
        return "0"

    def prepared(self, piece: Piece) -> TritonPlan:
        """`prepare` and its backward."""
        pulled = [f"d_{n}" for n in piece.wrt]
        self._add("prepare", piece.forward, piece.results, f"{TITLES['prepare']}. Makes {', '.join(piece.results)}.")
        self._add("prepare_vjp", piece.backward, pulled, "Cotangents of the inputs of prepare.")
        made = {n.removeprefix("d_"): n for n in self.functions["prepare_vjp"].results}
        self.results = {"prepare": {n: n for n in self.functions["prepare"].results}, "prepare_vjp": made}
        return self._plan(("prepare", "prepare_vjp"), {})

    def decoders(self) -> TritonPlan:
        """The rows whose correlations say whether the Gram form is precise: [S, R, D] of each head, R rows for each of
        S squares, those that one has not zero."""
        module, squares = self.captured.decoders, self.captured.squares
        assert module is not None
        names = [f"rows_{i}" for i in range(sum(squares))]
        self._add("decoders", module, names, DECODERS)
        tiles = iter(module.graph.output_node().args[0])
        sides = [[tuple(map(int, next(tiles).meta["val"].shape)) for _ in range(count)] for count in squares]
        longest, wide = max(sum(rows for rows, _ in side) for side in sides), sides[0][0][1]
        self.shapes["rows"] = (len(sides), longest, wide)
        places: dict[str, str] = {}
        for index, side in enumerate(sides):
            row = index * longest
            for rows, _ in side:
                places[names[len(places)]] = f"rows_made + item * {self.elements('rows')} + {row * wide}"
                row += rows
        self.results = {"decoders": places}
        return self._plan(("decoders",), {"rows": self.shapes["rows"]})

    def _add(self, name: str, module: fx.GraphModule, results: Sequence[str], doc: str) -> None:
        values = {n.name: n.meta["val"] for n in module.graph.find_nodes(op="placeholder")}
        made = dict(zip(results, module.graph.output_node().args[0], strict=True))
        values |= {n: node.meta["val"] for n, node in made.items() if node is not None}
        if not used_inputs(module):
            raise NoSpelling(f"{name} is of constants alone")
        self.shapes |= {n: _sizes(value) for n, value in values.items() if isinstance(value, Tensor)}
        axes = type_axes(self.captured.spec, module, self.captured.readout_axes).axes
        rows = dict.fromkeys(values, Rows())

        def of_tile(height: int, block: Block | None, carried: Sequence[str]) -> TritonFunction:
            return TritonFunction(name, module, results, (), doc, axes, height, rows, block=block)

        tiles = [(_ROWS, length) for length in _LENGTHS]
        function = self.fitting(of_tile, module, tiles, [[]])
        if any(value.kind == "system" for value in function.values):
            raise NoSpelling(f"{name} solves a linear system, and PyTorch says where it has no solution")
        self.functions[name] = function

    def _plan(self, names: Sequence[str], tiles: Mapping[str, tuple[int, ...]]) -> TritonPlan:
        """The module; `tiles`: sizes of what its first kernel makes, where those are its own."""
        launches = [self._launch(self.functions[name]) for name in names]
        kernels = {
            launch.kernel: self._kernel(self.functions[n], tiles) for launch, n in zip(launches, names, strict=True)
        }
        called = {launch.kernel: [self.functions[n]] for launch, n in zip(launches, names, strict=True)}
        given = [tuple(self.functions[name].inputs) for name in names]
        backward = len(names) > 1
        return TritonPlan(
            text=self.module("One program makes what a head has of it.", [*kernels.values()], launches),
            forward=given[0],
            backward=given[1] if backward else (),
            gradients=tuple(self.results[names[1]]) if backward else (),
            rounded=(),
            rows=_ROWS,
            state=0,
            wide=tuple(n for n in dict.fromkeys([*given[0], *given[-1]]) if not self.elements(n) % 16),
            forward_launches=(launches[0],),
            backward_launches=(launches[1],) if backward else (),
            computed=tuple(self.captured.spec.slow),
            common=tuple(tiles or self.results[names[0]]),
            tiles=dict(tiles),
            work=self.work(kernels, called.__getitem__, lambda kernel: called[kernel][0].alive),
        )

    def _launch(self, function: TritonFunction) -> Launch:
        warps = fewest_warps(self.warps_for(function.alive), [function])
        return Launch(f"every_{function.name}", "heads", warps, function.scratch)

    def _kernel(self, function: TritonFunction, tiles: Mapping[str, tuple[int, ...]]) -> str:
        self.used = set()
        own = self.results[function.name]
        places = {n: self.at(n) for n in function.inputs}
        if tiles:
            places |= own
        else:
            places |= {made: f"{n}_made + item * {self.elements(made)}" for n, made in own.items()}
        given = [*self.pointers(function.inputs), *self.made_pointers([*(tiles or own)]), "memory", "H", "B"]
        body = [self.call(function.name, places, count="1")]
        return self.frame(f"every_{function.name}", function.doc, given, str(function.scratch), body)


def _sizes(value: Tensor) -> tuple[int, ...]:
    """Of a tile, without axes of size 1."""
    return tuple(int(size) for size in value.shape if size != 1)
