"""Tracing: one graph for every sequence length, and what a body may fix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop import zoo
from nestloop.lowering import capture, lower, ops, pipeline
from nestloop.lowering.runtime.library import NestedLoopOp
from tests.lowering.comparison import assert_equal, compare, differences, random_inputs, run, tokens_at_a_time

LENGTHS = [1, 2, 23, 100]


class Linear(nl.Learner):
    """x W."""

    w = nl.fast("a", "e")

    def forward(self, x):
        return x @ self.w


class Plain(nl.Loop):
    """Squared error, read out with the tokens' own number."""

    learner = Linear
    schedule = nl.FullBatch(2)
    k, q, v = nl.view("a"), nl.view("a"), nl.view("e")

    def loss(self, f, t):
        return (f(t.k) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)


class Normed(Plain):
    """Features normalised over the tokens: the mean depends on n."""

    def readout(self, f, t):
        y = f(t.q)
        return (y - y.mean(0)) / self.n + y.softmax(0)


class Fixed(Plain):
    """A read-out for six tokens only."""

    def readout(self, f, t):
        return f(t.q).reshape(2, 3, self.e).transpose(0, 1).reshape(6, self.e)


SIZES = {"a": 3, "e": 4, "H": 2}


@pytest.mark.parametrize("loop", [Plain, Normed, zoo.MTTTMLPSGD4])
def test_one_lowering_serves_every_length(loop: type[nl.Loop], monkeypatch: pytest.MonkeyPatch):
    sizes = SIZES if issubclass(loop, Plain) else {"d": 3, "D": 6, "H": 2}
    lowered: list[int | None] = []
    stages = pipeline.stages

    def counting(spec, sizes, tokens, losses, carried, **more):
        lowered.append(tokens)
        return stages(spec, sizes, tokens, losses, carried, **more)

    monkeypatch.setattr(pipeline, "stages", counting)
    monkeypatch.setattr(lower, "_PLANS", {})
    monkeypatch.setattr(lower.plans, "read", lambda key: None)
    op, reference = nl.compile(loop), nl.compile(loop, backend="reference")
    for tokens in LENGTHS:
        inputs = random_inputs(loop.spec, sizes, tokens=tokens)
        assert_equal(differences(run(op, inputs), run(reference, inputs)), 1e-10)
    assert lowered == [1, None]  # where there is one token, sizes broadcast


def test_a_body_for_one_length_works_for_it():
    assert_equal(compare(Fixed, random_inputs(Fixed.spec, SIZES, tokens=6)), 1e-12)


def test_a_body_for_one_length_refuses_another():
    inputs = random_inputs(Fixed.spec, SIZES, tokens=8)
    with pytest.raises(nl.NestloopError) as caught:
        nl.compile(Fixed)(inputs.views, inputs.weights)
    message = str(caught.value)
    assert "test_capture.py" in message and "reshape" in message and "Fixed" in message


def test_the_graph_holds_n_as_a_symbol():
    captured = capture.capture(Plain.spec, SIZES, None)
    assert captured.tokens is None and captured.loss is not None
    (result,) = next(n for n in captured.loss.graph.nodes if n.op == "output").args
    assert not isinstance(result.meta["val"].shape[0], int)
    assert capture.capture(Plain.spec, SIZES, 5).tokens == 5


def test_only_admitted_ops_are_left():
    for loop in (zoo.MTTTMLP, zoo.GatedBranch, zoo.LinearAttentionElu):
        captured = capture.capture(loop.spec, {"d": 4, "D": 8, "H": 2}, None)
        for module in (captured.loss, captured.readout):
            assert module is not None
            assert all(ops.admitted(n.target) for n in module.graph.nodes if n.op == "call_function")


@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (3, 2), (1, 6), (4, 4)])
def test_a_grid_loop_takes_its_shape_with_the_call(rows: int, columns: int):
    inputs = random_inputs(
        zoo.DepthwiseBranch.spec,
        {"d": 3, "H": 1, "h": rows, "w": columns},
        heads=1,
        tokens=rows * columns,
        h=rows,
        w=columns,
    )
    assert_equal(compare(zoo.DepthwiseBranch, inputs), 1e-10)


def test_a_grid_is_square_unless_told():
    inputs = random_inputs(zoo.DepthwiseBranch.spec, {"d": 3, "H": 1, "h": 3, "w": 3}, heads=1, tokens=9)
    assert_equal(compare(zoo.DepthwiseBranch, inputs), 1e-10)


