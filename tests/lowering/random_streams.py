"""Streams drawn at random: learner, loss, optimizer, schedule and read-out, declared as classes at run time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import nestloop as nl
from nestloop.lang import coefficient
from nestloop.lang.declare import Slow
from tests.lowering.comparison import Inputs, random_inputs
from tests.lowering.rules import RULES, settings_of

FAMILIES = ("causal", "online", "chunked", "program")
SQUARE = ("residual", "residual MLP", "transposed")  # learners whose outputs are as wide as their inputs
LEARNERS = ("linear", "biased", "MLP", "SwiGLU", "layer norm", "gain", "scalar", *SQUARE)
NOT_AFFINE = ("normalised weights", "product of weights")
LOSSES = ("dot", "L2", "squares", "Huber", "Huber at a gate", "decoder", "held key")
READOUTS = ("plain", "residual", "normed", "ratio", "skip", "twice", "reads a weight")
COEFFICIENTS = ("number", "text", "slow", "gate", "channel gate", "channel slow", "column gate", "by weight")
LENGTHS = (1, 7, 15, 16, 17)
LONG = (63, 65, 196)


@dataclass(frozen=True)
class RandomStream:
    """What was drawn; `declare` makes the classes, `inputs` the tensors.

    Attributes:
        schedule: the schedule, as its class takes it.
        lr, scale, decay, momentum: which kind of coefficient each is, from COEFFICIENTS; "" for none.
        log_decay: whether the decay is given by its logarithm.
        transforms: of "clip", "joint clip", "Newton-Schulz": the gradient's, then the momentum's; "" for none.
        rule: which optimizer, from RULES.
        beta: which kind of coefficient the one is that it declares, where it declares one.
        zero: whether the first fast weight starts from exact zero.
        grouped: whether both heads see the same keys and queries.
    """

    learner: str
    loss: str
    readout: str
    schedule: Any
    lr: str
    scale: str = ""
    decay: str = ""
    log_decay: bool = False
    decay_order: str = "after"
    momentum: tuple[str, ...] = ()
    window: int | None = None
    transforms: tuple[str, str] = ("", "")
    restore: bool = False
    zero: bool = False
    grouped: bool = False
    rule: str = ""
    beta: str = "number"

    @property
    def sizes(self) -> dict[str, int]:
        return {"a": 3, "e": 4, "m": 6, "D": 5, "H": 2}

    @property
    def micro(self) -> int:
        return getattr(self.schedule, "micro", 1)

    @property
    def period(self) -> int:
        """Tokens between the places where a sequence may be cut; 0 where it may not."""
        match self.schedule:
            case nl.Program():
                return 0
            case nl.Chunked(order="update-apply"):
                return self.schedule.size
        return 1

    @property
    def output(self) -> str:
        """The size of the learner's output, as text."""
        return "a" if self.learner in SQUARE else "e"

    def declare(self) -> type[nl.Loop]:
        """The loop class."""
        return _declare(self)

    def inputs(self, loop: type[nl.Loop], tokens: int, sequences: int = 2, seed: int = 0) -> Inputs:
        """Float64 inputs, with rates and keys small enough for the inner loop to stay of order one."""
        small = 0.1 if isinstance(self.schedule, (nl.Causal, nl.Online)) else 0.05
        scale = {"k": 0.7, "v": 0.7, "lr_gate": small, "lr_channel": small}
        given = random_inputs(
            loop.spec, self.sizes, sequences=sequences, heads=2, tokens=tokens, scale=scale, seed=seed
        )
        rates = {part.name for part in coefficient.parts(loop.spec.optimizer.lr) if isinstance(part, Slow)}
        for part in loop.spec.optimizer.coefficients():
            if isinstance(part, Slow):  # a rate or a decay, not a weight: in (0, 1)
                value = given.weights[part.name].detach().sigmoid()
                value = value.log() if self.log_decay and part.name.startswith("decay") else value
                given.weights[part.name] = (value * (small if part.name in rates else 1.0)).requires_grad_()
        return given


