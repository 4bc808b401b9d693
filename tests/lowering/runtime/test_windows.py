"""Windows of keys: PyTorch's attention in blocks of queries where the kernel is softmax's, else the definition."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

import nestloop as nl
from nestloop import zoo
from tests.equality import equal
from tests.lowering.comparison import random_inputs
from tests.lowering.runtime.calls import TRACES_STATES_OF_VIEWS

B, H, d = 2, 2, 4
LENGTHS = (1, 5, 64, 65, 150)  # blocks are of 64 queries, or of the window


class Attention(nl.Loop):
    """Softmax attention."""

    learner = nl.KernelEstimator
    q, k, v = nl.view("d"), nl.view("d"), nl.view("2*d")

    def kernel(self, q, k):
        return torch.exp(q @ k.T * self.d**-0.5)


class Distances(Attention):
    def kernel(self, q, k):
        return torch.exp(-(q[:, None] - k[None]).square().sum(-1))


def sliding(loop: type[nl.Loop], window: int, **more: Any) -> type[nl.Loop]:
    return type("Window", (loop,), {"schedule": nl.Sliding(window), "__doc__": "A window.", **more})


def drawn(tokens: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    sizes = {"q": d, "k": d, "v": 2 * d}
    return {n: torch.randn(B, H, tokens, size, dtype=dtype, requires_grad=True) for n, size in sizes.items()}


def masked(views: dict[str, torch.Tensor], window: int) -> torch.Tensor:
    place = torch.arange(views["q"].shape[2])
    seen = (place[None] <= place[:, None]) & (place[None] > place[:, None] - window)
    scores = views["q"] @ views["k"].mT * d**-0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ views["v"]


def cut(views: dict[str, torch.Tensor], start: int, stop: int) -> dict[str, torch.Tensor]:
    return {name: view[:, :, start:stop] for name, view in views.items()}


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("window", [1, 3, 64, 70, 200])
def test_queries_attend_to_the_last_keys(window: int, tokens: int):
    torch.manual_seed(0)
    views = drawn(tokens)
    op = nl.compile(sliding(Attention, window), backend="torch")
    z, end = op(views, {})
    equal(z, masked(views, window), [*views.values()])
    assert end["position"] == tokens and set(end) == {"position", *(["k.tail", "v.tail"] if window > 1 else [])}
    if window > 1:
        rows = torch.cat([torch.zeros(B, H, window - 1, d, dtype=torch.float64), views["k"]], 2)[:, :, tokens:]
        torch.testing.assert_close(end["k.tail"], rows, rtol=0, atol=0)


@pytest.mark.parametrize("window", [2, 40, 100])
def test_any_split_is_the_whole_and_so_are_the_gradients(window: int):
    torch.manual_seed(0)
    views = drawn(170)
    op = nl.compile(sliding(Attention, window), backend="torch")
    parts, state = [], None
    for start, stop in pairwise([0, 1, 30, 31, 140, 170]):
        z, state = op(cut(views, start, stop), {}, state)
        parts.append(z)
    whole, end = op(views, {})
    equal(torch.cat(parts, 2), whole, [*views.values()])
    assert state is not None and state["position"] == end["position"]
    torch.testing.assert_close(state["v.tail"], end["v.tail"], rtol=0, atol=0)


@pytest.mark.parametrize("layout", [{}, {"shared": True}, {"group": 2}], ids=str)
def test_it_is_the_reference_from_a_state_too(layout: dict[str, Any]):
    loop = sliding(Attention, 3, k=nl.view("d", **layout))
    inputs = random_inputs(loop.spec, {"d": d, "H": H}, tokens=9)
    made = {}
    for backend in ("reference", "torch"):
        op = nl.compile(loop, backend=backend)
        early, state = op({n: v.narrow(v.ndim - 2, 0, 4) for n, v in inputs.views.items()}, {})
        late, end = op({n: v.narrow(v.ndim - 2, 4, 5) for n, v in inputs.views.items()}, {}, state)
        made[backend] = torch.cat([early.flatten(), late.flatten(), end["k.tail"].flatten(), end["v.tail"].flatten()])
    equal(made["torch"], made["reference"], [*inputs.views.values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype):
    torch.manual_seed(0)
    views = {name: view.detach().to(dtype) for name, view in drawn(100, torch.float32).items()}
    z, end = nl.compile(sliding(Attention, 9), backend="torch")(views, {})
    assert z.dtype == dtype and end["k.tail"].dtype == torch.float32
    wide = masked({name: view.double() for name, view in views.items()}, 9)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(z.double(), wide, rtol=4 * unit, atol=4 * unit)


def test_scores_that_no_exponential_holds():
    torch.manual_seed(0)
    views = {name: view.detach() for name, view in drawn(80, torch.float32).items()}
    views |= {name: 20 * views[name] for name in "qk"}
    z, _ = nl.compile(sliding(Attention, 9), backend="torch")(views, {})
    wide = masked({name: view.double() for name, view in views.items()}, 9)
    torch.testing.assert_close(z.double(), wide, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("loop", [Distances, zoo.Parallax])
def test_other_kernels_and_fits_are_the_definition(loop: type[nl.Loop]):
    window = sliding(loop, 5)
    inputs = random_inputs(window.spec, {"d": d, "H": H}, tokens=70)
    made = [nl.compile(window, backend=backend)(inputs.views, {})[0] for backend in ("reference", "torch")]
    assert torch.equal(*made)


@pytest.mark.skipif(not TRACES_STATES_OF_VIEWS, reason="PyTorch 2.11 does not trace such a state")
def test_one_graph_with_gradients():
    torch.manual_seed(0)
    op = nl.compile(sliding(Attention, 9), backend="torch")

    def step(views: dict[str, torch.Tensor]) -> torch.Tensor:
        first, state = op(cut(views, 0, 100), {})
        return torch.cat([first, op(cut(views, 100, 150), {}, state)[0]], 2)

    views = drawn(150)
    traced = torch.compile(step, backend="aot_eager", fullgraph=True)
    equal(traced(views), masked(views, 9), [*views.values()])


@pytest.mark.parametrize("window", [3, 100])
def test_a_few_graphs_for_every_length(window: int, graphs: Callable[[], int]):
    torch.manual_seed(0)
    layer = nl.Layer(sliding(Attention, window), 8, 2).double()
    traced = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (20, 37, 130, 65, 200, 101, 300, 450, 9):
        x = torch.randn(2, tokens, 8, dtype=torch.float64, requires_grad=True)
        leaves = [x, *layer.parameters()]
        made, wanted = ([y, *torch.autograd.grad(y.square().sum(), leaves)] for y in (traced(x), layer(x)))
        torch.testing.assert_close(made, wanted)
    assert graphs() <= 5  # up to a block, with one more, with several


def test_stages_and_plain_words_say_what_runs():
    window, other = sliding(Attention, 9), sliding(Distances, 9)
    runs = "scaled_dot_product_attention(q, k, v, scale=...) runs, in blocks of queries, each to the last 9 keys"
    assert nl.inspect(window, stage="run") == f"PyTorch's {runs}"
    assert nl.inspect(window, stage="emit") == f"nothing: PyTorch's {runs}"
    assert "the reference runs" in nl.inspect(other, stage="emit")
    told = nl.explain(window)
    assert "carried beside: k.tail" in told
    assert "PyTorch's scaled_dot_product_attention, in blocks of queries, because the kernel is exp(c q k^T)" in told
    assert "runs: the reference" in nl.explain(other)
    layer = nl.Layer(zoo.CausalLaCT, 64, 1)
    assert "in blocks of queries" in nl.explain(layer) and "fit:" in nl.inspect(zoo.Parallax, stage="capture")
