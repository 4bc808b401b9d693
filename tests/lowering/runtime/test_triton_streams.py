"""Streams in generated Triton: interpreted for what they compute, compiled for what they take.

The interpreter sees no layouts; the compiler runs nothing. Each kernel is put through both.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import nestloop as nl
from nestloop import costs, zoo
from nestloop.errors import NoPlanError
from nestloop.lowering import pipeline
from nestloop.lowering.emit import triton_choice, triton_fitting, triton_split, triton_stream, triton_strips
from nestloop.lowering.lower import STREAM_OPS
from nestloop.lowering.ops.strided import NoSpelling
from nestloop.lowering.runtime import cache, triton, tuned
from nestloop.lowering.runtime.triton import TritonStream
from nestloop.lowering.runtime.triton_plan import Tiling, TritonPlan
from nestloop.lowering.streams import prepared
from tests.drawn import SIZES
from tests.lowering.comparison import assert_equal, differences, run, run_in_parts
from tests.lowering.runtime.scans import UNPLANNED, plan_of
from tests.lowering.runtime.test_native import Causally, doubled, inputs_of, single
from tests.lowering.runtime.test_native_streams import STREAMS, drawn
from tests.lowering.test_prepared import SOLVED

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

LOW = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half the distance from 1 to the next number


@pytest.fixture(autouse=True)
def few_states_kept(states_kept: Any):
    """Most chunks are to be recomputed, from states one to three chunks apart."""
    states_kept(lambda count, budget, state: 1 + count % 3)


@pytest.mark.parametrize("loop", STREAMS, ids=lambda loop: loop.__name__)
def test_every_loop_of_the_zoo_is_what_generated_pytorch_gives(loop: type[nl.Loop]):
    torch.manual_seed(0)
    inputs, losses = drawn(loop, 19), not isinstance(loop.spec.schedule, nl.Program)
    op = nl.compile(loop, backend="triton")
    if loop in UNPLANNED:
        with pytest.raises(NoPlanError) as refusal:
            run(op, inputs, losses)
        assert UNPLANNED[loop] in str(refusal.value)
        return
    assert_equal(differences(run(op, inputs, losses), run(nl.compile(loop, backend="torch"), inputs, losses)), 1e-9)


@pytest.mark.parametrize("loop", [*SOLVED, zoo.TTTLinear], ids=lambda loop: loop.__name__)
def test_one_token_is_enough(loop: type[nl.Loop]):
    inputs = drawn(loop, 1)
    assert_equal(differences(*(run(nl.compile(loop, backend=b), inputs) for b in ("triton", "torch"))), 1e-9)


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The state of every scan lies in memory, and hidden axes are walked in blocks."""

    def refused(*_):
        raise NoSpelling("the state stays in memory")

    for name, size in {"d": 8, "dk": 5}.items():  # what was lowered for other sizes in this process is none of these
        monkeypatch.setitem(SIZES, name, size)
    monkeypatch.setenv("NESTLOOP_CACHE", str(tmp_path))  # what is generated depends on these numbers
    monkeypatch.setattr(triton_choice, "TritonScan", refused)
    monkeypatch.setattr(pipeline, "is_affine", lambda piece, carry: False)  # all of it in one kernel
    monkeypatch.setattr(triton_fitting, "SHORTEST_BLOCKED", 32)
    monkeypatch.setattr(triton_fitting, "ALIVE", 0)
    monkeypatch.setattr(triton_stream, "BLOCKS", (0, 16))


STREAMED = [zoo.TTTLinear, zoo.TTTMLP, zoo.Yaad, zoo.Moneta, zoo.CausalLaCT, zoo.GatedDeltaNet, zoo.OmegaNet]


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("loop", STREAMED, ids=lambda loop: loop.__name__)
def test_a_state_that_lies_in_memory(loop: type[nl.Loop]):
    """An incomplete chunk last, and a state that hands it on."""
    torch.manual_seed(0)
    inputs = drawn(loop, 37)
    op = nl.compile(loop, backend="triton")
    assert_equal(differences(run(op, inputs), run(nl.compile(loop, backend="torch"), inputs)), 1e-9)
    (path,) = cache.cache_dir().glob("*_scan_triton*.py")
    assert "pair = scratch" in path.read_text()


