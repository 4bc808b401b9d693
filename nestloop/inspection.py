"""What the compiler made of a loop, as text: every stage (`inspect`), and in plain words (`explain`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from nestloop.compiled import CompiledLoop, spec_of
from nestloop.errors import UnknownStageError
from nestloop.lang.declare import caller
from nestloop.lang.dims import DimExpr
from nestloop.lang.loop import LoopSpec
from nestloop.lang.schedule import Chunked, Program
from nestloop.lang.state import counts_tokens, state_numbers, state_size
from nestloop.lowering import names, pipeline
from nestloop.lowering.in_parts import told
from nestloop.lowering.pipeline import Lowered, LoweredStream
from nestloop.lowering.rewrites import Rewrite, attention_of
from nestloop.lowering.rewrites.gram import NAME as GRAM_FORM
from nestloop.lowering.runtime import offline
from nestloop.lowering.runtime.choice import why_no_cpp
from nestloop.lowering.runtime.compiler import find
from nestloop.lowering.runtime.plan import Plan
from nestloop.lowering.runtime.recipe import Asked
from nestloop.lowering.runtime.tiles import LOST_BITS
from nestloop.lowering.runtime.triton_plan import FEW, WORTH, TritonPlan
from nestloop.lowering.runtime.work import expected
from nestloop.stages import STAGES, AnyLowered, compiled, optimizer_text, schedule_text
from nestloop.targets import check_dims, loops_of, trial_sizes


def inspect(loop: Any, stage: str | None = None, device: str = "sm_90", **dims: int) -> str:
    """The stages of a loop's lowering as text.

    Args:
        loop: a declared loop, `nl.compile(...)` of one, or a layer.
        stage: one of "declare", "capture", "check", "differentiate", "rewrite", "schedule", "emit" (generated
            PyTorch), "cpp" (generated C++), "triton" (generated Triton), "run"; None for all of these. Then, compiled
            for `device` whether there is one or not: "ttir", "ttgir", "ptx", "sass" (AMD: "amdgcn").
        device: "sm_80", "sm_90", "sm_100" or "gfx942".
        dims: sizes; those not given are small ones (d = 16, H = 2, N = 16).

    Raises:
        UnknownStageError: no such stage.
        UnknownDimError: the loop has no dim of such a name.
        NoPlanError: the loop has no Triton, or Triton is not installed, for a compiled stage.
        CompileError: a body cannot be compiled.
    """
    check_dims(loop, dims)
    return "\n\n".join(inspect_text(spec.cls, stage, {**sizes, **dims}, device) for spec, sizes, _ in loops_of(loop))


def explain(loop: Any, **dims: int) -> str:
    """In plain words: what is fast and slow, the state and when it resets, where gradients flow, what runs and why.

    Args:
        loop: a declared loop, `nl.compile(...)` of one, or a layer.
        dims: sizes; those not given are small ones.

    Raises:
        UnknownDimError: the loop has no dim of such a name.
        CompileError: a body cannot be compiled.
    """
    check_dims(loop, dims)
    parts = [explain_text(spec.cls, {**sizes, **dims}, op) for spec, sizes, op in loops_of(loop)]
    return "\n\n".join(parts)


def inspect_text(loop: Any, stage: str | None, dims: Mapping[str, int], device: str = "sm_90") -> str:
    """`inspect` of one loop class (or several, as a tuple)."""
    if isinstance(loop, (tuple, list)):
        return "\n\n".join(inspect_text(part, stage, dims, device) for part in loop)
    if stage is not None and stage not in (*STAGES, *offline.STAGES):
        raise UnknownStageError(
            "There is no such stage.",
            where=caller(),
            given=repr(stage),
            need=", ".join([*STAGES, *offline.STAGES]),
            fix='write stage="emit"',
        )
    if stage in offline.STAGES:
        spec = names.safe(spec_of(loop), triton=True)
        return compiled(_lower(spec, trial_sizes(spec, dims), triton=True), stage, device)
    texts = stage_texts(loop, (stage,) if stage is not None else tuple(STAGES), dims)
    return texts[stage] if stage is not None else "\n\n".join(f"== {name} ==\n{text}" for name, text in texts.items())


def stage_texts(loop: Any, stages: Sequence[str], dims: Mapping[str, int]) -> dict[str, str]:
    """Some of `STAGES` of one loop class, by name."""
    triton = "triton" in stages
    spec = names.safe(spec_of(loop), triton)
    sizes = trial_sizes(spec, dims)
    lowered = _lower(spec, sizes, triton)
    return {name: STAGES[name](lowered, sizes) for name in stages}


def explain_text(loop: Any, dims: Mapping[str, int], op: CompiledLoop | None = None) -> str:
    """`explain` of one loop class (or several, as a tuple)."""
    if isinstance(loop, (tuple, list)):
        return "\n\n".join(explain_text(part, dims) for part in loop)
    triton = op is not None and op.requested == "triton"
    spec = names.safe(spec_of(loop), triton)
    sizes = trial_sizes(spec, dims)
    return "\n".join(_explain(_lower(spec, sizes, triton), sizes, op))


def _lower(spec: LoopSpec, sizes: dict[str, int], triton: bool = False) -> AnyLowered:
    plain = {name: size for name, size in sizes.items() if name not in ("B", "N", "n")}
    tokens = sizes["N"] if spec.sees_grid else None
    part = "update" if isinstance(spec.schedule, Program) else "scan"
    if not triton:
        return pipeline.any_stages(spec, plain, tokens, part)
    lowered, own = pipeline.stages_with_triton(spec, plain, tokens, part)
    if own is lowered:
        return lowered
    return replace(lowered, rewrites=[*lowered.rewrites, Rewrite("parts", True, told(own.spec, spec))])


def _explain(lowered: AnyLowered, sizes: Mapping[str, int], op: CompiledLoop | None) -> list[str]:
    spec = lowered.spec.declared
    lines = [
        f"{spec.name}  ({spec.where.short})",
        spec.about,
    ]
    if spec.is_kernel_estimator:
        lines += ["", "fast weights: none. The state is the keys and values of the sequence."]
        lines += _state(spec) if spec.streams else []
    else:
        numbers = state_numbers(spec, sizes)
        lines += ["", "fast weights (the inner loop changes them while it reads one sequence):"]
        for fast in spec.fast.values():
            start = (
                "exactly zero, never learned"
                if fast.frozen_zero
                else "learned by the outer loop"
                if fast.learned
                else "fixed"
            )
            lines.append(f"  {fast.name} [{', '.join(map(str, fast.dims))}] per head and sequence; starts {start}")
        lines.append(
            f"state: {state_size(spec)} = {numbers:,} numbers, {4 * numbers:,} bytes in float32 per head and sequence;"
        )
        lines.append(f"  {4 * numbers * sizes['H']:,} bytes a sequence with H = {sizes['H']}")
        lines += _state(spec)
        lines.append(
            "reset: every sequence of every call starts from the initial fast weights, "
            "in training and evaluation alike,"
        )
        lines.append("  unless a state is passed; nothing is carried from one call to the next by itself")
        if getattr(spec.schedule, "reset", None):
            seen = "" if (spec.optimizer.window or 1) == 1 else "; the window reaches behind that"
            lines.append(f"  within a sequence it starts again every {spec.schedule.reset} tokens{seen}")
    lines += ["", "slow weights (only the outer loop changes them): " + (", ".join(spec.slow) or "none")]
    lines.append("views: " + ", ".join(f"{n} [{', '.join(map(str, v.dims))}]" for n, v in spec.views.items()))
    if spec.gates:
        lines.append("gates: " + ", ".join(spec.gates))
    if not spec.is_kernel_estimator:
        lines += ["", *_inner_loop(spec)]
    lines += ["", *_gradients(lowered), "", *_what_runs(lowered, op, sizes)]
    return [line for i, line in enumerate(lines) if line or (i and lines[i - 1])]


_PARTS = {
    "anchor": "the weights that the chunk's gradients are taken at",
    "update": "what was taken from the weights since the chunk began, before its scale",
    "momentum": "a momentum",
    "pending": "what waits for the chunk's step",
    "tail": "the last tokens' views, for the window",
}


def _state(spec: LoopSpec) -> list[str]:
    """What a stream carries beside its fast weights."""
    lines = []
    for entry in spec.entries.values():
        kept = entry.name.rpartition(".")[2]
        own = f"{kept} of {type(spec.optimizer).__name__}" if kept in spec.optimizer.moments else _PARTS.get(entry.part)
        lines += [] if entry.part == "weight" else [f"  carried beside: {entry.name}, {own}"]
    return [*lines, *(["  carried beside: position, the tokens seen"] if counts_tokens(spec) else [])]


def _stream(spec: LoopSpec) -> list[str]:
    """When a stream's gradients are taken, and with which weights a token is read."""
    schedule = spec.schedule
    lines = [f"inner loop: {schedule_text(spec)}; {optimizer_text(spec)}"]
    if isinstance(schedule, Program):
        return [*lines, "  operations in the order given; an update takes its gradients at the current weights"]
    if isinstance(schedule, Chunked):
        at = {None: "its first weights", 0: "the initial weights"}.get(
            schedule.anchor, f"the weights at the last multiple of {schedule.anchor} tokens"
        )
        when = "with the weights after its own chunk's step"
        if schedule.order == "apply-update":
            when = "with the weights before its own chunk's step"
            when += ", a chunk's last token after it" if schedule.inclusive else ""
        return [*lines, f"  one step a chunk, gradients at {at}, summed over its tokens", f"  read-out: {when}"]
    at = "the current weights" if schedule.chunk == 1 else f"the first weights of each {schedule.chunk} tokens"
    steps = f"{schedule.micro} steps" if schedule.micro > 1 else "one step"
    lines.append(f"  {steps} a token, the gradient of that token's own loss at {at}")
    lines.append(f"  read-out: each token with the weights {schedule.read} its own step")
    return lines


