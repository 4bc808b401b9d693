"""Fast weights in parts: which loops come apart, and that they are the same loops."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nestloop as nl
from nestloop import zoo
from nestloop.lang.schedule import Schedule
from nestloop.lowering import in_parts, lower, pipeline
from nestloop.lowering.runtime import cache, executable, offline
from nestloop.lowering.runtime.fingerprint import fingerprint
from nestloop.lowering.runtime.recipe import Asked
from nestloop.lowering.runtime.triton_plan import TritonPlan
from tests.lowering.comparison import assert_equal, differences, random_inputs, run, run_in_parts

SIZES = {"d": 8, "dk": 8, "dv": 8}
WHOLE: dict[str, Any] = {"H": 2, "D": 16}


def beside(x: Tensor) -> Tensor:
    """[x, 1]"""
    return torch.cat([x, torch.ones_like(x[:, :1])], -1)


class Row(nl.Learner):
    """A bias as a row of its matrix."""

    w = nl.fast("d + 1", "d")

    def forward(self, x):
        return beside(x) @ self.w


class Columns(nl.Learner):
    w = nl.fast("d", "d + 1")

    def forward(self, x):
        return F.silu(x) @ self.w


class Both(nl.Learner):
    w = nl.fast("d + 1", "d + 1")

    def forward(self, x):
        return beside(x) @ self.w


class Thirds(nl.Learner):
    """Three maps side by side."""

    w = nl.fast("d", "3*d")

    def forward(self, x):
        a, b, c = (x @ self.w).chunk(3, -1)
        return F.silu(a) * b + c


class Hidden(nl.Learner):
    a, b = nl.fast("d", "2*d"), nl.fast("2*d + 1", "d")

    def forward(self, x):
        return x + beside(F.gelu(x @ self.a)) @ self.b


class Normed(nl.Learner):
    """A norm over values and normaliser alike."""

    w = nl.fast("d", "d + 1")

    def forward(self, x):
        return F.layer_norm(x @ self.w, (self.d + 1,))


class Halves(nl.Learner):
    """Whose dim is a sum of what an odd d has no half of."""

    w = nl.fast("d", "d/2 + d/2")

    def forward(self, x):
        return x @ self.w


class Cumulative(nl.Learner):
    """Takes the axis whole."""

    w = nl.fast("d", "d + 1")

    def forward(self, x):
        return (x @ self.w).cumsum(-1)


def declared(learner: type[nl.Learner], schedule: Schedule, optimizer: nl.SGD, first: bool = False) -> type[nl.Loop]:
    """A loop whose targets are as wide as what the learner makes, the one before the values with `first`."""

    def targets(y: Tensor, v: Tensor) -> Tensor:
        if y.shape[1] == v.shape[1]:
            return v
        return torch.cat([torch.ones_like(v[:, :1]), v], 1) if first else beside(v)

    class Declared(nl.Loop):
        k, v, q = nl.view("d"), nl.view("d"), nl.view("d")

        def loss(self, f, t):
            y = f(t.k)
            return (y - targets(y, t.v)).square().sum(-1)

        def readout(self, f, t):
            y = f(t.q)
            if y.shape[1] == t.q.shape[1]:
                return y
            return y[:, 1:] / (y[:, :1].square() + 1) if first else y[:, :-1] / (y[:, -1:].square() + 1)

    body = {name: value for name, value in vars(Declared).items() if name not in ("spec", "declared_at")}
    return type("Declared", (nl.Loop,), {**body, "learner": learner, "schedule": schedule, "optimizer": optimizer})


def small(**more: Any) -> nl.SGD:
    return nl.SGD(lr=0.02, **more)


class Held(nl.Loop):
    """Beside a learner that the inner gradient takes for a constant."""

    learner, schedule, optimizer = Columns, nl.Causal(4), small()
    k, v, q = nl.view("d"), nl.view("d"), nl.view("d")

    def loss(self, f, t):
        return (f(t.k) - beside(t.v) - 0.3 * f.held(t.q)).square().sum(-1)

    def readout(self, f, t):
        y = f(t.q)
        return y[:, :-1] * y[:, -1:]


LOOPS: dict[str, type[nl.Loop]] = {
    "a row, in a batch": declared(Row, nl.FullBatch(2), small()),
    "columns, in batches": declared(Columns, nl.Shuffled(2), small()),
    "both, in a batch": declared(Both, nl.FullBatch(2), small()),
    "thirds, token by token": declared(Thirds, nl.Online(), small()),
    "a hidden layer": declared(Hidden, nl.Causal(4), small()),
    "columns, the one first": declared(Columns, nl.Causal(4), small(), first=True),
    "a row with momentum": declared(Row, nl.Chunked(4), small(momentum=0.9, decay=0.95)),
    "both with momenta": declared(Both, nl.Chunked(4), small(momentum=(0.9, 0.5))),
    "a row with its own rate": declared(Row, nl.Causal(4), nl.SGD(lr={"w": 0.02}, decay={"w": 0.9})),
    "a norm": declared(Normed, nl.Causal(4), small()),
    "clipped together": declared(Both, nl.Chunked(4), small(gradient_transform=nl.global_clip(0.5))),
    "held columns": Held,
    "columns with a window": declared(Columns, nl.Causal(4), small(window=3)),
    "a linear attention": zoo.LinearAttentionElu,
    "a causal one": zoo.CausalLinearAttentionElu,
    "cosFormer": zoo.CosFormer,
}


def in_parts_of(loop: type[nl.Loop], **sizes: int) -> list[str]:
    """Its fast weights as generated Triton has them."""
    return list(in_parts.in_parts(loop.spec, {**WHOLE, **SIZES, "d": 16, "dk": 16, "dv": 16, **sizes}, None).fast)


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_in_parts_is_the_same_loop(name: str):
    loop = LOOPS[name]
    assert any("part2" in weight for weight in in_parts_of(loop))
    sizes = {"d": 16, "dk": 16, "dv": 16}
    inputs = random_inputs(loop.spec, sizes, tokens=12, carried=not loop.spec.streams)
    if not loop.spec.streams:
        found, wanted = (run(nl.compile(loop, backend=b), inputs) for b in ("triton", "reference"))
    else:
        found, wanted = (run_in_parts(nl.compile(loop, backend=b), inputs, [8]) for b in ("triton", "reference"))
    assert_equal(differences(found, wanted), 1e-10)


STAY: dict[str, tuple[type[nl.Loop], dict[str, int]]] = {
    "tiles as small": (declared(Row, nl.FullBatch(2), small()), {"d": 15}),
    "something takes the axis whole": (declared(Cumulative, nl.FullBatch(2), small()), {}),
    "a transform sees the weight": (declared(Row, nl.Chunked(4), small(transform=nl.newton_schulz())), {}),
    "one system has all of it": (declared(Row, nl.Online(), small()), {}),
    "nothing is joined": (zoo.MTTTMLP, {}),
    "terms that are no sizes": (declared(Halves, nl.FullBatch(2), small()), {"d": 17}),
}


@pytest.mark.parametrize("name", STAY)
def test_a_loop_stays_whole(name: str):
    loop, sizes = STAY[name]
    assert in_parts_of(loop, **sizes) == list(loop.spec.fast)


def test_a_coefficient_along_the_axis_keeps_it_whole():
    class Decayed(nl.Loop):
        learner, schedule = Columns, nl.Chunked(4)
        k, v, q = nl.view("d"), nl.view("d"), nl.view("d")
        along, across = nl.gate(dims=("d + 1",)), nl.gate(dims=("d",))
        loss, readout = LOOPS["columns, in batches"].loss, LOOPS["columns, in batches"].readout

    for gate, parts in ((Decayed.along, ["w"]), (Decayed.across, ["w_part1", "w_part2"])):
        loop: type[nl.Loop] = type("Decayed", (Decayed,), {"learner": Columns, "optimizer": small(decay=gate)})
        assert in_parts_of(loop) == parts
        inputs = random_inputs(loop.spec, {"d": 16}, tokens=8)
        found, wanted = (run(nl.compile(loop, backend=b), inputs) for b in ("triton", "reference"))
        assert_equal(differences(found, wanted), 1e-10)


def test_tokens_may_be_joined_too():
    """Each against the next."""

    class Next(nl.Loop):
        learner, optimizer = Row, small()
        k, v, q = nl.view("d"), nl.view("d"), nl.view("d")

        def loss(self, f, t):
            return (f(t.k) - torch.cat([t.v[1:], t.v[-1:]])).square().sum(-1)

        def readout(self, f, t):
            return f(t.q)

    sizes = {**WHOLE, "d": 16}
    parted = in_parts.in_parts(Next.spec, sizes, None)
    assert list(parted.fast) == ["w_part1", "w_part2"]
    inputs = random_inputs(Next.spec, sizes, tokens=7)
    wanted = run(nl.compile(Next, backend="reference"), inputs)
    made = pipeline.stages(parted, sizes, None, False, False)  # generated PyTorch: a tile of all tokens has no Triton
    name = executable.build(parted, pipeline.plan(made), 2, losses=False, asked=Asked("torch"))
    w = inputs.weights["w"]
    weights = {"w_part1": w[:, :16], "w_part2": w[:, 16:]}
    z, _, _ = executable.EXECUTABLES[name](inputs.views, weights, None, None)
    torch.testing.assert_close(z, wanted["z"], rtol=1e-10, atol=1e-10)


def test_names_of_parts_that_are_taken():
    class Taken(nl.Learner):
        w, w_part1 = nl.fast("d", "d + 1"), nl.fast("d", "d + 1")

        def forward(self, x):
            return x @ self.w + F.silu(x) @ self.w_part1

    loop = declared(Taken, nl.FullBatch(1), small())
    assert in_parts_of(loop) == ["w", "w_part1_part1", "w_part1_part2"]
    said = nl.explain(nl.compile(loop, backend="triton"), d=16)
    assert "smaller with w_part1 [d, d + 1] in parts w_part1_part1 [d, d], w_part1_part2 [d, 1]" in said
    inputs = random_inputs(loop.spec, {"d": 16}, tokens=8)
    found, wanted = (run(nl.compile(loop, backend=b), inputs) for b in ("triton", "reference"))
    assert_equal(differences(found, wanted), 1e-10)


def test_plans_of_parts_are_not_those_of_the_whole():
    sizes = {**WHOLE, "d": 16}
    first = [in_parts.in_parts(LOOPS[name].spec, sizes, None) for name in ("columns, in batches", "both, in a batch")]
    whole = [LOOPS[name].spec for name in ("columns, in batches", "both, in a batch")]
    assert len({fingerprint(spec, sizes) for spec in (*first, *whole)}) == 4


def test_what_bodies_say_is_kept(monkeypatch: pytest.MonkeyPatch):
    loop = declared(Both, nl.FullBatch(1), small())
    apart = in_parts_of(loop)
    in_parts._CHOSEN.known.clear()
    monkeypatch.setattr(in_parts, "_comes_apart", lambda *_: pytest.fail("asked again"))
    assert in_parts_of(loop) == apart and len(apart) == 4
    kept = [path for path in cache.cache_dir().iterdir() if path.suffix == ".parts" and path.read_text() == "0"]
    assert kept


def test_a_kept_plan_runs_without_tracing():
    """In a process of its own, after this one has lowered it."""
    sizes = {"d": 16, "H": 2}
    lower.lower(zoo.LinearAttentionElu.spec, sizes, None, False, False, Asked("triton"))
    code = f"""
