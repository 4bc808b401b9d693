"""What tests of ops share."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from tests.lowering.runtime.calls import Calls, recorded


@pytest.fixture
def calls() -> Iterator[Calls]:
    """The ops that are called, with their tensors."""
    with recorded() as found:
        yield found


@pytest.fixture
def graphs() -> Iterator[Callable[[], int]]:
    """How many graphs `torch.compile` has made since the test began."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
