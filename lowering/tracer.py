"""What traces functions of one loop's tensors: tiles without memory, and what a graph of them may hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from nestloop.errors import CapturedTensorError, Location, UnadmittedOpError
from nestloop.lang.loop import LoopSpec
from nestloop.lang.state import Entry
from nestloop.lowering import ops
from nestloop.lowering.any_length import record_for_any_length
from nestloop.lowering.draws import Generators, Heard
from nestloop.lowering.length import HINT, Length
from nestloop.lowering.runtime.fingerprint import whole_numbers
from nestloop.lowering.watched import WatchedCalls, WatchedOps, as_compile_error, rounding, unvalidated

# What a value may be converted to, beside the compute dtype. Of that, float32 is a lower bound: it is not rounded to.
_KEPT = (torch.float32, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_LOW = (torch.bfloat16, torch.float16)
_BODIES = ("loss", "readout", "kernel", "fit")


class Tracer:
    """Traces functions of one loop's tensors over tiles without memory, all with the same symbol for n.

    Attributes:
        reads_dtype: whether a body depends on the compute dtype.
        decided: the first body whose graph holds for one number of tokens alone, if any.
    """

    def __init__(
        self, spec: LoopSpec, sizes: dict[str, int], tokens: int | None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.dtype, self.reads_dtype = dtype, False
        self.decided: str | None = None
        self.spec, self.sizes = spec, {n: s for n, s in sizes.items() if n not in ("N", "n")}
        self.tokens = tokens
        self.n = Length({*whole_numbers(spec), *self.sizes.values()})
        first = next(iter(spec.inputs))
        self.length: Any = self.tile(first).shape[0]
        self.dims: dict[str, Any] = {**self.sizes, "n": spec.schedule.seen(self.length)}
        if (not spec.schedule.needs_order and not spec.streams) or spec.is_kernel_estimator:
            self.dims["N"] = self.length

    @contextmanager
    def of(self, spec: LoopSpec) -> Iterator[None]:
        """Trace functions of another loop's tensors, which runs over the same tokens."""
        own, self.spec = self.spec, spec
        try:
            yield
        finally:
            self.spec = own

    def tile(self, name: str, micro: int = 0, tokens: bool = True) -> Tensor:
        """A fresh tile of a declared tensor: [n, *dims] for views (with `micro`, [n, micro, *dims]; without `tokens`,
        [*dims]), [*dims] for weights, of which NAME__held is another."""
        name = name.removesuffix("__held")
        declared = {**self.spec.fast, **self.spec.slow, **self.spec.inputs}[name]
        shape = [expr.size(self.sizes, declared.where) for expr in declared.dims]
        if name not in self.spec.inputs or not tokens:
            return self.example(shape)
        steps = [micro] if micro else []
        return self.example([self.tokens or self.n.size, *steps, *shape])

    def entry(self, entry: Entry) -> Tensor:
        """A fresh tile for an entry of the state, tokens aside."""
        return self.example([expr.size(self.sizes, entry.like.where) for expr in entry.like.dims])

    def row(self) -> Tensor:
        """A fresh number for each of the tile's rows."""
        return self.example([self.tokens or self.n.size])

    def example(self, shape: Sequence[Any]) -> Tensor:
        """A tensor without memory."""
        return torch.empty(tuple(shape), dtype=self.dtype, device="meta")

    def like(self, value: Tensor) -> Tensor:
        """One of the shape of a traced value."""
        return self.example(value.shape)

    def fixed_tokens(self) -> int | None:
        """The sequence length, where a body (or the declaration) fixes it."""
        if self.tokens is not None:
            return self.tokens
        return None if self.n.is_free(self._least) else HINT

    @property
    def _least(self) -> int:
        """Rows of a tile of two tokens."""
        return 2 + (self.spec.optimizer.window or 1) - 1

    def trace(self, body: Callable[..., Any], names: list[str], user_body: str | None = None) -> fx.GraphModule:
        """The graph of `body` over tiles of the named tensors."""
        return self.trace_on(body, [self.tile(name) for name in names], names, user_body)

    def trace_on(
        self, body: Callable[..., Any], examples: list[Tensor], names: list[str], user_body: str | None = None
    ) -> fx.GraphModule:
        """The graph of `body` over given tensors, placeholders named `names`."""

        def run(tensors: Sequence[Tensor], generators: Generators) -> tuple[Any, WatchedCalls]:
            with unvalidated(), generators, WatchedOps(self.spec), WatchedCalls(self.spec, generators) as calls:
                made = body(*tensors)
                calls.check_surroundings()
            self.reads_dtype |= calls.reads_dtype
            return made, calls

        def watched(*tensors: Tensor) -> Any:
            if user_body is None:
                return body(*tensors)
            made, calls = run(tensors, Generators())
            if calls.in_doubt:
                run(tensors, Heard())
            return made

        # A body may take any branch on n; a rule of PyTorch's takes the same one for all but the shortest.
        lengths = [n for n in (self.n.lengths if user_body else (2, 3, 5, 29, 64, 1024)) if n >= self._least]
        with as_compile_error(self.spec, user_body):
            graph = record_for_any_length(self.n, lengths, watched, examples, names)
        if user_body and self.decided is None and not self.n.is_free(self._least):
            self.decided = user_body
        low = () if user_body in _BODIES else _LOW  # which derivatives have of an optimizer's functions alone
        _check_admitted(self.spec, graph, (*_KEPT, *low, self.dtype))  # of derivatives too, which may take other ops
        return graph


def _op_name(func: Any) -> str:
    return func._schema.name.split("::")[-1] if hasattr(func, "_schema") else getattr(func, "__name__", str(func))


def _is_of_another_dtype(node: fx.Node, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether a value is converted to a dtype outside these, or, of numbers, made in one that is floating."""
    if node.target is torch.ops.aten._to_copy.default:
        return node.meta["val"].dtype not in dtypes
    made = node.kwargs.get("dtype")
    return isinstance(made, torch.dtype) and made.is_floating_point and made not in dtypes


def _where(node: fx.Node, spec: LoopSpec) -> Location:
    """The line that a value is of: of what reads it, where it was made from numbers, which is no op."""
    return next((one.meta["where"] for one in (node, *node.users) if "where" in one.meta), spec.where)


def _check_admitted(spec: LoopSpec, module: fx.GraphModule, dtypes: tuple[torch.dtype, ...]) -> None:
    for node in module.graph.nodes:
        if node.op == "get_attr":
            raise CapturedTensorError(
                f"A body of {spec.name} makes a tensor constant.",
                where=_where(node, spec),
                given=f"a tensor made from numbers, used as {node.name}",
                need="Python numbers, or weights that are declared",
                fix="write the number itself, or declare it: scale = nl.slow('d', init='constant(0.5)')",
            )
        if _is_of_another_dtype(node, dtypes):
            raise rounding(spec, node.meta["val"].dtype, _where(node, spec))
        if node.op != "call_function" or ops.admitted(node.target):
            continue
        near = ops.nearest(node.target)
        raise UnadmittedOpError(
            f"{spec.name} uses {_op_name(node.target)}, which is outside the ops nestloop compiles.",
            where=node.meta.get("where", spec.where),
            given=str(node.target),
            need="an op with a row in lowering/ops" + (f"; near it: {', '.join(near)}" if near else ""),
            fix="write it with admitted ops, or add a row for it (CONTRIBUTING.md); backend='reference' takes any op",
        )