@pytest.fixture
def kernels_of_scans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[str]:
    """The kernels of the scans that run, of which there are several chunks to few tokens."""
    monkeypatch.setenv("NESTLOOP_CACHE", str(tmp_path))
    monkeypatch.setattr(triton_choice, "LONGEST_SPLIT", 16)
    called = TritonStream._run
    found: set[str] = set()

    def remembered(self: TritonStream, *given: Any) -> None:
        if self.signature.chunk:
            found.update(self.plan.kernels)
        called(self, *given)

    monkeypatch.setattr(TritonStream, "_run", remembered)
    return found


AFFINE = [
    *[zoo.CausalLinearAttention, zoo.CosFormer, zoo.NormAttention, zoo.RetNet, zoo.LightningAttentionFla, zoo.GLA],
    *[zoo.HGRN2, zoo.RWKV6, zoo.Mamba2, zoo.SimpleGLA, zoo.DeltaNet, zoo.GatedDeltaNet, zoo.KDA, zoo.Comba, zoo.GDN2],
    *[zoo.Longhorn, zoo.DeltaProduct, zoo.Mesa],
]


@pytest.mark.parametrize("loop", AFFINE, ids=lambda loop: loop.__name__)
def test_chunks_of_an_affine_state_run_at_once(loop: type[nl.Loop], kernels_of_scans: set[str]):
    """An incomplete chunk last, in calls of which the second goes on from the first one's state: the reference."""
    torch.manual_seed(0)
    inputs = drawn(loop, 37)
    found = run_in_parts(nl.compile(loop, backend="triton"), inputs, [20], losses=False)
    wanted = run(nl.compile(loop, backend="reference"), inputs, losses=False)
    assert_equal(differences(found, wanted), 1e-9)
    assert {"forward_outputs", "backward_tokens"} <= kernels_of_scans


@pytest.mark.parametrize("loop", [*SOLVED, zoo.GLA, zoo.Mesa], ids=lambda loop: loop.__name__)
def test_what_is_prepared_is_taken(loop: type[nl.Loop], kernels_of_scans: set[str], monkeypatch: pytest.MonkeyPatch):
    """All that can be, by all that read it, beside an incomplete chunk that computes it itself: the reference."""
    monkeypatch.setattr(prepared, "_WORTH", 0)
    torch.manual_seed(0)
    inputs = drawn(loop, 53)
    found = run_in_parts(nl.compile(loop, backend="triton"), inputs, [20], losses=False)
    wanted = run(nl.compile(loop, backend="reference"), inputs, losses=False)
    assert_equal(differences(found, wanted), 1e-9)
    assert ("backward_prepare_walks" in kernels_of_scans) == (loop in SOLVED)


# The axis that strips are of: the last, but where a label of ones lies beside it.
IN_STRIPS = {zoo.NormAttention: "dv", zoo.Mamba2: "dv", zoo.GatedDeltaNet: "dv", zoo.CausalLinearAttentionElu: "d"}


@pytest.mark.parametrize("loop", IN_STRIPS, ids=lambda loop: loop.__name__)
def test_a_state_is_walked_in_strips(loop: type[nl.Loop], kernels_of_scans: set[str], monkeypatch: pytest.MonkeyPatch):
    """The last one shorter; chunks walk the same axis in blocks, and all that can be is prepared: the reference."""
    monkeypatch.setattr(triton_strips, "LENGTH", 16)
    monkeypatch.setattr(prepared, "_WORTH", 0)
    monkeypatch.setattr(triton_stream, "BLOCKS", (16, 0))
    for name, size in {"d": 40, "dk": 17, "dv": 40}.items():
        monkeypatch.setitem(SIZES, name, size)
    torch.manual_seed(0)
    inputs = drawn(loop, 21)
    found = run_in_parts(nl.compile(loop, backend="triton"), inputs, [18], losses=False)
    wanted = run(nl.compile(loop, backend="reference"), inputs, losses=False)
    assert_equal(differences(found, wanted), 1e-9)
    assert {"forward_outputs", "backward_tokens"} <= kernels_of_scans
    text = "".join(path.read_text() for path in cache.cache_dir().glob("*_scan_triton*.py"))
    axis = IN_STRIPS[loop]
    assert f"each strip of {axis} of the state" in text and f"in_strip < {SIZES[axis]}" in text