def random_streams(family: str) -> st.SearchStrategy[RandomStream]:
    """Every legal combination for one kind of schedule."""
    draw = st.sampled_from
    some = draw(["", "", *COEFFICIENTS])
    parts: dict[str, Any] = {
        "learner": draw([*LEARNERS, *NOT_AFFINE]),
        "loss": draw(LOSSES),
        "readout": draw(["plain", *READOUTS]),
        "lr": draw(COEFFICIENTS),
        "scale": draw(["", "", "number", "slow", "gate"]),
        "decay": some,
        "log_decay": st.booleans(),
        "decay_order": draw(["after", "before"]),
        "momentum": st.lists(draw(COEFFICIENTS), max_size=2).map(tuple),
        "transforms": st.tuples(*[draw(["", "", "clip", "joint clip", "Newton-Schulz"])] * 2),
        "restore": st.booleans(),
        "window": draw([None, None, None, 1, 2, 6]),
        "zero": draw([False, False, True]),
        "grouped": draw([False, False, True]),
        "rule": draw(["", "", *RULES]),
        "beta": draw(COEFFICIENTS),
        "schedule": _schedules(family),
    }
    if family == "online":  # half of them a matrix and its products, which the solved form is for
        parts["learner"] = draw(["linear"] * len(LEARNERS) + [*LEARNERS, *NOT_AFFINE])
    return st.builds(RandomStream, **parts).map(_legal)


def _schedules(family: str) -> st.SearchStrategy[Any]:
    read, order = st.sampled_from(["after", "after", "before"]), st.sampled_from(["update-apply", "apply-update"])
    reset = st.sampled_from([None, None, 1, 2])
    size = st.sampled_from([2, 4, 5, 16])
    if family == "causal":
        return st.builds(lambda b, r, m: nl.Causal(b, r, m and m * b), size, read, reset)
    if family == "online":
        micro = st.sampled_from([1, 1, 2, 3])
        return st.builds(lambda r, m, n: nl.Online(r, m and 5 * m, n), read, reset, micro)
    if family == "chunked":
        anchors = st.sampled_from([None, None, 0, 1, 2])

        def chunked(b: int, order: str, anchor: int | None, inclusive: bool, m: int | None) -> nl.Chunked:
            inclusive = inclusive and order == "apply-update"
            return nl.Chunked(b, order, anchor and anchor * b, inclusive, m and m * b)

        return st.builds(chunked, size, order, anchors, st.booleans(), reset)
    programs = [
        nl.Program(("update", 0, "N//2"), ("apply", 0, "N")),
        nl.Program(("update", 0, "N//2"), ("apply", 0, "N//2"), ("update", 0, "N"), ("apply", "N//2", "N")),
        nl.Program(("apply", 0, "N")),
        nl.Program(("update", 0, "N"), ("update", 0, "N"), ("apply", 0, "N")),
    ]
    return st.sampled_from(programs)


def _legal(case: RandomStream) -> RandomStream:
    """The nearest combination that the language allows and that stays finite."""
    token_by_token = isinstance(case.schedule, (nl.Causal, nl.Online))
    if token_by_token:
        case = replace(case, transforms=("", ""), restore=False, rule="")
        if case.scale and (case.schedule.read == "before" or case.decay or case.momentum):
            case = replace(case, scale="")
    if not token_by_token or case.micro > 1:
        case = replace(case, window=None)
    if not token_by_token or case.schedule.chunk > 1:
        case = replace(case, decay_order="after")
    if case.learner == "normalised weights" or case.restore or any(case.transforms):
        # a norm has no derivative at zero
        case = replace(case, zero=False)
    if case.restore and case.learner == "scalar":
        case = replace(case, learner="linear")
    if case.micro > 1 and case.readout in ("skip", "residual"):
        case = replace(case, readout="plain")
    return replace(case, log_decay=case.log_decay and bool(case.decay))


def _declare(case: RandomStream) -> type[nl.Loop]:
    learner: Any = type("RandomLearner", (nl.Learner,), {**_weights(case), "forward": _FORWARD[case.learner]})
    return type("RandomStreamLoop", (nl.Loop,), {"learner": learner, **_loop_body(case, learner.fast)})