def _inner_loop(spec: LoopSpec) -> list[str]:
    if spec.streams:
        return _stream(spec)
    reduction = {"mean": "the mean", "sum": "the sum"}[spec.schedule.reduction]
    lines = [f"inner loop: {schedule_text(spec)}; {optimizer_text(spec)}"]
    steps = spec.schedule.batches(1 << 20)
    what = "all tokens" if not spec.schedule.needs_order else "its batch of tokens, in the order given"
    lines.append(f"  {len(steps)} step(s); each takes the gradient of {reduction} of the token losses over {what},")
    lines.append("  at the weights the step before left")
    if isinstance(spec.optimizer.lr, DimExpr):
        lines.append(f"  learning rate {spec.optimizer.lr}: N tokens of the sequence, n of the step's batch")
    if spec.optimizer.orders or spec.optimizer.moments:
        kept = "moments" if spec.optimizer.moments else "momenta"
        lines.append(f"  {kept} are zero before the first step of a call, and no part of the state")
    lines.append("  read-out: every token with the weights after the last step")
    return lines


def _gradients(lowered: AnyLowered) -> list[str]:
    spec, matrices = lowered.spec.declared, {stack.whole: stack.names for stack in lowered.spec.stacks}
    reached: dict[str, list[str]] = {}
    pieces, made = dict(lowered.pieces), lowered.captured
    if isinstance(spec.schedule, Program):  # whose other op is the read-out
        pieces |= pipeline.any_stages(lowered.spec, dict(made.sizes), made.tokens, "read").pieces
    for name, piece in pieces.items():
        (results,) = next(n for n in piece.backward.graph.nodes if n.op == "output").args
        for wrt, result in zip(piece.wrt, results, strict=True):
            if result is not None:
                reached.setdefault(wrt, []).append(name)
    passed = {name for wrt, names in reached.items() if wrt.startswith("gradient_") for name in names}
    lost = {n.replace("update", "gradient") for n in pieces if "update" in n and n not in passed}
    reached = {wrt: [name for name in names if name not in lost] for wrt, names in reached.items()}
    all_of_it = "nothing detached, through the inner gradients (second order)"
    lines = [f"outer gradients reach, {'what bodies and the optimizer detach aside' if made.detached else all_of_it}:"]
    for name in [*spec.inputs, *[n for n in spec.fast if not spec.fast[n].frozen_zero], *spec.slow]:
        through = ", ".join(
            dict.fromkeys(n.replace("_", " ") for one in matrices.get(name, (name,)) for n in reached.get(one, []))
        )
        lines.append(f"  {name}: through the {through}" if through else f"  {name}: no path, its gradient is zero")
    return lines