def test_factors_of_products_are_handed_on_as_these_round_them(
    kernels_of_scans: set[str], monkeypatch: pytest.MonkeyPatch
):
    """The same numbers to the last bit, at half the bytes; the gradient of a decay reads whole states."""
    torch.manual_seed(0)
    low = {n: t.detach().bfloat16().requires_grad_() for n, t in drawn(zoo.DeltaNet, 37).views.items()}
    op = nl.compile(zoo.DeltaNet, backend="triton")

    def results() -> list[torch.Tensor]:
        z, _ = op(low, {})
        return [z, *torch.autograd.grad(z.float().square().sum(), list(low.values()))]

    handed = TritonPlan.handed
    walked = {"states_low_handed", "cotangents_low_handed"}
    low_in = {
        loop: {one.name for one in plan_of(loop).backward_handed if one.low}
        for loop in (zoo.DeltaNet, zoo.GatedDeltaNet)
    }
    assert low_in[zoo.DeltaNet] == walked | {"ready_low_handed", "pulled_low_handed"}
    assert not walked & low_in[zoo.GatedDeltaNet]
    rounded = results()
    exact = lambda plan, which: [dataclasses.replace(one, low=False) for one in handed(plan, which)]  # noqa: E731
    monkeypatch.setattr(TritonPlan, "handed", exact)
    assert "forward_outputs" in kernels_of_scans and all(map(torch.equal, rounded, results()))


# Gradients are taken at one anchor, in chunks of a length of their own: tokens, and those of the first call.
ANCHORED = {zoo.NeuralMemory: (150, 70), zoo.InContextAutoregression: (6, 3)}
WALKED_IN_MEMORY = [zoo.CosFormer, zoo.GatedDeltaNet, zoo.DeltaProduct, zoo.Mesa, *ANCHORED]


@pytest.mark.parametrize("loop", WALKED_IN_MEMORY, ids=lambda loop: loop.__name__)
def test_a_state_that_is_walked_in_memory(
    loop: type[nl.Loop], kernels_of_scans: set[str], monkeypatch: pytest.MonkeyPatch
):
    """Its axes in blocks; several chunks, an incomplete one last, in two calls: the reference."""
    monkeypatch.setattr(triton_split, "ALIVE", 0)
    monkeypatch.setattr(triton_fitting, "SHORTEST_BLOCKED", 16)
    for name, size in {"d": 16, "dk": 16, "dv": 16}.items():
        monkeypatch.setitem(SIZES, name, size)
    torch.manual_seed(0)
    tokens, first = ANCHORED.get(loop, (37, 20))
    inputs = drawn(loop, tokens)
    found = run_in_parts(nl.compile(loop, backend="triton"), inputs, [first], losses=False)
    wanted = run(nl.compile(loop, backend="reference"), inputs, losses=False)
    assert_equal(differences(found, wanted), 1e-9)
    assert {"forward_outputs", "backward_tokens"} <= kernels_of_scans
    (path, *_) = cache.cache_dir().glob("*_scan_triton*.py")
    assert "(item * (chunks + 1) + index + 1)" in path.read_text()


