"""Stage `capture`: the user's bodies as graphs of one head's tile.

A body is plain PyTorch. It is traced once with `make_fx` over fake tensors whose token axis is symbolic, so one
graph serves every sequence length, and decomposed to the ops that have a row in `lowering.ops`. Whatever cannot
be compiled is refused here, at the user's own line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nestloop import reference
from nestloop.errors import (
    CapturedTensorError,
    CompileError,
    DataDependentError,
    InPlaceError,
    Location,
    LossNotPerTokenError,
    NestloopError,
    ReadoutShapeError,
    ShapeMismatchError,
    UnadmittedOpError,
    UnusedFastWeightError,
)
from nestloop.lang.loop import LoopSpec
from nestloop.lowering import ops

_HINT = 23  # stands for n while tracing; the graphs hold the symbol
_LOOKS_AT_VALUES = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}


@dataclass(frozen=True)
class Captured:
    """A loop's bodies as graphs; the inputs of each are its placeholders, by their declared names.

    Attributes:
        loss: (fast, slow, tokens) -> each token's loss [n]; None for a kernel estimator.
        readout: (fast, slow, tokens) -> [n, *]; for a kernel estimator its kernel, (slow, q, k) -> [n, m].
        sizes: every dim's size; N and n are absent where they are symbolic.
        output: the shape of one token's output.
        tokens: the one sequence length the graphs are valid for, or None for any.
    """

    spec: LoopSpec
    loss: fx.GraphModule | None
    readout: fx.GraphModule
    sizes: dict[str, int]
    output: tuple[int, ...]
    tokens: int | None


def capture(spec: LoopSpec, sizes: dict[str, int], tokens: int | None) -> Captured:
    """Trace a loop's bodies for these sizes.

    Raises:
        CompileError: one of its subclasses, at the line of the body that cannot be compiled.
    """
    return capture_with(Tracer(spec, sizes, tokens))


def capture_with(tracer: Tracer) -> Captured:
    """`capture` with a tracer that later stages go on using."""
    spec, sizes = tracer.spec, tracer.sizes
    everything = {**spec.fast, **spec.slow}
    if spec.is_kernel_estimator:
        kernel = tracer.trace(_kernel_body(spec, tracer.dims), [*spec.slow, "q", "k"], "kernel")
        _check_used(spec, kernel)
        value = tracer.tile("v")
        return Captured(spec, None, kernel, sizes, tuple(value.shape[1:]), tracer.fixed_tokens())

    inputs = [*everything, *spec.inputs]
    loss = tracer.trace(_flat(reference.token_loss(spec, tracer.dims), spec), inputs, "loss")
    _check_loss(spec, loss)
    _check_used(spec, loss)
    readout = tracer.trace(_flat(reference.token_readout(spec, tracer.dims), spec), inputs, "readout")
    output = _check_readout(spec, readout)
    return Captured(spec, loss, readout, sizes, output, tracer.fixed_tokens())


def _flat(body: Callable[..., Tensor], spec: LoopSpec) -> Callable[..., Tensor]:
    """A body over dicts as a function of its tensors in declaration order."""
    names = [*spec.fast, *spec.slow, *spec.inputs]

    def flat(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        return body(*({n: given[n] for n in group} for group in (spec.fast, spec.slow, spec.inputs)))

    return flat


def _kernel_body(spec: LoopSpec, dims: dict[str, Any]) -> Callable[..., Tensor]:
    def kernel(*tensors: Tensor) -> Tensor:
        slow = dict(zip(spec.slow, tensors[:-2], strict=True))
        return spec.body_with(slow, dims).kernel(*tensors[-2:])

    return kernel


class Tracer:
    """Traces functions of one loop's tensors over fake tiles, all with the same symbol for n."""

    def __init__(self, spec: LoopSpec, sizes: dict[str, int], tokens: int | None) -> None:
        self.spec, self.sizes = spec, {n: s for n, s in sizes.items() if n not in ("N", "n")}
        self.tokens = tokens
        self.fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=False)
        first = next(iter(spec.inputs))
        self.length = self.tile(first).shape[0]
        self.dims: dict[str, Any] = {**self.sizes, "n": self.length}
        if not spec.schedule.needs_order or spec.is_kernel_estimator:
            self.dims["N"] = self.length

    def tile(self, name: str) -> Tensor:
        """A fresh fake tile of a declared tensor: [n, *dims] for views, [*dims] for weights."""
        declared = {**self.spec.fast, **self.spec.slow, **self.spec.inputs}[name]
        shape = [expr.size(self.sizes, declared.where) for expr in declared.dims]
        if name not in self.spec.inputs:
            return self.example(shape)
        return self.example([self.tokens or _HINT, *shape], symbolic=self.tokens is None)

    def example(self, shape: list[int], symbolic: bool = False) -> Tensor:
        """A fake tensor with its own storage; the first axis is the symbol n where `symbolic`."""
        kinds = [DimDynamic.STATIC] * len(shape)
        if symbolic:
            kinds[0] = DimDynamic.DUCK
        return self._fake_tensor(shape, kinds)

    def like(self, value: Tensor) -> Tensor:
        """A fake tensor of the shape of a traced value."""
        shape = list(value.shape)
        symbolic = [i for i, size in enumerate(shape) if not isinstance(size, int)]
        kinds = [DimDynamic.DUCK if i in symbolic else DimDynamic.STATIC for i in range(len(shape))]
        return self._fake_tensor([_HINT if i in symbolic else size for i, size in enumerate(shape)], kinds)

    def _fake_tensor(self, shape: list[int], kinds: list[DimDynamic]) -> Tensor:
        context = StatelessSymbolicContext(dynamic_sizes=kinds)
        return self.fake.from_tensor(torch.empty(shape), symbolic_context=context)

    def fixed_tokens(self) -> int | None:
        """The sequence length, where a body (or the declaration) fixes it."""
        return self.tokens or (None if self.length.node.expr.free_symbols and _is_free(self.length) else _HINT)

    def trace(self, body: Callable[..., Any], names: list[str], what: str) -> fx.GraphModule:
        """The graph of `body` over tiles of the named tensors."""
        graph = self.trace_on(body, [self.tile(name) for name in names], names, user_body=what)
        _check_admitted(self.spec, graph)
        return graph

    def trace_on(
        self, body: Callable[..., Any], examples: list[Tensor], names: list[str], user_body: str | None = None
    ) -> fx.GraphModule:
        """The graph of `body` over given fake tensors, placeholders named `names`."""
        def watched(*tensors: Tensor) -> Any:
            if user_body is None:
                return body(*tensors)
            with _BodyMode(self.spec), _Calls(self.spec):
                return body(*tensors)

        # A body may not write into tensors, but PyTorch's own composite functions and derivative formulas do.
        traced = torch.func.functionalize(watched)

        with self.fake, _as_compile_error(self.spec, user_body):
            module = make_fx(traced, decomposition_table=ops.decompositions(), tracing_mode="real")(*examples)
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        assert len(placeholders) == len(names), "two example inputs were merged: they share a storage"
        for node, name in zip(placeholders, names, strict=True):
            node.meta["declared"] = name
        module.graph.eliminate_dead_code()
        return module


