"""What running a lowered loop may refuse."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

from nestloop.errors import (
    DoubleBackwardError,
    ForwardModeError,
    IndefiniteMatrixError,
    Location,
    NoPlanError,
    SharedMemoryError,
    SingularSystemError,
)
from nestloop.lang.loop import LoopSpec
from nestloop.lowering.runtime.plan import Plan
from nestloop.lowering.runtime.recipe import Origin
from nestloop.lowering.runtime.triton_plan import TritonPlan

_RIDGE = "add a positive diagonal, as a ridge does: a + torch.diag(self.lamb), with lamb > 0"


def no_native(origin: Origin, reason: str) -> NoPlanError:
    """The refusal of a loop without C++, where that was asked for by name."""
    return NoPlanError(
        f"{origin.name} has no C++ plan for these sizes.",
        where=origin.where,
        given=reason,
        need="ops with a C++ spelling in lowering/ops, and a C++ compiler",
        fix='write backend="auto": generated PyTorch runs where there is no C++',
    )


def check_triton(spec: LoopSpec | Origin, plan: Plan) -> None:
    """Raise `NoPlanError` for a loop that has no Triton, or where Triton is not installed."""
    if plan.not_triton:
        raise NoPlanError(
            f"{spec.name} has no Triton plan for these sizes.",
            where=spec.where,
            given=plan.not_triton,
            need="ops with a Triton spelling in lowering/ops, and tiles that fit a program's registers",
            fix='write backend="torch": generated PyTorch runs every loop, on a GPU too',
        )
    if importlib.util.find_spec("triton") is None:
        raise NoPlanError(
            "The triton backend needs Triton.",
            where=spec.where,
            given="no module named triton",
            need="Triton 3.6 or newer",
            fix="pip install 'nestloop[triton]'",
        )


def no_room(plan: TritonPlan, kernel: str, wanted: int, available: int) -> SharedMemoryError:
    """The refusal of a kernel that wants so many bytes of shared memory on a device that has fewer.

    Tiles go there when products take them, or when they change their layout: the largest one is to blame.
    """
    kernels, functions = plan.work["kernels"], plan.work["functions"]
    called = kernels.get(kernel, {}).get("calls") or list(functions)
    tile = max((functions[name]["largest"] for name in called), key=lambda largest: largest["elements"])
    size = fits = tile["size"]
    while wanted * fits > available * size and fits > 16:
        fits //= 2
    return SharedMemoryError(
        f"The {kernel} kernel wants more shared memory than the device has.",
        given=f"{wanted:,} bytes of shared memory for a program",
        need=f"at most {available:,}: its largest tile is {tile['tile']}, {4 * tile['elements']:,} bytes in float32",
        fix=f"make {tile['axis']} at most {fits} (it is {size}): a smaller size, or chunks of fewer tokens where that "
        'is n; or write backend="torch": generated PyTorch runs every loop, on a GPU too',
    )


@contextmanager
def shared_memory_of(plan: TritonPlan, kernel: str) -> Iterator[None]:
    """While a kernel is launched: Triton's refusal of one that wants too much shared memory, in our words."""
    from triton.runtime.errors import OutOfResources

    try:
        yield
    except OutOfResources as error:
        if error.name != "shared memory":
            raise
        raise no_room(plan, kernel, error.required, error.limit) from None


def singular_system(origin: Origin, line: str | Location) -> SingularSystemError:
    """The refusal of a linear system that has no solution; `line`: of the user's, as `Location.short` gives it."""
    return SingularSystemError(
        f"A linear system of {origin.name} is singular.",
        where=_where(origin, line),
        given="a matrix with a pivot that is exactly zero",
        need="a matrix with an inverse, for every head, sequence and token",
        fix=_RIDGE,
    )


def indefinite_matrix(origin: Origin, line: str | Location) -> IndefiniteMatrixError:
    """The refusal of a matrix that has no Cholesky factor; `line`: as above."""
    return IndefiniteMatrixError(
        f"A matrix of {origin.name} has no Cholesky factor.",
        where=_where(origin, line),
        given="one that is not positive definite",
        need="a symmetric matrix whose eigenvalues are positive, for every head, sequence and token",
        fix=_RIDGE,
    )


def _where(origin: Origin, line: str | Location) -> Location | None:
    if isinstance(line, Location):
        return line
    if not line:
        return origin.where
    name, _, number = line.rpartition(":")
    file = next((f for f in origin.files if os.path.basename(f) == name), name)
    return Location(file, int(number))


def differentiated_twice(origin: Origin) -> DoubleBackwardError:
    """The refusal of a gradient's gradient."""
    return DoubleBackwardError(
        f"A gradient of {origin.name} is differentiated again.",
        where=origin.where,
        given="a gradient with a graph of its own (create_graph=True, or torch.func.grad inside another transform)",
        need="first derivatives of what a loop computes, its own gradients inside: generated code has no others",
        fix='write nl.compile(..., backend="reference"), which PyTorch differentiates as often as it is asked to',
    )


def forward_mode(origin: Origin) -> ForwardModeError:
    """The refusal of a derivative that is taken forward."""
    return ForwardModeError(
        f"{origin.name} is differentiated in forward mode.",
        where=origin.where,
        given="a tensor with a tangent (torch.func.jvp, jacfwd or hessian, or torch.autograd.forward_ad)",
        need="derivatives in reverse mode: generated code has no others",
        fix='write nl.compile(..., backend="reference"), or torch.func.vjp or jacrev',
    )