FUNCTIONS = {
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "relu": F.relu,
    "relu squared": lambda x: F.relu(x) ** 2,
    "softplus": F.softplus,
    "softplus beta": lambda x: F.softplus(x, beta=2.0, threshold=5.0),
    "elu": F.elu,
    "elu alpha": lambda x: F.elu(x, 0.7),
    "celu": F.celu,
    "selu": F.selu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "leaky relu": F.leaky_relu,
    "logsigmoid": F.logsigmoid,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(-1),
    "log softmax": lambda x: F.log_softmax(x, -1),
    "logsumexp": lambda x: x.logsumexp(-1, keepdim=True) + x,
    "normalize": lambda x: F.normalize(x, dim=-1),
    "layer norm": lambda x: F.layer_norm(x, (x.shape[-1],)),
    "group norm": lambda x: F.group_norm(x, 2),
    "rms norm": lambda x: F.rms_norm(x, (x.shape[-1],), eps=1e-3),
    "norm": lambda x: x / (torch.linalg.norm(x, dim=-1, keepdim=True) + 1),
    "std": lambda x: x / (x.std(-1, keepdim=True) + 1e-3),
    "var": lambda x: x / (x.var(-1, keepdim=True, correction=0) + 1),
    "erf": torch.erf,
    "exp": lambda x: torch.exp(-x.abs()),
    "sin": lambda x: torch.sin(x) * torch.cos(x),
    "clamp": lambda x: x.clamp(-1, 1),
    "maximum": lambda x: torch.maximum(x, -0.3 * x),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "where of numbers": lambda x: torch.where(x > 0, 0.75, 0.125) * x,  # float32 in PyTorch: numbers it has
    "mask": lambda x: x * (x > 0.1),
    "mask of integers": lambda x: x * (x * 3).long().abs(),
    "boolean algebra": lambda x: torch.where((x > 0) & ~(x > 1) | (x < -2), x, x.square()),
    "glu": lambda x: F.glu(torch.cat([x, x + 1], -1)),
    "chunk": lambda x: x.chunk(2, -1)[0].repeat(1, 2),
    "split": lambda x: torch.cat(x.split(4, -1)[::-1], -1),
    "stack": lambda x: torch.stack([x, x.sin()], -1).sum(-1),
    "roll": lambda x: x.roll(1, -1),
    "flip": lambda x: x.flip(-1),
    "einsum": lambda x: torch.einsum("nd,ne->nd", x, x),
    "unflatten": lambda x: x.unflatten(-1, (2, 4)).softmax(-1).flatten(-2),
    "heads inside": lambda x: x.view(-1, 2, 4).transpose(1, 2).flatten(1),
    "pad": lambda x: F.pad(x, (1, 0))[:, :-1],
    "slice with a step": lambda x: torch.cat([x[:, ::2], x[:, 1::2]], -1),
    "causal": lambda x: (x @ x.T).tril() @ x / 8,
    "token mean": lambda x: x - x.mean(0),
    "token softmax": lambda x: x.softmax(0),
    "cumsum": lambda x: x.cumsum(0) / 5,
    "position": lambda x: x + torch.arange(x.shape[-1], device=x.device) / 8,
    "token position": lambda x: x * (torch.arange(x.shape[0], device=x.device)[:, None] + 1) / 8,
    "token count": lambda x: x * x.shape[0] / 4,
    "token count in a root": lambda x: x / x.shape[0] ** 0.5,
    "half the tokens": lambda x: x * (x.shape[0] / 4) / (1 + x.shape[0] // 2),
    "first token": lambda x: x + x[:1],
    "previous token": lambda x: x + F.pad(x, (0, 0, 1, 0))[:-1],
    "tokens reversed": lambda x: x + x.flip(0),
    "a triangle of the tile": lambda x: x.tril(1),
    "convolution over tokens": lambda x: F.conv1d(x.T[None], x.new_full((8, 1, 3), 0.3), padding=1, groups=8)[0].T,
    "mse": lambda x: F.mse_loss(x, torch.zeros_like(x), reduction="none"),
    "huber": lambda x: F.huber_loss(x, torch.zeros_like(x), reduction="none", delta=0.8),
    "smooth l1": lambda x: F.smooth_l1_loss(x, torch.zeros_like(x), reduction="none", beta=0.6),
    "amax": lambda x: x - x.amax(-1, keepdim=True),
    "pow": lambda x: (x.square() + 1) ** 0.3,
    "pow of a number": lambda x: 1.3**x,
    "log": lambda x: (x.square() + 1).log(),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.3),
    "lerp": lambda x: torch.lerp(x, x.sin(), 0.3),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_inside_a_body(name: str, monkeypatch: pytest.MonkeyPatch):
    """PyTorch's functions by name, as an activation: values, losses, every gradient, in tiles unless tokens mix."""
    monkeypatch.setattr(NestedLoopOp, "rows", tokens_at_a_time(2), raising=False)
    function = FUNCTIONS[name]

    class Learner(nl.Learner):
        w = nl.fast("d", "d")
        b = nl.fast("d")

        def forward(self, x):
            return function(x @ self.w + self.b)

    class Activated(nl.Loop):
        learner = Learner
        optimizer = nl.SGD(lr=0.1)
        k, q, v = nl.view("d"), nl.view("d"), nl.view("d")

        def loss(self, f, t):
            return (f(t.k) - t.v).square().sum(-1)

        def readout(self, f, t):
            return f(t.q)

    inputs = random_inputs(Activated.spec, {"d": 8, "H": 2}, tokens=5)
    assert_equal(compare(Activated, inputs), 1e-10)


def test_what_a_body_computes_twice_is_computed_and_differentiated_once():
    class Once(Plain):
        def loss(self, f, t):
            y = f(t.k)
            return (y - t.v).square().sum(-1) + y.abs().sum(-1)

    class Twice(Plain):
        def loss(self, f, t):
            return (f(t.k) - t.v).square().sum(-1) + f(t.k).abs().sum(-1)

    one, two = (nl.inspect(loop, "emit") for loop in (Once, Twice))
    assert one.count("mm(") == two.count("mm(") > 0
    assert one.count("\n") == two.count("\n")