def _what_streams(lowered: LoweredStream, op: CompiledLoop | None, sizes: Mapping[str, int]) -> list[str]:
    form = lowered.form
    lines, native, chosen = _backend(lowered.spec, pipeline.stream_plan(lowered), op, sizes)
    if native:
        lines.append("  in parallel over heads and sequences; a chunk's tile and the state stay in a core's cache")
    lines += chosen
    if lowered.part != "scan":
        return [*lines, "  an op for each update and each read-out, joined by the state"]
    longest = form.in_cpp.longest if native else form.longest
    if op is not None and op.requested == "triton" and lowered.triton is not None:
        longest = lowered.triton.rows
    lines.append(f"  a scan over chunks of {longest} tokens; each chunk's step takes the {form.name} form")
    for rule in lowered.rewrites:
        lines.append(f"  {rule.name}: {'' if rule.fired else 'no, '}{rule.why}")
    lines.append(
        "  backward: in reverse from kept states, every chunk recomputed. A state is kept every so many chunks"
    )
    lines.append("  that all kept ones take no more memory than the views, or every square root of the chunks")
    return lines


def _tiles(lowered: Lowered) -> str:
    assert lowered.native is not None
    if lowered.native.whole:
        why = "which mix" if lowered.typing is not None and lowered.typing.mixing else "on whose number it depends"
        return f"in parallel over heads and sequences; a tile holds all tokens, {why}"
    rows = lowered.native.rows
    return f"in parallel over heads and sequences, and tokens where those are few; tiles of at most {rows} tokens"


