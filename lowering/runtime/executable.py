"""Stage `run`: a plan as a function of views, weights, state and order."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop, sdpa_flop

from nestloop.lang.binding import grouped_heads
from nestloop.lang.loop import LoopSpec
from nestloop.lang.state import identifier, steps_with
from nestloop.lowering.runtime import cache, compiler
from nestloop.lowering.runtime.batches import BatchLoop, autocast_dtype, compute_dtype, output_dtype, with_pieces
from nestloop.lowering.runtime.library import Code, NestedLoopOp
from nestloop.lowering.runtime.native import NativeModule, NativePlan
from nestloop.lowering.runtime.plan import Plan
from nestloop.lowering.runtime.refusals import check_arguments, check_triton, no_native
from nestloop.lowering.runtime.signature import Signature
from nestloop.lowering.runtime.triton import TritonBatches
from nestloop.lowering.runtime.triton_plan import TritonPlan
from nestloop.lowering.runtime.work import flops, pays

Executable = Callable[..., tuple[Tensor, dict[str, Tensor], Tensor | None]]

LONGEST_MODULE = 3000  # lines of Triton; of more, one kernel takes minutes to compile
# Numbers alive at once, over four times a multiprocessor's registers: such a kernel runs slowly, or on no device.
MOST_ALIVE = 280_000
EXECUTABLES: dict[str, Executable] = {}
OPS: dict[str, NestedLoopOp] = {}  # what those of them call that are no attention
_BY_CODE: dict[str, NestedLoopOp] = {}  # the same by what they run, which does not say how views come


@cache.one_thread()
def build(
    spec: LoopSpec,
    plan: Plan,
    heads: int,
    losses: bool,
    inductor: bool,
    backend: str = "torch",
    double: bool = False,
    wide: Callable[[], Plan] | None = None,
    gpu: bool = False,
) -> str:
    """Make a plan runnable; its name in `EXECUTABLES`.

    Args:
        backend: "torch"; "cpp"; "triton"; or "auto": where the plan has C++ and it can be built, C++ or PyTorch by the
            sizes of a call; else PyTorch; on a GPU Triton, where the plan has it (`settled`).
        double: whether it is float64 that will be computed in.
        wide: gives the plan for weights that this one is not precise with (`rewrites.gram`), when they come.
        gpu: whether "auto" may be Triton.

    Raises:
        NoPlanError: "cpp" was asked for, and the loop has no C++ or it cannot be built.
    """
    asked, backend = backend, settled(plan, backend, gpu)
    if plan.form == "attention" and backend != "cpp":
        name = f"softmax_attention_{plan.scale}_{heads}_{_layout(spec)}"
        EXECUTABLES.setdefault(name, _attention(spec, plan.scale, heads))
        return name
    if backend == "triton":
        check_triton(spec, plan)
    reason = no_native_reason(plan, inductor, backend, double)
    native = plan.triton if backend == "triton" else plan.native if backend != "torch" and not reason else None
    path = cache.write(plan.name, plan.source)
    name = f"{path.stem}_inductor" if inductor else path.stem
    if native is not None:  # a module of PyTorch goes with several of C++
        name = f"{path.stem}_{named_backend(asked, backend)}_{cache.digest(native.text)}"
    if name not in _BY_CODE:
        low = plan.low if backend == "triton" else ()
        signature = _signature(spec, plan, heads, losses, wide is not None, low)
        check_arguments(spec, signature)
        code = _code(spec, plan, signature, inductor, backend, double)

        def other() -> Code:
            assert wide is not None
            found = wide()
            return _code(spec, found, signature, inductor, settled(found, asked, gpu), double)

        def instead() -> NestedLoopOp:
            return OPS[build(spec, plan, heads, losses, inductor, "torch", double, wide)]

        work, falls_back = flops(spec, plan, heads), backend == "triton" != asked
        _BY_CODE[name] = NestedLoopOp(
            name, code, signature, work, spec, wide and other, instead if falls_back else None
        )
    made = f"{name}_{_layout(spec)}"
    if made not in EXECUTABLES:
        OPS[made], EXECUTABLES[made] = _BY_CODE[name], _loop(_BY_CODE[name], spec)
    return made


def _layout(spec: LoopSpec) -> str:
    """How heads come in a call's tensors, as a digest: generated code, which finds them first in each, is the same."""
    views = [(name, view.group, getattr(view, "shared", False)) for name, view in spec.inputs.items()]
    return cache.digest(repr([*views, *[(name, weight.shared) for name, weight in spec.slow.items()]]))


