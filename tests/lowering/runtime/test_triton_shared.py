"""What steps share and is made of slow weights alone, in Triton: equal to generated PyTorch, head by head."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import nestloop as nl
from nestloop import zoo
from nestloop.lowering import names, pipeline
from nestloop.lowering.emit import triton_fitting
from nestloop.lowering.runtime import cache, offline
from nestloop.lowering.runtime.batches import BatchLoop
from nestloop.lowering.runtime.launching import TritonCode
from nestloop.lowering.runtime.plan import Plan, keep, read
from nestloop.lowering.runtime.triton import TritonBatches

pytest.importorskip("triton")

SIZES = {"d": 5, "D": 40, "H": 3}


def lowered(loop: type[nl.Loop], **sizes: int) -> Plan:
    spec = names.safe(loop.spec, triton=True)
    return pipeline.plan(pipeline.stages(spec, {**SIZES, **sizes}, None, False, False, triton=True))


def modules(loop: type[nl.Loop], plan: Plan) -> tuple[ModuleType, ModuleType]:
    """Generated PyTorch as it is, and with kernels in the place of some of its functions."""
    spec, module = names.safe(loop.spec, triton=True), cache.load(cache.write(plan.name, plan.source))
    assert plan.triton is not None
    inputs = (*spec.inputs, *plan.inputs, *spec.slow)
    loop_of = BatchLoop(
        inputs, tuple(spec.inputs), plan.inputs, (), plan.tiles, lambda n: [], lambda n: 1.0, False, plan.shared
    )
    return module, TritonBatches(plan.name, plan.triton, module, loop_of).prepared()


def weights(plan: Plan, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The slow weights of an MTTT layer, a bias that heads share; and cotangents of what is made of them."""
    torch.manual_seed(0)
    d, wide, heads = SIZES["d"], SIZES["D"], SIZES["H"]
    shapes = {"g": (heads, 1, d, wide), "g_bias": (1, 1, wide), "scale": (heads, 1, wide), "shift": (heads, 1, wide)}
    made = {n: torch.randn(*shape, dtype=dtype) for n, shape in shapes.items()}
    assert plan.triton is not None and plan.triton.prepare is not None
    back = [n for n in plan.triton.prepare.backward if n.startswith("d_")]
    shared = {n: torch.randn(heads, 1, *plan.shared[n.removeprefix("d_")], dtype=dtype) for n in back}
    return made, shared


@pytest.fixture(params=[False, True], ids=["whole", "in blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        monkeypatch.setattr(triton_fitting, "SHORTEST_BLOCKED", 32)
        monkeypatch.setattr(triton_fitting, "ALIVE", 0)
    return request.param


@pytest.mark.oldest_triton
@pytest.mark.parametrize("wide", [40, 64])
def test_kernels_of_slow_weights_are_generated_pytorch(wide: int, blocks: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(SIZES, "D", wide)
    plan = lowered(zoo.MTTTMLP)
    assert plan.triton is not None and plan.triton.prepare is not None
    assert ("for block in tl.range" in plan.triton.prepare.text) is (blocks and wide == 64)  # blocks are whole
    given, cotangents = weights(plan, torch.float64)
    values = {**given, **cotangents}
    torch_module, triton_module = modules(zoo.MTTTMLP, plan)
    for name in ("prepare", "prepare_vjp"):
        function = getattr(torch_module, name)
        arguments = [values[n] for n in function.__code__.co_varnames[: function.__code__.co_argcount - 1]]
        for found, wanted in zip(
            getattr(triton_module, name)(*arguments, None), function(*arguments, None), strict=True
        ):
            torch.testing.assert_close(found, wanted.expand_as(found), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_rows_decide_as_generated_pytorch(dtype: torch.dtype):
    plan = lowered(zoo.MTTTMLP)
    torch_module, triton_module = modules(zoo.MTTTMLP, plan)
    assert triton_module.conditioned is not torch_module.conditioned
    given, _ = weights(plan, dtype)
    others = [torch.empty(1, 1, 1, dtype=dtype)] * (len(zoo.MTTTMLP.spec.inputs) + len(plan.inputs))
    nearly = given["g"].clone()
    nearly[2, 0, 4] = nearly[2, 0, :4].sum(0) * (1 + 2.0**-10)
    opposite = {**given, "g_bias": given["g"][:1, :, 0] - given["g"][:1, :, 1]}
    for changed, fine in ((given, True), ({**given, "g": nearly}, False), (opposite, False)):
        values = [*others, *changed.values()]
        assert bool(triton_module.conditioned(*values)) is bool(torch_module.conditioned(*values)) is fine


def test_factors_of_products_are_rounded_as_in_generated_pytorch():
    plan = lowered(zoo.MTTTMLP)
    given, cotangents = weights(plan, torch.float32)
    values = {**given, **cotangents}
    torch_module, triton_module = modules(zoo.MTTTMLP, plan)
    for name in ("prepare", "prepare_vjp"):
        function = getattr(torch_module, name)
        arguments = [values[n] for n in function.__code__.co_varnames[: function.__code__.co_argcount - 1]]
        exact = function(*arguments, None)
        rounded, found = (getattr(module, name)(*arguments, torch.bfloat16) for module in (torch_module, triton_module))
        for one, like, without in zip(found, rounded, exact, strict=True):
            error = (like - without).abs().max()
            torch.testing.assert_close(one, like.expand_as(one), rtol=2**-7, atol=float(2**-7 * like.abs().max()))
            assert bool(((one - without).abs().max() > 0.1 * error) if error > 1e-3 else True)


class Solved(nl.Loop):
    """A decoder that is the solution of a system of slow weights."""

    learner = zoo.LinearAttention.learner
    k, q, v = nl.view("d"), nl.view("d"), nl.view("d")
    a, b = nl.slow("d", "d"), nl.slow("d", "d")

    def loss(self, f, t):
        return 0.5 * (f(t.k) @ torch.linalg.solve(self.a, self.b) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)


def test_a_system_is_left_to_pytorch_which_says_that_it_has_no_solution():
    plan = lowered(Solved)
    assert "solve(" in plan.source and plan.triton is not None and plan.triton.prepare is None


def test_a_plan_that_was_kept_has_them():
    plan = lowered(zoo.MTTTMLP)
    keep("shared", plan)
    assert read("shared") == plan


@pytest.mark.parametrize(("kernel", "spilled"), [("every_prepare", 0), ("every_prepare_vjp", 4), ("every_decoders", 0)])
def test_they_compile_for_a_gpu_and_spill_one_register_at_most(kernel: str, spilled: int):
    plan = lowered(zoo.MTTTMLP, d=64, D=384, H=6).triton
    assert plan is not None and plan.prepare is not None and plan.decoders is not None
    one = plan.decoders if kernel == "every_decoders" else plan.prepare
    assert max(offline.compiled(one, kernel).spilled) <= spilled


def test_a_call_launches_one_kernel_each(monkeypatch: pytest.MonkeyPatch):
    launched: list[str] = []
    launch = TritonCode.launch

    def noting(self: TritonCode, plan: Any, direction: str, *given: Any) -> None:
        launched.extend(one.kernel for one in plan.launches(direction))
        launch(self, plan, direction, *given)

    monkeypatch.setattr(TritonCode, "launch", noting)
    torch.manual_seed(0)
    layer = nl.Layer(zoo.MTTTMLP, 24, 2, d=6, backend="triton")
    layer(torch.randn(1, 4, 24)).sum().backward()
    assert launched == ["every_decoders", "every_prepare", "forward", "forward", "backward", "every_prepare_vjp"]
