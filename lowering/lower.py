"""The door to the compiler: a plan from the cache, or from the pipeline, made runnable.

Nothing here imports the pipeline until a loop is lowered for the first time: a cached one runs without tracing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import torch

from nestloop.errors import CompileError
from nestloop.lang.loop import LoopSpec
from nestloop.lang.parts import StaysWhole
from nestloop.lowering.in_matrices import in_matrices
from nestloop.lowering.in_parts import in_parts
from nestloop.lowering.runtime import plan as plans
from nestloop.lowering.runtime.choice import runs_triton
from nestloop.lowering.runtime.executable import EXECUTABLES, build
from nestloop.lowering.runtime.fingerprint import fingerprint, whole_numbers
from nestloop.lowering.runtime.plan import Plan
from nestloop.lowering.runtime.recipe import Asked
from nestloop.lowering.runtime.streams import STREAM_OPS, build_stream
from nestloop.lowering.runtime.triton_plan import UNTUNED, Tiling
from nestloop.lowering.runtime.tuned import tiling_for
from nestloop.lowering.runtime.whole import called_whole

__all__ = ["EXECUTABLES", "STREAM_OPS", "lower", "output_for_some", "plan_for"]

# Squares, with many divisors or a power of two: one of them is a number of tokens that a body holds for, if any is.
_SOME = (3600, 1024, 196)

_PLANS: dict[str, Plan] = {}
_NAME = "nestloop-lowering"
_THREAD = ThreadPoolExecutor(1, _NAME)


def _after_fork() -> None:
    global _THREAD
    _THREAD = ThreadPoolExecutor(1, _NAME)  # threads stay in the parent


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def plan_for(
    spec: LoopSpec,
    sizes: dict[str, int],
    tokens: int | None,
    losses: bool,
    carried: bool,
    double: bool = False,
    part: str = "",
    triton: bool = False,
    tiling: Tiling = UNTUNED,
) -> Plan:
    """The plan of a loop for one set of sizes.

    Args:
        sizes: every dim but N and n, `H` included.
        tokens: one sequence length, or None for any.
        losses: whether the inner losses are wanted.
        carried: whether fast weights come from a state even where they are frozen at zero.
        double: whether it computes in float64, for the rare body that depends on the dtype.
        part: of a stream, which of its ops (`lowering.pipeline.stream_stages`); of a loop in batches "wide", for its
            plan without the Gram form.
        triton: whether it is to have Triton too.
        tiling: of that.

    Raises:
        CompileError: a body cannot be compiled.
    """
    spec = _apart(in_matrices, spec, sizes, tokens)
    key = fingerprint(spec, sorted(sizes.items()), tokens, losses, carried, double, part, triton, tiling)
    if key is not None and key in _PLANS:
        return _PLANS[key]
    found = plans.read(key)
    if found is None:
        found = _apart(_plan, spec, sizes, tokens, losses, carried, double, part, triton, tiling)
        plans.keep(key, found)
    if key is not None:
        _PLANS[key] = found
    return found


def output_for_some(spec: LoopSpec, sizes: dict[str, int]) -> tuple[int, ...] | None:
    """The shape of one token's output of a loop whose bodies do not hold for every number of tokens, but for some, even
    ones say; None where there is none among those tried: the products of numbers that bodies name (a grid of 14 x 14),
    and those of `_SOME`. What a dim has, or half of it or twice, is not tried: there, axes may fit by accident.
    """
    named = sorted(n for n in whole_numbers(spec) if 1 < n <= 64)[:6]
    tried = dict.fromkeys((*_SOME, *(a * b for a in named for b in named)))
    return _apart(_output_for_one_of, spec, sizes, [n for n in tried if not {n, 2 * n, n / 2} & {*sizes.values()}])


def _output_for_one_of(spec: LoopSpec, sizes: dict[str, int], tried: list[int]) -> tuple[int, ...] | None:
    from nestloop.lowering.capture import capture

    for tokens in tried:
        with suppress(CompileError):
            return capture(spec, sizes, tokens).output
    return None


Made = TypeVar("Made")


def _apart(function: Callable[..., Made], *arguments: Any) -> Made:
    """Call a function in a thread that has nothing of what a user's call may be made under: a functional transform, the
    hooks of a recomputed block on saved tensors, autocast, a mode that counts FLOPs. All of these are a thread's own.

    The thread lives as long as the process: PyTorch 2.11 keeps pointers into one that has ended.
    """
    if threading.current_thread().name.startswith(_NAME):  # a body that itself calls a loop
        return function(*arguments)
    return _THREAD.submit(function, *arguments).result()


def _plan(
    spec: LoopSpec,
    sizes: dict[str, int],
    tokens: int | None,
    losses: bool,
    carried: bool,
    double: bool,
    part: str,
    triton: bool,
    tiling: Tiling,
) -> Plan:
    from nestloop.lowering import pipeline

    dtype = {"dtype": torch.float64} if double else {}
    code = {"triton": triton, "tiling": tiling}
    if spec.streams and not spec.slides:
        return pipeline.stream_plan(pipeline.stream_stages(spec, sizes, tokens, losses, part, **dtype, **code))
    wide = part == "wide"
    return pipeline.plan(pipeline.stages(spec, sizes, tokens, losses, carried, **dtype, wide=wide, **code))


def lower(
    spec: LoopSpec,
    sizes: dict[str, int],
    tokens: int | None,
    losses: bool,
    carried: bool,
    asked: Asked,
    part: str = "",
) -> str:
    """The name in `EXECUTABLES` (of a stream, in `STREAM_OPS`) of the op for one set of sizes; "" where a body holds
    for one length only and `tokens` does not say which.

    `asked`: what is to run; the other arguments as for `plan_for`.
    """
    triton, double = asked.may_be_triton, asked.double
    stacked = _apart(in_matrices, spec, sizes, tokens)
    if stacked is not spec:
        name = lower(stacked, sizes, tokens, losses, carried, asked, part)
        return called_whole(name, stacked.stacks, spec.streams) if name else ""
    parted = _apart(in_parts, spec, sizes, tokens) if triton and not spec.parts else spec
    if parted is not spec:
        with suppress(StaysWhole):  # with other tokens, say
            name = lower(parted, sizes, tokens, losses, carried, asked, part)
            if name:
                return called_whole(name, parted.parts, spec.streams)
    tiling = tiling_for(spec, sizes) if triton else UNTUNED
    plan = plan_for(spec, sizes, tokens, losses, carried, part=part, triton=triton, tiling=tiling)
    if plan.triton is None and tiling.rows is not None:  # tuned for the loop alone, without losses or a state
        tiling = UNTUNED
        plan = plan_for(spec, sizes, tokens, losses, carried, part=part, triton=triton)
    if tokens is None and plan.tokens is not None:
        return ""
    if spec.parts and (plan.triton is None or not runs_triton(plan, asked)):
        return ""  # parts are for Triton alone
    if double and plan.reads_dtype:
        plan = plan_for(spec, sizes, tokens, losses, carried, double, part, triton, tiling)
    if spec.slides and plan.form != "attention":
        return ""  # what defines the loop computes as little as any plan would
    if plan.form == "stream":
        return build_stream(spec, plan, sizes["H"], asked)

    def wide() -> Plan:
        return plan_for(spec, sizes, tokens, losses, carried, double and plan.reads_dtype, "wide", triton)

    return build(spec, plan, sizes["H"], losses, asked, wide)
