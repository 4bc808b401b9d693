"""Gradients of gradients: of generated code they are refused, not zero; the reference has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import nestloop as nl
from nestloop import zoo
from nestloop.errors import DoubleBackwardError, ForwardModeError
from tests.lowering.comparison import random_inputs

LOOPS: dict[str, tuple[type[nl.Loop], dict[str, int]]] = {
    "a batch": (zoo.MTTTLinear, {"d": 3, "D": 4, "H": 2}),
    "many steps": (zoo.MTTTMLPSGD4, {"d": 3, "D": 4, "H": 2}),
    "a stream": (zoo.DeltaNet, {"dk": 3, "dv": 3, "H": 2}),
    "chunks": (zoo.TTTMLP, {"d": 2, "H": 2}),
}
over_loops = pytest.mark.parametrize("name", LOOPS)


def of_first_view(name: str, backend: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The output as a function of one view, and that view."""
    loop, sizes = LOOPS[name]
    inputs = random_inputs(loop.spec, sizes, tokens=5)
    op, first = nl.compile(loop, backend=backend), next(iter(inputs.views))
    views = {n: 0.3 * t.detach() for n, t in inputs.views.items()}
    weights = {n: t.detach() for n, t in inputs.weights.items()}
    return (lambda x: op({**views, first: x}, weights, order=inputs.order)[0]), views[first]


def message(loop: type[nl.Loop]) -> list[str]:
    return [
        f"A gradient of {loop.__name__} is differentiated again.",
        "  given: a gradient with a graph of its own (create_graph=True, or torch.func.grad inside another transform)",
        "  need:  first derivatives of what a loop computes, its own gradients inside: generated code has no others",
        '  fix:   write nl.compile(..., backend="reference"), which PyTorch differentiates as often as it is asked to',
    ]


def refused(step: Callable[[], Any], loop: type[nl.Loop]) -> None:
    with pytest.raises(DoubleBackwardError) as caught:
        step()
    first, where, *rest = str(caught.value).splitlines()
    assert [first, *rest] == message(loop) and f"class {loop.__name__}" in where


@over_loops
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_a_gradient_may_have_a_graph_that_nobody_goes_back_through(name: str, backend: str):
    op, x = of_first_view(name, backend)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(op(one).square().sum(), one)
    (graphed,) = torch.autograd.grad(op(two).square().sum(), two, create_graph=True)
    assert graphed.requires_grad and torch.equal(plain, graphed)


@over_loops
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_to_go_back_through_it_is_refused(name: str, backend: str):
    op, x = of_first_view(name, backend)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(op(x).square().sum(), x, create_graph=True)
    refused(gradient.square().sum().backward, LOOPS[name][0])


@over_loops
def test_torch_func_is_refused_too(name: str):
    op, x = of_first_view(name, "torch")

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: op(x).square().sum())(x)

    assert gradient(x).isfinite().all()
    refused(lambda: torch.func.grad(lambda x: gradient(x).square().sum())(x), LOOPS[name][0])
    refused(lambda: torch.func.jacrev(gradient)(x), LOOPS[name][0])


def forward_modes(op: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The derivative of `op` at x towards x, in forward mode."""

    def dual() -> Tensor:
        with forward_ad.dual_level():
            tangent: Tensor = forward_ad.unpack_dual(op(forward_ad.make_dual(x, x))).tangent
            return tangent

    return {"jvp": lambda: torch.func.jvp(op, (x,), (x,))[1], "dual": dual, "jacfwd": lambda: torch.func.jacfwd(op)(x)}


@over_loops
@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("mode", ["jvp", "dual", "jacfwd"])
def test_forward_mode_is_refused(name: str, backend: str, mode: str):
    loop = LOOPS[name][0]
    with pytest.raises(ForwardModeError) as caught:
        forward_modes(*of_first_view(name, backend))[mode]()
    assert str(caught.value) == (
        f"{loop.__name__} is differentiated in forward mode.\n"
        f"  at:    {loop.spec.where}   {loop.spec.where.text}\n"
        "  given: a tensor with a tangent (torch.func.jvp, jacfwd or hessian, or torch.autograd.forward_ad)\n"
        "  need:  derivatives in reverse mode: generated code has no others\n"
        '  fix:   write nl.compile(..., backend="reference"), or torch.func.vjp or jacrev'
    )


@over_loops
def test_the_reference_has_it(name: str):
    op, x = of_first_view(name, "reference")
    modes, towards = forward_modes(op, x), 1e-6 * x
    slope = (op(x + towards) - op(x - towards)) / 2e-6
    for mode in ("jvp", "dual"):
        torch.testing.assert_close(modes[mode](), slope, rtol=1e-5, atol=1e-6)


@over_loops
def test_the_reference_has_them(name: str):
    op, x = of_first_view(name, "reference")
    assert torch.autograd.gradgradcheck(op, x.requires_grad_(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["a batch", "a stream"])
def test_shapes_without_memory(name: str):
    op, x = of_first_view(name, "auto")
    loop, sizes = LOOPS[name]
    inputs = random_inputs(loop.spec, sizes, tokens=5)
    views, weights = ({n: t.detach().to("meta") for n, t in group.items()} for group in (inputs.views, inputs.weights))
    first = views[next(iter(views))].requires_grad_()
    z = nl.compile(loop)(views, weights)[0]
    z.sum().backward()
    assert z.device.type == "meta" and z.shape == op(x).shape and first.grad is not None
