"""Bodies drawn at random from the functions of PyTorch that people write: in views, learners, losses and read-outs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import nestloop as nl
from tests.lowering.body_functions import FUNCTIONS, KINDS, LOSSES, fitted
from tests.lowering.comparison import Inputs, random_inputs

LEARNERS = (
    "linear",
    "bias",
    "gated",
    "normed",
    "two norms",
    "low rank",
    "unit rows",
    "mixture",
    "transposed",
    "scaled",
)
SCHEDULES: dict[str, Any] = {
    "full batch": nl.FullBatch(),
    "batches": nl.FullBatch(steps=2, reduction="sum"),
    "shuffled": nl.Shuffled(batches=2),
    "causal": nl.Causal(3),
    "causal before": nl.Causal(2, "before"),
    "online": nl.Online(),
    "online before": nl.Online("before"),
    "chunked": nl.Chunked(3),
    "chunked later": nl.Chunked(3, "apply-update"),
    "program": nl.Program(("update", 0, "N"), ("apply", 0, "N")),
}
RATES = ("number", "gate", "slow", "features")
OPTIMIZERS = ("plain", "plain", "momentum", "decay", "both", "clip", "sign", "Newton-Schulz")


@dataclass(frozen=True)
class RandomBody:
    """What was drawn; `declare` makes the classes, `inputs` the tensors.

    Attributes:
        encode, hidden, decode: names of functions, applied in turn to keys and queries, in the learner between its
            weights, and to what is read.
        key_size, value_size, hidden_size: features of keys, of values, of the learner between its weights.
    """

    learner: str
    encode: tuple[str, ...]
    hidden: tuple[str, ...]
    decode: tuple[str, ...]
    loss: str
    schedule: str
    rate: str
    optimizer: str
    key_size: int
    value_size: int
    hidden_size: int
    tokens: int
    sequences: int
    heads: int
    seed: int

    def declare(self) -> type[nl.Loop]:
        """The loop class."""
        return _declare(self)

    @property
    def sizes(self) -> dict[str, int]:
        return {"a": self.key_size, "e": self.value_size, "m": self.hidden_size, "H": self.heads}

    def inputs(self, loop: type[nl.Loop]) -> Inputs:
        """Float64 inputs, with rates small enough for the inner loop to stay of order one."""
        return random_inputs(
            loop.spec,
            self.sizes,
            sequences=self.sequences,
            heads=self.heads,
            tokens=self.tokens,
            scale={"eta": 0.1},
            seed=self.seed,
        )


def random_bodies() -> st.SearchStrategy[RandomBody]:
    """Every composition."""
    draw = st.sampled_from
    kinds = draw(KINDS)
    function = kinds.flatmap(lambda kind: draw(sorted(kind)))
    some = st.lists(function, max_size=2).map(tuple)
    return st.builds(
        RandomBody,
        learner=draw(LEARNERS),
        encode=some,
        hidden=some,
        decode=some,
        loss=draw(sorted(LOSSES)),
        schedule=draw(tuple(SCHEDULES)),
        rate=draw(RATES),
        optimizer=draw(OPTIMIZERS),
        key_size=draw([1, 3, 4, 5]),
        value_size=draw([2, 4, 5]),
        hidden_size=draw([2, 3, 6]),
        tokens=draw([1, 2, 7, 10, 101]),
        sequences=st.integers(1, 2),
        heads=st.integers(1, 2),
        seed=st.integers(0, 2**16),
    )


def composed(names: tuple[str, ...], x: Tensor, y: Tensor) -> Tensor:
    """Functions applied in turn, each to what there is and to `y` made as wide."""
    for name in names:
        x = FUNCTIONS[name](x, fitted(y, x.shape[-1]))
    return x


def _declare(case: RandomBody) -> type[nl.Loop]:
    shapes: dict[str, tuple[str, ...]] = {"w1": ("a", "m"), "w2": ("m", "e")}
    extra: dict[str, dict[str, tuple[str, ...]]] = {
        "bias": {"b1": ("m",), "b2": ("e",)},
        "gated": {"u1": ("a", "m")},
        "normed": {"g1": ("m",), "b1": ("m",)},
        "two norms": {"g1": ("m",), "b1": ("m",), "g2": ("e",)},
        "low rank": {"r1": ("a", "2"), "r2": ("2", "e")},
        "mixture": {"u1": ("3", "m", "e"), "r1": ("a", "3")},
        "scaled": {"s1": ()},
    }
    weights: dict[str, Any] = {"m": nl.dim(case.hidden_size)}
    for name, dims in {**shapes, **extra.get(case.learner, {})}.items():
        weights[name] = nl.fast(*dims, init="ones") if name.startswith("g") else nl.fast(*dims)

    def forward(self: Any, x: Tensor) -> Tensor:
        w1 = F.normalize(self.w1, dim=0) if case.learner == "unit rows" else self.w1
        h = torch.addmm(self.b1, x, w1) if case.learner == "bias" else x @ w1
        if case.learner in ("normed", "two norms"):
            h = F.layer_norm(h, (self.m,), self.g1, self.b1, eps=1e-2)
        if case.learner == "gated":
            h = F.silu(h) * F.linear(x, self.u1.T)
        if case.learner == "transposed":
            h = torch.tanh(h) @ w1.T @ w1
        h = fitted(composed(case.hidden, h, x), self.m)
        y = F.linear(h, self.w2.T, self.b2) if case.learner == "bias" else torch.matmul(h, self.w2)
        if case.learner == "low rank":
            y = y + x @ self.r1 @ self.r2
        if case.learner == "mixture":
            y = y + torch.einsum("nr,nm,rme->ne", torch.softmax(x @ self.r1, -1), h, self.u1)
        if case.learner == "two norms":
            y = F.rms_norm(y, (self.e,), self.g2, eps=1e-2)
        return y * torch.exp(self.s1) if case.learner == "scaled" else y

    learner: Any = type("RandomLearner", (nl.Learner,), {**weights, "forward": forward})
    return type("RandomBodyLoop", (nl.Loop,), {"learner": learner, **_loop_body(case, tuple(learner.fast))})


def _signs(gradient: Tensor) -> Tensor:
    """Normalised and of bounded size: a sign with a derivative."""
    return torch.tanh(gradient / (gradient.abs().mean() + 0.1))


def _orthogonal(gradient: Tensor) -> Tensor:
    return nl.newton_schulz(((2.0, -1.5, 0.5),) * 2, eps=0.1)(gradient) if gradient.ndim == 2 else gradient


def _loop_body(case: RandomBody, fast: tuple[str, ...]) -> dict[str, Any]:
    schedule = SCHEDULES[case.schedule]
    body: dict[str, Any] = {"k": nl.view("a"), "q": nl.view("a"), "v": nl.view("e")}
    rate: Any = 0.1
    stream = not isinstance(schedule, (nl.FullBatch, nl.Shuffled))
    if case.rate == "gate":
        rate = body["eta"] = nl.gate()
    elif case.rate == "features" and stream:
        body["eta"] = nl.slow("a")
        rate = dict.fromkeys(fast, 0.1) | {"w1": body["eta"]}
    elif case.rate != "number":
        rate = body["eta"] = nl.slow()
    transforms = {"clip": nl.soft_clip(-1), "sign": _signs, "Newton-Schulz": _orthogonal}
    by_token = case.schedule in ("causal", "causal before", "online", "online before")
    body["optimizer"] = nl.SGD(
        lr=rate,
        transform=None if by_token else transforms.get(case.optimizer),
        momentum=0.6 if case.optimizer in ("momentum", "both") and stream else None,
        decay=0.9 if case.optimizer in ("decay", "both") and stream else None,
    )
    body["schedule"] = schedule

    def loss(self: Any, f: Any, t: Any) -> Tensor:
        return LOSSES[case.loss](f(fitted(composed(case.encode, t.k, t.v), self.a)), t.v)

    def readout(self: Any, f: Any, t: Any) -> Tensor:
        y = f(fitted(composed(case.encode, t.q, t.v), self.a))
        return composed(case.decode, y, t.v)

    return {**body, "loss": loss, "readout": readout}
