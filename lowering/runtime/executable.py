"""Stage `run`: a plan as a function of views, weights, state and order."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nestloop.lang.binding import grouped_heads
from nestloop.lang.loop import LoopSpec
from nestloop.lang.state import identifier, steps_with
from nestloop.lowering.runtime import cache
from nestloop.lowering.runtime.attention import attention
from nestloop.lowering.runtime.batches import BatchLoop, autocast_dtype, compute_dtype, with_pieces
from nestloop.lowering.runtime.choice import Choice, choose
from nestloop.lowering.runtime.code import Code
from nestloop.lowering.runtime.library import NestedLoopOp
from nestloop.lowering.runtime.native import NativeModule, NativePlan
from nestloop.lowering.runtime.plan import Plan
from nestloop.lowering.runtime.recipe import Asked, Origin, Recipe
from nestloop.lowering.runtime.signature import Signature
from nestloop.lowering.runtime.triton import TritonBatches
from nestloop.lowering.runtime.triton_plan import TritonPlan
from nestloop.lowering.runtime.work import pays

Executable = Callable[..., tuple[Tensor, dict[str, Any], Tensor | None]]

EXECUTABLES: dict[str, Executable] = {}
OPS: dict[str, NestedLoopOp] = {}  # what those of them call that are no attention
_BY_CODE: dict[str, NestedLoopOp] = {}  # the same by what they run, which does not say how views come


def build(
    spec: LoopSpec, plan: Plan, heads: int, losses: bool, asked: Asked, wide: Callable[[], Plan] | None = None
) -> str:
    """Make a plan runnable; its name in `EXECUTABLES`.

    Args:
        asked: what is to run (`choose`).
        wide: gives the plan for weights that this one is not precise with (`rewrites.gram`), when they come.

    Raises:
        NoPlanError: "cpp" or "triton" was asked for, and the loop has none, or it cannot be built.
    """
    if plan.form == "attention" and (spec.slides or asked.backend != "cpp"):
        over = f"_to_{spec.schedule.window}" if spec.slides else ""
        name = f"softmax_attention_{plan.scale}_{heads}{over}_{_layout(spec)}"
        EXECUTABLES.setdefault(name, attention(spec, plan.scale, heads))
        return name
    op = batch_op(Recipe(Origin.of(spec), plan, heads, losses, asked, wide))
    made = f"{op.name}_{_layout(spec)}"
    with cache.one_thread():
        if made not in EXECUTABLES:
            OPS[made], EXECUTABLES[made] = op, _loop(op, spec)
    return made


@cache.one_thread()
def batch_op(recipe: Recipe, name: str = "") -> NestedLoopOp:
    """The op of a loop of batches, made where there is none of that name.

    Args:
        name: that it was made under where the recipe was kept; "" for that which says what runs here.

    Raises:
        NoPlanError: as `build`.
    """
    origin, plan = recipe.origin, recipe.plan
    chosen = choose(origin, plan, recipe.asked)
    name = name or cache.write(plan.name, plan.source).stem + chosen.suffix
    if name in _BY_CODE:
        return _BY_CODE[name]
    signature = _signature(recipe, plan.low if isinstance(chosen.native, TritonPlan) else ())
    code = _code(recipe, plan, signature, chosen)

    def other() -> Code:
        assert recipe.wide is not None
        return _code(recipe, recipe.wide, signature, choose(origin, recipe.wide, recipe.asked))

    def instead() -> NestedLoopOp:
        return batch_op(replace(recipe, asked=replace(recipe.asked, backend="torch")))

    wide = other if recipe.make_wide is not None else None
    _BY_CODE[name] = NestedLoopOp(name, code, signature, recipe, wide, instead if chosen.falls_back else None)
    return _BY_CODE[name]


def _layout(spec: LoopSpec) -> str:
    """How heads come in a call's tensors, as a digest: generated code, which finds them first in each, is the same."""
    views = [(name, view.group, getattr(view, "shared", False)) for name, view in spec.inputs.items()]
    return cache.digest(repr([*views, *[(name, weight.shared) for name, weight in spec.slow.items()]]))


def _code(recipe: Recipe, plan: Plan, signature: Signature, chosen: Choice) -> Code:
    """A plan's generated code, loaded."""
    module = cache.load(cache.write(plan.name, plan.source))
    module = compiled_pieces(module, plan) if recipe.asked.inductor else module
    library = None if chosen.native is None else _library(recipe.origin, plan.name, chosen.native, module, signature)
    module = module if library is None else library.prepared()
    return Code(module, plan.rows, tuple(plan.shared), library, pays(recipe.origin, plan) if chosen.by_size else None)


def _library(
    origin: Origin, name: str, plan: NativePlan | TritonPlan, module: types.ModuleType, signature: Signature
) -> NativeModule | TritonBatches:
    assert origin.schedule is not None
    loop = BatchLoop(
        inputs=signature.inputs,
        tokens=signature.tokens,
        fast=signature.fast,
        ends=signature.ends,
        tiles=signature.tiles,
        batches=origin.schedule.batches,
        weight=origin.schedule.weight,
        losses=signature.losses,
        shared=signature.shared,
    )
    if isinstance(plan, TritonPlan):
        return TritonBatches(name, plan, module, loop)
    return NativeModule(name, plan, module, loop)


def compiled_pieces(module: types.ModuleType, plan: Plan) -> types.ModuleType:
    """A copy of a generated module whose pieces go through `torch.compile`: each compiles once for all steps."""
    pieces = [name for piece in plan.pieces for name in (piece, f"{piece}_vjp")]
    pieces += ["advance"] if hasattr(module, "advance") else []
    return with_pieces(module, **{name: torch.compile(getattr(module, name)) for name in pieces})


def _signature(recipe: Recipe, low: tuple[str, ...]) -> Signature:
    origin, plan = recipe.origin, recipe.plan
    schedule = origin.schedule if plan.form == "loop" else None
    return Signature(
        tokens=origin.tokens,
        fast=plan.inputs,
        slow=origin.slow,
        tiles={**plan.tiles, "z": plan.output},
        ends=tuple(plan.tiles),
        losses=recipe.losses and schedule is not None,
        steps=(lambda length: 1) if schedule is None else schedule.steps_on,
        ordered=schedule is not None and schedule.needs_order,
        heads=recipe.heads,
        shared=plan.shared,
        decides=recipe.make_wide is not None,
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
