"""Stage `capture`: the user's bodies as graphs of one head's tile.

A body is plain PyTorch. It is recorded once on tensors without memory whose token axis is symbolic, so one graph
serves every sequence length, and decomposed to the ops that have a row in `lowering.ops`. Whatever cannot
be compiled is refused here, at the user's own line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from nestloop import reference
from nestloop.errors import (
    Location,
    UnusedFastWeightError,
)
from nestloop.lang.declaration import body_line
from nestloop.lang.loop import LoopSpec
from nestloop.lang.returned import described, misshapen
from nestloop.lang.state import Entry, identifier, steps_with
from nestloop.lowering import ops
from nestloop.lowering.axes import Axes, type_axes
from nestloop.lowering.groups import by_groups
from nestloop.lowering.joins import taken_apart
from nestloop.lowering.layouts import as_products
from nestloop.lowering.recorder import placeholders
from nestloop.lowering.stacks import of_matrices
from nestloop.lowering.token_joins import without_token_joins
from nestloop.lowering.traced import TracedFunction, once, traced, traced_functions
from nestloop.lowering.tracer import Tracer


@dataclass(frozen=True)
class Captured:
    """A loop's bodies as graphs; the inputs of each are its placeholders, by their declared names.

    Attributes:
        spec: its declaration, the functions of its optimizer traced.
        loss: (fast, slow, tokens) -> each token's loss [n]; None for a kernel estimator.
        readout: (fast, slow, tokens) -> [n, *]; for a kernel estimator its kernel, (slow, q, k) -> [n, m].
        sizes: every dim's size; N and n are absent where they are symbolic.
        output: the shape of one token's output.
        tokens: the one sequence length the graphs are valid for, or None for any.
        prepare: slow weights -> what the loss reads of them (`lowering.rewrites.hoist`); None where it reads them.
        hoisted: those values, by name, traced; more inputs of the loss.
        project: tokens and slow weights -> what the loss reads of both (`lowering.rewrites.project`), or None.
        projected: those values, one row per token, by name, traced; more inputs of the loss.
        decoders: slow weights -> rows [*, D] whose correlations say whether the loss is as precise as it was before
            `lowering.rewrites.gram` rewrote it; None where it did not.
        squares: how many of those are the rows of each square of the loss, in order.
        fit: of a kernel estimator, (slow, tokens) -> the estimate at each query [n, *].
        reads_dtype: whether a body asks for the dtype, or uses a constant of it (RMSNorm's default eps).
    """

    spec: LoopSpec
    loss: fx.GraphModule | None
    readout: fx.GraphModule
    sizes: dict[str, int]
    output: tuple[int, ...]
    tokens: int | None
    prepare: fx.GraphModule | None = None
    hoisted: Mapping[str, Tensor] = field(default_factory=dict)
    project: fx.GraphModule | None = None
    projected: Mapping[str, Tensor] = field(default_factory=dict)
    decoders: fx.GraphModule | None = None
    squares: tuple[int, ...] = ()
    fit: fx.GraphModule | None = None
    reads_dtype: bool = False

    @property
    def one_length(self) -> bool:
        """Whether the graphs hold for one number of tokens, which a tile must have; a single one fits any tile."""
        return self.tokens not in (None, 1)

    @property
    def readout_axes(self) -> Axes:
        """The axes of the output."""
        graph = self.readout if self.fit is None else self.fit
        return type_axes(self.spec, graph).axes[_value(graph)]

    @property
    def detached(self) -> bool:
        """Whether nothing flows back from a value of a body, or of a function of the optimizer."""
        functions = [one for one in vars(self.spec.optimizer).values() if isinstance(one, TracedFunction)]
        graphs = [self.loss, self.readout, self.fit, *[graph for one in functions for graph in one.graphs.values()]]
        return any(node.target is ops.DETACHED for graph in graphs if graph is not None for node in graph.graph.nodes)

    @property
    def loss_inputs(self) -> list[str]:
        """Inputs of the loss, in order."""
        held = [f"{name}__held" for name in self.spec.fast] if self.spec.holds else []
        return [*self.spec.fast, *self.spec.slow, *self.hoisted, *self.tokens_read, *held]

    @property
    def states(self) -> dict[str, Entry]:
        """What a step of a batch schedule starts with and leaves, by its name in generated code, fast weights first."""
        return {identifier(name): entry for name, entry in {**self.spec.entries, **steps_with(self.spec)}.items()}

    def starts(self, carried: bool) -> list[str]:
        """Those of `states` that a call gives; `carried` as in `nestloop.lowering.lower`."""
        frozen = {} if carried else {name for name, fast in self.spec.fast.items() if fast.frozen_zero}
        return [name for name in self.states if name not in frozen]

    @property
    def tokens_read(self) -> list[str]:
        """Inputs of the loss with one row per token."""
        return [*self.spec.inputs, *self.projected]


def capture(spec: LoopSpec, sizes: dict[str, int], tokens: int | None) -> Captured:
    """Trace a loop's bodies for these sizes.

    Raises:
        CompileError: one of its subclasses, at the line of the body that cannot be compiled.
        StaysWhole: of a loop in parts, a body takes a fast weight whole.
    """
    return capture_with(Tracer(spec, sizes, tokens))


def capture_with(tracer: Tracer) -> Captured:
    """`capture` with a tracer that later stages go on using."""
    spec, sizes = tracer.spec, tracer.sizes
    if spec.whole is not None:
        return _with_matrices(tracer, spec.whole)
    everything = {**spec.fast, **spec.slow}
    if spec.is_kernel_estimator:
        kernel = traced(tracer, lambda dims: _kernel_body(spec, dims), [*spec.slow, "q", "k"], "kernel")
        _check_kernel(spec, kernel)
        fit = traced(tracer, lambda dims: _fit_body(spec, dims), [*spec.slow, *spec.inputs], "fit")
        output = _check_rows(spec, "fit", fit)
        return Captured(spec, None, kernel, sizes, output, tracer.fixed_tokens(), fit=fit)

    inputs = [*everything, *spec.inputs]
    held = [f"{name}__held" for name in spec.fast] if spec.holds else []
    loss = traced(tracer, lambda dims: _flat(reference.token_loss(spec, dims), spec, held), inputs + held, "loss")
    _check_loss(spec, loss)
    inputs = [name for name in inputs if name not in spec.inputs or not spec.inputs[name].micro]
    readout = traced(tracer, lambda dims: _flat(reference.token_readout(spec, dims), spec), inputs, "readout")
    _check_used(spec, loss, readout)
    output = _check_rows(spec, "readout", readout)
    loss, readout = (_with_products(graph, tracer) for graph in (loss, readout))
    if spec.parts:
        loss, readout = (_in_parts(graph, tracer) for graph in (loss, readout))
    spec = replace(spec, optimizer=traced_functions(tracer))
    return Captured(spec, loss, readout, sizes, output, tracer.fixed_tokens())


def _with_matrices(tracer: Tracer, whole: LoopSpec) -> Captured:
    """`capture` of a loop whose fast weights are matrices to its bodies, by way of the loop as it is declared."""
    with tracer.of(whole):
        captured = capture_with(tracer)
    assert captured.loss is not None
    loss, readout = (of_matrices(graph, tracer) for graph in (captured.loss, captured.readout))
    return replace(captured, spec=tracer.spec, loss=once(loss), readout=once(readout))


def _with_products(module: fx.GraphModule, tracer: Tracer) -> fx.GraphModule:
    """A body's graph whose products are of matrices, with rows of one token at most."""
    module = as_products(without_token_joins(module, tracer), tracer)
    return once(by_groups(module, tracer))


def _in_parts(module: fx.GraphModule, tracer: Tracer) -> fx.GraphModule:
    """A body's graph whose fast weights lie in parts, without their joins. Raises `StaysWhole` where it takes one
    whole."""
    function = taken_apart(module, {parts.sizes for parts in tracer.spec.parts})
    return tracer.trace(function, placeholders(module))


def _flat(body: Callable[..., Tensor], spec: LoopSpec, held: Sequence[str] = ()) -> Callable[..., Tensor]:
    """A body over dicts as a function of its tensors in declaration order, those of `held` weights last.

    A read-out sees no view of micro-steps.
    """
    names = [*spec.fast, *spec.slow, *spec.inputs]

    def flat(*tensors: Tensor) -> Tensor:
        whole = len(tensors) == len(names) + len(held)
        seen = names if whole else [n for n in names if n not in spec.inputs or not spec.inputs[n].micro]
        given = dict(zip([*seen, *held], tensors, strict=True))
        parts = [{n: given[n] for n in group if n in given} for group in (spec.fast, spec.slow, spec.inputs)]
        return body(*parts, {n: given[f"{n}__held"] for n in spec.fast}) if held else body(*parts)

    return flat


def _kernel_body(spec: LoopSpec, dims: dict[str, Any]) -> Callable[..., Tensor]:
    def kernel(*tensors: Tensor) -> Tensor:
        slow = dict(zip(spec.slow, tensors[:-2], strict=True))
        return spec.body_with(slow, dims).kernel(*tensors[-2:])

    return kernel


def _fit_body(spec: LoopSpec, dims: dict[str, Any]) -> Callable[..., Tensor]:
    def fit(*tensors: Tensor) -> Tensor:
        given = dict(zip([*spec.slow, *spec.inputs], tensors, strict=True))
        groups = (spec.slow, spec.inputs, spec.of_keys)
        slow, queries, keys = ({name: given[name] for name in group} for group in groups)
        body = spec.body_with(slow, dims)
        weight = body.kernel(queries["q"], keys["k"])
        return body.fit(weight, spec.tokens_with(queries), spec.tokens_with(keys))

    return fit


def _value(module: fx.GraphModule) -> Any:
    (result,) = next(node for node in module.graph.nodes if node.op == "output").args
    return result


def _written(spec: LoopSpec, what: str, module: fx.GraphModule) -> tuple[str, list[Any] | None, Location]:
    """What a body returned: as text, its shape if it is one tensor, and the line to show.

    That is the line of the last op if it stands in the body itself, and else the body's first.
    """
    result = _value(module)
    body = getattr(spec.cls, what)
    where, code = body_line(body, spec.where), body.__code__
    if not isinstance(result, fx.Node):
        return described(result), None, where
    last, lines = result.meta.get("where"), [line for *_, line in code.co_lines() if line is not None]
    if last is not None and last.file == code.co_filename and min(lines) <= last.line <= max(lines):
        where = last
    shape = list(result.meta["val"].shape)
    return ops.named_shape(shape), shape, where


def _check_loss(spec: LoopSpec, module: fx.GraphModule) -> None:
    given, shape, where = _written(spec, "loss", module)
    if shape is None or len(shape) != 1 or not _runs_over_tokens(spec, module, shape[0]):
        raise misshapen(spec, "loss", given, where)


def _runs_over_tokens(spec: LoopSpec, module: fx.GraphModule, size: Any) -> bool:
    first = next(node for node in module.graph.nodes if node.meta.get("declared") in {*spec.inputs})
    tokens = first.meta["val"].shape[0]
    return size is tokens or bool(size == tokens)


def _check_kernel(spec: LoopSpec, module: fx.GraphModule) -> None:
    given, shape, where = _written(spec, "kernel", module)
    if shape is None or len(shape) != 2 or not all(_runs_over_tokens(spec, module, size) for size in shape):
        raise misshapen(spec, "kernel", given, where)


def _check_used(spec: LoopSpec, module: fx.GraphModule, readout: fx.GraphModule) -> None:
    """Refuse a fast weight that the loss does not read, or from which nothing of it flows back: no step moves it. What
    the read-out reads and decays is moved all the same."""
    read = {n.meta.get("declared") for n in readout.graph.find_nodes(op="placeholder") if n.users}
    fading = {name for name in spec.fast if name in read and spec.optimizer.fades(name)}
    reached, stack = set(), [_value(module)]
    while stack:
        node = stack.pop()
        if node not in reached and _flows(node):
            reached.add(node)
            stack.extend(node.all_input_nodes)
    for node in module.graph.nodes:
        name = node.meta.get("declared")
        if node.op != "placeholder" or name not in spec.fast or node in reached:
            continue
        called, stop = spec.called.get(name, name), _stop(node)
        if stop is None and name in fading:
            continue
        if stop is None:
            raise UnusedFastWeightError(
                f"The loss of {spec.name} does not depend on the fast weight '{called}'.",
                where=spec.fast[name].where,
                given=f"{spec.learner.__name__}.{called}, which no path from the loss reaches",
                need="a loss that every fast weight enters: the inner loop would never change it",
                fix=f"use self.{called} in forward, or declare it as nl.slow(...)",
            )
        through = "detach" if stop.target is ops.DETACHED else stop.meta.get("called", stop.name)
        raise UnusedFastWeightError(
            f"The loss of {spec.name} has no gradient in the fast weight '{called}'.",
            where=stop.meta.get("where", spec.fast[name].where),
            given=f"{spec.learner.__name__}.{called}, whose way to the loss ends at {through}: its derivative is zero",
            need="a loss that every fast weight moves: the inner loop would never change it",
            fix=f"leave {through} out on one way from self.{called} to the loss, or declare {called} as nl.slow(...)",
        )


def _flows(node: fx.Node) -> bool:
    """Whether a gradient of a value flows on to what it is computed from."""
    value = node.meta.get("val")
    numbers = isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.dtype.is_floating_point)
    return numbers and not ops.is_flat(node.target)


def _stop(weight: fx.Node) -> fx.Node | None:
    """The first op that lets no gradient through to a weight that none reaches; None where nothing reads it."""
    seen = {weight}
    for node in weight.graph.nodes:
        if seen.intersection(node.all_input_nodes):
            if not _flows(node):
                return node
            seen.add(node)
    return None


def _check_rows(spec: LoopSpec, body: str, module: fx.GraphModule) -> tuple[int, ...]:
    """The shape of one row of what a body returns, which has one for each token."""
    given, shape, where = _written(spec, body, module)
    if shape is None or not shape or not _runs_over_tokens(spec, module, shape[0]):
        raise misshapen(spec, body, given, where)
    return tuple(int(size) for size in shape[1:])