def _is_free(length: Any) -> bool:
    """Whether the symbol n is still any number: a body may have fixed it by reshaping to a literal size."""
    env, expr = length.node.shape_env, length.node.expr
    return bool(env.replace(expr).free_symbols)


class _BodyMode(TorchDispatchMode):
    """Watches a user's body while it is traced: refuses what cannot be compiled, notes each op's line."""

    def __init__(self, spec: LoopSpec) -> None:
        super().__init__()
        self.spec = spec

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        where = user_line(self.spec)
        name = func._schema.name.split("::")[-1]
        if name in _LOOKS_AT_VALUES:
            raise DataDependentError(
                f"A body of {self.spec.name} looks at the values of a tensor.",
                where=where,
                given=f"{name}, which an if, while, int(), float() or .item() on a tensor calls",
                need="control flow that depends on shapes and numbers only: the body is traced once for all values",
                fix="choose between values with torch.where(condition, a, b)",
            )
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
                raise CapturedTensorError(
                    f"A body of {self.spec.name} uses a tensor from outside its declaration.",
                    where=where,
                    given=f"a tensor {_shape(value)}",
                    need="weights and views that are declared; numbers may come from anywhere",
                    fix="declare it, scale = nl.slow('d'), or write the number itself",
                )
        mode = get_proxy_mode()
        graph = mode.tracer.graph if mode is not None else None
        before = len(graph.nodes) if graph is not None else 0
        try:
            result = func(*args, **kwargs)
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, NestloopError):
                raise
            raise _OpFailed(func, args, str(error).splitlines()[0], where) from error
        if graph is not None and where is not None:
            for node in list(graph.nodes)[before:]:
                node.meta.setdefault("where", where)
                node.meta.setdefault("called", name)
        return result


