"""The generated code that an op runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from nestloop.lowering.runtime.native import NativeModule
from nestloop.lowering.runtime.native_stream import NativeStream
from nestloop.lowering.runtime.triton import TritonBatches, TritonStream


@dataclass(frozen=True)
class Code:
    """What an op runs.

    Attributes:
        module: the generated module, with `forward` and `backward`; with `conditioned` where there are weights that it
            is not precise with.
        rows: tokens, of all sequences together, that are worked on at a time on a CPU.
        shared: names of what its `common` makes, which all steps share.
        native: the same two functions in C++, for tensors on a CPU, or in Triton, for all; None where the generated
            module does for all.
        pays: (heads, sequences, tokens) -> whether C++ is to run there; None for always. Both keep the same states, so
            that either can go back from what the other one kept.
    """

    module: ModuleType
    rows: int
    shared: Sequence[str] = ()
    native: NativeModule | NativeStream | TritonBatches | TritonStream | None = None
    pays: Callable[[int, int, int], bool] | None = None

    def runs_native(self, inputs: Sequence[Tensor], halo: int) -> bool:
        """Whether a call with these inputs, `halo` rows before their tokens, runs in C++."""
        if self.native is None or inputs[0].device.type != "cpu":
            return False
        sequences, rows = inputs[0].shape[1:3]
        return self.pays is None or self.pays(max(t.shape[0] for t in inputs), sequences, rows - halo)
