"""What "auto" is where tensors lie on a GPU, as far as a machine without one can show it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nestloop as nl
from nestloop import compiled, zoo
from nestloop.lowering import lower
from nestloop.lowering.runtime import executable
from tests.drawn import draw

pytest.importorskip("triton")


def ops_of(loop: Any, dtype: torch.dtype = torch.float32, **settings: Any) -> list[str]:
    """Names of what a call of a loop runs."""
    op = nl.compile(loop, **settings)
    views, weights = ({n: t.detach().to(dtype) for n, t in part.items()} for part in draw(loop.spec, 9))
    found, _ = op(views, weights)
    wanted, _ = nl.compile(loop, backend="torch")(views, weights)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    return list(op._names.values())


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_on_a_gpu", lambda view: True)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("loop", [zoo.MTTTLinear, zoo.CausalLinearAttention])
def test_it_is_triton(loop: Any):
    assert all("_triton_" in name for name in ops_of(loop))


@pytest.mark.usefixtures("on_a_gpu")
def test_it_is_pytorch_where_there_is_no_triton():
    assert not any("_triton_" in name or "_cpp_" in name for name in ops_of(zoo.LaCT))


@pytest.mark.usefixtures("on_a_gpu")
def test_it_is_pytorch_where_triton_takes_minutes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(executable, "LONGEST_MODULE", 10)
    assert not any("_triton_" in name for name in ops_of(zoo.GLA))


def test_it_is_pytorch_where_registers_are_far_too_few():
    """Backward of Atlas with heads of 128 features wants more shared memory than any device has."""

    def op(backend: str) -> str:
        sizes = {"d": 128, "H": 2, "D": 256}
        return lower.lower(zoo.Atlas.spec, sizes, None, False, False, False, backend=backend, part="scan", gpu=True)

    assert "_triton_" in op("triton") and "_triton_" not in op("auto")


@pytest.mark.usefixtures("on_a_gpu")
def test_it_is_pytorch_in_float64_and_under_inductor():
    assert not any("_triton_" in name for name in ops_of(zoo.RetNet, torch.float64))
    op = nl.compile(zoo.RetNet, inductor=True)
    assert not op._may_be_triton({"q": torch.zeros(1)})


def test_on_a_cpu_it_is_not_triton():
    assert not any("_triton_" in name for name in ops_of(zoo.RetNet))
