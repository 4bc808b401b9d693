"""Each stage of a loop's lowering as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from nestloop.errors import UnknownStageError
from nestloop.lang.declare import Declaration, Gate, Slow, View, caller
from nestloop.lang.loop import LoopSpec
from nestloop.lang.state import state_numbers, state_size
from nestloop.lowering import pipeline
from nestloop.lowering.axes import is_token, type_axes
from nestloop.lowering.emit.tile import size_text
from nestloop.lowering.pipeline import AnyLowered, LoweredStream
from nestloop.lowering.rewrites import attention_of
from nestloop.lowering.runtime import cache, offline
from nestloop.lowering.runtime.executable import OPS, build
from nestloop.lowering.runtime.library import NestedLoopOp
from nestloop.lowering.runtime.recipe import Asked
from nestloop.lowering.runtime.refusals import check_triton
from nestloop.lowering.runtime.streams import STREAM_OPS, build_stream
from nestloop.lowering.runtime.tiles import spacing_within
from nestloop.lowering.runtime.triton_plan import FEW
from nestloop.lowering.schedule.cost import cost


def _declare(lowered: AnyLowered, sizes: Mapping[str, int]) -> str:
    """What was declared: weights, views, the optimizer and the schedule, with their sizes."""
    spec = lowered.spec.declared
    lines = [f"loop {spec.name}  {spec.where.short}", f"learner {spec.learner.__name__}"]
    for kind in (spec.fast, spec.slow, spec.views, spec.gates):
        lines += [f"  {_declaration(d)}" for d in kind.values()]
    if not spec.is_kernel_estimator:
        lines += [f"optimizer {optimizer_text(spec)}", f"schedule {schedule_text(spec)}"]
    lines.append("sizes " + ", ".join(f"{n} = {s}" for n, s in sizes.items()))
    return "\n".join(lines)


def _declaration(declared: Declaration) -> str:
    shape = f"[{', '.join(str(e) for e in declared.dims)}]"
    details = []
    if isinstance(declared, (View, Slow)) and declared.shared:
        details.append("shared by all heads")
    if hasattr(declared, "init"):
        details.append(f"init {declared.init}")
    if getattr(declared, "learned", True) is False:
        details.append("not learned")
    text = f"{declared.kind} {declared.name} {shape}" + (f" ({', '.join(details)})" if details else "")
    return f"{text:<60}  {declared.where.short}"


def optimizer_text(spec: LoopSpec) -> str:
    """The optimizer with its coefficients."""
    optimizer = spec.optimizer
    others = ", 1.0 for the others" if isinstance(optimizer.lr, Mapping) and set(optimizer.lr) != set(spec.fast) else ""
    parts = [f"{type(optimizer).__name__}, learning rate {_coefficient(optimizer.lr)}{others}"]
    for name in ("scale", "decay", "log_decay"):
        if getattr(optimizer, name) is not None:
            parts.append(f"{name.replace('_', ' ')} {_coefficient(getattr(optimizer, name))}")
    if optimizer.decays is not None:
        parts.append(f"decay {optimizer.decay_order} the gradient")
    parts += [f"momentum {_coefficient(order)}" for order in optimizer.momentum or ()]
    parts += [f"{name} {_coefficient(value)}" for name, value in {**optimizer.own, **optimizer.numbers}.items()]
    parts += [] if optimizer.window is None else [f"window of {optimizer.window} tokens"]
    for name, given in optimizer.functions.items():
        if name != "update":  # which its name says
            parts.append(f"{name.replace('_', ' ')} {getattr(given, '__name__', given)}")
    return ", ".join(parts)


def _coefficient(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{_coefficient(part)} for {name}" for name, part in value.items())
    if isinstance(value, (Slow, Gate)):
        dims = f" [{', '.join(map(str, value.dims))}]" if value.dims else ""
        return f"{value.kind} {value.name}{dims}"
    return str(value)


def schedule_text(spec: LoopSpec) -> str:
    """The schedule with its settings."""
    schedule = spec.schedule
    values = ", ".join(f"{name} = {value}" for name, value in vars(schedule).items() if name != "where")
    return f"{type(schedule).__name__} ({values})"


def _capture(lowered: AnyLowered, sizes: Mapping[str, int]) -> str:
    """The bodies as graphs of one head's tile, traced once on symbolic tokens."""
    captured = lowered.captured
    parts = [] if captured.loss is None else [f"loss:\n{graph_text(lowered.spec, captured.loss)}"]
    name = "readout" if captured.loss is not None else "kernel"
    parts.append(f"{name}:\n{graph_text(lowered.spec, captured.readout)}")
    if captured.fit is not None and lowered.spec.has_fit:
        parts.append(f"fit:\n{graph_text(lowered.spec, captured.fit)}")
    return "\n".join(parts)