import sys
from nestloop import zoo
from nestloop.lowering import lower
from nestloop.lowering.runtime.recipe import Asked
print(lower.lower(zoo.LinearAttentionElu.spec, {sizes!r}, None, False, False, Asked("triton")))
assert "nestloop.lowering.pipeline" not in sys.modules and "nestloop.lowering.capture" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def plan(loop: type[nl.Loop], **sizes: int) -> TritonPlan:
    sizes = {"H": 2, "D": 256, **sizes}
    spec = in_parts.in_parts(loop.spec, sizes, None)
    if spec.streams:
        made: pipeline.AnyLowered = pipeline.stream_stages(spec, sizes, None, False, "scan", triton=True)
    else:
        made = pipeline.stages(spec, sizes, None, False, False, triton=True)
    assert made.triton is not None, made.not_triton
    return made.triton


@pytest.mark.oldest_triton
@pytest.mark.parametrize("loop", [zoo.LinearAttentionElu, zoo.CausalLinearAttentionElu, zoo.CosFormer])
def test_heads_of_128_features_fit_a_device(loop: type[nl.Loop]):
    """With tiles of 129 columns, 256 in registers, backward of the first takes more than any device has, and the last
    has no Triton."""
    made = plan(loop, d=128, dk=128, dv=128)
    for launch in (*made.forward_launches, *made.backward_launches):
        kernel = offline.compiled(made, launch.kernel, "sm_90")
        assert kernel.shared <= 96 * 1024 and max(kernel.spilled) <= 512, (launch.kernel, kernel.summary)


def test_it_is_told():
    said = nl.explain(nl.compile(zoo.CosFormer, backend="triton"), dk=16, dv=16)
    assert "tiles of generated Triton are smaller with w [2 * dk, dv + 1] in parts w_part1 [2 * dk, dv], " in said
    assert "w [2 * dk, dv + 1] per head and sequence" in said
    text = nl.inspect(zoo.CosFormer, "triton", dk=16, dv=16)
    assert "w is w_part1, w_part2 side by side." in text
    assert "w_part1" not in nl.inspect(zoo.CosFormer, "capture") + nl.inspect(zoo.CosFormer, "emit")


def test_what_a_loop_should_take_is_that_of_its_parts():
    """The whole of this one has no Triton."""
    said = str(nl.cost(zoo.CosFormer, B=8, H=12, N=2048, dk=128, dv=128))
    assert "Triton, chunks of 16, at once +" in said
