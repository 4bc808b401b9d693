"""Optimizers that are declared: what they mean, against PyTorch's own and against steps written out by hand."""

from __future__ import annotations

import pytest
import torch

import nestloop as nl

H, N, d = 2, 12, 4
BACKENDS = ("reference", "torch", "cpp")
pytestmark = pytest.mark.usefixtures("quick_builds")


class MLP(nl.Learner):
    a, b = nl.fast("d", "2*d"), nl.fast("2*d", "d")

    def forward(self, x):
        return torch.tanh(x @ self.a) @ self.b


class Recall(nl.Loop):
    """What every loop here is, but for its optimizer and schedule."""

    learner = MLP
    q, k, v = nl.view("d"), nl.view("d"), nl.view("d")

    def loss(self, f, t):
        return (f(t.k) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)


class Nesterov(nl.Optimizer):
    """A momentum that is looked ahead with."""

    m, steps = nl.moment(), nl.moment(scalar=True)
    beta = nl.coefficient(0.9)
    gain = 2.0

    def update(self, w, g, s):
        m = s.beta * s.m + g
        return self.gain * (g + s.beta * m) / (s.steps + 1), {"m": m, "steps": s.steps + 1}


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def declared(optimizer: nl.SGD, schedule, **parts) -> type[nl.Loop]:
    return type("Changed", (Recall,), {"optimizer": optimizer, "schedule": schedule, **parts})


def inputs() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    return {name: normal(1, H, N, d) for name in "qkv"}, {"a": normal(H, d, 2 * d), "b": normal(H, 2 * d, d)}


