"""The reference against loops written out by hand in float64: values, and gradients of everything."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop import zoo
from tests.drawn import draw

B, H, N, d, D = 2, 3, 7, 4, 12


def normal(*shape, scale=0.5):
    return (scale * torch.randn(shape, dtype=torch.float64)).requires_grad_()


def close(one, other, leaves, tolerance=1e-10):
    """Equal values, and equal gradients of a random combination of them."""
    one, other = list(one), list(other)
    weights = [torch.randn_like(value) for value in one]
    grads = [
        torch.autograd.grad(values, leaves, weights, allow_unused=True, retain_graph=True) for values in (one, other)
    ]
    for mine, theirs in [*zip(one, other, strict=True), *zip(*grads, strict=True)]:
        if mine is None or theirs is None:
            assert mine is None or not mine.any()
            assert theirs is None or not theirs.any()
            continue
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Linear(nl.Learner):
    w = nl.fast("d", "d")

    def forward(self, x):
        return x @ self.w


class Squares(nl.Loop):
    learner = Linear
    k, q, v = nl.view("d"), nl.view("d"), nl.view("d")

    def loss(self, f, t):
        return 0.5 * (f(t.k) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)


def squares(**changed):
    return nl.compile(type("Changed", (Squares,), changed), backend="reference")


def inputs(tokens=N):
    views = {name: normal(B, H, tokens, d) for name in "kqv"}
    return views, {"w": normal(H, d, d)}


def gradient(w, k, v):
    """Of 0.5 |k w - v|^2 summed over tokens: [B, H, d, d]."""
    return k.mT @ (k @ w - v)


def test_mttt_linear():
    views = {"k": normal(B, H, N, d), "q": normal(B, H, N, d), "x": normal(B, N, D)}
    weights = {"g": normal(H, d, D), "g_bias": normal(D)}
    op = nl.compile(zoo.MTTTLinear, backend="reference")
    z, state, losses = op(views, weights, return_losses=True)

    x = views["x"][:, None]
    g, bias = weights["g"], weights["g_bias"]
    target = x - bias  # at W = 0 the reconstruction is the bias
    w1 = H / (N * D) * views["k"].mT @ (target @ g.mT)
    before = 0.5 * H * (bias - x).square().mean((-1, -2)).expand(B, H)
    after = 0.5 * H * (views["k"] @ w1 @ g + bias - x).square().mean((-1, -2))
    expected = views["q"] @ w1
    leaves = [*views.values(), *weights.values()]
    close([z, state["w"], losses], [expected, w1, torch.stack([before, after], -1)], leaves)


def test_an_mlp_of_two_steps():
    class Two(zoo.MTTTMLP):
        schedule = nl.FullBatch(steps=2)
        optimizer = nl.SGD(lr=(1.0, 0.3))

    views = {"k": normal(B, H, N, d), "q": normal(B, H, N, d), "x": normal(B, N, D)}
    shapes = {"w1": [d, 4 * d], "w2": [4 * d, d], "b1": [4 * d], "b2": [d], "g": [d, D], "scale": [D], "shift": [D]}
    weights = {name: normal(H, *shape) for name, shape in shapes.items()} | {"g_bias": normal(D)}
    z, state, losses = nl.compile(Two, backend="reference")(views, weights, return_losses=True)

    def mlp(w, x):
        return F.gelu(x @ w["w1"] + w["b1"], approximate="tanh") @ w["w2"] + w["b2"]

    def loss(w, b, h):
        y = mlp(w, views["k"][b, h]) @ weights["g"][h] + weights["g_bias"]
        y = F.layer_norm(y, (D,), weights["scale"][h], weights["shift"][h], eps=1e-6)
        return 0.5 * H * (y - views["x"][b]).square().mean()

    rows: dict[str, list[torch.Tensor]] = {"z": [], "w1": [], "b2": [], "losses": []}
    for b in range(B):
        for h in range(H):
            fast, seen = {n: weights[n][h] for n in ("w1", "w2", "b1", "b2")}, []
            for lr in (1.0, 0.3):
                value = loss(fast, b, h)
                grads = torch.autograd.grad(value, list(fast.values()), create_graph=True)
                fast = {n: w - lr * g for (n, w), g in zip(fast.items(), grads, strict=True)}
                seen.append(value)
            rows["z"].append(mlp(fast, views["q"][b, h]))
            rows["losses"].append(torch.stack([*seen, loss(fast, b, h)]))
            rows["w1"].append(fast["w1"])
            rows["b2"].append(fast["b2"])
    expected = [torch.stack(r).unflatten(0, (B, H)) for r in rows.values()]
    close([z, state["w1"], state["b2"], losses], expected, [*views.values(), *weights.values()])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("tokens, sizes", [(7, [2, 2, 2, 1]), (8, [2, 2, 2, 2]), (3, [1, 1, 1]), (1, [1])])
def test_shuffled_batches(reduction, per_sequence, tokens, sizes):
    views, weights = inputs(tokens)
    order = torch.rand(*([B] if per_sequence else []), H, tokens).argsort(-1)
    op = squares(schedule=nl.Shuffled(4, reduction=reduction), optimizer=nl.SGD(lr=0.1))
    z, state, losses = op(views, weights, order=order, return_losses=True)

    index = (order if per_sequence else order.expand(B, H, tokens))[..., None].expand(B, H, tokens, d)
    k, v = (views[n].gather(2, index) for n in "kv")
    w, seen, start = weights["w"].expand(B, H, d, d), [], 0
    for size in sizes:
        k_i, v_i = k[:, :, start : start + size], v[:, :, start : start + size]
        seen.append(0.5 * (k_i @ w - v_i).square().sum(-1).mean(-1))
        w = w - 0.1 * gradient(w, k_i, v_i) / (size if reduction == "mean" else 1)
        start += size
    seen.append(0.5 * (views["k"] @ w - views["v"]).square().sum(-1).mean(-1))
    close([z, state["w"], losses], [views["q"] @ w, w, torch.stack(seen, -1)], [*views.values(), *weights.values()])


def test_a_gate_is_each_token_s_rate():
    class Gated(Squares):
        eta = nl.gate()
        optimizer = nl.SGD(lr=eta)

    views, weights = inputs()
    views["eta"] = torch.rand(B, H, N, dtype=torch.float64).requires_grad_()
    z, state, losses = nl.compile(Gated, backend="reference")(views, weights, return_losses=True)
    k, v, w0 = views["k"], views["v"], weights["w"]
    w = w0 - (views["eta"][..., None] * k).mT @ (k @ w0 - v) / N
    before, after = (0.5 * (k @ m - v).square().sum(-1).mean(-1) for m in (w0, w))  # losses are not gated
    close([z, state["w"], losses], [views["q"] @ w, w, torch.stack([before, after], -1)], [*views.values(), w0])


def test_a_learned_scalar_rate_per_head_and_shared():
    for shared in (False, True):

        class Learned(Squares):
            eta = nl.slow(init="constant(0.1)", shared=shared)
            optimizer = nl.SGD(lr=eta)
            schedule = nl.FullBatch(2)

        views, weights = inputs()
        weights["eta"] = normal() if shared else normal(H)
        z, state = nl.compile(Learned, backend="reference")(views, weights)
        eta = weights["eta"] if shared else weights["eta"][:, None, None]
        w = weights["w"].expand(B, H, d, d)
        for _ in range(2):
            w = w - eta * gradient(w, views["k"], views["v"]) / N
        close([z, state["w"]], [views["q"] @ w, w], [*views.values(), *weights.values()])


@pytest.mark.parametrize(
    "lr, rates",
    [((0.3, 0.1), (0.3, 0.1)), ("H/(N*d)", (H / (N * d),) * 2), ("1/n**2 + B", (1 / N**2 + B,) * 2), (2, (2, 2))],
)
def test_rates_as_numbers_and_text(lr, rates):
    views, weights = inputs()
    op = squares(optimizer=nl.SGD(lr=lr), schedule=nl.FullBatch(2))
    z, state = op(views, weights)
    w = weights["w"]
    for rate in rates:
        w = w - rate * gradient(w, views["k"], views["v"]) / N
    close([z, state["w"]], [views["q"] @ w, w], [*views.values(), *weights.values()])


def test_text_rates_know_the_batch():
    views, weights = inputs()
    order = torch.arange(N).expand(H, N)
    op = squares(optimizer=nl.SGD(lr="n/N"), schedule=nl.Shuffled(2))
    z, state = op(views, weights, order=order)
    w = weights["w"]
    for start, stop in ((0, 4), (4, 7)):
        part = (views["k"][:, :, start:stop], views["v"][:, :, start:stop])
        w = w - (stop - start) / N * gradient(w, *part) / (stop - start)
    close([z, state["w"]], [views["q"] @ w, w], [*views.values(), *weights.values()])


def test_sum_is_mean_times_tokens():
    views, weights = inputs()
    by_mean = squares(optimizer=nl.SGD(lr=0.1 * N))(views, weights)
    by_sum = squares(optimizer=nl.SGD(lr=0.1), schedule=nl.FullBatch(reduction="sum"))(views, weights)
    close([by_mean[0], by_mean[1]["w"]], [by_sum[0], by_sum[1]["w"]], [*views.values(), *weights.values()])


def test_soft_clip_divides_by_the_norm_plus_one():
    views, weights = inputs()
    z, state = squares(optimizer=nl.SGD(transform=nl.soft_clip(-2)))(views, weights)
    g = gradient(weights["w"], views["k"], views["v"]) / N
    w = weights["w"] - g / (g.norm(dim=-2, keepdim=True) + 1)
    close([z, state["w"]], [views["q"] @ w, w], [*views.values(), *weights.values()])


def test_a_state_is_continued():
    views, weights = inputs()
    op = squares(optimizer=nl.SGD(lr=0.1))
    _, middle = op({n: t[:, :, :4] for n, t in views.items()}, weights)
    z, end = op({n: t[:, :, 4:] for n, t in views.items()}, weights, state=middle)
    w = weights["w"]
    for part in (slice(0, 4), slice(4, 7)):
        k, v = (views[n][:, :, part] for n in "kv")
        w = w - 0.1 * gradient(w, k, v) / k.shape[2]
    close([z, end["w"]], [views["q"][:, :, 4:] @ w, w], [*views.values(), *weights.values()])


def test_frozen_zeros_are_not_passed_but_can_be_carried():
    class Zero(Linear):
        w = nl.fast("d", "d", init="zeros", learned=False)

    views, _ = inputs()
    op = squares(learner=Zero)
    assert not op.spec.weights
    z, state = op(views, {})
    start = {"w": torch.zeros(B, H, d, d, dtype=torch.float64)}
    close([z], [op(views, {}, state=start)[0]], list(views.values()))
    carried = op(views, {}, state=state)[1]["w"]
    w = state["w"] - gradient(state["w"], views["k"], views["v"]) / N
    close([carried], [w], list(views.values()))


@pytest.mark.parametrize("schedule", [nl.FullBatch(2), nl.Shuffled(4)], ids=["full batch", "shuffled"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_tokens_take_no_step(schedule, backend):
    views, weights = inputs(0)
    op = nl.compile(type("Changed", (Squares,), {"schedule": schedule}), backend=backend)
    order = torch.zeros(H, 0, dtype=torch.int64) if schedule.needs_order else None
    z, state, losses = op(views, weights, order=order, return_losses=True)
    assert z.shape == (B, H, 0, d)
    assert torch.equal(state["w"], weights["w"].expand(B, H, d, d))
    assert losses.shape == (B, H, 1) and losses.isnan().all()  # the mean over no tokens
    (grad,) = torch.autograd.grad(state["w"].sum(), weights["w"])
    assert torch.equal(grad, torch.full_like(grad, B))


class Convolved(Squares):
    """Of a grid, whose body takes none without rows."""

    class learner(nl.Learner):
        h, width = nl.grid()
        w = nl.fast("d", 1, 3, 3)

        def forward(self, x):
            image = x.T.reshape(1, self.d, self.h, self.width)
            return F.conv2d(image, self.w, padding=1, groups=self.d).reshape(self.d, -1).T


@pytest.mark.parametrize("dims", [{}, {"h": 4}], ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_grid_of_no_tokens_takes_no_step(backend, dims):
    layer = nl.Layer(Convolved, H * d, H, backend=backend)
    x = torch.randn(B, 0, H * d, requires_grad=True)
    out, losses = layer(x, return_losses=True, **dims)
    assert out.shape == x.shape
    assert losses.shape == (B, H, 1) and losses.isnan().all()
    out.sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    _, state = layer.op(layer.make_views(x), dict(layer.fast), **dims)
    assert torch.equal(state["w"], layer.fast["w"].expand(B, H, d, 1, 3, 3))


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
@pytest.mark.parametrize("loop", [zoo.MTTTLinear, zoo.LinearAttention])
def test_without_tokens_a_weight_that_starts_at_zero_stays_there(loop, backend):
    views, weights = draw(loop.spec, 0)
    z, end = nl.compile(loop, backend=backend)(views, weights)
    assert z.shape == (2, 2, 0, 4) and not end["w"].any()


@pytest.mark.parametrize("schedule", [nl.FullBatch(2), nl.Shuffled(4)], ids=["full batch", "shuffled"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_sequences(schedule, backend):
    views, weights = inputs()
    empty = {name: view[:0] for name, view in views.items()}
    op = nl.compile(type("Changed", (Squares,), {"schedule": schedule}), backend=backend)
    order = torch.rand(H, N).argsort(-1) if schedule.needs_order else None
    z, state, losses = op(empty, weights, order=order, return_losses=True)
    assert z.shape == (0, H, N, d) and state["w"].shape == (0, H, d, d)
    assert losses.shape == (0, H, schedule.steps + 1)
    (grad,) = torch.autograd.grad(z.sum(), weights["w"])
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, backend):
    views, weights = inputs()
    expected, _ = squares()(views, weights)
    low = {name: view.to(dtype) for name, view in views.items()}
    z, state, losses = nl.compile(Squares, backend=backend)(
        low, {n: w.to(torch.promote_types(dtype, torch.float32)) for n, w in weights.items()}, return_losses=True
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (z.dtype, state["w"].dtype, losses.dtype) == (dtype, wide, wide)
    torch.testing.assert_close(z.double(), expected, rtol=0, atol=20 * torch.finfo(dtype).eps)


def test_a_learned_norm_is_differentiated_twice():
    """PyTorch's own layer_norm is not, of a weight for every sequence, under `vmap`."""

    class Normed(Squares):
        class learner(nl.Learner):
            w, g, b = nl.fast("d", "d"), nl.fast("d"), nl.fast("d")

            def forward(self, x):
                return F.layer_norm(x @ self.w, (self.d,), self.g, self.b)

        schedule, optimizer = nl.FullBatch(steps=2), nl.SGD(lr=0.3)

    views = {name: normal(B, H, N, d) for name in ("q", "k", "v")}
    weights = {"w": normal(H, d, d), "g": normal(H, d), "b": normal(H, d)}
    z, _ = nl.compile(Normed, backend="reference")(views, weights)

    def by_hand(sequence, head):
        fast = [weights[name][head] for name in ("w", "g", "b")]
        k, q, v = (views[name][sequence, head] for name in ("k", "q", "v"))
        for _ in range(2):
            loss = 0.5 * (F.layer_norm(k @ fast[0], (d,), *fast[1:]) - v).square().sum(-1).mean()
            fast = [w - 0.3 * g for w, g in zip(fast, torch.autograd.grad(loss, fast, create_graph=True), strict=True)]
        return F.layer_norm(q @ fast[0], (d,), *fast[1:])

    written = torch.stack([torch.stack([by_hand(i, h) for h in range(H)]) for i in range(B)])
    close([z], [written], [*views.values(), *weights.values()])


@pytest.mark.parametrize("function", [F.mse_loss, F.huber_loss, F.smooth_l1_loss])
def test_losses_between_heads_and_the_whole_token(function):
    class Whole(Squares):
        x, g = nl.view("D", shared=True), nl.slow("d", "D")

        def loss(self, f, t):
            return function(f(t.k) @ self.g, t.x, reduction="none").mean(-1)

    class Written(Whole):
        def loss(self, f, t):
            size = (f(t.k) @ self.g - t.x).abs()
            far = size - 0.5 if function is not F.mse_loss else size.square()
            near = 0.5 * size.square() if function is not F.mse_loss else size.square()
            return torch.where(size < 1, near, far).mean(-1)

    views = {name: normal(B, H, N, d) for name in ("q", "k", "v")} | {"x": normal(B, N, D, scale=2)}
    weights = {"w": normal(H, d, d), "g": normal(H, d, D)}
    leaves = [*views.values(), *weights.values()]
    one, other = (nl.compile(loop, backend="reference")(views, weights)[0] for loop in (Whole, Written))
    close([one], [other], leaves)
