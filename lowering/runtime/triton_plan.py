"""What is kept of generated Triton; nothing here imports Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Tiling:
    """What may be chosen of a loop's Triton; what is not given, the compiler chooses.

    Attributes:
        rows: tokens of a chunk, where any number is legal, or of every tile of a loop of batches.
        warps: warps of a program of every kernel, forward and backward.
    """

    rows: int | None = None
    warps: tuple[int, int] | None = None


UNTUNED = Tiling()


@dataclass(frozen=True)
class Launch:
    """A kernel, run after those before it in its direction.

    Attributes:
        kernel: its name, which begins with "forward" or "backward".
        over: what has a program of its own, of every head and sequence: "sequences" (all of it), "chunks" (each chunk),
            "groups" (the chunks from one state that is kept for backward to the next), "ranges" (of tokens).
        warps: of a program.
        scratch: elements of memory that a program works in.
        states: elements more for each chunk from one state that is kept to the next.
    """

    kernel: str
    over: str
    warps: int
    scratch: int
    states: int = 0


@dataclass(frozen=True)
class Handed:
    """Memory in which a kernel leaves what one after it reads.

    Attributes:
        name: of the kernels' argument, which ends with "_handed".
        over: what has elements of its own, of every head and sequence: as of a `Launch`.
        elements: of each.
    """

    name: str
    over: str
    elements: int


@dataclass(frozen=True)
class TritonPlan:
    """Generated Triton and how it is called.

    Attributes:
        text: the module, with the kernels of `forward_launches` and `backward_launches`.
        forward, backward: names of the tensors that all kernels of a direction take, in order.
        gradients: names of the inputs that `backward` gives a cotangent of, in order; the others' are zero.
        rows: tokens of a chunk of a scan, or of a tile; of one piece, the most that it takes.
        state: elements of the state between two chunks.
        wide: names of the tensors whose rows are a multiple of 16 elements long.
        forward_launches, backward_launches: the kernels, in order.
        forward_handed, backward_handed: what they leave for one another.
        common: of a loop of batches, names of what all steps share, which the PyTorch module makes.
        work: what its kernels do, for the cost model (`emit.triton_work.work`).
    """

    text: str
    forward: tuple[str, ...]
    backward: tuple[str, ...]
    gradients: tuple[str, ...]
    rows: int
    state: int
    wide: tuple[str, ...]
    forward_launches: tuple[Launch, ...]
    backward_launches: tuple[Launch, ...]
    forward_handed: tuple[Handed, ...] = ()
    backward_handed: tuple[Handed, ...] = ()
    common: tuple[str, ...] = ()
    work: dict[str, Any] = field(default_factory=dict)

    def launches(self, direction: str) -> tuple[Launch, ...]:
        """The kernels of "forward" or "backward"."""
        return self.forward_launches if direction == "forward" else self.backward_launches

    def handed(self, direction: str) -> tuple[Handed, ...]:
        """What the kernels of "forward" or "backward" leave for one another."""
        return self.forward_handed if direction == "forward" else self.backward_handed

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names of all kernels, in order."""
        return tuple(launch.kernel for launch in (*self.forward_launches, *self.backward_launches))

    def with_warps(self, warps: Sequence[int]) -> TritonPlan:
        """The same with so many warps a program, forward and backward."""
        forward, backward = (
            tuple(replace(launch, warps=count) for launch in self.launches(direction))
            for direction, count in zip(("forward", "backward"), warps, strict=True)
        )
        return replace(self, forward_launches=forward, backward_launches=backward)

    def options(self, kernel: str, nvidia: bool = True) -> dict[str, Any]:
        """How a kernel is compiled.

        A bound on registers is given to NVIDIA's assembler because without one it may, for large kernels, take 32.
        """
        (warps,) = (one.warps for one in (*self.forward_launches, *self.backward_launches) if one.kernel == kernel)
        bound = {"maxnreg": min(255, 65_536 // (32 * warps))} if nvidia else {}
        return {"num_warps": warps, "num_stages": 1, **bound}
