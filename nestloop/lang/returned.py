"""What bodies return: the errors of those that return something else, one row a body."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nestloop.errors import CompileError, KernelShapeError, Location, LossNotPerTokenError, ReadoutShapeError

if TYPE_CHECKING:
    from nestloop.lang.loop import LoopSpec

_BODIES: dict[str, tuple[type[CompileError], str, str, str]] = {
    "loss": (
        LossNotPerTokenError,
        "The loss of {} is not one number per token.",
        "[n]: the loss of each of the tile's n tokens; the schedule's reduction adds them up",
        "reduce over the last axis only: .mean(-1) or .sum(-1)",
    ),
    "readout": (
        ReadoutShapeError,
        "The read-out of {} is not one row per token.",
        "[n, *]: the output of each token",
        "return f(t.q), one row per token",
    ),
    "kernel": (
        KernelShapeError,
        "The kernel of {} is not one number per query and key.",
        "[n, m]: how much each of the m keys counts at each of the n queries",
        "return torch.exp(q @ k.T), or another positive function of the two",
    ),
    "fit": (
        ReadoutShapeError,
        "The fit of {} is not one row per query.",
        "[n, *]: the estimate at each of the n queries",
        "return weight @ s.v / weight.sum(-1, keepdim=True), or another sum over keys",
    ),
}


def misshapen(spec: LoopSpec, body: str, given: str, where: Location | None) -> CompileError:
    """The error of a "loss", "readout", "kernel" or "fit" that returns what `given` says."""
    error, what, need, fix = _BODIES[body]
    rows = given.strip("[]").split(", ")[0]
    if given == _NOTHING:
        fix = f"return the {body}"
    elif given == "[]" and where is not None and _REDUCING.search(where.text):
        fix = 'write reduction="none" in it, and .mean(-1) or .sum(-1) after it'
    elif rows != "n" and re.search(r"\bn\b", rows):
        fix = "keep one row per token: no slice, no cat and no .view(-1) of the token axis"
    return error(what.format(spec.name), where=where, given=given, need=need, fix=fix)


_REDUCING = re.compile(r"\b(\w+_loss|cross_entropy)\(")  # whose default is the mean over all
_NOTHING = "None: the body returns nothing"


def described(made: Any) -> str:
    """What is no tensor, as text."""
    return _NOTHING if made is None else f"a {type(made).__name__}"


def seen(made: Any, tokens: tuple[int, ...]) -> str:
    """What a call's body returned, as text: first sizes that are these numbers of tokens as n, and as m of a kernel's
    keys."""
    if not isinstance(made, Tensor):
        return described(made)
    sizes = [str(size) for size in made.shape]
    for axis, (count, letter) in enumerate(zip(tokens, "nm", strict=False)):
        if made.shape[axis : axis + 1] == (count,):
            sizes[axis] = letter
    return f"[{', '.join(sizes)}]"
