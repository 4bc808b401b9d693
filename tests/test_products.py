"""Products by oneDNN are PyTorch's, values and gradients, and PyTorch's own where something reads or replaces them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from nestloop import products

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch is built without oneDNN")

ROWS, WIDE, MADE = 130, 128, 144  # enough for oneDNN


@pytest.fixture(autouse=True)
def on_any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights that oneDNN is given from here on."""
    op, seen = torch.ops.mkldnn._linear_pointwise, list[Tensor]()

    def spy(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        seen.append(weight)
        made: Tensor = op(x, weight, *rest)
        return made

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", spy)
    return seen


def ran_onednn(function: Callable[[], object]) -> bool:
    with torch.profiler.profile() as profile:
        function()
    return any(event.name == "mkldnn::_linear_pointwise" for event in profile.events())


LAYOUTS: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
    "dense": (lambda: drawn(ROWS, WIDE), lambda: drawn(MADE, WIDE)),
    "batches": (lambda: drawn(2, ROWS, WIDE), lambda: drawn(MADE, WIDE)),
    "transposed": (lambda: drawn(WIDE, ROWS).mT, lambda: drawn(WIDE, MADE).mT),
    "parts": (lambda: drawn(ROWS, 2 * WIDE)[:, ::2], lambda: drawn(MADE, WIDE + 3)[:, 3:]),
    "one row for all": (lambda: drawn(1, WIDE).expand(ROWS, -1), lambda: drawn(1, WIDE).expand(MADE, -1)),
    "one column for all": (lambda: drawn(ROWS, 1).expand(-1, WIDE), lambda: drawn(MADE, 1).expand(-1, WIDE)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients(layout: str, with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = (make().requires_grad_() for make in LAYOUTS[layout])
    bias = drawn(MADE).requires_grad_() if with_bias else None
    given = [t for t in (x, weight, bias) if t is not None]
    seen = spied(monkeypatch)
    made = products.linear(x, weight, bias)
    cotangents = (drawn(*made.shape), drawn(1).expand(made.shape))
    for cotangent in cotangents:
        found = torch.autograd.grad(made, given, cotangent, retain_graph=True)
        wide = [t.double() for t in given]
        exact = F.linear(*wide)
        needed = torch.autograd.grad(exact, given, cotangent.double())
        torch.testing.assert_close(made.double(), exact, rtol=1e-5, atol=1e-4)
        for a, b in zip(found, needed, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    assert len(seen) == 1 + 2 * len(cotangents)
    assert all(w.is_contiguous() or w.mT.is_contiguous() for w in seen)  # others take a thousand times as long


def test_product_of_matrices() -> None:
    a, b = drawn(ROWS, WIDE), drawn(WIDE, MADE)
    assert ran_onednn(lambda: products.product(a, b))
    torch.testing.assert_close(products.product(a, b).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)


def test_gradient_of_a_gradient() -> None:
    def second(linear: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        x, weight = drawn(ROWS, WIDE).requires_grad_(), drawn(MADE, WIDE).requires_grad_()
        (first,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, weight])

    for a, b in zip(second(products.linear), second(F.linear), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2 * b.abs().mean().item())


@pytest.mark.parametrize("only", ["x", "weight", "bias"])
def test_gradients_that_are_not_asked_for_are_not_made(only: str) -> None:
    given = {"x": drawn(ROWS, WIDE), "weight": drawn(MADE, WIDE), "bias": drawn(MADE)}
    given[only].requires_grad_()
    products.linear(*given.values()).sum().backward()
    assert [name for name, t in given.items() if t.grad is not None] == [only]


OTHERS: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "few rows": ((3, 128 * 64), torch.float32),
    "little work": ((64, 64), torch.float32),
    "no rows": ((0, WIDE), torch.float32),
    "a vector": ((WIDE * 128,), torch.float32),
    "float64": ((ROWS, WIDE), torch.float64),
    "bfloat16": ((ROWS, WIDE), torch.bfloat16),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_rest_is_pytorchs(case: str) -> None:
    shape, dtype = OTHERS[case]
    x, weight = drawn(*shape, dtype=dtype), drawn(MADE, shape[-1], dtype=dtype)
    assert not ran_onednn(lambda: products.linear(x, weight))
    assert torch.equal(products.linear(x, weight), F.linear(x, weight))


def test_what_is_watched_or_transformed_is_pytorchs() -> None:
    x, weight = drawn(ROWS, WIDE), drawn(MADE, WIDE)
    exact = F.linear(x, weight)
    with FlopCounterMode(display=False) as counted:
        products.linear(x, weight)
    assert counted.get_total_flops() == 2 * ROWS * WIDE * MADE
    mapped = torch.vmap(products.linear, (0, None))(x[None].expand(3, -1, -1), weight)
    torch.testing.assert_close(mapped, exact[None].expand(3, -1, -1))
    slope = torch.func.grad(lambda w: products.linear(x, w).sum())(weight)
    torch.testing.assert_close(slope, x.sum(0).expand(MADE, -1), rtol=1e-4, atol=1e-4)
    with forward_ad.dual_level():
        dual = products.linear(forward_ad.make_dual(x, x), weight)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, exact)
    with torch.autocast("cpu"):
        assert products.linear(x, weight).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert not ran_onednn(lambda: products.linear(x, weight))
    compiled = torch.compile(partial(products.apply, nn.Linear(WIDE, MADE)), fullgraph=True, backend="aot_eager")
    assert not ran_onednn(lambda: compiled(x).sum().backward())


@pytest.mark.parametrize(("name", "faster"), [("AMD EPYC", True), ("Intel Xeon", False), ("", False)])
def test_which_processors(name: str, faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for module in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name})
    assert products.onednn_is_faster.__wrapped__() is faster
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not products.onednn_is_faster.__wrapped__()


def test_modules_that_others_watch_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    x, fired = drawn(ROWS, WIDE), list[str]()
    linear = nn.Linear(WIDE, MADE)
    pair = nn.Sequential(nn.Linear(WIDE, MADE), nn.Linear(MADE, WIDE))
    seen = spied(monkeypatch)
    torch.testing.assert_close(products.apply(linear, x), F.linear(x, linear.weight, linear.bias))
    torch.testing.assert_close(products.apply(pair, x), pair(x), rtol=1e-4, atol=1e-4)
    assert len(seen) == 3

    def watched(module: nn.Module, times: int) -> None:
        seen.clear()
        fired.clear()
        assert torch.equal(products.apply(module, x), module(x))
        assert not seen and len(fired) == 2 * times

    hooks: list[Callable[[nn.Module], Any]] = [
        lambda module: module.register_forward_hook(lambda *_: fired.append("after")),
        lambda module: module.register_forward_pre_hook(lambda *_: fired.append("before")),
    ]
    for register in hooks:
        for module in (linear, pair):
            handle = register(module)
            watched(module, 1)
            handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: fired.append("any"))
    watched(linear, 1)
    watched(pair, 3)
    handle.remove()

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            fired.append("own")
            return 2 * super().forward(input)

    watched(Doubled(WIDE, MADE), 1)
    inner = linear.forward

    def forward(given: Tensor) -> Tensor:  # as accelerate's hooks replace it
        fired.append("put there")
        return inner(given)

    linear.forward = forward  # type: ignore[assignment, method-assign]
    watched(linear, 1)
