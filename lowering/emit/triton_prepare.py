"""The functions that walk a state from chunk to chunk, less what all chunks compute at once, ahead of the walk."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import fx

from nestloop.lowering.axes import Axes
from nestloop.lowering.emit.triton_stream import TritonStream
from nestloop.lowering.emit.triton_tiles import Rows
from nestloop.lowering.ops.strided import Extent, extent, product
from nestloop.lowering.schedule.apart import Block
from nestloop.lowering.schedule.parts import joined
from nestloop.lowering.streams.prepared import Prepared, Taking, prepared, taking

# What the functions of walks are handed of their own chunk, as memory is called.
WALKS = {"advance": "ready", "chunk_state_vjp": "pulled"}
# The kernels that prepare them, each before the walk of its name, or before all.
PREPARES = {
    "forward_prepare_states": ("advance",),
    "backward_prepare_walks": ("advance", "chunk_state_vjp"),
    "backward_prepare_states": ("advance",),
    "backward_prepare_cotangents": ("chunk_state_vjp",),
}


class TritonPrepare(TritonStream):
    """What a scan whose chunks run at once does ahead of its walks.

    Attributes:
        prepared: the functions of walks that are cut in two, by name.
        taken: what functions of every chunk take of what walks are handed, by their name.
        row: elements of one row of what is handed on, by name.
        prepares: whether any are.
    """

    prepares = True

    def __post_init__(self) -> None:
        self.prepared: dict[str, Prepared] = {}
        self.taken: dict[str, tuple[str, ...]] = {}
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
        if cut is None:
            return
        self.prepared[name] = cut
        for node in cut.rest.graph.find_nodes(op="placeholder"):
            if node.name in cut.handed:
                sizes = [size for size in map(extent, node.meta["val"].shape) if not size.is_one]
                self.shapes[node.name] = tuple(size.at(self.rows) for size in sizes)
                self.row[node.name] = product(sizes[1:])

    def add_part(
        self, name: str, module: fx.GraphModule, results: Sequence[str | None], doc: str, rows: Collection[str]
    ) -> None:
        """A function of a walk, less what is prepared of it, or of every chunk, less what walks are handed of it.

        Args:
            rows: what it reads and writes itself.
        """
        part = self.prepared.get(name) or self._taking(name, module, results)
        if part is None:
            self._add_one(name, module, results, doc, rows)
            return
        own = dict.fromkeys([*rows, *part.handed], Rows())
        self.add_blocked(name, part.rest, results, doc, own, self._axes_of(part), self.blocks_of(name))

    def _taking(self, name: str, module: fx.GraphModule, results: Sequence[str | None]) -> Taking | None:
        """A function of complete chunks, which alone are prepared, less what the walks before it are handed."""
        walks = {"chunk": ["advance"], "chunk_vjp": [*WALKS]}.get(name, [])
        made = [self.prepared[walk] for walk in walks if walk in self.prepared]
        if not made:
            return None
        waits = [*self.walked, *[f"d_{n}_new" for n in self.walked]]
        found = taking(module, [r is not None for r in results], waits, made, self.rows)
        self.taken[name] = () if found is None else found.handed
        return found

    def add_prepares(self) -> None:
        """The functions that prepare walks."""
        for walks in dict.fromkeys(walks for kernel, walks in PREPARES.items() if self.is_prepared_by(kernel)):
            cuts = [self.prepared[walk] for walk in walks]
            handed = [n for cut in cuts for n in cut.handed]
            doc = f"What {' and '.join(walks)} take{'s' if len(walks) == 1 else ''} of a chunk alone. "
            own = dict.fromkeys([*self.per_token, *self.shared, *self.carry, *handed], Rows())
            ahead = joined([cut.ahead.graph for cut in cuts])
            self.add_blocked(self.prepare_of(walks), ahead, handed, f"{doc}Makes {', '.join(handed)}.", own)

    @staticmethod
    def prepare_of(walks: Sequence[str]) -> str:
        """The function that prepares walks."""
        return "prepare_walks" if len(walks) > 1 else f"prepare_{walks[0]}"

    def is_prepared_by(self, kernel: str) -> bool:
        """Whether a kernel prepares what it is for."""
        walks = PREPARES.get(kernel, ())
        at_once = kernel.startswith("backward") and self._are_prepared_at_once
        return bool(walks) and all(walk in self.prepared for walk in walks) and (len(walks) > 1) == at_once

    @property
    def _are_prepared_at_once(self) -> bool:
        """Whether backward prepares both walks before either, of every chunk: what they share is computed once."""
        if not self.takes("chunk_vjp", "advance") or "chunk_state_vjp" not in self.prepared:
            return False
        ahead = self.prepared["chunk_state_vjp"].ahead.graph
        return not any(node.users and node.name in self.carry for node in ahead.find_nodes(op="placeholder"))

    def _axes_of(self, parts: Prepared | Taking) -> dict[fx.Node, Axes]:
        """The names of the axes of each value of a graph's parts: as the whole has them."""
        whole = self._axes(parts.whole)
        return {node: whole[source] for node, source in parts.sources.items() if source in whole}

    def takes(self, name: str, walk: str) -> bool:
        """Whether a function takes something that is prepared of a walk."""
        return walk in self.prepared and not set(self.prepared[walk].handed).isdisjoint(self.taken.get(name, ()))

    def _add_one(
        self, name: str, module: fx.GraphModule, results: Sequence[str | None], doc: str, rows: Collection[str]
    ) -> None:
        """A function; `rows`: what it reads and writes itself."""
        self.add_blocked(name, module, results, doc, dict.fromkeys(rows, Rows()), blocked=self.blocks_of(name))

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
            direction, _, walked = kernel.partition("_")
            before = [f"{direction}_prepare_walks", f"{direction}_prepare_{walked}"]
            made |= {one: "chunks" for one in before if one not in made and self.is_prepared_by(one)}
            made[kernel] = parts
        return made

    def prepare(self, kernel: str, state: Mapping[str, str]) -> list[str]:
        """Lines that prepare a complete chunk; `state`: where that which it reads of the state lies."""
        places = {n: self.at(n) for n in self.shared} | dict(state)
        for walk in PREPARES[kernel]:
            places |= self.ready(walk, "part")
        call = self.call(self.prepare_of(PREPARES[kernel]), places)
        return ["index = part", *self.span, *self.either(lambda name: [call] if name == "chunk" else ["pass"])]
