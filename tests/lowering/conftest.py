"""`pytest tests/lowering --update-golden` writes the golden texts again, to be read before they are committed."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nestloop.lowering.runtime import tiles
from nestloop.lowering.runtime.launching import TritonCode
from nestloop.lowering.runtime.streams import STREAM_OPS
from nestloop.lowering.runtime.triton_plan import TritonPlan
from tests.lowering.typed_kernels import assert_typed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", default=False, help="write golden texts again")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden texts are written instead of compared."""
    return bool(request.config.getoption("update_golden", False))


@pytest.fixture(autouse=True)
def kernels_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel that a test interprets is read by Triton's compiler, too."""
    launch = TritonCode.launch

    def read(self: TritonCode, plan: TritonPlan, direction: str, *given: Any, **named: Any) -> None:
        for one in plan.launches(direction):
            assert_typed(plan, one.kernel)
        launch(self, plan, direction, *given, **named)

    monkeypatch.setattr(TritonCode, "launch", read)


@pytest.fixture
def states_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[..., int]], None]]:
    """Lets a test say how many chunks lie between states that are kept (arguments as of `tiles.spacing_within`). What
    ops remember of calls before, and what they would of these, is forgotten."""

    def forget() -> None:
        for op in STREAM_OPS.values():
            for remembered in ("_spacings", "_layouts"):
                vars(op.signature).pop(remembered, None)

    def keep(rule: Callable[..., int]) -> None:
        monkeypatch.setattr(tiles, "spacing_within", rule)
        forget()

    yield keep
    forget()


@pytest.fixture
def matmul_precision() -> Iterator[Callable[[str], None]]:
    """What sets PyTorch's precision of float32 products, for a test."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)