def graph_text(spec: LoopSpec, module: fx.GraphModule, output: tuple[str, ...] = ()) -> str:
    """A tile graph as text: one op a line, its axes and the user's line it came from."""
    axes = type_axes(spec, module, output).axes
    lines = []
    for node in module.graph.nodes:
        if node.op == "output":
            results = node.args[0] if isinstance(node.args[0], (tuple, list)) else [node.args[0]]
            lines.append(f"  return {', '.join('0' if r is None else _name(r) for r in results)}")
        elif node.op == "placeholder" and node.users:
            lines.append(f"  {_name(node)}: [{', '.join(axes[node])}]")
        elif node.op == "call_function" and node in axes:
            given = [_argument(a) for a in node.args] + [
                f"{k}={v}" for k, v in node.kwargs.items() if k == "approximate"
            ]
            where = node.meta.get("where")
            target = str(node.target).removeprefix("aten.").removesuffix(".default")
            text = f"  {_name(node)}: [{', '.join(axes[node])}] = {target}({', '.join(given)})"
            lines.append(f"{text:<88}{where.short if where else ''}".rstrip())
    return "\n".join(lines)


def _name(node: fx.Node) -> str:
    return node.meta.get("declared", node.name) if node.op == "placeholder" else node.name


def _argument(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(v) for v in value)}]"
    if not isinstance(value, fx.Node):
        return repr(value)
    return _name(value) if isinstance(value.meta.get("val"), torch.Tensor) else size_text(value.meta["val"])


def _check(lowered: AnyLowered, sizes: Mapping[str, int]) -> str:
    """The axes of every value, and whether tokens mix: which forms and schedules are legal."""
    if lowered.typing is None:
        return "a kernel estimator: every query meets every key, by declaration"
    axes = sorted({a for names in lowered.typing.axes.values() for a in names if not a.isdigit()})
    lines = [f"axes: {', '.join(axes)} (over tokens: {', '.join(a for a in axes if is_token(a))})"]
    lines.append(f"output: [{', '.join(lowered.captured.readout_axes)}]")
    if not lowered.typing.mixing:
        lines.append("tokens do not mix in the loss: each token's gradient depends on that token alone")
    else:
        lines.append("tokens mix in the loss:")
        lines += [f"  {mixing}" for mixing in lowered.typing.mixing[:8]]
    return "\n".join(lines)


def _differentiate(lowered: AnyLowered, sizes: Mapping[str, int]) -> str:
    """The inner gradient, and the outer backward of every piece, derived by PyTorch and simplified."""
    output = lowered.captured.readout_axes
    parts = []
    for name, piece in lowered.pieces.items():
        parts.append(f"{name} -> {', '.join(piece.results)}:\n{graph_text(lowered.spec, piece.forward)}")
        parts.append(
            f"{name} backward, d_{', d_'.join(piece.wrt)}:\n{graph_text(lowered.spec, piece.backward, output)}"
        )
    return "\n".join(parts)


def _rewrite(lowered: AnyLowered, sizes: Mapping[str, int]) -> str:
    """The rules that change the computation: whether each fired, and why."""
    return "\n".join(str(rule) for rule in lowered.rewrites)


def _cost(lowered: AnyLowered, sizes: Mapping[str, int]) -> str:
    """What each piece computes and writes, and what backward keeps or computes again."""
    tokens = sizes["N"]
    lines = [f"per head and sequence; n tokens in the piece's tile, numbers for n = {tokens}"]
    for name, piece in lowered.pieces.items():
        for direction, module in (("forward", piece.forward), ("backward", piece.backward)):
            spent = cost(module)
            products, elementwise, traffic = spent.at(tokens)
            lines.append(
                f"  {name} {direction}: products {spent.products} FLOP = {products:,}; "
                f"elementwise {elementwise:,} FLOP; values written unfused {traffic:,}"
            )
    lines.append(
        f"state: {state_size(lowered.spec)} = {state_numbers(lowered.spec, sizes):,} numbers per head and sequence"
    )
    if lowered.spec.is_kernel_estimator:
        return "\n".join(lines)
    if isinstance(lowered, LoweredStream) and lowered.part == "scan":
        return "\n".join([*lines, *_kept(lowered, sizes)])
    lines.append("backward: recomputes every step from the state it started from; keeps one state per step")
    return "\n".join(lines)