def _code(spec: LoopSpec, plan: Plan, signature: Signature, inductor: bool, backend: str, double: bool) -> Code:
    """A plan's generated code, loaded. Raises `NoPlanError` as `build` does."""
    reason = no_native_reason(plan, inductor, backend, double)
    if backend == "cpp" and reason:
        raise no_native(spec, reason)
    module = cache.load(cache.write(plan.name, plan.source))
    module = compiled_pieces(module, plan) if inductor else module
    if backend == "triton":
        check_triton(spec, plan)
    native = plan.triton if backend == "triton" else plan.native if backend != "torch" and not reason else None
    library = None if native is None else _library(spec, plan.name, native, module, signature)
    module = module if library is None else library.prepared()
    return Code(module, plan.rows, tuple(plan.shared), library, pays(spec, plan) if backend == "auto" else None)


def settled(plan: Plan, backend: str, gpu: bool) -> str:
    """What "auto" is on a GPU: Triton where a plan has it that does not take minutes to compile, nor far more registers
    than there are; else PyTorch."""
    if backend != "auto" or not gpu:
        return backend
    if plan.triton is None or plan.triton.text.count("\n") > LONGEST_MODULE:
        return "torch"
    alive = [function["alive"] for function in plan.triton.work["functions"].values()]
    return "triton" if max(alive, default=0) <= MOST_ALIVE else "torch"


def named_backend(asked: str, settled: str) -> str:
    """Of an op, in its name: what was asked for and what that is, which only "auto" tells apart."""
    return settled if asked == settled else f"{asked}_{settled}"


def no_native_reason(plan: Plan, inductor: bool, backend: str, double: bool) -> str:
    """Why a backend that may be C++ is not; "" where it is, or was not asked for."""
    if inductor:
        return "inductor compiles generated PyTorch"
    return "" if backend in ("torch", "triton") else not_native(plan, double)


def not_native(plan: Plan, double: bool = False, build_now: bool = True) -> str:
    """Why a plan does not run as C++ here, "" where it does. A compiler that is missing or fails is announced once.

    `build_now`: find out by building it; else a compiler's being there is enough.
    """
    if plan.native is None:
        return plan.not_native
    scalar = "double" if double else "float"
    key = (plan.native.text, scalar)
    if key in _FAILED:
        return _FAILED[key]
    try:
        if build_now:
            compiler.loaded(plan.name, plan.native.text, scalar)
        else:
            compiler.find()
    except compiler.BuildError as error:
        if build_now:
            _announce(str(error))
            _FAILED[key] = str(error)
        return str(error)
    return ""


def _announce(cause: str) -> None:
    if not _FAILED:
        warnings.warn(
            f"nestloop runs generated PyTorch instead of C++, which is slower: {cause}. "
            "Install g++ or clang++, or name one with CXX; backend='torch' says that this is intended.",
            stacklevel=2,
        )


_FAILED: dict[tuple[str, str], str] = {}


def _library(
    spec: LoopSpec, name: str, plan: NativePlan | TritonPlan, module: types.ModuleType, signature: Signature
) -> NativeModule | TritonBatches:
    loop = BatchLoop(
        inputs=signature.inputs,
        tokens=signature.tokens,
        fast=signature.fast,
        ends=signature.ends,
        tiles=signature.tiles,
        batches=spec.schedule.batches,
        weight=spec.schedule.weight,
        losses=signature.losses,
        shared=signature.shared,
    )
    if isinstance(plan, TritonPlan):
        return TritonBatches(name, plan, module, loop)
    return NativeModule(name, plan, module, loop)


_ATTENDING = ("q", "k", "v")


