"""Phases of a graph whose long axis is walked in blocks: nothing is read before it is there."""

from __future__ import annotations

import pytest
import torch

import nestloop as nl
from nestloop import zoo
from nestloop.lowering import names, pipeline
from nestloop.lowering.emit.triton_values import TRITON
from nestloop.lowering.ops.strided import Extent
from nestloop.lowering.schedule.phases import NoPhases, Phase, handed_on, is_blocked, phases, sums_over
from nestloop.lowering.schedule.reading import read
from nestloop.lowering.schedule.recompute import recompute_phases
from nestloop.lowering.schedule.values import Value

SIZES = {"d": 6, "D": 40, "dx": 5, "dy": 3, "H": 2}


def values_of(loop: type[nl.Loop], name: str, backward: bool = False) -> list[Value]:
    """The values of a piece of a loop of batches."""
    spec = names.safe(loop.spec, True)
    piece = pipeline.stages(spec, SIZES, None, losses=False, carried=False).pieces[name]
    module = piece.backward if backward else piece.forward
    results = [f"d_{n}" for n in piece.wrt] if backward else list(piece.results)
    return read(module, results, [False] * len(results), [*spec.views, "d_z"], language=TRITON).computed


@pytest.mark.parametrize("again", [False, True], ids=["handed on", "computed again"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ["gradient", "update", "readout"])
@pytest.mark.parametrize("loop", [zoo.MTTTMLPSGD4, zoo.MTTTMLP], ids=lambda loop: loop.__name__)
def test_what_a_phase_reads_is_there(loop: type[nl.Loop], name: str, backward: bool, again: bool):
    size = Extent(0, 24)
    values = values_of(loop, name, backward)
    found = phases(values, size)
    assert sorted(v.name for p in found for v in [*p.once, *p.blocks]) == sorted(v.name for v in values)
    if again:
        recompute_phases(found, size)
    handed = handed_on(found, size)
    computed, there = {v for p in found for v in [*p.once, *p.blocks]}, set()
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
    """The hidden layer, then its cotangent: its argument and the activation's sigmoid are handed on, not the products
    they came from, nor what takes little of both."""
    size = Extent(0, 24)
    found = phases(values_of(zoo.MTTTMLP, "gradient"), size)
    recompute_phases(found, size)
    handed = sorted(str(v.node.target) for v in handed_on(found, size))
    assert len(found) == 2 and handed == ["aten.add.Tensor", "aten.sigmoid.default"]
    assert [v.kind for v in found[0].blocks if sums_over(v, size)] == ["product"]


def test_cheap_chains_are_computed_again():
    """Of a GELU's backward its argument, its values and slope, and what that is made of, are kept, and no phase reads
    more than it did."""
    size = Extent(0, 24)
    found = phases(values_of(zoo.MTTTMLP, "gradient", backward=True), size)
    before, read = handed_on(found, size), read_by(found, size)
    recompute_phases(found, size)
    after = handed_on(found, size)
    assert after < before and len(after) <= 5 and not [v for v in after if v.node.target is torch.ops.aten.sub.Tensor]
    assert all(now <= then for now, then in zip(read_by(found, size), read, strict=True))
    for value in (v for phase in found for v in phase.blocks):
        assert all(value in operand.base.users for operand in value.reads)
        assert not value.factors or [f.base for f in value.factors] == [o.base for o in value.reads]


def read_by(found: list[Phase], size: Extent) -> list[int]:
    """Blocks from elsewhere that each phase reads."""
    own = [set(phase.blocks) for phase in found]
    bases = [{o.base for v in phase.blocks for o in v.reads} for phase in found]
    return [len([v for v in read - mine if is_blocked(v, size)]) for read, mine in zip(bases, own, strict=True)]


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
