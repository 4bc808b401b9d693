"""What every emitter knows of a stream: what a chunk hands to the next, and what only the last one leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from nestloop.lang.schedule import Chunked
from nestloop.lang.state import identifier
from nestloop.lowering.axes import Axes, type_axes
from nestloop.lowering.capture import Captured
from nestloop.lowering.differentiate import Piece
from nestloop.lowering.streams.step import VALID, Step

TITLES = {
    "chunk": "One chunk: its read-out, and the state it leaves",
    "partial": "A chunk that is not complete: its read-out, and what waits for the step",
    "advance": "The state that a chunk leaves, alone",
    "update": "One step of the inner loop on a range of tokens",
    "read": "The output of a range of tokens",
}


@dataclass
class Scan:
    """The pieces of one op of a stream: a scan over chunks, or one piece. What writes them is a class derived from it.

    Attributes:
        pieces: what is written, with their backwards.
        states: forwards without read-out, "advance".
        steps: the step of each piece.
        longest: tokens of a scan's chunk; 0 where the op is one piece.
        losses: whether each token's loss is a result.
        form: the name of the form that the steps take.
    """

    captured: Captured
    pieces: Mapping[str, Piece]
    states: Mapping[str, fx.GraphModule]
    steps: Mapping[str, Step]
    longest: int
    losses: bool
    form: str

    def __post_init__(self) -> None:
        self.spec = self.captured.spec
        self.output = self.captured.readout_axes
        self.first = next(iter(self.steps.values()))
        self.halo = self.first.halo
        self.tokens, self.slow = [*self.spec.inputs, *([VALID] if self.halo else [])], list(self.spec.slow)
        self.entries = self.spec.entries
        schedule = self.spec.schedule
        self.chunked = schedule if isinstance(schedule, Chunked) else None

    def _axes(self, module: fx.GraphModule) -> Mapping[fx.Node, Axes]:
        return type_axes(self.spec, module, self.output).axes

    @property
    def carry(self) -> list[str]:
        """What a chunk hands to the next, as identifiers: fast weights and momenta, and an anchor of its own period."""
        kinds = {"weight", "momentum"} | ({"anchor"} if self.long_anchor else set())
        return [identifier(n) for n, e in self.entries.items() if e.part in kinds]

    @property
    def long_anchor(self) -> bool:
        return self.chunked is not None and self.chunked.anchor is not None

    @property
    def anchor_period(self) -> int:
        """Tokens from one anchor to the next that a chunk may hand on; 0 for one that stays, or none."""
        return 0 if self.chunked is None else self.chunked.anchor or 0

    @property
    def anchors(self) -> list[str]:
        """Anchors that a chunk hands to the next."""
        return [n for n in self.carry if n.endswith("__anchor")]

    @property
    def held(self) -> list[str]:
        """Parts of the state that every chunk hands on as they are: an anchor that stays."""
        return [] if self.anchor_period else self.anchors

    @property
    def walked(self) -> list[str]:
        """The parts that a chunk changes."""
        return [n for n in self.carry if n not in self.held]

    @property
    def starts(self) -> list[str]:
        """Carried entries that the scan takes: an anchor that begins with the scan is no input."""
        return [n for n in self.carry if not (self.anchor_period and n in self.anchors)]

    @property
    def last_anchors(self) -> dict[str, str]:
        """Anchors that only the last chunk leaves, its first weights -> the weight that each is of."""
        return {n: n.removesuffix("__anchor") for n in self.extra if n.endswith("__anchor")}

    @property
    def extra(self) -> list[str]:
        """Entries that only the last chunk leaves: its anchor, its scaled sum, what waits."""
        rest = {n: e for n, e in self.entries.items() if e.part != "tail"}  # which the call itself keeps
        return [identifier(n) for n in rest if identifier(n) not in self.carry]


ROWWISE = ("z", "losses")  # results with a row for each token of a call's own


class ScanTensors(Scan):
    """What C++ and Triton know beside: the tensors that an op's `forward` and `backward` take and make, by name.

    Attributes:
        initial: initial fast weights that steps read, whichever chunk they are of.
        carried: the state that `forward` takes.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.initial = [n for n in self.first.inputs if n.endswith("__initial")]
        if not self.longest:  # one piece: all of its state comes from outside
            (piece,) = self.pieces.values()
            self.carried = [n for n in piece.inputs if n not in self.slow and n not in self.tokens]
        else:
            self.carried = [*self.starts, *self.initial]

    @property
    def shared(self) -> list[str]:
        """Inputs whose cotangents chunks and sequences add up."""
        return [*(self.initial if self.longest else []), *self.slow]

    @property
    def kept(self) -> list[str]:
        """What is kept of the states between chunks."""
        return self.carry if self.longest else []

    @property
    def made(self) -> list[str]:
        """Names of forward's results, without the states kept."""
        if self.longest:
            return ["z", *[f"end_{n}" for n in [*self.carry, *self.extra]], *(["losses"] if self.losses else [])]
        results = next(iter(self.pieces.values())).results
        return [r if r in ROWWISE else f"end_{r.removesuffix('_new')}" for r in results]

    def given(self, which: str) -> list[str]:
        """Names of the tensors that `forward` or `backward` takes."""
        names = [*self.tokens, *self.carried, *self.slow]
        if which == "backward":
            names += [f"between_{n}" for n in self.kept] + [f"d_{n}" for n in self.made]
        return names

    def nonzero(self, piece: str) -> set[str]:
        """Inputs of a piece that have a cotangent."""
        found = zip(self.pieces[piece].wrt, self.pieces[piece].backward.graph.output_node().args[0], strict=True)
        return {n for n, cotangent in found if cotangent is not None and n != VALID}

    @property
    def seen(self) -> list[str]:
        """Token inputs that have a cotangent in some piece."""
        return [n for n in self.tokens if any(n in self.nonzero(p) for p in self.pieces)]

    @property
    def gradients(self) -> list[str]:
        """Inputs with a cotangent."""
        reached = [n for n in self.shared if any(n in self.nonzero(p) for p in self.pieces)]
        carried = [n for n in self.carried if n not in self.shared]
        if not self.longest:
            carried = [n for n in carried if n in self.nonzero(next(iter(self.pieces)))]
        return [*self.seen, *carried, *reached]
