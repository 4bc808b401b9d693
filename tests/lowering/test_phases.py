"""Phases of a graph whose long axis is walked in blocks: nothing is read before it is there."""

from __future__ import annotations

import pytest

import nestloop as nl
from nestloop import zoo
from nestloop.lowering import names, pipeline
from nestloop.lowering.emit.triton_values import TRITON
from nestloop.lowering.ops.strided import Extent
from nestloop.lowering.schedule.phases import NoPhases, handed_on, is_blocked, phases, sums_over
from nestloop.lowering.schedule.values import Value, read

SIZES = {"d": 6, "D": 40, "dx": 5, "dy": 3, "H": 2}


def values_of(loop: type[nl.Loop], name: str, backward: bool = False) -> list[Value]:
    """The values of a piece of a loop of batches."""
    spec = names.safe(loop.spec, True)
    piece = pipeline.stages(spec, SIZES, None, losses=False, carried=False).pieces[name]
    module = piece.backward if backward else piece.forward
    results = [f"d_{n}" for n in piece.wrt] if backward else list(piece.results)
    return read(module, results, [False] * len(results), [*spec.views, "d_z"], language=TRITON).computed


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ["gradient", "update", "readout"])
@pytest.mark.parametrize("loop", [zoo.MTTTMLPSGD4, zoo.MTTTMLP], ids=lambda loop: loop.__name__)
def test_what_a_phase_reads_is_there(loop: type[nl.Loop], name: str, backward: bool):
    size = Extent(0, 24)
    values = values_of(loop, name, backward)
    found = phases(values, size)
    handed = handed_on(found, size)
    assert sorted(v.name for p in found for v in [*p.once, *p.blocks]) == sorted(v.name for v in values)
    computed, there = set(values), set()
    for phase in found:
        for value in phase.once:
            assert not is_blocked(value, size)
            assert all(o.base in there for o in value.reads if o.base in computed)
            there.add(value)
        own: set[Value] = set()
        for value in phase.blocks:
            for base in (o.base for o in value.reads if o.base in computed):
                assert base in own or base in (handed if is_blocked(base, size) else there)
            own |= set() if sums_over(value, size) else {value}
        there |= {v for v in phase.blocks if sums_over(v, size) or v in handed}


def test_an_mlp_gradient_takes_two_walks():
    """The hidden layer, then its cotangent: the activations are handed on, not the products they came from."""
    size = Extent(0, 24)
    found = phases(values_of(zoo.MTTTMLP, "gradient"), size)
    handed = handed_on(found, size)
    assert len(found) == 2 and {v.kind for v in handed} == {"element"} and len(handed) == 2
    assert [v.kind for v in found[0].blocks if sums_over(v, size)] == ["product"]


class Softmax(nl.Learner):
    a, b = nl.fast("d", "4*d"), nl.fast("4*d", "d")

    def forward(self, x):
        return (x @ self.a).softmax(-1) @ self.b


class Grouped(nl.Learner):
    a, b = nl.fast("d", "4*d"), nl.fast("4*d", "d")

    def forward(self, x):
        hidden = (x @ self.a).reshape(*x.shape[:-1], 4, self.d)
        return (hidden * hidden.mean(-1, keepdim=True)).reshape(*x.shape[:-1], 4 * self.d) @ self.b


class Square(nl.Learner):
    a, b, c = nl.fast("d", "4*d"), nl.fast("4*d", "4*d"), nl.fast("4*d", "d")

    def forward(self, x):
        return (x @ self.a) @ self.b @ self.c


def recalling(hidden: type[nl.Learner]) -> type[nl.Loop]:
    class Recalling(nl.Loop):
        learner, optimizer, schedule = hidden, nl.SGD(lr=0.1), nl.FullBatch(1)
        k, v, q = nl.view("d"), nl.view("d"), nl.view("d")

        def loss(self, f, t):
            return (f(t.k) - t.v).square().mean(-1)

        def readout(self, f, t):
            return f(t.q)

    return Recalling


@pytest.mark.parametrize(
    ("learner", "reason"),
    [
        (Softmax, "a function runs along the axis"),
        (Grouped, "a view takes the axis apart"),
        (Square, "a value has the axis twice"),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_an_axis_that_is_needed_whole(learner: type[nl.Learner], reason: str):
    with pytest.raises(NoPhases, match=reason):
        phases(values_of(recalling(learner), "readout"), Extent(0, 24))
