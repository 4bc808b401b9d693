"""Loops whose state is more tensors than one of PyTorch's operators has arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import nestloop as nl
from nestloop.lowering.runtime.operator import MOST_ARGUMENTS
from tests.lowering.body_loops import Recall
from tests.lowering.comparison import assert_equal, differences, random_inputs, run
from tests.lowering.runtime.calls import Calls
from tests.lowering.runtime.test_library import backward_arguments

H, d = 2, 4
WEIGHTS = {f"w{i}": nl.fast("d", "d") for i in range(11)}
pytestmark = pytest.mark.usefixtures("quick_builds")


class Deep(nl.Learner):
    vars().update(WEIGHTS)

    def forward(self, x):
        for name in WEIGHTS:
            x = x + torch.tanh(x @ getattr(self, name))
        return x


class Batches(Recall):
    learner = Deep
    optimizer, schedule = nl.SGD(lr=0.1, momentum=0.9), nl.FullBatch(2)


class Shuffled(Recall):
    learner = Deep
    optimizer, schedule = nl.SGD(lr=0.1, momentum=0.9), nl.Shuffled(2)


class Stream(Recall):
    learner = Deep
    optimizer, schedule = nl.SGD(lr=0.02, momentum=0.9), nl.Causal(4)  # larger steps amplify rounding


over_loops = pytest.mark.parametrize("loop", [Batches, Shuffled, Stream], ids=lambda loop: loop.__name__)


@over_loops
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_it_is_its_definition(loop: Any, backend: str):
    check(loop, backend)


def test_kernels_too():
    pytest.importorskip("triton")
    check(Stream, "triton")


def check(loop: Any, backend: str) -> None:
    inputs = random_inputs(loop.spec, {"d": d, "H": H}, tokens=7, sequences=2, heads=H)
    wanted = run(nl.compile(loop, backend="reference", d=d), inputs)
    assert_equal(differences(run(nl.compile(loop, backend=backend, d=d), inputs), wanted), 1e-10)


@over_loops
def test_pytorch_sees_an_ordinary_op(loop: Any, calls: Calls):
    nl.Layer(loop, H * d, H)(torch.randn(2, 6, H * d))
    for op, tensors in calls:
        given = tuple(t.detach() for t in tensors)
        backward = backward_arguments(op, given)
        assert len(backward) > MOST_ARGUMENTS
        assert str(op.backward_op.overload._schema).endswith("(Tensor[] tensors) -> Tensor[]")
        assert set(opcheck(op.forward_op.overload, _as_taken(op.forward_op, given)).values()) == {"SUCCESS"}
        assert set(opcheck(op.backward_op.overload, _as_taken(op.backward_op, backward)).values()) == {"SUCCESS"}


def _as_taken(operator: Any, tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    lists = "Tensor[]" in str(operator.overload._schema)
    return (list(tensors),) if lists else tensors


@over_loops
def test_graphs_vmap_and_counters_see_one(loop: Any):
    torch.manual_seed(0)
    layer, x = nl.Layer(loop, H * d, H).double().eval(), torch.randn(3, 2, 6, H * d, dtype=torch.float64)
    leaves = [p for p in layer.parameters() if p.requires_grad]
    plain = [layer(one) for one in x]
    for made, wanted in zip(torch.func.vmap(layer)(x), plain, strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-10, atol=1e-12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x[0]).square().sum(), leaves)
    wanted = torch.autograd.grad(plain[0].square().sum(), leaves)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    taken = dict(layer.named_parameters())

    def total(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(total), (None, 0))({n: p.detach() for n, p in taken.items()}, x)
    names = [n for n, p in taken.items() if p.requires_grad]
    for name, b in zip(names, wanted, strict=True):
        torch.testing.assert_close(each[name][0], b, rtol=1e-10, atol=1e-12)
    with FlopCounterMode(display=False) as counter:
        layer(x[0]).sum().backward()
    tokens, matrix = 2 * 6 * H, 2 * d * d
    assert counter.get_total_flops() > 2 * len(WEIGHTS) * tokens * matrix


@over_loops
def test_an_exported_program_calls_it(loop: Any, tmp_path: Any):
    layer, x = nl.Layer(loop, H * d, H).eval(), torch.randn(2, 6, H * d)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))
    nl.save_ops(program, tmp_path / "deep.ops")
    nl.load_ops(tmp_path / "deep.ops")
