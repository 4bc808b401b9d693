"""Schedules: the order in which an inner loop sees the tokens of one sequence, and when it steps.

A batch schedule learns first and reads out afterwards: every token is read with the last weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch

from nestloop.errors import IllegalScheduleError
from nestloop.lang.declare import caller


def even(start: int, stop: int, count: int) -> list[tuple[int, int]]:
    """(start, stop) of `count` parts as even as can be, the first ones with one more."""
    size, larger = divmod(stop - start, count) if count else (0, 0)
    bounds = [start]
    for index in range(count):
        bounds.append(bounds[-1] + size + (index < larger))
    return list(pairwise(bounds))


@dataclass(frozen=True)
class BatchSchedule:
    """Steps on batches of tokens, then one read-out of every token.

    The loss of a batch is the mean of its tokens' losses (`reduction="mean"`), or their sum ("sum").
    """

    needs_order: ClassVar[bool] = False
    reduction: str = "mean"

    @property
    def steps(self) -> int:
        """Steps taken on a sequence that is long enough."""
        raise NotImplementedError

    def batches(self, tokens: int) -> list[tuple[int, int]]:
        """(start, stop) of each step's batch, in a sequence of `tokens` tokens."""
        raise NotImplementedError

    def steps_on(self, tokens: int) -> int:
        """How many steps `batches` makes; `tokens` may be a traced size."""
        raise NotImplementedError

    def weight(self, batch_tokens: int) -> float:
        """What each token's loss counts in a batch of `batch_tokens`."""
        return 1.0 / batch_tokens if self.reduction == "mean" else 1.0

    def _check(self, count: int, name: str) -> None:
        kind = type(self).__name__
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise IllegalScheduleError(
                f"{kind} takes at least one step.",
                where=caller(),
                given=f"{name}={count!r}",
                need="a whole number, 1 or more",
                fix=f"write nl.{kind}(1)",
            )
        if self.reduction not in ("mean", "sum"):
            raise IllegalScheduleError(
                f"{kind} does not know this reduction over a batch's tokens.",
                where=caller(),
                given=f"reduction={self.reduction!r}",
                need='"mean" or "sum"',
                fix=f'write nl.{kind}({count}, reduction="mean")',
            )


@dataclass(frozen=True)
class FullBatch(BatchSchedule):
    """`steps` gradient steps, each on all tokens of the sequence (arXiv 2310.13807, batch gradient descent).

    Raises:
        IllegalScheduleError: steps < 1, or an unknown reduction.
    """

    steps: int = 1
    reduction: str = "mean"

    def __init__(self, steps: int = 1, reduction: str = "mean") -> None:
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "reduction", reduction)
        self._check(steps, "steps")

    def batches(self, tokens: int) -> list[tuple[int, int]]:
        return [(0, tokens)] * self.steps_on(tokens)

    def steps_on(self, tokens: int) -> int:
        return self.steps if tokens else 0


@dataclass(frozen=True)
class Shuffled(BatchSchedule):
    """The tokens in a given order, in `batches` disjoint batches, one gradient step each (2310.13807, SGD).

    The order is an explicit input, so that a run can be replayed: int64 [H, N], or [B, H, N].
    N tokens make batches as even as can be, the first N mod `batches` with one token more; a sequence shorter
    than `batches` makes N steps of one token.

    Raises:
        IllegalScheduleError: count < 1, or an unknown reduction.
    """

    needs_order: ClassVar[bool] = True
    count: int = 4
    reduction: str = "mean"

    def __init__(self, batches: int = 4, reduction: str = "mean") -> None:
        object.__setattr__(self, "count", batches)
        object.__setattr__(self, "reduction", reduction)
        self._check(batches, "batches")

    @property
    def steps(self) -> int:
        """Steps taken on a sequence of at least `count` tokens."""
        return self.count

    def batches(self, tokens: int) -> list[tuple[int, int]]:
        return even(0, tokens, self.steps_on(tokens))

    def steps_on(self, tokens: int) -> int:
        return torch.sym_min(self.count, tokens)
