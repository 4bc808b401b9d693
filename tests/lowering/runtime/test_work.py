"""Which of C++ and generated PyTorch a call on a CPU runs, and why; each goes back from what the other one kept."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

import nestloop as nl
from nestloop import zoo
from nestloop.lang.kept import MOST
from nestloop.lowering.lower import plan_for
from nestloop.lowering.runtime.code import Code
from nestloop.lowering.runtime.plan import Plan
from nestloop.lowering.runtime.work import Expected, expected, runs
from tests.lowering.comparison import assert_equal, differences, random_inputs, run
from tests.lowering.runtime.test_native import Causally, Recall, inputs_of

pytestmark = pytest.mark.usefixtures("quick_builds")


def plan_of(loop: type[nl.Loop], **sizes: int) -> Plan:
    part = "update" if isinstance(loop.spec.schedule, nl.Program) else "scan" if loop.spec.streams else ""
    return plan_for(loop.spec, {**loop.spec.default_dims, **sizes}, None, False, False, part=part)


def test_pieces_are_counted_by_their_tokens():
    plan = plan_of(Causally, a=4, e=3, H=2)
    assert runs(Causally.spec, plan, 40) == {("chunk", 16): 2, ("chunk", 8): 1}
    plan = plan_of(zoo.MTTTMLPSGD4, d=4, D=16, H=2)
    assert runs(zoo.MTTTMLPSGD4.spec, plan, 10) == {
        **{("prepare", 10): 1, ("project", 10): 1, ("readout", 10): 1},
        **{("gradient", 3): 2, ("update", 3): 2, ("gradient", 2): 2, ("update", 2): 2},
    }


def choice(loop: type[nl.Loop], call: tuple[int, int, int, int], **sizes: int) -> Expected:
    """For (heads, sequences, tokens, threads)."""
    return expected(loop.spec, plan_of(loop, H=call[0], **sizes))(*call)


def test_what_is_expected_of_ever_new_lengths_is_not_kept_without_end():
    compare = expected(zoo.DeltaNet.spec, plan_of(zoo.DeltaNet, dk=4, dv=4, H=1))

    def alive() -> int:
        return sum(isinstance(one, Expected) for one in gc.get_objects())

    before = alive()
    for length in range(1, MOST + 50):
        compare(1, 1, length, 1)
    assert alive() - before <= MOST


# Forward and backward of PyTorch and of C++, one core of a Xeon with AVX-512: the ratio of their CPU times.
MEASURED = [
    (zoo.LaCT, {"d": 64}, 4, 2048, 2.58),
    (zoo.LaCT, {"d": 128}, 2, 2048, 1.18),
    (zoo.LaCT, {"d": 256}, 1, 2048, 0.79),
    (zoo.LaCT, {"d": 384}, 1, 2048, 0.81),
    (zoo.CausalLaCT, {"d": 64}, 4, 4096, 2.35),
    (zoo.CausalLaCT, {"d": 256}, 1, 4096, 0.74),
    (zoo.LaCTMuon, {"d": 256}, 1, 2048, 0.84),
    (zoo.TTTLinear, {"d": 256}, 2, 512, 5.01),
    (zoo.DeltaNet, {"dk": 256, "dv": 256}, 2, 512, 2.99),
]


@pytest.mark.parametrize(
    ("loop", "sizes", "heads", "tokens", "ratio"), MEASURED, ids=[f"{m[0].__name__}-{m[1]}" for m in MEASURED]
)
def test_what_is_faster_on_one_core_is_chosen(loop: type[nl.Loop], sizes: dict, heads: int, tokens: int, ratio: float):
    found = choice(loop, (heads, 1, tokens, 1), **sizes)
    assert found.is_native is (ratio > 1)
    if ratio < 2:
        assert 0.8 < found.torch / found.native / ratio < 1.25


def test_idle_cores_count_where_pytorch_would_use_them():
    assert choice(zoo.LaCT, (4, 4, 2048, 16), d=64).is_native
    few = choice(zoo.LaCT, (2, 1, 2048, 16), d=64)
    assert not few.is_native and few.idle == 14
    assert few.why == (
        f"generated PyTorch is expected to be {few.native / few.torch:.2g} times as fast as C++: "
        f"products are most of the work, {few.intensity:.0f} FLOP for each value written, "
        "and C++ would leave 14 threads idle"
    )
    assert choice(zoo.DeltaNet, (1, 1, 1024, 16), dk=64, dv=64).is_native  # its ops are too small to be shared out


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Answers that calls of "auto" get, in turn; what was asked follows."""
    answers: list[bool] = []
    monkeypatch.setattr(Code, "runs_native", lambda code, inputs, halo: answers.pop(0))
    yield answers
    assert not answers


@pytest.mark.parametrize("loop", [Recall, Causally, zoo.OmegaNet])
def test_either_goes_back_from_what_the_other_kept(loop: type[nl.Loop], decided: list[bool]):
    if loop is zoo.OmegaNet:
        torch.manual_seed(0)
        inputs = random_inputs(loop.spec, {"d": 4, "H": 2}, tokens=40, scale={"k": 0.3, "q": 0.3})
    else:
        inputs = inputs_of(loop, 4, 3, 40)
    wanted = run(nl.compile(loop, backend="reference"), inputs)
    for forward, backward in ((True, False), (False, True)):
        decided[:] = [forward, backward]
        assert_equal(differences(run(nl.compile(loop), inputs), wanted), 1e-9)


def test_pytorch_runs_where_it_is_expected_to_be_faster(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert "(backend 'torch': expected to be faster)" in nl.explain(zoo.LaCT, d=64, H=1, B=1, N=2048)
    called: list[str] = []
    native = "nestloop.lowering.runtime.native_stream.NativeStream.forward"
    monkeypatch.setattr(native, lambda library, *tensors: called.append(library.name))
    inputs = random_inputs(zoo.LaCT.spec, {"d": 64, "H": 1}, sequences=1, heads=1, tokens=2048, dtype=torch.float32)
    with torch.no_grad():
        found = nl.compile(zoo.LaCT)(inputs.views, inputs.weights)[0]
        assert torch.equal(found, nl.compile(zoo.LaCT, backend="torch")(inputs.views, inputs.weights)[0])
    assert not called
