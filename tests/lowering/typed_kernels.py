"""Kernels as Triton's compiler reads them. Its interpreter runs Python, where a variable may change its shape."""

from __future__ import annotations

from typing import Any

from nestloop.lowering.runtime import offline
from nestloop.lowering.runtime.triton_plan import TritonPlan

_TYPED: set[tuple[str, str]] = set()


def assert_typed(plan: TritonPlan, kernel: str) -> None:
    """Raise what Triton does of a kernel whose types do not fit; each is read once."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ir, make_backend

    if (plan.text, kernel) in _TYPED:
        return
    _TYPED.add((plan.text, kernel))
    source = offline.source_of(plan.text, kernel, "bf16", plan.wide, plan.low, plan.computed)
    target = GPUTarget("cuda", 90, 32)
    backend: Any = make_backend(target)
    options, context = backend.parse_options(plan.options(kernel)), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    made = backend.get_codegen_implementation(options), backend.get_module_map()
    source.make_ir(target, options, *made, context)
