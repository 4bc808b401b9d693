"""Kernels of streams as they are compiled and launched, for devices that need not be there."""

from __future__ import annotations

import dataclasses

import pytest

import nestloop as nl
from nestloop import inspection, zoo
from nestloop.errors import NoPlanError, SharedMemoryError
from nestloop.lowering import pipeline
from nestloop.lowering.runtime import offline
from nestloop.lowering.runtime.refusals import shared_memory_of
from nestloop.lowering.runtime.triton_plan import Tiling
from tests.drawn import SIZES
from tests.lowering.runtime.scans import UNPLANNED, plan_of

pytest.importorskip("triton")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("loop", "d", "rows"),
    [
        pytest.param(zoo.LightningAttention, 128, 64, id="products alone"),
        pytest.param(zoo.DeltaNet, 64, 64, id="systems, which others take solved"),
        pytest.param(zoo.GatedDeltaNet, 64, 32, id="systems and decays"),
        pytest.param(zoo.CausalLinearAttentionElu, 64, 32, id="tiles put together"),
    ],
)
def test_wide_products_alone_take_long_chunks(loop: type[nl.Loop], d: int, rows: int):
    assert plan_of(loop, d=d, dk=d, dv=d).rows == rows


@pytest.mark.parametrize(
    ("loop", "warps"),
    [
        pytest.param(zoo.DeltaNet, 4, id="products alone, of factors in shared memory"),
        pytest.param(zoo.RetNet, 8, id="decays beside them"),
        pytest.param(zoo.GatedDeltaNet, 4, id="few tiles"),
    ],
)
def test_cotangents_of_tokens_take_few_warps_where_these_hold_their_tiles(loop: type[nl.Loop], warps: int):
    plan = plan_of(loop, Tiling(levels=2), d=64, dk=64, dv=64)
    (launch,) = (one for one in plan.backward_launches if one.kernel == "backward_tokens")
    assert launch.warps == warps


def test_no_product_shifts_the_rows_of_a_triangle_of_ones():
    """Of a state that does not decay, what a step is taken at has all steps before it."""
    assert "exact_dot" not in plan_of(zoo.DeltaNet, dk=64, dv=64).text


def test_a_state_that_is_not_affine_stays_with_its_program():
    assert plan_of(zoo.TTTLinear).kernels == ("forward", "backward")
    # conjugate gradients read the state, and what it becomes does not
    wanted = ("forward_states", "forward_outputs", "backward_states", "backward_prepare_cotangents")
    assert plan_of(zoo.MesaNet).kernels == (*wanted, "backward_cotangents", "backward_tokens", "backward_sums")


@pytest.mark.parametrize("loop", [zoo.DeltaNet, zoo.KDA], ids=lambda loop: loop.__name__)
def test_systems_are_solved_ahead_of_the_walks(loop: type[nl.Loop]):
    plan = plan_of(loop, dk=64, dv=64)
    forward = ("forward_prepare_states", "forward_states", "forward_outputs")
    backward = ("backward_prepare_walks", "backward_states", "backward_cotangents", "backward_tokens")
    assert plan.kernels == (*forward, *backward)
    assert {one.over for one in plan.all_launches if "_prepare_" in one.kernel} == {"chunks"}

    def text(name: str) -> str:
        return plan.text.partition(f"def {name}(")[2].partition("\n\n\n")[0]

    for function, handed in (("advance", "ready_"), ("chunk_state_vjp", "pulled_"), ("chunk", "ready_")):
        assert "solve" not in text(function) and f"{handed}1_at" in text(function)
    assert "solve" not in text("chunk_vjp") and {"ready_1_at", "pulled_3_at"} <= set(text("chunk_vjp").split(", "))
    # Two right sides forward, and two more backward, of the transpose: a matrix is inverted once.
    for function, count, turned in (("prepare_advance", 2, 0), ("prepare_walks", 4, 2)):
        assert text(function).count("tiles.inverse_triangular(") == 1 and "solve_triangular(" not in text(function)
        assert text(function).count("tiles.solved(") == count
        assert text(function).count("tiles.solved(tl.trans(") == turned