def _kept(lowered: LoweredStream, sizes: Mapping[str, int]) -> list[str]:
    """What backward keeps of a stream, at a few lengths."""
    spec = lowered.spec
    views = sum(math.prod([e.size(dict(sizes)) for e in view.dims]) for view in spec.inputs.values())
    carried = [e for e in spec.entries.values() if e.part in ("weight", "momentum")]
    state = sum(math.prod([e.size(dict(sizes)) for e in entry.like.dims]) for entry in carried)
    lines = [f"backward: recomputes every chunk of {lowered.form.longest} tokens from the states it kept"]
    for tokens in (sizes["N"], 1024, 65536):
        count = -(-tokens // lowered.form.longest)
        every = spacing_within(count, views * tokens, state)
        kept = -(-count // every) - 1
        lines.append(
            f"  N = {tokens}: {count} chunks, a state every {every}: {kept} kept, {4 * kept * state:,} bytes "
            "per head and sequence"
        )
    return lines


def _runs(lowered: AnyLowered) -> str:
    """What runs where nothing is generated."""
    spec = lowered.spec
    if attention_of(lowered.rewrites) is None:
        return "the reference runs, which defines a window of keys and computes no more than any plan"
    seen = f", in blocks of queries, each to the last {spec.schedule.window} keys" if spec.slides else ""
    return f"PyTorch's scaled_dot_product_attention(q, k, v, scale=...) runs{seen}"


def _emit(lowered: AnyLowered, sizes: Mapping[str, int]) -> str:
    """The generated PyTorch."""
    if lowered.source is None:
        return f"nothing: {_runs(lowered)}"
    return lowered.source.text.rstrip()


def _cpp(lowered: AnyLowered, sizes: Mapping[str, int]) -> str:
    """The generated C++, or why there is none."""
    return f"none: {lowered.not_native}" if lowered.native is None else lowered.native.text.rstrip()


def _triton(lowered: AnyLowered, sizes: Mapping[str, int]) -> str:
    """The generated Triton, or why there is none."""
    if lowered.triton is None:
        return f"none: {lowered.not_triton}"
    texts = [module.text.rstrip() for module in lowered.triton.modules]
    if lowered.triton.at_once is not None:
        texts[-1] = f"# With {FEW}:\n{texts[-1]}"
    return "\n\n\n".join(texts)


def compiled(lowered: AnyLowered, stage: str, device: str) -> str:
    """Every kernel at one stage, with what they take."""
    if device not in offline.TARGETS:
        raise UnknownStageError(
            "There is no such device to compile for.",
            where=caller(),
            given=repr(device),
            need=", ".join(offline.TARGETS),
            fix='write device="sm_90"',
        )
    plan = pipeline.plan_of(lowered)
    check_triton(lowered.spec, plan)
    assert plan.triton is not None
    parts = []
    for module, kernel in [(one, kernel) for one in plan.triton.modules for kernel in one.kernels]:
        made = offline.compiled(module, kernel, device)
        if stage not in made.text:
            raise UnknownStageError(
                f"{device} has no stage {stage}.",
                where=caller(),
                given=repr(stage),
                need=", ".join(made.text),
                fix=f'write stage="{list(made.text)[-1]}"',
            )
        parts.append(f"// {made.summary}\n{made.text[stage].rstrip()}")
    return "\n\n".join(parts)


def _run(lowered: AnyLowered, sizes: Mapping[str, int]) -> str:
    """The registered ops, and the file in the cache that they run."""
    if lowered.source is None:
        return _runs(lowered)
    if isinstance(lowered, LoweredStream):
        name = build_stream(lowered.spec, pipeline.stream_plan(lowered), sizes["H"], Asked("torch"))
        return _registered(STREAM_OPS[name].op)
    name = build(lowered.spec, pipeline.plan(lowered), sizes["H"], losses=False, asked=Asked("torch"))
    return _registered(OPS[name])


def _registered(op: NestedLoopOp) -> str:
    """The generated file and the schemas of its two ops."""
    file = f"{op.name}.py in the cache ({cache.cache_dir().name})"
    return f"{file}\n{op.forward_op.overload._schema}\n{op.backward_op.overload._schema}"


# By name, in their order; those that take Triton's compiler (`compiled`) are no part of them.
STAGES: dict[str, Callable[[AnyLowered, Mapping[str, int]], str]] = {
    "declare": _declare,
    "capture": _capture,
    "check": _check,
    "differentiate": _differentiate,
    "rewrite": _rewrite,
    "schedule": _cost,
    "emit": _emit,
    "cpp": _cpp,
    "triton": _triton,
    "run": _run,
}
