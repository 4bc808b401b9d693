"""Which ops a test calls, and what PyTorch traces of calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from nestloop.lowering.runtime.library import NestedLoopOp

# Dynamo of PyTorch 2.11 does not find the view or gate whose rows or sums a state has.
TRACES_STATES_OF_VIEWS = not torch.__version__.startswith("2.11.")

Calls = list[tuple[NestedLoopOp, tuple[Tensor, ...]]]


@contextmanager
def recorded() -> Iterator[Calls]:
    """The ops that are called inside, with their tensors."""
    found: Calls = []
    original = NestedLoopOp.__call__

    def recording(self: NestedLoopOp, *given: Tensor) -> tuple[Tensor, ...]:
        found.append((self, given))
        return original(self, *given)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(NestedLoopOp, "__call__", recording)
        yield found