@pytest.mark.parametrize(
    ("loop", "rows"),
    [(zoo.CausalLinearAttention, None), (zoo.RetNet, 32), (zoo.GLA, None)],
    ids=["CausalLinearAttention", "RetNet", "GLA"],
)
def test_nothing_is_prepared_where_a_walk_is_short(loop: type[nl.Loop], rows: int | None):
    """Decays of 64 tokens from each other are worth it: RetNet's, whose chunks are as long, are told to be shorter."""
    assert not [kernel for kernel in plan_of(loop, Tiling(rows=rows)).kernels if "_prepare_" in kernel]


def test_explain_says_which_kernels_run():
    lines = inspection._kernels(plan_of(zoo.DeltaNet, dk=64, dv=64))
    assert "  forward_states: a program a head and sequence and each of 2 strips of its state, 4 warps" in lines
    text = nl.explain(nl.compile(zoo.DeltaNet, backend="triton"))
    assert "runs: generated Triton, asked for (backend 'triton'; tensors on a CPU are interpreted)" in text
    assert "\n  forward_prepare_states: a program a chunk of each, " in text
    assert "\n  forward_outputs: a program a chunk of each, " in text
    alone = nl.explain(nl.compile(zoo.OmegaNet, backend="triton"))
    assert "\n  backward: a program a head and sequence, " in alone and "_outputs" not in alone
    either = nl.explain(nl.compile(zoo.TTTLinear, backend="triton"), d=64)
    few = "at most half as many heads and sequences as multiprocessors, and more than 7 chunks"
    assert f"\n  or, with {few}, these at once:\n  forward_states: a program a head and sequence" in either


@pytest.mark.oldest_triton
@pytest.mark.parametrize("device", ["sm_90", "sm_80", "gfx942"])
def test_kernels_compile_for_devices_that_are_not_there(device: str):
    plan = plan_of(zoo.DeltaNet, dk=64, dv=64)
    for launch in plan.forward_launches:
        made = offline.compiled(plan, launch.kernel, device)
        assert made.shared <= offline.SHARED[device] and made.registers <= 512
        assert not any(made.spilled) or device != "sm_90"
        assert "dot" in made.text["ttgir"]
        assert "mfma" in made.text["amdgcn"] if device == "gfx942" else "mma" in made.text["ptx"]


@pytest.mark.parametrize("device", ["sm_90", "gfx942"])
def test_linear_systems_compile(device: str):
    made = offline.compiled(plan_of(zoo.Mesa), "forward_outputs", device)
    assert made.shared <= offline.SHARED[device] and max(made.spilled) <= 128


@pytest.mark.oldest_triton
def test_what_does_not_compile_is_refused():
    plan = plan_of(zoo.CausalLinearAttention)
    broken = dataclasses.replace(plan, text=plan.text.replace("tl.cdiv(", "tl.no_such_function("))
    with pytest.raises(NoPlanError) as refusal:
        offline.compiled(broken, "forward_states")
    assert str(refusal.value).startswith("The forward_states kernel does not compile for sm_90.")


@pytest.mark.oldest_triton
def test_what_a_product_reads_is_computed_once():
    """Not by each thread that the product needs it in: Triton would take the ELU of a key there."""
    plan = plan_of(zoo.NormAttention, dk=64, dv=64)
    exponentials = []
    for launch in plan.launches("forward"):
        made = offline.compiled(plan, launch.kernel)
        exponentials += [line for line in made.text["ttgir"].splitlines() if "math.exp" in line]
        assert made.spilled == (0, 0)
    assert len(exponentials) >= 2 and not any("dot_op" in line or "#linear" in line for line in exponentials)


def hoisted(made: offline.Compiled) -> list[str]:
    """Lines of a kernel that compute places of two axes before its first loop."""
    before, _ = made.text["ttgir"].split("scf.for", 1)
    return [line for line in before.splitlines() if "tt.expand_dims" in line or "tt.broadcast" in line]