def _weights(case: RandomStream) -> dict[str, Any]:
    out = case.output
    shapes: dict[str, tuple[str, ...]]
    match case.learner:
        case "linear" | "transposed" | "normalised weights":
            shapes = {"w": ("a", "m" if case.learner == "transposed" else out)}
        case "biased" | "layer norm" | "residual":
            shapes = {"w": ("a", out), "b": (out,)}
        case "gain":
            shapes = {"w": ("a", out), "g": (out,)}
        case "scalar":
            shapes = {"w": ("a", out), "s": ()}
        case "SwiGLU":
            shapes = {"w": ("a", "m"), "w3": ("a", "m"), "w2": ("m", out)}
        case "product of weights":
            shapes = {"w": ("a", "m"), "w2": ("m", out)}
        case _:
            shapes = {"w": ("a", "m"), "b": ("m",), "w2": ("m", out), "b2": (out,)}
    made: dict[str, Any] = {"m": nl.dim(6)}
    for name, dims in shapes.items():
        frozen = case.zero and name == "w"
        made[name] = nl.fast(*dims, init="zeros", learned=False) if frozen else nl.fast(*dims)
    if case.learner in ("layer norm", "residual", "residual MLP"):
        made["ln_scale"], made["ln_shift"] = nl.slow(out), nl.slow(out)
    return made


def _normed(self: Any, y: Tensor) -> Tensor:
    return F.layer_norm(y, (y.shape[-1],), self.ln_scale, self.ln_shift, eps=1e-2)


def _mlp(self: Any, x: Tensor) -> Tensor:
    return F.gelu(x @ self.w + self.b, approximate="tanh") @ self.w2 + self.b2


_FORWARD: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": lambda self, x: x @ self.w,
    "biased": lambda self, x: x @ self.w + self.b,
    "MLP": _mlp,
    "SwiGLU": lambda self, x: (F.silu(x @ self.w) * (x @ self.w3)) @ self.w2,
    "layer norm": lambda self, x: _normed(self, x @ self.w + self.b),
    "gain": lambda self, x: (x @ self.w) * (1 + self.g),
    "scalar": lambda self, x: (x @ self.w) * torch.cos(self.s),
    "residual": lambda self, x: x + _normed(self, x @ self.w + self.b),
    "residual MLP": lambda self, x: x + _normed(self, _mlp(self, x)),
    "transposed": lambda self, x: torch.tanh(x @ self.w) @ self.w.T,
    "normalised weights": lambda self, x: x @ (self.w / (self.w.square().sum(0, keepdim=True).sqrt() + 0.5)),
    "product of weights": lambda self, x: x @ (self.w @ self.w2),
}


