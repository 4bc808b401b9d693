"""What tests of ops share."""

from collections.abc import Iterator

import pytest

from tests.lowering.runtime.calls import Calls, recorded


@pytest.fixture
def calls() -> Iterator[Calls]:
    """The ops that are called, with their tensors."""
    with recorded() as found:
        yield found
