"""What bodies return: the errors of those that return something else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from nestloop.errors import KernelShapeError, Location, LossNotPerTokenError, ReadoutShapeError

if TYPE_CHECKING:
    from nestloop.lang.loop import LoopSpec


def described(made: Any) -> str:
    """What is no tensor, as text."""
    return "None: the body returns nothing" if made is None else f"a {type(made).__name__}"


def seen(made: Any, *tokens: int) -> str:
    """What a call's body returned, as text: sizes that are numbers of tokens as n, and m of a kernel's keys."""
    if not isinstance(made, Tensor):
        return described(made)
    names = dict(zip(range(made.ndim), zip(tokens, "nm", strict=False), strict=False))
    sizes = [names[i][1] if i in names and names[i][0] == size else str(size) for i, size in enumerate(made.shape)]
    return f"[{', '.join(sizes)}]"


def loss_error(spec: LoopSpec, given: str, where: Location | None) -> LossNotPerTokenError:
    return LossNotPerTokenError(
        f"The loss of {spec.name} is not one number per token.",
        where=where,
        given=given,
        need="[n]: the loss of each of the tile's n tokens; the schedule's reduction adds them up",
        fix="reduce over the last axis only: .mean(-1) or .sum(-1)",
    )


def readout_error(spec: LoopSpec, given: str, where: Location | None) -> ReadoutShapeError:
    return ReadoutShapeError(
        f"The read-out of {spec.name} is not one row per token.",
        where=where,
        given=given,
        need="[n, *]: the output of each token",
        fix="return f(t.q), one row per token",
    )


def kernel_error(spec: LoopSpec, given: str, where: Location | None) -> KernelShapeError:
    return KernelShapeError(
        f"The kernel of {spec.name} is not one number per query and key.",
        where=where,
        given=given,
        need="[n, m]: how much each of the m keys counts at each of the n queries",
        fix="return torch.exp(q @ k.T), or another positive function of the two",
    )
