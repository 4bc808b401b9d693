"""The cost model: its counts against counts by hand, what must grow with what, what it says and what it refuses.

How long a kernel takes on a GPU is asserted nowhere: the model has not been held against one.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence

import pytest

import nestloop as nl
from nestloop import cost_table, costs, zoo
from nestloop.errors import NestloopError, NoPlanError, UnknownDeviceError, UnknownDtypeError
from nestloop.lowering import names
from nestloop.lowering.candidates import Candidate, candidates
from nestloop.lowering.runtime import offline, plan
from nestloop.lowering.runtime.tiles import spacing_within
from nestloop.lowering.runtime.triton_plan import AHEAD
from nestloop.lowering.schedule.devices import DEVICES
from nestloop.lowering.schedule.plan_work import attention
from nestloop.lowering.schedule.roofline import Estimate, Facts, Work, estimate, least, registers, resident
from nestloop.targets import trial_sizes

H200 = DEVICES["h200"]


def plans(loop: type[nl.Loop], **dims: int) -> tuple[list[Candidate], dict[str, int]]:
    """The plans of a loop, and its sizes."""
    spec = names.safe(loop.spec, triton=True)
    sizes = trial_sizes(spec, dims)
    return candidates(spec, {n: s for n, s in sizes.items() if n not in ("B", "N")}, None), sizes


def works(loop: type[nl.Loop], name: str, dtype: str = "bf16", **dims: int) -> tuple[Sequence[Work], Sequence[Work]]:
    """What forward and backward of one plan do."""
    found, sizes = plans(loop, **dims)
    (one,) = (c for c in found if c.name == name)
    spec = names.safe(loop.spec, triton=True)
    return one.work(spec, sizes, "forward", dtype), one.work(spec, sizes, "backward", dtype)


def numbers(works: Sequence[Work], b: int, h: int, n: int, warps: int = 4) -> Estimate:
    return estimate(works, H200, "bf16", warps, {"B": b, "H": h, "N": n})


@pytest.mark.parametrize("tokens", [64, 100])
@pytest.mark.parametrize("rows", [16, 32, 64])
def test_flops_of_causal_linear_attention_are_those_counted_by_hand(rows: int, tokens: int):
    b, h, d = 2, 3, 64  # so large that not every chunk of 16 keeps its state
    forward, backward = works(zoo.CausalLinearAttention, f"Triton, chunks of {rows}", dk=d, dv=d, H=h)
    tiles = [min(rows, tokens - start) for start in range(0, tokens, rows)]
    # q S and k^T v, then (q k^T) and its product with v
    assert numbers(forward, b, h, tokens).flops == b * h * sum(4 * n * d * d + 4 * n * n * d for n in tiles)
    # four products with a state, five of a chunk's tokens; k^T v again for every state that was not kept
    again = len(tiles) - -(-len(tiles) // spacing_within(len(tiles), b * h * 3 * d * tokens, b * h * d * d))
    assert again or rows > 16
    pulled = sum(8 * n * d * d + 10 * n * n * d for n in tiles) + again * 2 * rows * d * d
    assert numbers(backward, b, h, tokens).flops == b * h * pulled


def test_chunks_that_run_at_once_take_the_same_products_in_more_programs():
    b, h, n, d = 2, 3, 192, 64
    forward, backward = works(zoo.CausalLinearAttention, "Triton, chunks of 32, at once", dk=d, dv=d, H=h)
    alone, back = works(zoo.CausalLinearAttention, "Triton, chunks of 32", dk=d, dv=d, H=h)
    states, outputs = forward
    assert numbers(forward, b, h, n).flops == numbers(alone, b, h, n).flops
    # k^T v, in two strips of the state, and what else a chunk takes
    assert numbers([states], b, h, n).flops == b * h * 2 * n * d * d
    assert (numbers([states], b, h, n).programs, numbers([outputs], b, h, n).programs) == (b * h * 2, b * h * 6)
    # the states are written as factors of products, and read again, beside all that one kernel moves; q and the first
    # state are read once
    moved = numbers(forward, b, h, n).traffic - numbers(alone, b, h, n).traffic
    assert moved == b * h * (2 * 2 * 6 * d * d + 2 * 2 * n * d)
    # what reaches each state is q^T d_z; of a state's own cotangent the chunk's tokens alone have need
    assert numbers([backward[1]], b, h, n).flops == b * h * 2 * n * d * d
    assert [int(numbers([one], b, h, n).programs) for one in backward][1:] == [b * h * 2, b * h * 6]
    assert numbers(backward, b, h, n).flops == numbers(back, b, h, n).flops


@pytest.mark.parametrize(("dtype", "size"), [("bf16", 2), ("fp32", 4)])
def test_bytes_of_causal_linear_attention_are_those_counted_by_hand(dtype: str, size: int):
    b, h, n, d = 2, 3, 128, 32
    forward, backward = works(zoo.CausalLinearAttention, "Triton, chunks of 32", dtype, dk=d, dv=d, H=h)
    kept = -(-4 // spacing_within(4, b * h * 3 * d * n, b * h * d * d)) - 1
    first = 4 * h * d * d  # the state before, the same for all sequences
    # q, k and v; o and the last state, in float32; the states kept
    made = 4 * (n * d + d * d + kept * d * d)
    assert numbers(forward, b, h, n).traffic == first + b * h * (3 * n * d * size + made)
    # q, k, v, the cotangents of o and of the last state, the states kept; cotangents of q, k, v and the first state
    read, made = 4 * n * d * size + 4 * (d * d + kept * d * d), 4 * (3 * n * d + d * d)
    assert numbers(backward, b, h, n).traffic == first + b * h * (read + made)


def test_flops_and_bytes_of_mttt_linear_are_those_counted_by_hand():
    b, h, n, d, wide = 2, 3, 48, 16, 96
    for name in ("generated PyTorch", "Triton, tiles of 16"):
        forward, backward = works(zoo.MTTTLinear, name, d=d, D=wide, H=h)
        # x g^T for each token, u^T delta and the read-out; for each head once g g^T
        by_hand = b * h * n * (2 * wide * d + 4 * d * d) + h * 2 * d * d * wide
        assert numbers(forward, b, h, n).flops == by_hand
        assert numbers(backward, b, h, n).flops == 2 * by_hand  # each product has two
    # the kernel alone: k and q in bfloat16, x g^T in float32, and g_bias g^T for each head; o and the state
    found, sizes = plans(zoo.MTTTLinear, d=d, D=wide, H=h)
    (one,) = (c for c in found if c.name == "Triton, tiles of 16")
    spec = names.safe(zoo.MTTTLinear.spec, triton=True)
    alone = dataclasses.replace(one, pieces={}).work(spec, sizes, "forward", "bf16")
    given = b * h * n * (2 * d * 2 + d * 4) + 4 * h * d
    assert numbers(alone, b, h, n).traffic == given + 4 * b * h * (n * d + d * d)


def test_generated_pytorch_writes_and_reads_every_value_and_launches_every_op():
    b, h, n, d = 2, 3, 64, 16
    forward, _ = works(zoo.LinearAttention, "generated PyTorch", d=d, H=h)
    found = numbers(forward, b, h, n)
    # v times a factor, k^T of that, the step of it and its sign, and o = q w
    assert found.flops == b * h * 4 * n * d * d
    values = found.traffic - 3 * b * h * n * d * 2  # q, k and v are read
    assert values == 8 * b * h * (1 + n * d + 3 * d * d + n * d)
    assert int(forward[0].launches) == 6 and found.parts["launches"] == 6 * H200.launch


GROWING = [zoo.CausalLinearAttention, zoo.TTTLinear, zoo.MTTTLinear, zoo.MTTTMLPSGD4]


@pytest.mark.parametrize("loop", GROWING, ids=lambda loop: loop.__name__)
def test_more_tokens_or_sequences_never_take_less(loop: type[nl.Loop]):
    found, sizes = plans(loop, d=16, dk=16, dv=16, D=32, H=2)
    spec = names.safe(loop.spec, triton=True)
    for one in found:
        if one.plan is None:
            continue
        for direction in ("forward", "backward"):
            work = one.work(spec, sizes, direction, "bf16")
            for steps in ([(4, n) for n in (16, 64, 1024)], [(b, 256) for b in (1, 8, 512)]):
                taken = [numbers(work, b, 2, n) for b, n in steps]
                for few, many in itertools.pairwise(taken):
                    assert few.flops < many.flops and few.traffic < many.traffic
                    assert few.seconds <= many.seconds


def test_a_plan_from_the_cache_says_the_same(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NESTLOOP_CACHE", str(tmp_path))
    found, sizes = plans(zoo.TTTLinear, d=16, H=2)
    (one,) = (c for c in found if c.name == "Triton, chunks of 16")
    assert one.plan is not None
    plan.keep("kept", one.plan)
    again = plan.read("kept")
    assert again == one.plan
    spec = names.safe(zoo.TTTLinear.spec, triton=True)
    for direction in ("forward", "backward"):
        other = dataclasses.replace(one, plan=again)
        assert other.work(spec, sizes, direction, "bf16") == one.work(spec, sizes, direction, "bf16")


def test_registers_are_what_tiles_take_and_a_share_for_the_rest():
    assert registers(H200, 128 * 128, 4) == (255, 0)  # 128 for tiles and 127 others
    assert registers(H200, 138 * 128, 4) == (255, 8 * 10)
    assert registers(H200, 138 * 128, 8) == (69 + 127, 0)
    assert registers(DEVICES["mi300x"], 138 * 256, 4) == (138 + 127, 0)
    assert resident(H200, 4, 255, None) == 2 and resident(H200, 8, 255, None) == 1
    assert resident(H200, 4, 128, 100 << 10) == 2 and resident(H200, 4, 128, None) == 4
    assert resident(H200, 4, 16, None) == 16  # 2048 threads


@pytest.mark.slow
def test_registers_are_about_what_the_compiler_takes():
    pytest.importorskip("triton")
    found, _ = plans(zoo.CausalLinearAttention, dk=64, dv=64)
    (one,) = (c for c in found if c.name == "Triton, chunks of 32")
    assert one.plan is not None and one.plan.triton is not None
    # Tokens in float32, as tiles are counted: in bfloat16, what is read and written takes half the registers. Nothing
    # is read ahead, which would wait in shared memory instead.
    text = one.plan.triton.text.replace(f"{AHEAD}, ", "")
    made = offline.compiled(dataclasses.replace(one.plan.triton.with_warps((4, 4)), text=text), "forward", dtype="fp32")
    expected, spilled = registers(H200, one.plan.triton.work["kernels"]["forward"]["alive"], 4)
    assert abs(made.registers - expected) < 40 and made.spilled[0] == spilled == 0


def test_what_a_compiled_kernel_shows_takes_the_place_of_what_is_expected():
    _, backward = works(zoo.TTTLinear, "Triton, chunks of 16", d=64, H=8)
    shape = {"B": 32, "H": 8, "N": 1024}
    expected = estimate(backward, H200, "bf16", 4, shape)
    clean = estimate(backward, H200, "bf16", 4, shape, [Facts(128, 0, 100 << 10)])
    assert (clean.registers, clean.spilled, clean.shared, clean.resident) == (128, 0, 100 << 10, 2)
    assert expected.spilled > 0 and clean.parts["cache"] < expected.parts["cache"]
    worse = estimate(backward, H200, "bf16", 4, shape, [Facts(255, 2 * expected.spilled, 0)])
    assert worse.parts["cache"] > expected.parts["cache"] and worse.parts["memory"] == expected.parts["memory"]


def test_nothing_runs_faster_than_the_machine():
    for loop in (zoo.CausalLinearAttention, zoo.MTTTLinear, zoo.SelfAttention):
        found, sizes = plans(loop, d=64, dk=64, dv=64, D=128, H=4)
        spec, shape = names.safe(loop.spec, triton=True), {"B": 64, "H": 4, "N": 1024}
        for one in (c for c in found if c.plan is not None):
            work = one.work(spec, sizes, "forward", "bf16")
            assert estimate(work, H200, "bf16", 8, shape).seconds >= least(work, H200, "bf16", shape)


def test_softmax_attention_is_counted_by_the_usual_formula():
    shape = {"B": 2, "H": 3, "N": 128}
    found = [estimate([attention(64, d, "bf16", False)], H200, "bf16", 0, shape) for d in ("forward", "backward")]
    assert [e.flops for e in found] == [6 * 4 * 128**2 * 64, 6 * 10 * 128**2 * 64]
    long = estimate([attention(64, "forward", "bf16", False)], H200, "bf16", 0, {**shape, "N": 1 << 14})
    assert long.seconds == pytest.approx(long.flops / (0.5 * 989e12)) and long.bound == "products"
    causal = estimate([attention(64, "forward", "bf16", True)], H200, "bf16", 0, shape)
    assert 2 * causal.flops == found[0].flops and causal.traffic == 6 * 4 * 128 * 64 * 2


def test_the_length_at_which_attention_is_overtaken_is_one_at_which_it_is():
    found = costs.costs_of(zoo.DeltaNet, {"B": 8, "H": 12, "N": 2048, "dk": 64, "dv": 64})
    length = found.overtakes()
    assert length is not None and length > 64
    assert found.at(length) < found.attention_at(length) and found.at(4 * length) < found.attention_at(4 * length)
    assert found.at(length - length // 16) >= found.attention_at(length - length // 16)


def test_attention_may_be_overtaken_at_no_length(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(costs.Costs, "overtakes", lambda self: None)
    assert "overtakes softmax attention at no length up to" in nl.cost(zoo.CausalLinearAttention)


def test_the_fastest_plan_is_chosen_and_every_other_says_why_it_is_not():
    found = costs.costs_of(zoo.CausalLinearAttention, {"B": 8, "H": 12, "N": 2048, "dk": 64, "dv": 64})
    for direction, warps in zip(("forward", "backward"), found.warps, strict=True):
        rows = found.rows[direction]
        assert [row.candidate.name for row in rows if not row.why] == [found.chosen.name]
        assert [row.warps for row in rows if not row.why] == [warps]
        assert {row.candidate.name for row in rows} >= {"generated PyTorch", "Triton, chunks of 16"}
    sums = {}
    for one in {row.candidate.name for row in found.rows["forward"]}:
        times = [
            min(r.expected.seconds for r in found.rows[d] if r.candidate.name == one and r.expected is not None)
            for d in ("forward", "backward")
        ]
        sums[one] = sum(times)
    assert min(sums, key=lambda name: sums[name]) == found.chosen.name
    assert sums[found.chosen.name] == pytest.approx(found.at(2048))


def test_a_plan_that_does_not_exist_says_so():
    found = costs.costs_of(zoo.TTTLinear, {"N": 64})
    (row,) = (row for row in found.rows["forward"] if row.candidate.name == "Triton, chunks of 32")
    assert row.expected is None
    assert row.why == "no such plan: its dual form takes chunks of 16 tokens, and no others"
    assert row.why in cost_table.text(found)
    text = nl.cost(zoo.DepthwiseBranch)
    assert (
        "no such plan: its tokens mix, and generated Triton takes some of them at a time" in text
        and "chosen: generated PyTorch: " in text
    )


@pytest.mark.slow
def test_sizes_decide_whether_tokens_are_shared_out():
    few, many = (costs.costs_of(zoo.MTTTMLP, {"B": 4, "H": 3, "N": n, "d": 64, "D": 192}) for n in (196, 50_176))
    for found, several in ((few, False), (many, True)):
        assert found.chosen.in_ranges == several
        for row in found.rows["backward"]:
            if row.candidate.in_ranges and several:
                assert row.expected is not None and row.expected.programs == 132  # 12 heads and sequences, 11 ranges
            elif row.candidate.in_ranges and row.expected is None:
                assert row.why.startswith("no such plan: heads and sequences fill the device, or the tokens of a step")
            if row.candidate.by_default and row.warps == row.candidate.default_warps("backward"):
                assert row.candidate.in_ranges == several
    alone = [row for row in many.rows["forward"] if row.candidate.is_triton and not row.candidate.in_ranges]
    chosen = next(row for row in many.rows["forward"] if not row.why)
    for row in alone:
        assert row.expected is not None and chosen.expected is not None
        assert row.expected.programs == 12 and row.expected.seconds > 4 * chosen.expected.seconds
    assert few.at(50_176) < 2 * many.at(50_176) and many.at(196) < 2 * few.at(196)  # by whichever plan a length takes


def test_what_is_said_is_a_model_and_json_says_the_same():
    found = costs.costs_of(zoo.MTTTLinear, {"B": 4, "H": 2, "N": 64, "d": 16}, "b200", "fp32")
    text, said = cost_table.text(found), json.loads(json.dumps(cost_table.as_json(found)))
    assert "a model from vendors' figures and counts of generated code: nothing of it was measured" in text
    assert said["note"] in text and said["device"]["arch"] == "sm_100" and said["dims"]["N"] == 64
    assert f"chosen: {said['chosen']['plan']}" in text
    for direction in ("forward", "backward"):
        rows = [row for row in said[direction] if row["exists"]]
        assert [row["chosen"] for row in rows].count(True) == 1
        for row in rows:
            assert row["seconds"] == max(row["parts"].values()) and row["parts"][row["bound"]] == row["seconds"]


def test_auto_is_said_to_run_another_plan_where_it_does():
    said = '"auto" runs generated PyTorch there, where Triton has not been timed; backend="triton" runs it'
    assert said in nl.cost(zoo.CausalLinearAttention, "mi300x", N=4096)
    assert '"auto"' not in nl.cost(zoo.CausalLinearAttention, "h100", N=4096)


def test_a_compiled_loop_or_a_layer_knows_its_own_sizes():
    assert "dk = 32, dv = 32" in nl.cost(nl.compile(zoo.DeltaNet, dk=32, dv=32))
    assert ", d = 32, " in nl.cost(nl.Layer(zoo.LinearAttention, width=64, heads=2))


REFUSED = [
    (
        lambda: nl.cost(zoo.DeltaNet, device="h300"),
        UnknownDeviceError,
        """There are no figures of such a device.
  given: 'h300'
  need:  h200, h100, b200, a100, mi300x
  fix:   write device="h200", or add a row to nestloop/lowering/schedule/devices.py""",
    ),
    (
        lambda: nl.cost(zoo.DeltaNet, dtype="fp8"),
        UnknownDtypeError,
        """There is no such dtype of views.
  given: 'fp8'
  need:  bf16, fp16, fp32
  fix:   write dtype="bf16\"""",
    ),
    (
        lambda: nl.cost(zoo.LaCT),
        NoPlanError,
        f"""The cost model has no plan of LaCT.
  at:    {zoo.LaCT.spec.where}   class LaCT(nl.Loop):
  given: Program, whose operations are calls of their own
  need:  a loop of batches, or a stream that one scan over chunks runs
  fix:   measure it: the model counts what one kernel does from the first token to the last""",
    ),
]


@pytest.mark.parametrize(("step", "error", "message"), REFUSED, ids=["device", "dtype", "program"])
def test_what_has_no_costs_is_refused(step, error: type[NestloopError], message: str):
    with pytest.raises(error) as refusal:
        step()
    assert str(refusal.value) == message and type(refusal.value) is error
