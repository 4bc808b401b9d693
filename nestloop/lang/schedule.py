"""Schedules: the order in which an inner loop sees the tokens of one sequence, and when it steps.

A batch schedule learns first and reads out afterwards: every token is read with the last weights. A stream reads out
while it learns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import ClassVar

import torch

from nestloop.errors import IllegalScheduleError, InputError, Location, shown
from nestloop.lang.declaration import is_count
from nestloop.lang.declare import caller
from nestloop.lang.dims import DimExpr, parse


def even(start: int, stop: int, count: int) -> list[tuple[int, int]]:
    """(start, stop) of `count` parts as even as can be, the first ones with one more."""
    size, larger = divmod(stop - start, count) if count else (0, 0)
    sizes = [size + (index < larger) for index in range(count)]
    return list(pairwise(accumulate(sizes, initial=start)))


class Schedule:
    """What a schedule is: a `BatchSchedule` or a `Stream`."""

    needs_order: ClassVar[bool] = False

    def seen(self, tokens: int) -> int:
        """What `self.n` is in a body that works on so many tokens (which may be a traced size)."""
        return tokens


@dataclass(frozen=True)
class BatchSchedule(Schedule):
    """Steps on batches of tokens, then one read-out of every token.

    The loss of a batch is the mean of its tokens' losses (`reduction="mean"`), or their sum ("sum").
    """

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
        if not is_count(count):
            raise IllegalScheduleError(
                f"{kind} takes at least one step.",
                where=caller(),
                given=f"{name}={shown(count)}",
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


@dataclass(frozen=True)
class Stream(Schedule):
    """Schedules that read out while they learn, and carry a state from one call to the next.

    A step's loss is the sum of its tokens' losses. `reset` starts again from the initial fast weights every so many
    tokens: what was learned is forgotten, momenta and all, not what was seen. A window of the optimizer reaches behind
    it.
    """

    @property
    def period(self) -> int:
        """Tokens per chunk, 1 where there are none."""
        return 1

    def _positive(self, **counts: int | None) -> None:
        kind = type(self).__name__
        for name, count in counts.items():
            if count is not None and not is_count(count):
                raise IllegalScheduleError(
                    f"The {name} of {kind} is not a count.",
                    where=caller(),
                    given=f"{name}={shown(count)}",
                    need="a whole number, 1 or more",
                    fix=f"write {name}={2 if name == 'micro' else 16}",
                )

    def _multiple(self, name: str, value: int | None, of: int) -> None:
        if value is not None and value % of:
            raise IllegalScheduleError(
                f"The {name} of {type(self).__name__} falls inside a chunk.",
                where=caller(),
                given=f"{name}={value}, chunks of {of} tokens",
                need=f"a multiple of {of}",
                fix=f"write {name}={max(value // of, 1) * of}",
            )


@dataclass(frozen=True)
class Causal(Stream):
    """Token by token; gradients are taken at the weights their chunk started with (arXiv 2407.04620).

    Token t's step uses its own loss's gradient at the chunk's first weights, the anchor; it is then read out with the
    weights after its step (`read="after"`) or before it ("before"). Tokens are on their own: in a body `self.n` is 1.

    Args:
        chunk: tokens per anchor. 1 takes every gradient at the current weights.
        read: "after" (inclusive) or "before" a token's own step.
        reset: start from the initial fast weights every so many tokens, a multiple of `chunk`. The first steps after
            it still take the gradients of the tokens before it that are in the optimizer's `window`.

    Raises:
        IllegalScheduleError: a count that is none, a reset inside a chunk, an unknown `read`.
    """

    chunk: int = 16
    read: str = "after"
    reset: int | None = None
    micro: int = 1

    def __init__(self, chunk: int = 16, read: str = "after", reset: int | None = None) -> None:
        self._set(chunk, read, reset, 1)

    def _set(self, chunk: int, read: str, reset: int | None, micro: int) -> None:
        for name, value in (("chunk", chunk), ("read", read), ("reset", reset), ("micro", micro)):
            object.__setattr__(self, name, value)
        self._positive(chunk=chunk, reset=reset, micro=micro)
        self._multiple("reset", reset, chunk)
        if read not in ("after", "before"):
            raise IllegalScheduleError(
                f"{type(self).__name__} does not know when to read out.",
                where=caller(),
                given=f"read={read!r}",
                need='"after" or "before" the token\'s own step',
                fix='write read="after"',
            )

    @property
    def period(self) -> int:
        return self.chunk

    def seen(self, tokens: int) -> int:
        return 1


@dataclass(frozen=True)
class Online(Causal):
    """Token by token, each gradient at the current weights: the delta rule's schedule (2102.11174, 2412.06464).

    Args:
        read, reset: as for `Causal`.
        micro: steps per token, each on views of its own (`nl.view(..., micro=True)`; DeltaProduct, 2502.10297). The
            decay is taken once, with the first; the token is read out once, after the last.
    """

    def __init__(self, read: str = "after", reset: int | None = None, micro: int = 1) -> None:
        self._set(1, read, reset, micro)


@dataclass(frozen=True)
class Chunked(Stream):
    """Chunk by chunk: one step on all tokens of a chunk, which are all read out with the same weights.

    Args:
        size: tokens per chunk.
        order: "update-apply" reads a chunk with the weights its own step leaves, so that its tokens see one another
            (the last chunk may be shorter); "apply-update" reads it with the weights before the step (LaCT,
            arXiv 2505.23884). There a chunk that is not complete takes no step; its gradient waits in the state. Tokens
            are on their own, and in a body `self.n` is `size`, also where a call holds a part of a chunk alone.
        anchor: gradients are taken at the weights of the last multiple of so many tokens; None takes them at the
            chunk's first weights, 0 always at the initial ones.
        inclusive: with "apply-update", the last token of a chunk is read after the chunk's step (titans-pytorch).
        reset: start from the initial fast weights every so many tokens.

    Raises:
        IllegalScheduleError: a count that is none, an anchor or reset inside a chunk, an unknown order.
    """

    size: int = 64
    order: str = "update-apply"
    anchor: int | None = None
    inclusive: bool = False
    reset: int | None = None

    @property
    def period(self) -> int:
        return self.size

    def seen(self, tokens: int) -> int:
        return self.size if self.order == "apply-update" else tokens

    def __post_init__(self) -> None:
        self._positive(size=self.size, reset=self.reset, anchor=self.anchor or None)
        self._multiple("reset", self.reset, self.size)
        self._multiple("anchor", self.anchor, self.size)
        if self.order not in ("update-apply", "apply-update"):
            raise IllegalScheduleError(
                "Chunked does not know this order.",
                where=caller(),
                given=f"order={self.order!r}",
                need='"update-apply" or "apply-update"',
                fix='write order="apply-update"',
            )
        if self.inclusive and self.order == "update-apply":
            raise IllegalScheduleError(
                "Chunked reads every token after the step already.",
                where=caller(),
                given='inclusive=True, order="update-apply"',
                need='inclusive with order="apply-update" only',
                fix="leave inclusive out",
            )


def resets_at(schedule: Causal | Chunked, position: int) -> bool:
    """Whether a sequence starts again at a place: not at its first, where a given state is its start."""
    return bool(schedule.reset and position and position % schedule.reset == 0)


def sees_later(schedule: Schedule) -> bool:
    """Whether a token is read with weights that later tokens have changed."""
    if isinstance(schedule, Chunked):
        return schedule.order == "update-apply"
    return isinstance(schedule, Program) or not isinstance(schedule, Stream)


@dataclass(frozen=True)
class Program(Stream):
    """A list of operations on token ranges, carried out in order: LaCT's explicit schedule.

        nl.Program(("update", 0, "M"), ("apply", 0, "N"))

    "update" takes one step on the tokens start:stop, with gradients at the current weights; "apply" reads them out.
    Bounds are numbers or text in the dims. Every token is read out exactly once.

    Raises:
        IllegalScheduleError: an operation that is none.
        DimExpressionError: a bound that is not arithmetic.
    """

    operations: tuple[tuple[str, DimExpr, DimExpr], ...] = ()
    where: Location = field(init=False, repr=False, compare=False)

    def __init__(self, *operations: tuple[str, str | int, str | int]) -> None:
        where = caller()
        parsed = []
        for operation in operations:
            if not isinstance(operation, (tuple, list)) or len(operation) != 3 or operation[0] not in _OPERATIONS:
                raise IllegalScheduleError(
                    "Program does not know this operation.",
                    where=where,
                    given=shown(operation),
                    need='("update", start, stop) or ("apply", start, stop)',
                    fix='write nl.Program(("update", 0, "N"), ("apply", 0, "N"))',
                )
            parsed.append((operation[0], parse(operation[1], where), parse(operation[2], where)))
        object.__setattr__(self, "operations", tuple(parsed))
        object.__setattr__(self, "where", where)

    def on(self, sizes: dict[str, int], where: Location | None = None) -> list[tuple[str, int, int]]:
        """The operations on a sequence of these sizes, empty ranges left out; `where` is the loop they belong to.

        Raises:
            InputError: a bound that is a fraction, a range outside the sequence, a token read twice or not at all.
        """
        tokens = sizes["N"]
        made, read = [], [0] * tokens
        for kind, first, last in self.operations:
            start, stop = (_whole(bound, sizes, where) for bound in (first, last))
            if not 0 <= start <= stop <= tokens:
                raise InputError(
                    "An operation of Program lies outside the sequence.",
                    where=where,
                    given=f'("{kind}", {first}, {last}) = {start}:{stop}, N = {tokens}',
                    need="0 <= start <= stop <= N",
                    fix='bound it by the length: "N"',
                )
            if kind == "apply":
                read[start:stop] = [count + 1 for count in read[start:stop]]
            if start < stop:
                made.append((kind, start, stop))
        wrong = [index for index, count in enumerate(read) if count != 1]
        if wrong:
            raise InputError(
                "Program reads tokens out twice, or not at all.",
                where=where,
                given=f"token {wrong[0]}, read {read[wrong[0]]} times",
                need="every token in one apply",
                fix='end with ("apply", 0, "N")',
            )
        return made


def _whole(bound: DimExpr, sizes: dict[str, int], where: Location | None) -> int:
    value = bound.evaluate(sizes, where)
    if value != int(value):
        known = ", ".join(f"{name} = {sizes[name]}" for name in bound.names)
        raise InputError(
            "A bound of Program is not a number of tokens.",
            where=where,
            given=f"{bound} = {value:.4g}" + (f", {known}" if known else ""),
            need="a whole number",
            fix=f'write "{str(bound).replace(" / ", " // ")}"' if " / " in str(bound) else "write another number",
        )
    return int(value)


@dataclass(frozen=True)
class Sliding(Stream):
    """For a kernel estimator: each query sees the last `window` keys, its own among them (sliding-window attention).

    Raises:
        IllegalScheduleError: a window that is no number of tokens.
    """

    window: int = 128

    def __post_init__(self) -> None:
        self._positive(window=self.window)


_OPERATIONS = ("update", "apply")