@pytest.mark.oldest_triton
def test_places_are_computed_where_they_are_read():
    """Not before a kernel's first loop: there they would take registers from its start to its end."""
    plan = plan_of(zoo.TTTLinear, d=64)
    once = dataclasses.replace(plan, text=plan.text.replace("tiles.anew(n) + ", ""))
    assert not hoisted(offline.compiled(plan, "backward"))
    assert hoisted(offline.compiled(once, "backward"))  # as Triton has it


TOO_LARGE = """The forward_outputs kernel wants more shared memory than the device has.
  given: {wanted:,} bytes of shared memory for a program
  need:  at most {available:,}: its largest tile is [n,dv], 16,384 bytes in float32
  fix:   make n at most 32 (it is 64): a smaller size, or chunks of fewer tokens where that is n; or write \
backend="torch": generated PyTorch runs every loop, on a GPU too"""


def test_what_does_not_fit_shared_memory_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Before it is launched: where it is compiled, and in the place of Triton's own error."""
    from triton.runtime.errors import OutOfResources

    plan = plan_of(zoo.CausalLinearAttention, dk=64, dv=64)
    wanted = offline.compiled(plan, "forward_outputs").shared
    monkeypatch.setitem(offline.SHARED, "sm_90", wanted - 1)
    with pytest.raises(SharedMemoryError) as refusal:
        offline.compiled(plan, "forward_outputs")
    assert str(refusal.value) == TOO_LARGE.format(wanted=wanted, available=wanted - 1)
    with pytest.raises(SharedMemoryError) as refusal, shared_memory_of(plan, "forward_outputs"):
        raise OutOfResources(wanted, wanted - 1, "shared memory")
    assert str(refusal.value) == TOO_LARGE.format(wanted=wanted, available=wanted - 1)
    with pytest.raises(OutOfResources), shared_memory_of(plan, "forward_outputs"):
        raise OutOfResources(2048, 1024, "threads")


@pytest.mark.parametrize("loop", [zoo.CausalLaCT, zoo.Moneta], ids=lambda loop: loop.__name__)
def test_no_plan_has_a_tile_that_no_device_holds(loop: type[nl.Loop]):
    """At d = 32: a tile of 65,536 elements is all registers of a program, and more than its shared memory."""
    sizes = {**SIZES, "H": 2, **loop.spec.default_dims, "d": 32}
    lowered = pipeline.stream_stages(loop.spec, sizes, None, losses=False, part="scan", triton=True)
    assert lowered.triton is None
    assert "65536 elements is more than registers hold (262,144 bytes in float32" in lowered.not_triton


@pytest.mark.oldest_triton
def test_inspect_shows_every_stage_of_a_kernel():
    text = nl.inspect(zoo.CausalLinearAttention, "triton")
    assert "def forward_states(" in text and "decay.py" in text and "@triton.jit" in text
    assert nl.inspect(zoo.LaCT, "triton") == f"none: {UNPLANNED[zoo.LaCT]}"
    ttir = nl.inspect(zoo.CausalLinearAttention, "ttir")
    assert ttir.startswith("// forward_states for sm_90, bf16: ") and "// backward_tokens for sm_90, bf16: " in ttir


@pytest.mark.parametrize("loop", [zoo.GLA, zoo.TTTMLP], ids=lambda loop: loop.__name__)
def test_the_header_says_how_kernels_are_launched_and_what_functions_cost(loop: type[nl.Loop]):
    plan = plan_of(loop)
    header = plan.text.split('"""')[1]
    for one in plan.all_launches:
        strips = f" and {one.strips} strips of each" if one.strips > 1 else ""
        assert f"\n    {one.kernel}: over {one.over}{strips}, {one.warps} warps and " in header
    for name, numbers in plan.work["functions"].items():
        (line,) = (line for line in header.splitlines() if line.startswith(f"    {name}: n <= {numbers['tokens']}: "))
        assert f"{4 * numbers['moved']:,} bytes read and written; {numbers['alive']:,} numbers alive" in line
