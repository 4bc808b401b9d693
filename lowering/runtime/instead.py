"""Generated PyTorch in the place of kernels that a device has no room for, where "auto" had chosen them.

How much shared memory a kernel wants is known once it is compiled: at its first launch, which may be one of backward.
From then on generated PyTorch runs the op. What it keeps for backward is not shaped as what the kernels keep, which the
op's fake kernels promise: so nothing is kept, and backward runs forward again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from nestloop.errors import SharedMemoryError

if TYPE_CHECKING:
    from nestloop.lowering.runtime.library import NestedLoopOp


class Instead:
    """What runs an op of kernels, and what runs in their place.

    Args:
        op: the op.
        make: makes the op of generated PyTorch; None where the kernels were asked for by name.

    Attributes:
        refused: the refusal of a kernel that there is no room for; None while none was met.
    """

    def __init__(self, op: NestedLoopOp, make: Callable[[], NestedLoopOp] | None) -> None:
        self._op, self._make = op, make
        self.refused: SharedMemoryError | None = None

    @cached_property
    def _other(self) -> NestedLoopOp:
        assert self._make is not None
        return self._make()

    def made(self, name: str, tensors: list[Tensor], order: Tensor | None) -> list[Tensor]:
        """The results of `forward` or `backward`, as `NestedLoopOp.made` has them.

        Raises:
            SharedMemoryError: there is no room for a kernel that was asked for by name.
        """
        if self.refused is None:
            try:
                return self._op.made(name, tensors, order)
            except SharedMemoryError as refusal:
                if self._make is None:
                    raise
                self.refused = refusal
                _announce(self._op.origin.name, refusal)
        count, results = len(self._op.signature.inputs), self._other.signature.results
        inputs = tensors[:count]
        made = dict(zip(results, self._other.made("forward", inputs, order), strict=True))
        if name == "forward":
            promised = zip(self._op.signature.results, self._op.signature.empty(inputs), strict=True)
            return [memory if n not in self._op.cotangents else made[n] for n, memory in promised]
        kept = [made[n] for n in self._other.signature.saved]
        cotangents = tensors[count + len(self._op.signature.saved) :]
        return self._other.made("backward", [*inputs, *kept, *cotangents], order)


def _announce(loop: str, refusal: SharedMemoryError) -> None:
    warnings.warn(
        f"nestloop runs generated PyTorch instead of Triton for {loop}, which is slower: {refusal.what} "
        f"It is given {refusal.given}; it needs {refusal.need}. Smaller sizes may fit; backend='torch' says that this "
        "is intended, and does not run forward again in backward.",
        stacklevel=2,
    )
