"""Generated Triton on CPU tensors: Triton's interpreter, kernel by kernel, in a process that also compiles.

Triton interprets when TRITON_INTERPRET is set before it is imported, and then compiles nothing. Here one kernel is
interpreted at a time. Five things of the stock interpreter are mended on the way: bfloat16, which it computes wrongly
(products of garbage, casts that cut off), is rounded to nearest; what it puts in the place of `triton.language` while a
kernel runs is taken back after it, and put there once, not again for every function that the kernel calls; a number
that bounds a loop is read in a way that every numpy allows; and products may ask for every precision that devices have:
those in tf32 round their factors, all others are taken in full. What a kernel touches is watched (`runtime.touched`):
it must lie in the tensors that it was given, and be in an order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle
from triton.runtime.jit import JITFunction

from nestloop.lowering.runtime.touched import Races, Reach

_BUILDER: Any = type(interpreter.interpreter_builder)
_INTERPRETED: dict[int, InterpretedFunction] = {}


_TOUCHED: list[Races] = []  # by the kernel that runs


def interpreted(kernel: JITFunction, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Run a kernel on CPU tensors, one program after the other. Layouts and warps are not seen.

    Raises (inside Triton's InterpreterError) IndexError where it reads or writes what is in none of its tensors, and
    RuntimeError where it does so in an order that a GPU does not promise.
    """
    _install()
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    _TOUCHED.append(Races(Reach(kernel.__name__, tensors)))
    try:
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = True
            _function(kernel)[grid](**arguments)
    finally:
        _TOUCHED.pop()


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


def _to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 numbers without the 13 bits of their mantissas that matrix units do not read."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).reshape(np.shape(x))


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

    def patch_language(function: Any) -> Any:
        scope = patch_lang(whole)
        plain = tl.range

        def turns(*bounds: Any, num_stages: int = 1, **settings: Any) -> Iterable[int]:
            every: range = plain(*bounds, **settings)
            return every if num_stages == 1 else _TOUCHED[-1].turns(every)

        scope.set_attr(tl, "range", turns)
        return scope

    interpreter._patch_lang = patch_language

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

    def create_dot(
        self: Any, a: TensorHandle, b: TensorHandle, c: TensorHandle, precision: Any, *settings: Any
    ) -> TensorHandle:
        if not (_is_low(a) or _is_low(b)):
            if precision == ir.INPUT_PRECISION.TF32 and a.dtype.scalar == tl.float32:
                a, b = (TensorHandle(_to_tf32(factor.data), tl.float32) for factor in (a, b))
            return dot(self, a, b, c, precision, *settings)
        made = np.matmul(_widened(a), _widened(b)) + _widened(c)
        return TensorHandle(_to_bfloat16(made), tl.bfloat16) if _is_low(c) else TensorHandle(made, c.dtype.scalar)

    def create_fp_to_fp(self: Any, source: TensorHandle, to: Any, rounding: Any) -> TensorHandle:
        low = _is_low(source) or to.scalar == tl.bfloat16
        return self.cast_impl(source, to) if low else convert(self, source, to, rounding)

    load, store, set_grid_idx = _BUILDER.create_masked_load, _BUILDER.create_masked_store, _BUILDER.set_grid_idx

    def touch(verb: str, at: TensorHandle, mask: TensorHandle) -> None:
        _TOUCHED[-1].touch(verb, at.data, mask.data, at.get_element_ty().primitive_bitwidth // 8)

    def create_masked_load(self: Any, at: TensorHandle, mask: TensorHandle, *rest: Any) -> TensorHandle:
        touch("reads", at, mask)
        return load(self, at, mask, *rest)

    def create_masked_store(self: Any, at: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> Any:
        touch("writes", at, mask)
        return store(self, at, value, mask, *rest)

    def create_barrier(self: Any) -> None:
        _TOUCHED[-1].wait()

    def begin(self: Any, *place: int) -> None:
        _TOUCHED[-1].begin()
        set_grid_idx(self, *place)

    _BUILDER.set_grid_idx = begin
    arithmetic = (cast_impl, binary_op, unary_op, create_dot, create_fp_to_fp)
    for method in (*arithmetic, create_masked_load, create_masked_store, create_barrier):
        setattr(_BUILDER, method.__name__, method)
