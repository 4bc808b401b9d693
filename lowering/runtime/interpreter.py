"""Generated Triton on CPU tensors: Triton's interpreter, kernel by kernel, in a process that also compiles.

Triton interprets when TRITON_INTERPRET is set before it is imported, and then compiles nothing. Here one kernel is
interpreted at a time. Five things of the stock interpreter are mended on the way: bfloat16, which it computes wrongly
(products of garbage, casts that cut off), is rounded to nearest; what it puts in the place of `triton.language` while a
kernel runs is taken back after it, and put there once, not again for every function that the kernel calls; a number
that bounds a loop is read in a way that every numpy allows; and products may ask for every precision that devices have,
though all are taken in full. What a kernel reads and writes must lie in the tensors that it was given: a GPU would not
say so, unless the memory beside them happened to be nobody's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle
from triton.runtime.jit import JITFunction

_BUILDER: Any = type(interpreter.interpreter_builder)
_INTERPRETED: dict[int, InterpretedFunction] = {}


class Reach:
    """The memory that a kernel may touch: every element of the tensors that it is given, and nothing between them.

    Args:
        kernel: its name.
        tensors: by the names of its arguments, on the CPU, in any layout.
    """

    def __init__(self, kernel: str, tensors: dict[str, Tensor]) -> None:
        self.kernel, self.tensors = kernel, tensors
        first, last = zip(*map(_pieces, tensors.values()), strict=True) if tensors else ([], [])
        starts, ends = np.concatenate([[0], *first]), np.concatenate([[0], *last])
        order = np.argsort(starts, kind="stable")
        # Tensors may overlap: a piece ends where it or any before it ends the latest.
        self.starts, self.ends = starts[order], np.maximum.accumulate(ends[order])

    def check(self, verb: str, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        """Raise IndexError unless all elements of `size` bytes, where the mask is set, lie in the tensors."""
        wanted = addresses[mask.astype(np.bool_)].astype(np.int64)  # a mask of one number comes as int32
        beyond = wanted + size > self.ends[np.searchsorted(self.starts, wanted, side="right") - 1]
        if beyond.any():
            first = int(wanted[beyond][0])
            near = min(self.tensors, key=lambda name: abs(first - self.tensors[name].data_ptr()))
            raise IndexError(
                f"{self.kernel} {verb} {beyond.sum()} of {beyond.size} elements that are in none of its tensors, "
                f"the first {first - self.tensors[near].data_ptr()} bytes from the start of {near}"
            )


def _pieces(tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Where the pieces of a tensor that lie densely start, in bytes, and where they end."""
    if not tensor.numel():
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    size, dense = tensor.element_size(), 1
    axes = sorted((stride, count) for stride, count in zip(tensor.stride(), tensor.shape, strict=True) if count > 1)
    starts = np.array([tensor.data_ptr()], np.int64)
    for stride, count in axes:
        if stride <= dense:
            dense = max(dense, stride * (count - 1) + dense)
        else:
            starts = (starts[:, None] + np.arange(count, dtype=np.int64) * stride * size).reshape(-1)
    return starts, starts + dense * size


_REACH: list[Reach] = []  # of the kernel that runs