@pytest.mark.parametrize("loop", [zoo.TTTLinear, zoo.TTTMLP, zoo.Titans, zoo.Yaad], ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("forward", [0, 1])
def test_forward_and_backward_have_the_state_in_different_places(
    loop: type[nl.Loop], forward: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """One in registers, one in memory; several chunks, an incomplete one last, in two calls: the reference."""
    monkeypatch.setenv("NESTLOOP_CACHE", str(tmp_path))
    monkeypatch.setattr(triton_choice, "ALIVE", 0)
    places = {"forward": forward, "backward": 1 - forward}
    monkeypatch.setattr(triton_choice, "_of_fewest", lambda made, which: made[places[which]])
    for name in ("d", "dk", "dv"):
        monkeypatch.setitem(SIZES, name, 9 + forward)  # what was lowered in this process for others has one place
    torch.manual_seed(0)
    inputs = drawn(loop, 37)
    with tuned.trying(Tiling(levels=1)):
        found = run_in_parts(nl.compile(loop, backend="triton"), inputs, [20], losses=False)
    assert_equal(differences(found, run(nl.compile(loop, backend="reference"), inputs, losses=False)), 1e-9)
    (text,) = {path.read_text() for path in cache.cache_dir().glob("*_scan_triton*.py")}
    first, second = ("memory", "registers") if forward else ("registers", "memory")
    assert f"its state in {first} forward and its state in {second} backward" in text
    # What only the last chunk leaves, others neither write nor read.
    left = re.findall(r"tl\.(?:load|store)\((?:d_)?\w+__update_new_at .*", text)
    assert bool(left) == loop.__name__.startswith("TTT") and all("mask=" in line and "last" in line for line in left)


@pytest.mark.parametrize("loop", [zoo.RetNet, zoo.GatedDeltaNet, zoo.TTTLinear], ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("levels", [1, 2])
def test_each_kind_of_scan_gives_losses_and_their_gradients(
    loop: type[nl.Loop], levels: int, kernels_of_scans: set[str]
):
    """Of a state that is affine or is not, in one kernel or in several."""
    torch.manual_seed(0)
    inputs = drawn(loop, 37)
    with tuned.trying(Tiling(rows=16, levels=levels)):
        found = run(nl.compile(loop, backend="triton"), inputs)
    assert_equal(differences(found, run(nl.compile(loop, backend="torch"), inputs)), 1e-9)
    assert kernels_of_scans and ("forward_outputs" in kernels_of_scans) == (levels == 2)


@pytest.mark.parametrize("of_direction", [(1, 1), (99, 99), (99, 1), (1, 99)], ids=str)
def test_a_call_of_few_heads_and_sequences_walks_only_the_state(
    of_direction: tuple[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """On a device of so many multiprocessors, forward and backward: each goes back from what either kept."""
    torch.manual_seed(0)
    monkeypatch.setenv("NESTLOOP_CACHE", str(tmp_path))
    monkeypatch.setattr(triton_choice, "WORTH_APART", 9)  # of keys as short as these a walk is all there is
    ran, programs, launch = list[tuple[str, ...]](), iter(of_direction), TritonStream.launch

    def launched(self: TritonStream, plan: TritonPlan, *given: Any) -> None:
        if self.signature.chunk:
            ran.append(plan.kernels)
        launch(self, plan, *given)

    monkeypatch.setattr(triton, "programs", lambda device: next(programs))
    monkeypatch.setattr(TritonStream, "launch", launched)
    monkeypatch.setitem(SIZES, "d", 7)  # what was lowered in this process for others has no such plan
    inputs = drawn(zoo.TTTLinear, 121)
    found = run(nl.compile(zoo.TTTLinear, backend="triton"), inputs, losses=False)
    assert_equal(differences(found, run(nl.compile(zoo.TTTLinear, backend="reference"), inputs, losses=False)), 1e-9)
    assert [("forward_outputs" in kernels) for kernels in ran] == [many > 1 for many in of_direction]


def test_sizes_alone_decide_whether_a_scan_walks_only_its_state():
    plan = plan_of(zoo.TTTLinear, d=64)
    assert plan.at_once is not None and plan.at_once.kernels[:2] == ("forward_states", "forward_outputs")
    for items, tokens, is_few in ((32, 32768, True), (66, 113, True), (66, 112, False), (67, 32768, False)):
        assert (plan.for_call(items, tokens, programs=132) is plan.at_once) == is_few
    assert plan_of(zoo.DeltaNet).at_once is None  # whose state is affine: it is walked alone in every call
    assert plan_of(zoo.TTTLinear, Tiling(levels=1), d=64).at_once is None


@pytest.mark.parametrize(("sequences", "name"), [(1, "Triton, chunks of 16, at once"), (16, "Triton, chunks of 16")])
def test_the_cost_model_takes_the_scan_that_a_call_takes(sequences: int, name: str):
    found = costs.costs_of(zoo.TTTLinear, {"B": sequences, "H": 32, "N": 32768, "d": 64}, "h100")
    assert {row.candidate.name for row in found.rows["forward"] if row.candidate.by_default} == {name}


@pytest.mark.parametrize(("a", "e"), [(1, 5), (16, 5), (5, 33)], ids=str)
def test_float32_is_the_reference_in_float64_to_rounding(a: int, e: int):
    inputs = inputs_of(Causally, a, e, 21)
    wanted = run(nl.compile(Causally, backend="reference"), inputs)
    found = run(nl.compile(Causally, backend="triton"), single(inputs))
    assert_equal(differences(doubled(found), doubled(wanted)), 1e-5)


@pytest.mark.parametrize("loop", [zoo.GLA, zoo.GatedDeltaNet, zoo.TTTLinear], ids=lambda loop: loop.__name__)
def test_float32_in_tf32_is_close_to_float64(loop: type[nl.Loop], matmul_precision: Any):
    """As PyTorch's products are where it may: within 16 times what a factor loses, 10 bits kept of its mantissa."""
    torch.manual_seed(0)
    inputs = drawn(loop, 21)
    matmul_precision("high")
    found = doubled(run(nl.compile(loop, backend="triton"), single(inputs)))
    moved = differences(found, run(nl.compile(loop, backend="torch"), inputs))
    assert 2.0**-14 < max(moved.values()) <= 16 * 2.0**-10


@pytest.mark.oldest_triton
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision_is_close_to_float64(dtype: torch.dtype):
    """Within 16 roundings of the largest element: of each view, of the factors of the products in a row, of z."""
    torch.manual_seed(0)
    inputs = drawn(zoo.DeltaNet, 21)
    low = {n: t.detach().to(dtype).requires_grad_() for n, t in inputs.views.items()}
    weights = {n: t.detach().float() for n, t in inputs.weights.items()}
    z, _ = nl.compile(zoo.DeltaNet, backend="triton")(low, weights)
    exact = {n: t.detach().double().requires_grad_() for n, t in low.items()}
    wanted, _ = nl.compile(zoo.DeltaNet, backend="reference")(exact, {n: t.double() for n, t in weights.items()})
    cotangent = torch.randn_like(z)
    found = torch.autograd.grad((z * cotangent).sum(), list(low.values()))
    gradients = torch.autograd.grad((wanted * cotangent.double()).sum(), list(exact.values()))
    for made, right in zip([z, *found], [wanted, *gradients], strict=True):
        assert made.dtype == dtype
        assert (made.double() - right).abs().max() <= 16 * LOW[dtype] * right.abs().max()


def test_strided_views_are_read_where_they_lie():
    torch.manual_seed(0)
    inputs = drawn(zoo.DeltaNet, 19)
    spread = {n: t.detach().transpose(1, 2).contiguous().transpose(1, 2) for n, t in inputs.views.items()}
    op = nl.compile(zoo.DeltaNet, backend="triton")
    assert not spread["k"].is_contiguous()
    assert torch.equal(op(spread, inputs.weights)[0], op(inputs.views, inputs.weights)[0])


@pytest.mark.oldest_triton
def test_a_state_goes_from_one_backend_to_the_other():
    torch.manual_seed(0)
    inputs, whole = drawn(zoo.TTTLinear, 32), nl.compile(zoo.TTTLinear, backend="torch")
    first = {n: t[:, :, :16] for n, t in inputs.views.items()}
    rest = {n: t[:, :, 16:] for n, t in inputs.views.items()}
    wanted, _ = whole(inputs.views, inputs.weights)
    for begins, goes_on in (("torch", "triton"), ("triton", "cpp")):
        _, state = nl.compile(zoo.TTTLinear, backend=begins)(first, inputs.weights)
        z, _ = nl.compile(zoo.TTTLinear, backend=goes_on)(rest, inputs.weights, state)
        torch.testing.assert_close(z, wanted[:, :, 16:], rtol=1e-9, atol=1e-12)


def test_nothing_is_computed_of_no_sequences():
    inputs = drawn(zoo.DeltaNet, 19)
    none = {n: t[:0] for n, t in inputs.views.items()}
    z, state = nl.compile(zoo.DeltaNet, backend="triton")(none, inputs.weights)
    assert z.shape[0] == 0 and all(t.shape[0] == 0 for t in state.values() if isinstance(t, torch.Tensor))


@pytest.mark.oldest_triton
def test_the_op_is_an_op_of_pytorch():
    torch.manual_seed(0)
    inputs = drawn(zoo.CausalLinearAttention, 9)
    op = nl.compile(zoo.CausalLinearAttention, backend="triton")
    op(inputs.views, inputs.weights)
    (name,) = op._names.values()
    signature = STREAM_OPS[name].signature
    given = {n: t.transpose(0, 1) for n, t in inputs.views.items()}
    given |= {n: torch.zeros(2, 1, *signature.tiles[n], dtype=torch.float64) for n in signature.fast}
    torch.library.opcheck(getattr(torch.ops.nestloop, name).default, tuple(given[n] for n in signature.inputs))


def test_products_follow_what_pytorch_is_told(matmul_precision: Any):
    for told, taken in (("highest", "tf32x3"), ("high", "tf32")):
        matmul_precision(told)
        assert TritonStream.settings(torch.float32, torch.float32)["PRODUCT"] == taken
    assert TritonStream.settings(torch.float32, torch.bfloat16)["PRODUCT"] == "bf16"


@pytest.mark.parametrize("loop", [zoo.Mesa, zoo.OmegaNet], ids=lambda loop: loop.__name__)
def test_views_are_read_where_they_lie(loop: type[nl.Loop]):
    """Where graphs hold for one number of tokens, and where windows overlap, too."""
    torch.manual_seed(0)
    inputs, op = drawn(loop, 19), nl.compile(loop, backend="triton")
    plain = run(op, inputs)
    for name, view in inputs.views.items():
        inputs.views[name] = view.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert_equal(differences(run(op, inputs), plain), 0.0)