def _backend(
    spec: LoopSpec, plan: Plan, op: CompiledLoop | None, sizes: Mapping[str, int]
) -> tuple[list[str], bool, list[str]]:
    """What runs, with why; whether it is C++; and what was chosen by cost."""
    inductor = op is not None and op.inductor
    requested = "auto" if op is None else op.requested
    if requested == "triton":
        return _of_triton(plan), False, []
    missing = why_no_cpp(plan, Asked(requested, inductor), build_now=False)
    chosen: list[str] = []
    native = not missing
    if native and requested == "auto":
        threads = torch.get_num_threads()
        call = expected(spec, plan)(sizes["H"], sizes["B"], sizes["N"], threads)
        native = call.is_native
        chosen = [f"  for H = {sizes['H']}, B = {sizes['B']}, N = {sizes['N']} on {threads} threads {call.why};"]
        chosen.append("  the sizes of each call decide, on a CPU")
    if native:
        compiler = find()
        lines = [f"runs: generated C++, built by {compiler.version or compiler.command}, for tensors on a CPU"]
        return [*lines, f"  (backend 'cpp'; {_ON_A_GPU[requested]})"], True, chosen
    lines = ["runs: generated PyTorch" + (", its pieces compiled by torch.compile" if inductor else ", eager")]
    why = "inductor=True" if inductor else "asked for" if requested == "torch" else f"no C++ here: {missing}"
    return [*lines, f"  (backend 'torch': {'expected to be faster' if chosen else why})"], False, chosen


