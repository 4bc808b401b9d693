"""The layer: its parameters, its copies, its orders, its dims, and what it computes from them."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop import zoo
from nestloop.errors import OrderError, UnresolvedDimError
from nestloop.layer.branch import Passing

B, N, D, H = 2, 8, 12, 3
d = D // H


class Linear(nl.Learner):
    w = nl.fast("d", "d")

    def forward(self, x):
        return x @ self.w


class Steps(nl.Loop):
    """Shuffled steps, one rate per token, a slow weight of every kind."""

    learner = Linear
    k, q = nl.view("d", bias=True), nl.view("d")
    v = nl.view("d", shared=True)
    eta = nl.gate()
    g, bias = nl.slow("d", "d", init="eye"), nl.slow("d", shared=True, init="zeros")
    optimizer = nl.SGD(lr=eta)
    schedule = nl.Shuffled(4)

    def loss(self, f, t):
        return (f(t.k) @ self.g + self.bias - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)


class Sized(nl.Loop):
    """Two dims of its own: r has a size unless told otherwise, e has not."""

    learner = Linear
    k, q = nl.view("d"), nl.view("d")
    r, e = nl.dim(3), nl.dim()
    a, b = nl.slow("d", "r"), nl.slow("r", "e")

    def loss(self, f, t):
        return (f(t.k) @ self.a @ self.b).square().sum(-1)

    def readout(self, f, t):
        return f(t.q) @ self.a @ self.b


class OneHead(Steps):
    """However many heads the layer has, this one has its own number."""

    heads = 1


@pytest.fixture(scope="module")
def steps():
    torch.manual_seed(0)
    return nl.Layer(Steps, D, H)


@pytest.fixture(scope="module")
def vit3():
    torch.manual_seed(0)
    return nl.Layer(zoo.ViT3, D, H)


def shapes(layer):
    return {name: list(t.shape) for name, t in layer.state_dict().items()}


def test_parameters_of_one_loop(steps):
    assert shapes(steps) == {
        "fast.w": [H, d, d],
        "slow.g": [H, d, d],
        "slow.bias": [d],
        "views.k.weight": [D, D],
        "views.k.bias": [D],
        "views.q.weight": [D, D],
        "views.v.weight": [d, D],
        "views.eta.weight": [H, D],
        "views.eta.bias": [H],
        "out.weight": [D, D],
        "out.bias": [D],
    }
    assert all(p.requires_grad for p in steps.parameters())
    assert torch.equal(steps.slow["g"], torch.eye(d).expand(H, d, d))


def test_parameters_of_several_loops(vit3):
    assert shapes(vit3) == {
        "branches.0.fast.w1": [H, d, d],
        "branches.0.fast.w2": [H, d, d],
        "branches.1.fast.w3": [1, d, 1, 3, 3],
        **{f"branches.0.views.{name}.weight": [D, D] for name in "kqv"},
        **{f"branches.0.views.{name}.bias": [D] for name in "kqv"},
        **{f"branches.1.views.{name}.weight": [d, D] for name in "kqv"},
        **{f"branches.1.views.{name}.bias": [d] for name in "kqv"},
        "out.weight": [D, D + d],
        "out.bias": [D],
    }


def test_the_token_itself_is_not_projected_and_frozen_zeros_are_not_parameters():
    layer = nl.Layer(zoo.MTTTLinear, D, H, bias=False)
    assert shapes(layer) == {
        "slow.g": [H, d, D],
        "slow.g_bias": [D],
        "views.k.weight": [D, D],
        "views.k.bias": [D],
        "views.q.weight": [D, D],
        "views.q.bias": [D],
        "out.weight": [D, D],
    }


def test_a_frozen_start_is_kept_and_not_learned():
    class Frozen(Linear):
        w = nl.fast("d", "d", init="eye", learned=False)

    class Loop(Steps):
        learner = Frozen

    layer = nl.Layer(Loop, D, H, backend="reference")
    assert "fast.w" in layer.state_dict() and not layer.fast["w"].requires_grad
    layer(torch.randn(B, N, D)).sum().backward()
    assert layer.fast["w"].grad is None and layer.slow["g"].grad is not None


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_what_it_computes(backend):
    torch.manual_seed(1)
    layer = nl.Layer(Steps, D, H, backend=backend).double()
    x = torch.randn(B, N, D, dtype=torch.float64, requires_grad=True)
    order = torch.rand(H, N).argsort(-1)
    out, losses = layer(x, order=order, return_losses=True)

    own = dict(layer.named_parameters())

    def linear(name):
        return F.linear(x, own[f"views.{name}.weight"], own.get(f"views.{name}.bias"))

    k, q = (linear(name).unflatten(-1, (H, d)).transpose(1, 2) for name in ("k", "q"))  # rows are head-major
    v, eta = linear("v"), torch.sigmoid(linear("eta")).transpose(1, 2)
    g, bias, w = layer.slow["g"], layer.slow["bias"], layer.fast["w"].expand(B, H, d, d)
    expected_losses = []
    target = v[:, None].expand(B, H, N, d)
    for index in order.split(N // 4, -1):
        at = index[None, :, :, None].expand(B, H, -1, d)
        k_i, v_i, eta_i = k.gather(2, at), target.gather(2, at), eta.gather(2, at[..., 0])
        error = k_i @ w @ g + bias - v_i
        expected_losses.append(error.square().sum(-1).mean(-1))
        w = w - k_i.mT @ (2 * eta_i[..., None] * error @ g.mT) / (N // 4)
    expected_losses.append((k @ w @ g + bias - target).square().sum(-1).mean(-1))
    expected = layer.out((q @ w).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(losses, torch.stack(expected_losses, -1), rtol=1e-10, atol=1e-10)
    leaves = [x, *layer.parameters()]
    mine, theirs = (torch.autograd.grad(z.square().sum(), leaves, retain_graph=True) for z in (out, expected))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_copies_compute_the_same(steps):
    x = torch.randn(B, N, D)
    order = steps.eval().order(N, x.device)
    expected = steps(x, order=order)
    stored = io.BytesIO()
    torch.save(steps.state_dict(), stored)
    stored.seek(0)
    loaded = nl.Layer(Steps, D, H)
    assert not torch.equal(loaded(x, order=order), expected)
    loaded.load_state_dict(torch.load(stored))
    for twin in (loaded, copy.deepcopy(steps), pickle.loads(pickle.dumps(steps))):
        assert torch.equal(twin(x, order=order), expected)
    deep = copy.deepcopy(steps)
    with torch.no_grad():
        deep.fast["w"].add_(1)  # a copy's weights are its own
    assert torch.equal(steps(x, order=order), expected)


def test_orders(steps):
    device = torch.device("cpu")
    steps.eval()
    fixed = steps.order(N, device)
    assert fixed is not None and fixed.shape == (H, N) and torch.equal(fixed, steps.order(N, device))
    assert torch.equal(fixed, copy.deepcopy(steps).order(N, device))
    steps.train()
    torch.manual_seed(3)
    first, second = steps.order(N, device), steps.order(N, device)
    assert first is not None and second is not None
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(steps.order(N, device), first)
    for order in (fixed, first):
        assert torch.equal(order.sort(-1).values, torch.arange(N).expand(H, N))
        assert not torch.equal(order[0], order[1])  # each head has its own


def test_the_fixed_order_spreads_tokens_over_batches(steps):
    length = 196
    order = steps.eval().order(length, torch.device("cpu"))
    means = order.unflatten(-1, (4, -1)).double().mean(-1)  # every batch sees the whole sequence
    assert (means - (length - 1) / 2).abs().max() < length / 8
    assert len({tuple(row) for row in order.tolist()}) == H


def test_when_an_order_is_drawn(steps):
    x = torch.randn(B, N, D)
    steps.train()
    torch.manual_seed(0)
    drawn = [steps(x), steps(x)]
    torch.manual_seed(0)
    orders = [steps.order(N, x.device), steps.order(N, x.device)]
    assert not torch.equal(*drawn)
    for out, order in zip(drawn, orders, strict=True):
        assert torch.equal(out, steps(x, order=order))
        assert torch.equal(out, steps.eval()(x, order=order))
    assert torch.equal(steps(x), steps(x))
    assert torch.equal(steps(x), steps(x, order=steps.order(N, x.device)))
    state = torch.get_rng_state()
    steps(x)
    assert torch.equal(torch.get_rng_state(), state)  # evaluation leaves the generator alone
    with pytest.raises(OrderError):
        steps(x, order=orders[0][:, :-1])


def test_an_order_per_sequence(steps):
    x = torch.randn(B, N, D)
    order = torch.rand(B, H, N).argsort(-1)
    together = steps(x, order=order)
    for b in range(B):
        torch.testing.assert_close(together[b : b + 1], steps(x[b : b + 1], order=order[b]))


def test_losses(vit3, steps):
    x = torch.randn(B, N, D)
    out, losses = steps.eval()(x, return_losses=True)
    assert losses.shape == (B, H, 5) and torch.equal(out, steps(x))
    out, losses = vit3(torch.randn(B, 9, D), return_losses=True)
    assert [part.shape for part in losses] == [(B, H, 2), (B, 1, 2)]
    out, losses = nl.Layer(zoo.SelfAttention, D, H)(x, return_losses=True)
    assert losses is None and out.shape == x.shape


def test_branches_are_concatenated_before_one_projection(vit3):
    x = torch.randn(B, 9, D)
    parts = [part.mix(x, Passing(None, False, {}), None)[0] for part in vit3.branches]
    assert [part.shape[-1] for part in parts] == [D, d]
    assert torch.equal(vit3(x), vit3.out(torch.cat(parts, -1)))


def test_grids(vit3):
    x = torch.randn(B, 12, D)
    wide, tall = vit3(x, h=3, w=4), vit3(x, h=4)
    assert torch.equal(wide, vit3(x, w=4)) and torch.equal(tall, vit3(x, h=4, w=3))
    assert not torch.allclose(wide, tall)
    square = torch.randn(B, 16, D)
    assert torch.equal(vit3(square), vit3(square, h=4, w=4))
    image = x.unflatten(1, (3, 4))  # a convolution knows rows from columns, nothing else
    turned = vit3(image.transpose(1, 2).flatten(1, 2), h=4, w=3)
    with torch.no_grad():
        vit3.branches[1].fast["w3"].copy_(vit3.branches[1].fast["w3"].mT.clone())
    torch.testing.assert_close(turned.unflatten(1, (4, 3)).transpose(1, 2).flatten(1, 2), vit3(x, h=3, w=4))
    with pytest.raises(UnresolvedDimError):
        vit3(x)


def test_strides_do_not_matter(steps):
    steps.eval()
    x = torch.randn(D, N, B).permute(2, 1, 0)
    assert not x.is_contiguous()
    torch.testing.assert_close(steps(x), steps(x.contiguous()))
    step = torch.randn(B, 2 * N, D)[:, ::2]
    torch.testing.assert_close(steps(step), steps(step.contiguous()))
    torch.testing.assert_close(steps(x[:1].expand(B, N, D)), steps(x[:1]).expand(B, N, D))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precisions(steps, dtype):
    torch.manual_seed(0)
    x = 0.3 * torch.randn(B, N, D)
    expected = steps.eval()(x)
    layer = copy.deepcopy(steps).to(dtype)
    given = x.to(dtype).requires_grad_()
    out = layer(given)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=max(1e-5, 4 * torch.finfo(dtype).eps))
    out.sum().backward()
    assert given.grad is not None and given.grad.dtype == dtype and given.grad.isfinite().all()


def test_autocast_keeps_the_fast_weights_wide(steps):
    torch.manual_seed(0)
    x = 0.3 * torch.randn(B, N, D)
    expected = steps.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        out, losses = steps(x, return_losses=True)
    assert out.dtype == torch.bfloat16 and losses.dtype == torch.float32
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.03)


def test_dims_of_a_loop():
    layer = nl.Layer(Sized, D, H, e=5)
    assert {n: list(p.shape) for n, p in layer.slow.items()} == {"a": [H, d, 3], "b": [H, 3, 5]}
    assert list(layer.out.weight.shape) == [D, H * 5] and layer(torch.randn(B, N, D)).shape == (B, N, D)
    assert list(nl.Layer(Sized, D, H, e=5, r=2, backend="reference").slow["a"].shape) == [H, d, 2]
    with pytest.raises(UnresolvedDimError) as caught:
        nl.Layer(Sized, D, H)
    where = Sized.spec.slow["b"].where
    assert str(caught.value) == (
        "The dim 'e' has no size.\n"
        f"  at:    {where}   {where.text}\n"
        "  given: 'e' with sizes for D, H, d, r\n"
        "  need:  a size for e\n"
        "  fix:   pass e=... where the loop is compiled or the layer is made"
    )


def test_dims_of_views_are_as_large_as_d():
    layer, wide = nl.Layer(zoo.GLA, 12, 3), nl.Layer(zoo.GLA, 12, 3, dv=5)
    assert shapes(layer)["views.k.weight"] == shapes(layer)["views.v.weight"] == [12, 12]
    assert shapes(wide)["views.k.weight"] == [12, 12] and shapes(wide)["views.v.weight"] == [15, 12]


@pytest.mark.parametrize("loop", zoo.loops(), ids=lambda loop: loop.__name__)
def test_every_loop_of_the_zoo_is_a_layer(loop):
    width = 64 if loop.__name__.startswith("CausalLaCT") else 16  # beside heads of 64
    layer, x = nl.Layer(loop, width, 2, backend="reference"), torch.randn(1, 4, width)
    assert layer(x).shape == x.shape


def test_a_head_size_of_its_own():
    layer = nl.Layer(zoo.SelfAttention, 10, 3, d=7)
    assert shapes(layer)["views.k.weight"] == [21, 10] and shapes(layer)["out.weight"] == [10, 21]
    assert layer(torch.randn(B, N, 10)).shape == (B, N, 10)


def test_heads_fixed_by_a_loop():
    layer = nl.Layer(OneHead, D, H)
    assert shapes(layer)["fast.w"] == [1, d, d] and shapes(layer)["views.k.weight"] == [d, D]
    assert shapes(layer)["out.weight"] == [D, d]
    out, losses = layer(torch.randn(B, N, D), return_losses=True)
    assert out.shape == (B, N, D) and losses.shape == (B, 1, 5)


def test_views_start_at_unit_scale():
    torch.manual_seed(0)
    layer = nl.Layer(zoo.SelfAttention, 192, 3, backend="reference")
    state = layer.state_dict()
    for name in "kqv":
        assert state[f"views.{name}.weight"].std().item() == pytest.approx(1 / math.sqrt(192), rel=0.05)
        assert not state[f"views.{name}.bias"].any()
    assert not state["out.bias"].any()


def test_a_layer_is_made_where_and_in_what_it_is_asked_for():
    torch.manual_seed(0)
    made = nl.Layer(zoo.MTTTMLP, 16, 2, dtype=torch.float64)
    torch.manual_seed(0)
    like = nl.Layer(zoo.MTTTMLP, 16, 2).double()
    for (name, a), b in zip(made.named_parameters(), like.parameters(), strict=True):
        assert a.dtype == torch.float64 and torch.equal(a, b), name
    assert all(p.is_meta for p in nl.Layer(zoo.MTTTMLP, 16, 2, device="meta").parameters())


@pytest.mark.parametrize("loop", [zoo.MTTTMLP, zoo.TTTLinear], ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_tokens_give_every_parameter_a_gradient_of_zeros(loop, backend):
    layer = nl.Layer(loop, 16, 2, backend=backend)
    x = torch.randn(2, 0, 16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    for name, parameter in layer.named_parameters():
        assert not parameter.requires_grad or (parameter.grad is not None and not parameter.grad.any()), name
