"""Which code runs an op: generated PyTorch, C++ or Triton, of what was asked for and what its plan has.

Left to each call is what only a call knows: whether C++ or PyTorch is the faster with its sizes (`work`), whether a
form is precise with its weights (`decision`), and whether its device has room for a kernel (`instead`).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from nestloop.lowering.runtime import cache, compiler
from nestloop.lowering.runtime.native import NativePlan
from nestloop.lowering.runtime.plan import Plan
from nestloop.lowering.runtime.recipe import Asked, Origin
from nestloop.lowering.runtime.refusals import check_triton, no_native
from nestloop.lowering.runtime.triton_plan import TritonPlan

LONGEST_MODULE = 3000  # lines of Triton; of more, one kernel takes minutes to compile
# Numbers alive at once, over four times a multiprocessor's registers: such a kernel runs slowly, or on no device.
MOST_ALIVE = 280_000


@dataclass(frozen=True)
class Choice:
    """What runs.

    Attributes:
        native: the C++ or the Triton; None where generated PyTorch does all.
        by_size: whether the sizes of each call decide between this C++ and generated PyTorch.
        falls_back: whether generated PyTorch runs where a device has no room for a kernel.
        suffix: of the op's name: one module of PyTorch goes with several of C++ and Triton.
    """

    native: NativePlan | TritonPlan | None
    by_size: bool
    falls_back: bool
    suffix: str


def choose(origin: Origin, plan: Plan, asked: Asked) -> Choice:
    """What runs of a plan.

    Raises:
        NoPlanError: "cpp" or "triton" was asked for, and the loop has none, or it cannot be built.
    """
    auto = asked.backend == "auto"
    if runs_triton(plan, asked):
        check_triton(origin, plan)
        assert plan.triton is not None
        text = "".join(form.text for form in plan.triton.forms)
        return Choice(plan.triton, False, auto, f"_{'auto_' if auto else ''}triton_{cache.digest(text)}")
    reason = why_no_cpp(plan, asked)
    if reason and asked.backend == "cpp":
        raise no_native(origin, reason)
    if reason:
        return Choice(None, False, False, "_inductor" if asked.inductor else "")
    assert plan.native is not None
    # C++ with chunks of its own keeps other states than PyTorch: neither can go back from the other's.
    alike = plan.form != "stream" or plan.native.rows == plan.chunk
    return Choice(plan.native, auto and alike, False, f"_{asked.backend}_{cache.digest(plan.native.text)}")


def runs_triton(plan: Plan, asked: Asked) -> bool:
    """Whether Triton was asked for; by "auto", where a plan has it that does not take minutes to compile, nor far more
    registers than there are."""
    if asked.backend == "triton" or not asked.may_be_triton:
        return asked.backend == "triton"
    if plan.triton is None or plan.triton.text.count("\n") > LONGEST_MODULE:
        return False
    alive = [function["alive"] for function in plan.triton.work["functions"].values()]
    return max(alive, default=0) <= MOST_ALIVE


def why_no_cpp(plan: Plan, asked: Asked, build_now: bool = True) -> str:
    """Why it is not C++ that runs, where it is not Triton; "" where it is. A compiler that is missing or fails is
    announced once, where nobody asked for C++ by name.

    `build_now`: find out by building it; else a compiler's being there is enough.
    """
    if asked.inductor:
        return "inductor compiles generated PyTorch"
    if asked.backend == "torch":
        return "generated PyTorch was asked for"
    if asked.may_be_triton:
        return "tensors lie on a GPU"
    if plan.native is None:
        return plan.not_native
    scalar = "double" if asked.double else "float"
    key = (plan.native.text, scalar, *compiler.asked())
    if key not in _FAILED:
        try:
            if build_now:
                compiler.loaded(plan.name, plan.native.text, scalar)
            else:
                compiler.find()
        except compiler.BuildError as error:
            if not build_now:
                return str(error)
            _FAILED[key] = str(error)
        else:
            return ""
    if build_now and asked.backend == "auto":
        _announce(_FAILED[key])
    return _FAILED[key]


def _announce(cause: str) -> None:
    if not _ANNOUNCED:
        _ANNOUNCED.append(cause)
        warnings.warn(
            f"nestloop runs generated PyTorch instead of C++, which is slower: {cause}. "
            "Install g++ or clang++, or name one with CXX; backend='torch' says that this is intended.",
            stacklevel=2,
        )


_FAILED: dict[tuple[str, ...], str] = {}  # by C++, its scalar and what is asked of compilers
_ANNOUNCED: list[str] = []
