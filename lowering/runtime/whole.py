"""What runs fast weights in parts (`lowering.in_parts`, `lowering.stacks`), called with them whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from nestloop.lang.parts import Apart, apart, joined
from nestloop.lowering.runtime import cache
from nestloop.lowering.runtime.executable import EXECUTABLES, OPS
from nestloop.lowering.runtime.streams import STREAM_OPS, StreamOp


@dataclass(frozen=True)
class WholeOp(StreamOp):
    """An op of a stream, called with fast weights, and all that is as they are, whole."""

    parts: Sequence[Apart] = ()

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(joined(self.parts, super().__call__(apart(self.parts, tensors)), "end_"))


def called_whole(name: str, parts: Sequence[Apart], streams: bool) -> str:
    """Of an executable, or an op of a stream, of a loop in parts: one with the loop's own weights; its name."""
    made = f"{name}_{cache.digest(repr(parts))}"
    if streams:
        inner = STREAM_OPS[name]
        STREAM_OPS.setdefault(made, WholeOp(inner.op, inner.signature, parts))
        return made
    run = EXECUTABLES[name]

    def whole(
        views: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        state: Mapping[str, Tensor] | None,
        order: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        z, ends, losses = run(views, apart(parts, weights), None if state is None else apart(parts, state), order)
        return z, dict(joined(parts, ends)), losses

    EXECUTABLES.setdefault(made, whole)
    OPS[made] = OPS[name]
    return made
