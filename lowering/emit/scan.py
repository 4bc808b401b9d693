"""What every emitter knows of a stream: what a chunk hands to the next, and what only the last one leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from nestloop.lang.schedule import Chunked
from nestloop.lang.state import entries
from nestloop.lowering.axes import Axes, readout_axes, type_axes
from nestloop.lowering.capture import Captured
from nestloop.lowering.differentiate import Piece
from nestloop.lowering.streams.step import VALID, Step, identifier

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
        self.output = readout_axes(self.captured)
        self.first = next(iter(self.steps.values()))
        self.halo = self.first.halo
        self.tokens, self.slow = [*self.spec.inputs, *([VALID] if self.halo else [])], list(self.spec.slow)
        self.entries = entries(self.spec)
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
    def starts(self) -> list[str]:
        """Carried entries that the scan takes: an anchor that begins with the scan is no input."""
        return [n for n in self.carry if not (self.anchor_period and n in self.anchors)]

    @property
    def extra(self) -> list[str]:
        """Entries that only the last chunk leaves: its anchor, its scaled sum, what waits."""
        rest = {n: e for n, e in self.entries.items() if e.part != "tail"}  # which the call itself keeps
        return [identifier(n) for n in rest if identifier(n) not in self.carry]