def interpreted(kernel: JITFunction, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Run a kernel on CPU tensors, one program after the other. Races, layouts and warps are not seen.

    Raises IndexError (inside Triton's InterpreterError) where it reads or writes what is in none of its tensors.
    """
    _install()
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    _REACH.append(Reach(kernel.__name__, tensors))
    try:
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = True
            _function(kernel)[grid](**arguments)
    finally:
        _REACH.pop()


def _function(kernel: JITFunction) -> InterpretedFunction:
    key = id(kernel)  # a JITFunction's own hash walks its dependencies
    if key not in _INTERPRETED:
        _INTERPRETED[key] = InterpretedFunction(kernel.fn)
    return _INTERPRETED[key]


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits of float32 numbers rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).reshape(np.shape(x))


def _from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32).reshape(np.shape(bits))


def _is_low(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> np.ndarray:
    return _from_bfloat16(handle.data) if _is_low(handle) else handle.data


def _install() -> None:
    """Mend the interpreter, once; compiling is not touched."""
    if getattr(_BUILDER, "mended_by_nestloop", False):
        return
    _BUILDER.mended_by_nestloop = True
    builder = interpreter.interpreter_builder
    precisions = (*builder.options.allowed_dot_input_precisions, "bf16x3", "bf16x6")
    builder.options = replace(builder.options, allowed_dot_input_precisions=precisions)

    def call(self: JITFunction, *args: Any, **kwargs: Any) -> Any:  # tl.sum and the like, and generated functions
        return _function(self)(*args, **kwargs)

    def call_inside(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    JITFunction.__call__ = call
    InterpretedFunction.__call__ = call_inside
    patch_lang, patch = interpreter._patch_lang, interpreter._patch_lang_tensor
    whole = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # the generated file names one, Triton's own both
    interpreter._patch_lang = lambda function: patch_lang(whole)

    def patch_lang_tensor(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        # Triton 3.6 calls int() on an array of one element, which numpy 2.4 refuses.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
    cast, binary, unary = _BUILDER.cast_impl, _BUILDER.binary_op, _BUILDER.unary_op
    dot, convert = _BUILDER.create_dot, _BUILDER.create_fp_to_fp

    def cast_impl(self: Any, source: TensorHandle, to: Any) -> TensorHandle:
        if to.scalar == tl.bfloat16 and not _is_low(source):
            return TensorHandle(_to_bfloat16(source.data.astype(np.float32)), tl.bfloat16)
        if _is_low(source) and to.scalar != tl.bfloat16:
            wide = _from_bfloat16(source.data).astype(interpreter._get_np_dtype(to))
            return TensorHandle(wide, to.scalar)
        return cast(self, source, to)

    def binary_op(self: Any, a: TensorHandle, b: TensorHandle, op: Callable[..., np.ndarray]) -> TensorHandle:
        if not _is_low(a):
            return binary(self, a, b, op)
        made = op(_widened(a), _widened(b))
        return TensorHandle(made, tl.int1) if made.dtype == np.bool_ else TensorHandle(_to_bfloat16(made), tl.bfloat16)

    def unary_op(self: Any, a: TensorHandle, op: Callable[..., np.ndarray]) -> TensorHandle:
        return TensorHandle(_to_bfloat16(op(_widened(a))), tl.bfloat16) if _is_low(a) else unary(self, a, op)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, c: TensorHandle, *settings: Any) -> TensorHandle:
        if not (_is_low(a) or _is_low(b)):
            return dot(self, a, b, c, *settings)
        made = np.matmul(_widened(a), _widened(b)) + _widened(c)
        return TensorHandle(_to_bfloat16(made), tl.bfloat16) if _is_low(c) else TensorHandle(made, c.dtype.scalar)

    def create_fp_to_fp(self: Any, source: TensorHandle, to: Any, rounding: Any) -> TensorHandle:
        low = _is_low(source) or to.scalar == tl.bfloat16
        return self.cast_impl(source, to) if low else convert(self, source, to, rounding)

    load, store = _BUILDER.create_masked_load, _BUILDER.create_masked_store

    def create_masked_load(self: Any, at: TensorHandle, mask: TensorHandle, *rest: Any) -> TensorHandle:
        _REACH[-1].check("reads", at.data, mask.data, at.get_element_ty().primitive_bitwidth // 8)
        return load(self, at, mask, *rest)

    def create_masked_store(self: Any, at: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> Any:
        _REACH[-1].check("writes", at.data, mask.data, at.get_element_ty().primitive_bitwidth // 8)
        return store(self, at, value, mask, *rest)

    arithmetic = (cast_impl, binary_op, unary_op, create_dot, create_fp_to_fp)
    for method in (*arithmetic, create_masked_load, create_masked_store):
        setattr(_BUILDER, method.__name__, method)