def _count_attention_on_cpu() -> None:
    """FLOPs of PyTorch's CPU attention, which its own counter takes for free; a kernel estimator may run on it."""
    packet = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if packet not in flop_registry:
        register_flop_formula(packet)(lambda q, k, v, *_, out_shape=None, **__: sdpa_flop(q, k, v))
    packet = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    if packet not in flop_registry:
        register_flop_formula(packet)(lambda d, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop(d, q, k, v))


_count_attention_on_cpu()


def _attention(spec: LoopSpec, scale: float | None, heads: int) -> Executable:
    """The loop as PyTorch's own attention, differentiable as it is."""

    def every_head(name: str, view: Tensor) -> Tensor:
        if getattr(spec.inputs[name], "shared", False):
            return view.unsqueeze(1).expand(-1, heads, -1, -1)
        return grouped_heads(spec, name, view)

    def run(
        views: Mapping[str, Tensor], weights: Any, state: Any, order: Any
    ) -> tuple[Tensor, dict[str, Tensor], None]:
        given = [every_head(name, views[name]) for name in _ATTENDING]
        q, k, v = (view.to(output_dtype(given, given)) for view in given)
        z = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return z, {}, None

    return run


def compiled_pieces(module: types.ModuleType, plan: Plan) -> types.ModuleType:
    """A copy of a generated module whose pieces go through `torch.compile`: each compiles once for all steps."""
    pieces = [name for piece in plan.pieces for name in (piece, f"{piece}_vjp")]
    pieces += ["advance"] if hasattr(module, "advance") else []
    return with_pieces(module, **{name: torch.compile(getattr(module, name)) for name in pieces})


def _signature(spec: LoopSpec, plan: Plan, heads: int, losses: bool, decides: bool, low: tuple[str, ...]) -> Signature:
    learns = plan.form == "loop"
    return Signature(
        tokens=tuple(spec.inputs),
        fast=plan.inputs,
        slow=tuple(spec.slow),
        tiles={**plan.tiles, "z": plan.output},
        ends=tuple(plan.tiles),
        losses=losses and learns,
        steps=spec.schedule.steps_on if learns else lambda length: 1,
        ordered=spec.schedule.needs_order and learns,
        heads=heads,
        shared=plan.shared,
        decides=decides,
        low=low,
    )


def _loop(op: NestedLoopOp, spec: LoopSpec) -> Executable:
    signature = op.signature
    beside = {identifier(name): entry for name, entry in steps_with(spec).items()}

    def start(name: str, weights: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """What a step has beside the fast weights, before the first: [H, 1, *]."""
        entry = beside[name]
        if entry.part == "initial" and entry.like.name in weights:
            return weights[entry.like.name].unsqueeze(1)
        return like.new_zeros(signature.heads, 1, *signature.tiles[name], dtype=compute_dtype([like]))

    def run(
        views: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        state: Mapping[str, Tensor] | None,
        order: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        tensors = [heads_first(spec, name, views[name]) for name in spec.inputs]
        for name in signature.fast:
            if name in beside:
                tensors.append(start(name, weights, tensors[0]))
            else:
                tensors.append(weights[name].unsqueeze(1) if state is None else state[name].transpose(0, 1))
        for name in spec.slow:
            weight = weights[name]
            tensors.append(weight[None, None] if spec.slow[name].shared else weight.unsqueeze(1))
        if signature.ordered:
            assert order is not None
            tensors.append(order.unsqueeze(1) if order.ndim == 2 else order.transpose(0, 1))
        made = dict(zip(signature.results, op(*tensors), strict=True))
        ends = {name: made[f"end_{name}"].transpose(0, 1) for name in signature.ends if name not in beside}
        losses = made["losses"].transpose(0, 1) if signature.losses else None
        return made["z"].transpose(0, 1), ends, losses

    return run


def heads_first(spec: LoopSpec, name: str, view: Tensor) -> Tensor:
    """A view of a call, [B, H, N, *] or [B, H / group, N, *] -> [H, B, N, *]; [B, N, *] -> [1, B, N, *]. Under autocast
    in its precision, as for any product."""
    view = grouped_heads(spec, name, view)
    low = autocast_dtype(view.device.type)
    if low is not None and view.dtype == torch.float32:
        view = view.to(low)
    return view.unsqueeze(0) if getattr(spec.inputs[name], "shared", False) else view.transpose(0, 1)