class _Calls(TorchFunctionMode):
    """Sees the functions a body calls, before PyTorch takes them apart: refuses writes into tensors."""

    def __init__(self, spec: LoopSpec) -> None:
        super().__init__()
        self.spec = spec

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        plain_inplace = name.endswith("_") and not name.startswith("_") and not name.endswith("__")
        writes = plain_inplace or name in _WRITES or "out" in kwargs or kwargs.get("inplace")
        # PyTorch's own Python functions write into what they have just made; only the user's own writes count.
        if writes and sys._getframe(1).f_code.co_filename in _user_files(self.spec):
            raise InPlaceError(
                f"A body of {self.spec.name} writes into a tensor.",
                where=user_line(self.spec),
                given=f"{name} on {_shape(args[0]) if args else 'a tensor'}",
                need="values that are computed, not overwritten: the graph has no memory",
                fix="write y = x + z instead of x += z, torch.where or torch.cat instead of an assignment to x[...]",
            )
        return func(*args, **kwargs)


_WRITES = {"__setitem__", *(f"__i{op}__" for op in ("add", "sub", "mul", "truediv", "div", "pow", "and", "or", "xor"))}


class _OpFailed(Exception):
    """An op refused its operands inside a user's body."""

    def __init__(self, func: Any, args: tuple[Any, ...], message: str, where: Location | None) -> None:
        super().__init__(message)
        self.func, self.args_given, self.message, self.where = func, args, message, where


@contextmanager
def _as_compile_error(spec: LoopSpec, user_body: str | None) -> Iterator[None]:
    """Errors inside a user's body leave as a `CompileError` at the user's line, shapes given by axis names."""
    try:
        yield
    except NestloopError:
        raise
    except _OpFailed as failed:
        shapes = [_axes_of(spec, a) for a in failed.args_given if isinstance(a, Tensor)]
        raise ShapeMismatchError(
            f"In the {user_body} of {spec.name}, {_op_name(failed.func)} got axes that do not fit.",
            where=failed.where,
            given=" and ".join(shapes) or "no tensor",
            need=failed.message,
            fix="make the axes agree: transpose one side, or declare the weight with the other dims",
        ) from None
    except Exception as error:
        if user_body is None:
            raise
        raise CompileError(
            f"The {user_body} of {spec.name} cannot be traced: {type(error).__name__}.",
            where=_line_in_traceback(spec, error),
            given=str(error).splitlines()[0] if str(error) else type(error).__name__,
            need="plain PyTorch on tensors, numbers and the declared names",
            fix="run the body by hand on small tensors; backend='reference' calls it unchanged",
        ) from error


def _user_files(spec: LoopSpec) -> set[str]:
    files = set()
    for cls in (*spec.cls.__mro__, *spec.learner.__mro__):
        module = sys.modules.get(cls.__module__)
        inside = cls.__module__.startswith(("nestloop.lang", "builtins", "torch"))
        for value in () if inside else vars(cls).values():
            code = getattr(value, "__code__", None)
            if code is not None:
                files.add(code.co_filename)
        if not inside and module is not None and getattr(module, "__file__", None):
            files.add(module.__file__)
    return files