def losses(a: torch.Tensor, b: torch.Tensor, views: dict[str, torch.Tensor], head: int) -> torch.Tensor:
    k, v = (views[name][0, head] for name in "kv")
    return (torch.tanh(k @ a) @ b - v).square().sum(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)], ids=["usual", "no momentum"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_is_pytorchs(backend: str, betas: tuple[float, float], weight_decay: float):
    decay = {"decay": 1 - 0.05 * weight_decay} if weight_decay else {}
    loop = declared(nl.Adam(lr=0.05, betas=betas, **decay), nl.FullBatch(4))
    views, weights = inputs()
    z, state = nl.compile(loop, backend=backend)(views, weights)
    for head in range(H):
        a, b = (weights[name][head].detach().clone().requires_grad_() for name in "ab")
        adam = torch.optim.AdamW([a, b], lr=0.05, betas=betas, weight_decay=weight_decay)
        for _ in range(4):
            adam.zero_grad()
            losses(a, b, views, head).mean().backward()
            adam.step()
        close(state["a"][0, head], a, 1e-9)  # eps_root moves it by about 1e-16 / v
        close(z[0, head], torch.tanh(views["q"][0, head] @ a) @ b, 1e-9)


def by_hand(views, weights, beta, chunks) -> torch.Tensor:
    """Every token read out after its chunk's step, or after all of them where there are as many as in `chunks`."""
    made = []
    for head in range(H):
        w = {name: weights[name][head] for name in "ab"}
        m, read = {name: torch.zeros_like(one) for name, one in w.items()}, []
        for step, (tokens, weight) in enumerate(chunks):
            seen = {name: view[:, :, tokens] for name, view in views.items()}
            total = weight * losses(w["a"], w["b"], seen, head).sum()
            g = dict(zip(w, torch.autograd.grad(total, list(w.values()), create_graph=True), strict=True))
            m = {name: beta(head, tokens) * m[name] + g[name] for name in w}
            w = {name: w[name] - 0.02 * 2 * (g[name] + beta(head, tokens) * m[name]) / (step + 1) for name in w}
            read.append((tokens, dict(w)))
        if read[0][0] == slice(0, N):
            read = read[-1:]
        rows = [torch.tanh(views["q"][0, head, tokens] @ w["a"]) @ w["b"] for tokens, w in read]
        made.append(torch.cat(rows))
    return torch.stack(made)[None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["number", "learned", "gate"])
def test_a_declared_one_is_its_steps_by_hand_and_so_are_its_gradients(backend: str, kind: str):
    """Moments, a count of steps, and a coefficient that is a number, learned, or read from a chunk's tokens."""
    views, weights = inputs()
    parts, chunks = {}, [(slice(0, N), 1 / N)] * 3
    schedule = nl.FullBatch(3)
    generator = torch.Generator().manual_seed(1)
    rate = torch.rand(1, H, N, generator=generator, dtype=torch.float64).requires_grad_()
    if kind == "learned":
        parts["theta"] = nl.slow()
        weights["theta"] = rate[0, :, 0].detach().requires_grad_()
    elif kind == "gate":
        parts["theta"], schedule = nl.gate(), nl.Chunked(5, "update-apply")
        chunks = [(slice(start, min(start + 5, N)), 1.0) for start in range(0, N, 5)]

    def beta(head: int, tokens: slice):
        return {
            "number": lambda: 0.9,
            "learned": lambda: weights["theta"][head],
            "gate": lambda: rate[0, head, tokens].mean(),
        }[kind]()

    loop = declared(Nesterov(0.02, **({"beta": parts["theta"]} if parts else {})), schedule, **parts)
    given = {**views, "theta": rate} if kind == "gate" else views
    leaves = [*given.values(), *weights.values()]
    z, _ = nl.compile(loop, backend=backend)(given, weights)
    wanted = by_hand(views, weights, beta, chunks)
    close(z, wanted, 1e-10)
    cotangent = torch.randn(z.shape, generator=generator, dtype=torch.float64)
    for found, right in zip(
        torch.autograd.grad((z * cotangent).sum(), leaves),
        torch.autograd.grad((wanted * cotangent).sum(), leaves),
        strict=True,
    ):
        close(found, right, 1e-10)


def test_moments_are_in_the_state_of_a_stream_and_so_are_its_splits():
    loop = declared(Nesterov(0.02), nl.Chunked(5, "apply-update"))
    views, weights = inputs()
    op = nl.compile(loop)
    whole, end = op(views, weights)
    assert {"a.m", "a.steps", "b.m", "b.steps"} < set(end)
    assert list(end["a.m"].shape) == [1, H, d, 2 * d] and list(end["a.steps"].shape) == [1, H]
    assert end["a.steps"].tolist() == [[2.0, 2.0]]  # of 12 tokens, two whole chunks
    state, read = None, []
    for t in range(N):
        z, state = op({name: view[:, :, t : t + 1] for name, view in views.items()}, weights, state)
        read.append(z)
    close(torch.cat(read, 2), whole, 1e-12)


def test_numbers_of_the_class_are_given_where_it_is_made():
    class Slower(Nesterov):
        gain, lr = 0.5, 0.3

    assert Slower().gain == 0.5 and Slower().lr == 0.3
    assert Slower(0.1, gain=4.0).gain == 4.0 and Slower(0.1).lr == 0.1
    assert nl.Adam().lr == 1e-3 and nl.Adam(0.1).lr == 0.1 and nl.Adam(betas=(0.5, 0.9)).betas == (0.5, 0.9)
    assert nl.Adam(0.1) == nl.Adam(0.1) and nl.Adam(0.1) != nl.Adam(0.1, eps=1e-3)
    assert Nesterov(0.1, beta=0.5) != Nesterov(0.1)
    assert repr(Nesterov(0.1, gain=4.0)) == "Nesterov(lr=0.1, beta=0.9, gain=4.0)"
    assert repr(nl.Adam(decay=0.5)) == "Adam(lr=0.001, betas=(0.9, 0.999), eps=1e-08, eps_root=1e-16, decay=0.5)"


def test_what_is_generated_follows_the_update(tmp_path, monkeypatch):
    """A kept plan is of the very update, and of the numbers that it reads."""
    monkeypatch.setenv("NESTLOOP_CACHE", str(tmp_path))
    views, weights = inputs()
    found = set()
    for gain in (1.0, 2.0):
        for rule in (Nesterov(0.02, gain=gain), type("Nesterov", (Nesterov,), {"gain": gain, "beta": 0.4})(0.02)):
            loop = declared(rule, nl.FullBatch(2))
            z, _ = nl.compile(loop)(views, weights)
            close(z, nl.compile(loop, backend="reference")(views, weights)[0], 1e-10)
            found.add(round(z.sum().item(), 9))
    assert len(found) == 4


def test_explain_says_what_it_keeps():
    text = nl.explain(declared(Nesterov(0.02, beta=0.4), nl.Chunked(5, "apply-update")))
    assert "Nesterov, learning rate 0.02, beta 0.4, gain 2.0" in text
    assert "carried beside: a.m, m of Nesterov" in text and "carried beside: a.steps, steps of Nesterov" in text
    assert "moments are zero before the first step of a call" in nl.explain(declared(nl.Adam(0.1), nl.FullBatch(2)))


class FirstOrder(nl.Optimizer):
    """Steps through which nothing flows back."""

    def update(self, w, g, s):
        return g.detach()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_an_update_detaches_has_no_outer_gradient(backend: str):
    loop = declared(FirstOrder(0.02), nl.FullBatch(2))
    views, weights = inputs()
    z, state = nl.compile(loop, backend=backend)(views, weights)
    close(z, nl.compile(declared(nl.SGD(0.02), nl.FullBatch(2)))(views, weights)[0], 1e-12)
    k, v, q, a = torch.autograd.grad(z.sum(), [views["k"], views["v"], views["q"], weights["a"]], allow_unused=True)
    assert not any(gradient is not None and gradient.any() for gradient in (k, v))
    ends = {name: state[name].detach().requires_grad_() for name in "ab"}
    read = torch.tanh(views["q"] @ ends["a"]) @ ends["b"]
    for found, wanted in zip((q, a), torch.autograd.grad(read.sum(), [views["q"], ends["a"]]), strict=True):
        close(found, wanted.sum(0) if wanted.ndim > found.ndim else wanted, 1e-12)


def gradients_of(loop: type[nl.Loop]) -> list[str]:
    """What `explain` says of outer gradients."""
    text = nl.explain(loop).partition("outer gradients reach, ")[2].partition("\n\n")[0]
    return [line.strip() for line in text.splitlines()]


def test_explain_says_where_outer_gradients_do_not_flow():
    assert gradients_of(declared(FirstOrder(0.1), nl.FullBatch(2))) == [
        "what bodies and the optimizer detach aside:",
        "q: through the readout",
        "k: no path, its gradient is zero",
        "v: no path, its gradient is zero",
        "a: through the update, readout",
        "b: through the update, readout",
    ]
    program = nl.Program(("update", 0, "N"), ("apply", 0, "N"))
    assert gradients_of(declared(nl.SGD(0.1), program)) == [
        "nothing detached, through the inner gradients (second order):",
        "q: through the read",
        "k: through the update",
        "v: through the update",
        "a: through the update, read",
        "b: through the update, read",
    ]