_ON_A_GPU = {
    "auto": "tensors on a GPU run generated Triton, where the loop has it",
    "cpp": "tensors on a GPU run generated PyTorch",
}
_OVER = {
    "sequences": "a program a head and sequence",
    "heads": "a program a head",
    "chunks": "a program a chunk of each",
    "groups": "a program for the chunks between two states kept of each",
    "ranges": "a program a range of tokens of each",
}


def _of_triton(plan: Plan) -> list[str]:
    """The kernels that run, in order."""
    if plan.triton is None:
        return [f"runs: nothing, for generated Triton was asked for and has no plan: {plan.not_triton}"]
    lines = ["runs: generated Triton, asked for (backend 'triton'; tensors on a CPU are interpreted)"]
    ahead = [line for module in plan.triton.modules[: -len(plan.triton.forms)] for line in _kernels(module)]
    lines += ["  once for all sequences, of slow weights alone:", *ahead, "  then:"] if ahead else []
    lines += _kernels(plan.triton)
    if plan.triton.ranges is not None:
        least = WORTH * plan.triton.rows
        lines.append(f"  or, with fewer heads and sequences than multiprocessors, in ranges of {least} tokens or more,")
        lines += ["  whose sums are added up in order:", *_kernels(plan.triton.in_ranges())]
    if plan.triton.at_once is not None:
        lines += [f"  or, with {FEW}, these at once:", *_kernels(plan.triton.at_once)]
    return lines


def _kernels(triton: TritonPlan) -> list[str]:
    """A line on each of the kernels that run one after the other."""
    return [
        f"  {launch.kernel}: {_OVER[launch.over]}"
        f"{f' and each of {launch.strips} strips of its state' if launch.strips > 1 else ''}"
        f", {launch.warps} warp{'' if launch.warps == 1 else 's'}{', each step' if launch.each_step else ''}"
        for direction in ("forward", "backward")
        for launch in triton.launches(direction)
    ]


def _gram() -> list[str]:
    """Which of its two forms a loop with a Gram form runs in."""
    return [
        "  the Gram form where the decoder is well conditioned: correlations of its rows (and its bias) with no",
        f"  eigenvalue below 2^{LOST_BITS} eps. Else the wide form; the weights of each call decide",
    ]


def _what_runs(lowered: AnyLowered, op: CompiledLoop | None, sizes: Mapping[str, int]) -> list[str]:
    lines = _what_is_to_run(lowered, op, sizes)
    return [*lines, f"  the last call: {', '.join(op.ran)}"] if op is not None and op.ran else lines


def _attention(lowered: Lowered) -> str:
    """What runs where nothing is generated."""
    rule = attention_of(lowered.rewrites)
    if rule is None:
        return "runs: the reference, which has no steps to take and computes no more than any plan would"
    seen = ", in blocks of queries" if lowered.spec.slides else ""
    return f"runs: PyTorch's scaled_dot_product_attention{seen}, because {rule.why}"


def _what_is_to_run(lowered: AnyLowered, op: CompiledLoop | None, sizes: Mapping[str, int]) -> list[str]:
    fired = [rule for rule in lowered.rewrites if rule.fired]
    if op is not None and op.backend == "reference":
        return ["runs: the reference, brute force, because backend='reference' was asked for"]
    spec = lowered.spec
    if isinstance(lowered, LoweredStream):
        return _what_streams(lowered, op, sizes)
    if lowered.source is None:
        return [_attention(lowered)]
    lines, native, chosen = _backend(spec, pipeline.plan(lowered), op, sizes)
    lines += [f"  {_tiles(lowered)}"] if native else []
    lines += chosen
    lines += [f"  rewritten: {rule.name}, because {rule.why}" for rule in fired]
    lines += _gram() if any(rule.name == GRAM_FORM for rule in fired) else []
    if lowered.typing is not None and lowered.typing.mixing:
        lines.append(f"  the learner mixes tokens ({lowered.typing.mixing[0]}): only whole sequences are legal batches")
    return lines
