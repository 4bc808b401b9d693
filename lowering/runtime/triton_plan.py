"""What is kept of generated Triton; nothing here imports Triton."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Tiling:
    """What may be chosen of a loop's Triton; what is not given, the compiler chooses.

    Attributes:
        rows: tokens of a chunk, where any number is legal, or of every tile of a loop of batches.
        warps: warps of a program, forward and backward.
    """

    rows: int | None = None
    warps: tuple[int, int] | None = None


UNTUNED = Tiling()


@dataclass(frozen=True)
class TritonPlan:
    """Generated Triton and how it is called.

    Attributes:
        text: the module, with kernels `forward` and `backward`.
        forward, backward: names of the tensors each takes, in order.
        gradients: names of the inputs that `backward` gives a cotangent of, in order; the others' are zero.
        rows: tokens of a chunk of a scan, or of a tile; of one piece, the most that it takes.
        scratch: elements of memory that a program of each kernel works in.
        state: elements of the state between two chunks.
        warps: warps of a program of each kernel.
        wide: names of the tensors whose rows are a multiple of 16 elements long.
        common: of a loop of batches, names of what all steps share, which the PyTorch module makes.
        work: what its kernels do, for the cost model (`emit.triton_work.work`).
    """

    text: str
    forward: tuple[str, ...]
    backward: tuple[str, ...]
    gradients: tuple[str, ...]
    rows: int
    scratch: tuple[int, int]
    state: int
    warps: tuple[int, int]
    wide: tuple[str, ...]
    common: tuple[str, ...] = ()
    work: dict[str, Any] = field(default_factory=dict)

    def options(self, kernel: str, nvidia: bool = True) -> dict[str, Any]:
        """How a kernel is compiled.

        A bound on registers is given to NVIDIA's assembler because without one it may, for large kernels, take 32.
        """
        warps = self.warps[kernel == "backward"]
        bound = {"maxnreg": min(255, 65_536 // (32 * warps))} if nvidia else {}
        return {"num_warps": warps, "num_stages": 1, **bound}