def user_line(spec: LoopSpec) -> Location | None:
    """The innermost line of the user's own files on the stack."""
    files = _user_files(spec)
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename in files:
            return Location(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _line_in_traceback(spec: LoopSpec, error: BaseException) -> Location:
    files, found = _user_files(spec), spec.where
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename in files:
            found = Location(traceback.tb_frame.f_code.co_filename, traceback.tb_lineno)
        traceback = traceback.tb_next
    return found


def _op_name(func: Any) -> str:
    return func._schema.name.split("::")[-1]


def _shape(value: Any) -> str:
    return f"[{', '.join(map(str, value.shape))}]" if isinstance(value, Tensor) else repr(value)


def _axes_of(spec: LoopSpec, value: Tensor) -> str:
    """A shape with the dims that have each size: "[n, d] = [n, 16]"."""
    return ops.named_shape(value.shape)


def _check_admitted(spec: LoopSpec, module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.op == "get_attr":
            raise CapturedTensorError(
                f"A body of {spec.name} makes a tensor constant.",
                where=node.meta.get("where", spec.where),
                given=f"a tensor made from numbers, used as {node.name}",
                need="Python numbers, or weights that are declared",
                fix="write the number itself, or declare it: scale = nl.slow('d', init='constant(0.5)')",
            )
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


def _value(module: fx.GraphModule) -> Any:
    (result,) = next(node for node in module.graph.nodes if node.op == "output").args
    return result


def _check_loss(spec: LoopSpec, module: fx.GraphModule) -> None:
    result = _value(module)
    shape = result.meta["val"].shape if isinstance(result, fx.Node) else None
    first = next(node for node in module.graph.nodes if node.meta.get("declared") in spec.inputs)
    tokens = first.meta["val"].shape[0]
    if shape is None or len(shape) != 1 or shape[0] is not tokens and shape[0] != tokens:
        raise LossNotPerTokenError(
            f"The loss of {spec.name} is not one number per token.",
            where=result.meta.get("where", spec.where) if isinstance(result, fx.Node) else spec.where,
            given="not a tensor" if shape is None else f"{ops.named_shape(shape)}",
            need="[n]: the loss of each of the tile's n tokens; the schedule's reduction adds them up",
            fix="reduce over the last axis only: .mean(-1) or .sum(-1)",
        )


def _check_used(spec: LoopSpec, module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        name = node.meta.get("declared")
        if node.op == "placeholder" and name in spec.fast and not node.users:
            raise UnusedFastWeightError(
                f"The loss of {spec.name} does not depend on the fast weight '{name}'.",
                where=spec.fast[name].where,
                given=f"{spec.learner.__name__}.{name}, which no path from the loss reaches",
                need="a loss that every fast weight enters: the inner loop would never change it",
                fix=f"use self.{name} in forward, or declare it as nl.slow(...)",
            )


def _check_readout(spec: LoopSpec, module: fx.GraphModule) -> tuple[int, ...]:
    result = _value(module)
    shape = result.meta["val"].shape if isinstance(result, fx.Node) else None
    first = next(node for node in module.graph.nodes if node.meta.get("declared") in spec.inputs)
    tokens = first.meta["val"].shape[0]
    if shape is None or len(shape) < 1 or shape[0] is not tokens and shape[0] != tokens:
        raise ReadoutShapeError(
            f"The read-out of {spec.name} is not one row per token.",
            where=result.meta.get("where", spec.where) if isinstance(result, fx.Node) else spec.where,
            given="not a tensor" if shape is None else f"{ops.named_shape(shape)}",
            need="[n, *]: the output of each token",
            fix="return f(t.q), one row per token",
        )
    return tuple(int(size) for size in shape[1:])
