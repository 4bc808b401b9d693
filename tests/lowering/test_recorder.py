"""Recording: the ops of a function as a graph, without what PyTorch would import for it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from nestloop.lowering import ops
from nestloop.lowering.derivative import grad, vjp
from nestloop.lowering.length import Length
from nestloop.lowering.recorder import Recorder, noting, record
from nestloop.reference.precision import default_dtype

aten = torch.ops.aten


def example(*shape: Any) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device="meta")


def targets(module: torch.fx.GraphModule) -> list[Any]:
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def test_a_graph_computes_what_was_recorded():
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return torch.nn.functional.gelu(x @ w).softmax(-1), x.mean(0)

    module = record(function, [example(5, 4), example(4, 3)], ["x", "W"])
    assert [n.meta["declared"] for n in module.graph.find_nodes(op="placeholder")] == ["x", "W"]
    assert all(ops.admitted(target) for target in targets(module))
    given = torch.randn(5, 4, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    for made, expected in zip(module(*given), function(*given), strict=True):
        torch.testing.assert_close(made, expected)


def test_writes_become_values():
    def function(x: Tensor) -> Tensor:
        y = x.clone()
        y.add_(1)[0].mul_(3)
        return y

    module = record(function, [example(3, 2)], ["x"])
    given = torch.randn(3, 2, dtype=torch.float64)
    torch.testing.assert_close(module(given), function(given))
    assert not any(target._schema.is_mutable for target in targets(module))


def test_writes_inside_a_composite_become_values():
    def function(x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.cosine_similarity(x, y, dim=-1, eps=0.9)

    module = record(function, [example(3, 2), example(3, 2)], ["x", "y"])
    assert not any(target._schema.is_mutable for target in targets(module))
    given = torch.rand(3, 2, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64)
    torch.testing.assert_close(module(*given), function(*given))


def test_a_write_that_a_view_sees_stays_in_the_graph():
    """Where it is refused: no value stands for it."""
    recorder = Recorder()
    x = example(3, 2)
    recorder.placeholder("x", x)
    with recorder:
        y = x.clone()
        row = y[0]
        y.add_(1)
    module = recorder.finish(row)
    assert aten.add_.Tensor in targets(module) and not ops.admitted(aten.add_.Tensor)


def test_sizes_are_read_where_they_are_needed():
    n = Length().size

    def function(x: Tensor) -> Tensor:
        return x.reshape(-1, 2).sum(1) * (x.shape[0] + 1) / x.shape[0]

    module = record(function, [example(n, 4)], ["x"])
    for tokens in (2, 5):
        given = torch.randn(tokens, 4, dtype=torch.float64)
        torch.testing.assert_close(module(given), function(given))


def test_what_nothing_reads_is_left_out():
    assert targets(record(lambda x: (x.exp(), x.sin())[1], [example(3)], ["x"])) == [aten.sin.default]


def test_facts_are_those_of_the_innermost_note():
    def function(x: Tensor) -> Tensor:
        with noting(where="outside", called=None), noting(where="inside", called="exp"):
            y = x.exp()
        return y + 1

    first, second = (n for n in record(function, [example(3)], ["x"]).graph.nodes if n.op == "call_function")
    assert (first.meta["where"], first.meta["called"]) == ("outside", "exp")
    assert "where" not in second.meta


def test_a_gradient_is_that_of_torch_func():
    def objective(weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        y = (x @ weights["w"]).tanh()
        return y.square().sum(), y

    torch.manual_seed(0)
    weights = {"w": torch.randn(4, 3, dtype=torch.float64), "unused": torch.randn(2, dtype=torch.float64)}
    x = torch.randn(5, 4, dtype=torch.float64)
    mine, theirs = (g(objective, has_aux=True)(weights, x) for g in (grad, torch.func.grad))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("used", [True, False])
def test_a_pull_back_is_that_of_torch_func(used: bool):
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.exp() * (y if used else 1), x.detach()

    x, y, *cotangents = torch.randn(4, 3, dtype=torch.float64)
    theirs = torch.func.vjp(function, x, y)[1](tuple(cotangents))
    torch.testing.assert_close(vjp(function, [x, y], cotangents), theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["MTTTMLP", "ViT3", "TTTMLP"])
def test_a_first_compilation_imports_no_dynamo(name: str, tmp_path):
    program = f"""
import os, sys
os.environ["NESTLOOP_CACHE"] = {str(tmp_path / "cache")!r}
import torch, nestloop as nl
from nestloop import zoo
nl.Layer(zoo.{name}, 16, 2, backend="torch")(torch.randn(1, 4, 16))
assert "nestloop.lowering.pipeline" in sys.modules
assert not [name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor"))]
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_the_default_dtype_of_another_thread_stays():
    """It is the process's: what somebody sets while a loop is lowered is not put back."""
    try:
        with default_dtype(torch.float32):
            torch.set_default_dtype(torch.float64)
        assert torch.get_default_dtype() is torch.float64
        with default_dtype(torch.float32):
            assert torch.get_default_dtype() is torch.float32
            torch.set_default_dtype(torch.bfloat16)
        assert torch.get_default_dtype() is torch.bfloat16
        with default_dtype(torch.float32):
            pass
        assert torch.get_default_dtype() is torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