def _loop_body(case: RandomStream, fast: dict[str, Any]) -> dict[str, Any]:
    out, several = case.output, case.micro > 1
    group = 2 if case.grouped else 1
    body: dict[str, Any] = {
        "k": nl.view("a", group=group, micro=several),
        "q": nl.view("a", group=group),
        "v": nl.view(out, micro=several),
    }
    if case.readout in ("residual", "skip"):
        body["c"] = nl.view(out)
    if case.readout == "skip":
        body["skip"] = nl.slow(shared=True)
    if case.loss == "held key":
        body["p"] = nl.view("a", micro=several)
    if case.loss == "Huber at a gate":
        body["delta"] = nl.gate()
    if case.loss == "decoder":
        body["x"] = nl.view("D", shared=True)
        body["decode"], body["d_shift"] = nl.slow(out, "D"), nl.slow("D", shared=True)

    def factor(kind: str, role: str, number: float) -> Any:
        """A coefficient of this kind for every fast weight; what it declares goes into the body."""
        if not kind:
            return None
        if kind in ("number", "text"):
            text = f"{round(number * 12)}/(2*H*a)" if kind == "text" and number > 0.1 else "H/(7*a)"
            return number if kind == "number" or role.startswith("log") else text
        role = role.removeprefix("log ")
        if kind == "slow":
            return body.setdefault(f"{role}_slow", nl.slow())
        if kind == "gate":
            return body.setdefault(f"{role}_gate", nl.gate(micro=several and role == "lr"))
        if kind in ("channel gate", "channel slow", "column gate"):
            axis = out if kind == "column gate" else "a"
            value: Any = nl.slow(axis) if kind == "channel slow" else nl.gate(dims=(axis,))
            rest = None if role == "decay" else 0.5 * number
            body[f"{role}_channel"] = value
            return {name: value if any(str(d) == axis for d in f.dims) else rest for name, f in fast.items()
                    if rest is not None or any(str(d) == axis for d in f.dims)}  # fmt: skip
        body[f"{role}_gate"], body[f"{role}_slow"] = nl.gate(), nl.slow()
        kinds = [body[f"{role}_gate"], number, body[f"{role}_slow"], 0.5 * number]
        return dict(zip(fast, kinds, strict=False))

    decay = factor(case.decay, "log decay" if case.log_decay else "decay", -0.1 if case.log_decay else 0.9)
    chosen = {
        "": None,
        "clip": nl.soft_clip(-1),
        "joint clip": nl.global_clip(0.3),
        "Newton-Schulz": _newton_schulz_of_matrices,
    }
    settings = settings_of(
        case.rule,
        beta=factor(case.beta, "beta", 0.7) if case.rule == "averages" else None,
        lr=factor(case.lr, "lr", 0.1),
        scale=factor(case.scale, "scale", 0.8),
        decay=None if case.log_decay else decay,
        log_decay=decay if case.log_decay else None,
        decay_order=case.decay_order,
        momentum=[factor(m, f"momentum{i}", 0.6) for i, m in enumerate(case.momentum)] or None,
        window=case.window,
        gradient_transform=chosen[case.transforms[0]],
        transform=chosen[case.transforms[1]],
        restore=_restored if case.restore else None,
    )
    body["optimizer"] = RULES[case.rule](**settings)
    body["schedule"] = case.schedule
    return {**body, "loss": _loss(case), "readout": _readout(case)}


def _newton_schulz_of_matrices(gradient: Tensor) -> Tensor:
    return nl.newton_schulz(((2.0, -1.5, 0.5),) * 2, eps=0.1)(gradient) if gradient.ndim == 2 else gradient


def _restored(weight: Tensor, initial: Tensor) -> Tensor:
    return nl.restore_norm(-1, eps=0.1)(weight, initial)


def _loss(case: RandomStream) -> Callable[..., Tensor]:
    def loss(self: Any, f: Any, t: Any) -> Tensor:
        if case.loss == "held key":
            return (f(t.k) * (f.held(t.p) - t.v)).sum(-1)
        y = f(t.k)
        target = t.v - t.k if case.learner.startswith("residual") else t.v
        if case.loss == "dot":
            return -(y * target).sum(-1)
        if case.loss == "Huber":
            return F.huber_loss(y, target, reduction="none", delta=0.8).sum(-1)
        if case.loss == "Huber at a gate":
            error = y - target
            size, delta = error.abs(), t.delta[:, None]
            return torch.where(size < delta, 0.5 * error.square(), delta * (size - 0.5 * delta)).sum(-1)
        if case.loss == "decoder":
            decoded = F.layer_norm(y @ self.decode + self.d_shift, (self.D,), eps=1e-2)
            return 0.5 * (decoded - t.x).square().mean(-1)
        return (0.5 if case.loss == "L2" else 1.0) * (y - target).square().sum(-1)

    return loss


def _readout(case: RandomStream) -> Callable[..., Tensor]:
    def readout(self: Any, f: Any, t: Any) -> Tensor:
        y = f(t.q)
        match case.readout:
            case "residual":
                return t.c + y
            case "skip":
                return y * self.a**-0.5 + self.skip * t.c
            case "normed":
                return F.rms_norm(y, (y.shape[-1],), eps=1e-2)
            case "ratio":
                return y[:, :-1] / (1 + y[:, -1:].square())
            case "twice":
                return f(torch.tanh(y)) if case.output == "a" else y * f(2 * t.q)
            case "reads a weight":
                return y * (1 + f.w.square().mean())
        return y

    return readout
