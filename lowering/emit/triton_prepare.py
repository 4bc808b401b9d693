"""The functions that walk a state from chunk to chunk, less what all chunks compute at once, ahead of the walk."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import fx

from nestloop.lowering.emit.triton_stream import TritonStream
from nestloop.lowering.ops.strided import Extent, extent, product
from nestloop.lowering.runtime.triton_plan import Handed
from nestloop.lowering.schedule.apart import Block
from nestloop.lowering.streams.prepared import Prepared, prepared

# What the functions of walks are handed of their own chunk, as memory is called.
WALKS = {"advance": "ready", "chunk_state_vjp": "pulled"}
# The kernels that prepare them, each before the walk of its name, by the function.
PREPARES = {
    "forward_prepare_states": "advance",
    "backward_prepare_states": "advance",
    "backward_prepare_cotangents": "chunk_state_vjp",
}


class TritonPrepare(TritonStream):
    """What a scan whose chunks run at once does ahead of its walks.

    Attributes:
        prepared: the functions of walks that are cut in two, by name.
        row: elements of one row of what is handed on, by name.
        prepares: whether any are.
    """

    prepares = True

    def __post_init__(self) -> None:
        self.prepared: dict[str, Prepared] = {}
        self.row: dict[str, Extent] = {}
        super().__post_init__()

    def prepare_ahead(
        self, name: str, module: fx.GraphModule, results: Sequence[str | None], waits: Collection[str]
    ) -> None:
        """Cut a function of a walk in two where that is worth it.

        Args:
            waits: inputs that the chunk before hands on.
        """
        wanted = [r is not None for r in results]
        cut = prepared(module, wanted, waits, self.rows, f"{WALKS[name]}_") if self.prepares else None
        if cut is not None:
            self.prepared[name] = cut

    def add_walk(
        self,
        name: str,
        module: fx.GraphModule,
        results: Sequence[str | None],
        doc: str,
        rows: Collection[str],
    ) -> None:
        """A function of a walk, less what is prepared of it; `rows`: what it reads and writes itself."""
        cut = self.prepared.get(name)
        if cut is None:
            self._add_one(name, module, results, doc, rows)
            return
        whole = self._axes(cut.whole)
        axes = {node: whole[source] for node, source in cut.sources.items() if source in whole}
        for node in cut.rest.graph.find_nodes(op="placeholder"):
            if node.name in cut.handed:
                sizes = [size for size in map(extent, node.meta["val"].shape) if not size.is_one]
                self.shapes[node.name] = tuple(size.at(self.rows) for size in sizes)
                self.row[node.name] = product(sizes[1:])
        made = f"What {name} takes of its chunk alone. Makes {', '.join(cut.handed)}."
        own = dict.fromkeys([*self.per_token, *self.shared, *self.carry, *cut.handed], (0, False))
        self.add_blocked(f"prepare_{name}", cut.ahead, cut.handed, made, own, axes)
        own = dict.fromkeys([*rows, *cut.handed], (0, False))
        self.add_blocked(name, cut.rest, results, doc, own, axes, self.strips)

    def _add_one(
        self, name: str, module: fx.GraphModule, results: Sequence[str | None], doc: str, rows: Collection[str]
    ) -> None:
        """A function; `rows`: what it reads and writes itself."""
        self.add_blocked(name, module, results, doc, dict.fromkeys(rows, (0, False)), blocked=self.blocks_of(name))

    def blocks_of(self, name: str) -> Block | None:
        """The axis of the state of which a function computes a block at a time: a strip's, in a walk."""
        walks = name == "advance" or name.endswith("_state_vjp")
        return self.strips if walks or self.strips is None else replace(self.strips, is_strip=False)

    def step(self, name: str, made: bool = False) -> str:
        return str(self.row[name]) if name in self.row else super().step(name, made)

    def _slots(self, handed: str, names: Sequence[str], index: str = "index") -> dict[str, str]:
        """Where a chunk's part of what kernels leave for one another lies."""
        chunks = "parts" if index.startswith("part") else "chunks"
        return self.side_by_side(f"{handed}_handed + (item * {chunks} + {index}) * {self.room_for(names)}", names)

    def ready(self, walk: str, index: str = "index") -> dict[str, str]:
        """Where what is prepared of a chunk of a walk lies, by name."""
        return self._slots(WALKS[walk], self.prepared[walk].handed, index) if walk in self.prepared else {}

    def with_prepared(self, over: Mapping[str, str]) -> dict[str, str]:
        """Kernels and what they are over, with those that prepare a walk before it."""
        made: dict[str, str] = {}
        for kernel, parts in over.items():
            before = kernel.replace("_", "_prepare_", 1)
            made |= {before: "chunks"} if PREPARES.get(before) in self.prepared else {}
            made[kernel] = parts
        return made

    def ready_handed(self, *walks: str) -> list[Handed]:
        """The memory that it lies in."""
        made = [(walk, self.prepared[walk].handed) for walk in walks if walk in self.prepared]
        return [Handed(f"{WALKS[walk]}_handed", "chunks", self.room_for(names)) for walk, names in made]

    def prepare(self, walk: str, state: Mapping[str, str]) -> list[str]:
        """Lines that prepare a complete chunk; `state`: where that which it reads of the state lies."""
        places = {n: self.at(n) for n in self.shared} | {**state, **self.ready(walk, "part")}
        call = self.call(f"prepare_{walk}", places)
        return ["index = part", *self.span, *self.either(lambda name: [call] if name == "chunk" else ["pass"])]
