"""What all steps share is made once a call and kept for backward; tokens go out as they came in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nestloop as nl
from nestloop import zoo
from nestloop.lowering.runtime.executable import OPS
from nestloop.lowering.runtime.library import NestedLoopOp
from nestloop.lowering.runtime.native import NativeModule
from tests.lowering.comparison import assert_equal, differences, random_inputs, run
from tests.lowering.runtime.calls import recorded

pytestmark = pytest.mark.usefixtures("quick_builds")
SIZES = {"d": 4, "D": 24, "H": 3}


def called(loop: Any, backend: str, **settings: Any) -> tuple[Any, NestedLoopOp]:
    """A compiled loop, and its op once it has been called."""
    op = nl.compile(loop, backend=backend)
    with recorded() as found:
        run(op, inputs_of(loop, **settings))
    made, _ = found[-1]
    assert made in OPS.values()
    return op, made


def inputs_of(loop: Any, **settings: Any) -> Any:
    return random_inputs(loop.spec, SIZES, sequences=2, heads=3, tokens=9, **settings)


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[str]:
    """A list that grows by one with each call of a module's function."""
    calls: list[str] = []
    function: Callable[..., Any] = getattr(module, name)

    def counting(*given: Any) -> Any:
        calls.append(name)
        return function(*given)

    monkeypatch.setattr(module, name, counting)
    return calls


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("loop", [zoo.MTTTMLP, zoo.MTTTMLPSGD4])
def test_it_is_made_once_for_forward_and_backward(loop: Any, backend: str, monkeypatch: pytest.MonkeyPatch):
    op, inner = called(loop, backend)
    calls = counted(monkeypatch, inner.code.module, "common")
    run(op, inputs_of(loop))
    assert op.ran == ["the Gram form"] and len(calls) == 1


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_the_wide_form_reads_nothing_of_it(backend: str, monkeypatch: pytest.MonkeyPatch):
    op, inner = called(zoo.MTTTMLP, backend)
    inputs = inputs_of(zoo.MTTTMLP)
    with torch.no_grad():
        inputs.weights["g"][:, 1] = inputs.weights["g"][:, 0]  # two rows alike
    calls = counted(monkeypatch, inner.code.module, "common")
    assert_equal(differences(run(op, inputs), run(nl.compile(zoo.MTTTMLP, backend="reference"), inputs)), 1e-9)
    assert op.ran == ["the wide form"] and not calls


class Decoded(nl.Loop):
    """A decoder that heads share, its rows normalised, and a scale for each head."""

    learner = zoo.MTTTMLP.spec.learner
    k, q, x = nl.view("d"), nl.view("d"), nl.view("d")
    g, scale = nl.slow("d", "d", shared=True), nl.slow("d")

    def loss(self, f, t):
        return (f(t.k) @ F.normalize(self.g, dim=-1) * self.scale.exp() - t.x).square().mean(-1)

    def readout(self, f, t):
        return f(t.q)


@pytest.mark.parametrize("loop", [zoo.MTTTLinear, zoo.MTTTMLP, Decoded])
def test_slow_weights_are_prepared_in_cpp(loop: Any, monkeypatch: pytest.MonkeyPatch):
    _, inner = called(loop, "cpp")
    native = inner.code.native
    assert isinstance(native, NativeModule) and native.plan.prepare and native.plan.pulled
    built = native.prepared()
    generator = torch.Generator().manual_seed(2)

    def weight(name: str) -> Tensor:
        heads = 1 if loop.spec.slow[name].shared else 3
        return torch.randn(heads, 1, *[e.size(SIZES) for e in loop.spec.slow[name].dims], generator=generator).double()

    slow = [weight(n) for n in native.plan.prepare]
    wanted, calls = native.module.prepare(*slow, None), counted(monkeypatch, native.module, "prepare")
    made = built.prepare(*slow, None)
    for a, b in zip(made, wanted, strict=True):
        torch.testing.assert_close(a, b.expand_as(a), rtol=1e-12, atol=1e-12)
    cotangents = [torch.randn(b.shape, generator=generator).double() for b in made]
    pulled, before = (m.prepare_vjp(*slow, *cotangents, None) for m in (built, native.module))
    for a, b in zip(pulled, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert not calls
    native.prepared().prepare(*[t.float() for t in slow], torch.bfloat16)  # products in low precision are PyTorch's
    assert len(calls) == 1


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("loop", [zoo.LinearAttention, zoo.TTTLinear])
def test_tokens_go_out_as_they_came_in(loop: Any, backend: str):
    """z as a layer's output projection reads it, cotangents as its projections of the input do: nothing is copied."""
    inputs, op = random_inputs(loop.spec, {"d": 4, "H": 2}, tokens=37), nl.compile(loop, backend=backend)
    projected = {n: t.detach().transpose(1, 2).contiguous().transpose(1, 2) for n, t in inputs.views.items()}
    for views in (inputs.views, projected):
        leaves = {n: t.detach().requires_grad_() for n, t in views.items()}
        z, _ = op(leaves, inputs.weights)
        assert z.transpose(1, 2).is_contiguous()
        for name, cotangent in zip(leaves, torch.autograd.grad(z.square().sum(), list(leaves.values())), strict=True):
            assert cotangent.stride() == views[name].stride(), name
