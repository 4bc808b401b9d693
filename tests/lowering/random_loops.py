"""Learners and loops drawn at random: declared as classes at run time, as a user would declare them in a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import nestloop as nl
from tests.lowering.comparison import Inputs, random_inputs
from tests.lowering.rules import RULES, settings_of

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "relu": F.relu,
    "softplus": F.softplus,
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(-1),
    "leaky relu": F.leaky_relu,
}
NORMS = ("none", "layer norm", "affine layer norm", "rms norm", "l2")
LOSSES = ("dot", "L2", "Huber", "decoder")


@dataclass(frozen=True)
class RandomLoop:
    """What was drawn; `declare` makes the classes, `inputs` the tensors."""

    loss: str
    shuffled: bool
    steps: int
    reduction: str
    layers: int
    activation: str
    last_activation: bool
    glu: bool
    residual: bool
    norm: str
    bias: bool
    layer_norm_decoder: bool
    mean_features: bool
    rate: str
    frozen: str
    readout: str
    key_size: int
    value_size: int
    tokens: int
    sequences: int
    heads: int
    carried: bool
    losses: bool
    order_per_sequence: bool
    rows: int
    seed: int
    momentum: tuple[str, ...] = ()
    decay: str = ""
    transforms: tuple[str, str] = ("", "")
    restore: bool = False
    rule: str = ""

    def declare(self) -> type[nl.Loop]:
        """The loop class."""
        return _declare(self)

    @property
    def sizes(self) -> dict[str, int]:
        return {"a": self.key_size, "e": self.value_size, "D": 7, "H": self.heads}

    def inputs(self, loop: type[nl.Loop]) -> Inputs:
        """Float64 inputs, with rates small enough for the inner loop to stay of order one."""
        small = 0.3 / self.tokens if self.reduction == "sum" else 0.3
        return random_inputs(
            loop.spec,
            self.sizes,
            sequences=self.sequences,
            heads=self.heads,
            tokens=self.tokens,
            carried=self.carried,
            order_per_sequence=self.order_per_sequence,
            scale={"eta": small, "rates": small, "beta": 0.4, "keep": 0.5},
            seed=self.seed,
        )


def random_loops(loss: str, shuffled: bool) -> st.SearchStrategy[RandomLoop]:
    """Every combination for one loss and one schedule."""
    return st.builds(
        RandomLoop,
        loss=st.just(loss),
        shuffled=st.just(shuffled),
        steps=st.integers(1, 4),
        reduction=st.sampled_from(["mean", "sum"]),
        layers=st.integers(1, 3),
        activation=st.sampled_from(sorted(ACTIVATIONS)),
        last_activation=st.booleans(),
        glu=st.booleans(),
        residual=st.booleans(),
        norm=st.sampled_from(NORMS),
        bias=st.booleans(),
        layer_norm_decoder=st.booleans(),
        mean_features=st.booleans(),
        rate=st.sampled_from(["number", "text", "tuple", "learned", "gate", "by weight"]),
        frozen=st.sampled_from(["nothing", "nothing", "first", "last", "biases", "all"]),
        readout=st.sampled_from(["plain", "plain", "residual", "normed", "gated", "query too"]),
        key_size=st.sampled_from([3, 4]),
        value_size=st.sampled_from([4, 5, 2]),
        tokens=st.sampled_from([1, 3, 16, 65, 196]),
        sequences=st.integers(1, 2),
        heads=st.integers(1, 2),
        carried=st.booleans(),
        losses=st.booleans(),
        order_per_sequence=st.booleans(),
        rows=st.sampled_from([1, 7, 50, 10**6]),
        seed=st.integers(0, 2**16),
        momentum=st.sampled_from([(), (), ("number",), ("learned",), ("learned", "number")]),
        decay=st.sampled_from(["", "", "number", "learned"]),
        transforms=st.tuples(*[st.sampled_from(["", "", "", "clip", "joint clip"])] * 2),
        restore=st.sampled_from([False, False, False, True]),
        rule=st.sampled_from(["", "", *RULES]),
    )


def _declare(case: RandomLoop) -> type[nl.Loop]:
    activation = ACTIVATIONS[case.activation]
    width = "a" if case.residual else "2*a"
    bounds = ["a", *[width] * (case.layers - 1), "e"]
    weights: dict[str, Any] = {}

    def fast(name: str, *dims: str, position: str) -> None:
        frozen = case.frozen in (position, "all") or (case.frozen == "biases" and len(dims) == 1)
        weights[name] = nl.fast(*dims, init="zeros", learned=False) if frozen else nl.fast(*dims)

    for index in range(case.layers):
        position = "last" if index == case.layers - 1 else "first" if index == 0 else "middle"
        fast(f"w{index}", bounds[index], bounds[index + 1], position=position)
        if case.glu:
            fast(f"u{index}", bounds[index], bounds[index + 1], position=position)
        if case.bias:
            fast(f"b{index}", bounds[index + 1], position=position)
        if case.norm == "affine layer norm":
            weights[f"scale{index}"] = nl.slow(bounds[index])
            weights[f"shift{index}"] = nl.slow(bounds[index])

    def normed(self, x, index):
        if case.norm == "layer norm":
            return F.layer_norm(x, (x.shape[-1],))
        if case.norm == "affine layer norm":
            scale, shift = getattr(self, f"scale{index}"), getattr(self, f"shift{index}")
            return F.layer_norm(x, (x.shape[-1],), scale, shift, eps=1e-3)
        if case.norm == "rms norm":
            return F.rms_norm(x, (x.shape[-1],), eps=1e-3)
        return F.normalize(x, dim=-1) if case.norm == "l2" else x

    def layer(self, x, index):
        x = self.normed(x, index)
        y = x @ getattr(self, f"w{index}")
        if case.bias:
            y = y + getattr(self, f"b{index}")
        last = index == case.layers - 1
        if case.glu:
            return y * activation(x @ getattr(self, f"u{index}"))
        return activation(y) if not last or case.last_activation else y

    def forward(self, x):
        for index in range(case.layers):
            y = self.layer(x, index)
            x = x + y if case.residual and index < case.layers - 1 else y
        return x

    bodies = {"normed": normed, "layer": layer, "forward": forward}
    learner = type("RandomLearner", (nl.Learner,), {**weights, **bodies})
    fast_weights = [name for name, weight in weights.items() if weight.kind == "fast weight"]
    return type("RandomLoop", (nl.Loop,), {"learner": learner, **_loop_body(case, fast_weights)})


def _optimizer(case: RandomLoop, fast: list[str], body: dict[str, Any]) -> nl.SGD:
    """The optimizer, its slow weights and gates declared in `body`."""
    per_token = 1.0 if case.reduction == "mean" else 1 / case.tokens
    rate: Any = 0.3 * per_token
    if case.rate == "text":
        size = "D" if case.loss == "decoder" else "a"
        rate = f"H/(2*{size})" if case.reduction == "mean" else f"H/(2*N*{size})"
    elif case.rate == "tuple":
        rate = tuple(0.3 * per_token / (1 + i) for i in range(case.steps))
    elif case.rate == "learned":
        rate = body["eta"] = nl.slow()
    elif case.rate == "gate":
        rate = body["eta"] = nl.gate()
    elif case.rate == "by weight":
        body["eta"], body["rates"] = nl.gate(), nl.slow()
        rate = {name: (body["eta"], rate, body["rates"])[index % 3] for index, name in enumerate(fast)}
    coefficients = {"number": 0.6, "": None}
    if "learned" in case.momentum:
        body["beta"] = nl.slow()
    if case.decay == "learned":
        body["keep"] = nl.slow()
    transforms = {"": None, "clip": nl.soft_clip(-1), "joint clip": nl.global_clip(0.5)}
    settings = settings_of(
        case.rule,
        beta=body.get("beta"),
        lr=rate,
        gradient_transform=transforms[case.transforms[0]],
        transform=transforms[case.transforms[1]],
        momentum=tuple(body["beta"] if m == "learned" else coefficients[m] for m in case.momentum) or None,
        decay=body["keep"] if case.decay == "learned" else coefficients[case.decay],
        restore=nl.restore_norm(-1) if case.restore else None,
    )
    return RULES[case.rule](**settings)


def _loop_body(case: RandomLoop, fast: list[str]) -> dict[str, Any]:
    body: dict[str, Any] = {"k": nl.view("a"), "q": nl.view("a"), "v": nl.view("e")}
    body["optimizer"] = _optimizer(case, fast, body)
    schedule = nl.Shuffled if case.shuffled else nl.FullBatch
    body["schedule"] = schedule(case.steps, reduction=case.reduction)
    if case.readout == "gated":
        body["alpha"] = nl.gate()
    if case.loss == "decoder":
        body["x"] = nl.view("D", shared=True)
        body["g"], body["g_bias"] = nl.slow("e", "D"), nl.slow("D", shared=True)
        body["scale"], body["shift"] = nl.slow("D"), nl.slow("D")

    def errors(self, f, t):
        if case.loss == "dot":
            return -(f(t.k) * t.v)
        if case.loss == "L2":
            return 0.5 * (f(t.k) - t.v).square()
        if case.loss == "Huber":
            return F.huber_loss(f(t.k), t.v, reduction="none", delta=0.8)
        decoded = f(t.k) @ self.g + self.g_bias
        if case.layer_norm_decoder:
            decoded = F.layer_norm(decoded, (self.D,), self.scale, self.shift, eps=1e-6)
        return 0.5 * self.H * (decoded - t.x).square()

    def loss(self, f, t):
        per_feature = self.errors(f, t)
        return per_feature.mean(-1) if case.mean_features else per_feature.sum(-1)

    def readout(self, f, t):
        y = f(t.q)
        if case.readout == "residual":
            return t.v + y
        if case.readout == "normed":
            return F.layer_norm(y, (self.e,), eps=1e-3)
        if case.readout == "gated":
            return y * t.alpha[:, None]
        if case.readout == "query too":
            return torch.cat([y, t.q], -1)
        return y

    return {**body, "errors": errors, "loss": loss, "readout": readout}
