"""Inputs at which layers go wrong in training: each is one function here, which `nl.check(..., stress=True)` finds.

Code has to stay finite wherever the definition itself does in float32, and in float32 close to it. Where the definition
does not, the row says it: no code can mend a declaration. How far off views of two bytes are there is told, by the
largest gradient (or output) of all, and not judged: what cancels, or is solved for, takes more digits than they have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nestloop.checks.certificate import Row
from nestloop.checks.inputs import Inputs
from nestloop.checks.subject import SHARE, UNDEFINED, Subject, allowed, entered, furthest, not_finite
from nestloop.lang import coefficient
from nestloop.lang.binding import token_axis

Stress = Callable[[Subject], Inputs | None]  # None: there is nothing of the kind to stress
STRESSES: dict[str, Stress] = {}
declared = entered(STRESSES)

LONG = 128  # tokens
MANY = 30.0  # times its usual norm
FEW = 1e-4
CLOSED = -30.0  # of a log decay: nothing is kept


def stress(subject: Subject) -> Iterator[Row]:
    """Every stress on every backend, views in float32 and each other dtype under check."""
    for name, make in STRESSES.items():
        inputs = make(subject)
        if inputs is None:
            continue
        for dtype in subject.dtypes:
            given = subject.given(inputs, dtype)
            yield from _under(f"stress, {name}", subject, given, dtype)


def _under(check: str, subject: Subject, given: Inputs, dtype: str) -> Iterator[Row]:
    tokens = given.tokens(subject.spec)
    wanted = subject.reference(given)
    single = subject.single(given)
    where = not_finite(wanted) or not_finite(single)
    if where:
        yield Row(check, "reference", dtype, tokens, None, 0.0, UNDEFINED + where)
        return
    judged = dtype == "float32"
    share, bound = (SHARE, allowed(dtype, furthest(single, wanted)[0])) if judged else (1.0, math.inf)
    for backend in subject.here:
        found = subject.run(backend, given)
        where = not_finite(found)
        error, worst = (math.nan, where) if where else furthest(found, wanted, share)
        yield Row(check, backend, dtype, tokens, error, bound, worst)


def _of_views(subject: Subject, change: Callable[[Tensor], Tensor]) -> Inputs:
    return subject.inputs(subject.lengths[-1]).map(lambda name, value: change(value), subject.spec.views)


@declared
def tokens_of_zeros(subject: Subject) -> Inputs:
    return _of_views(subject, torch.zeros_like)


@declared
def large_tokens(subject: Subject) -> Inputs:
    return _of_views(subject, lambda view: MANY * view)


@declared
def small_tokens(subject: Subject) -> Inputs:
    return _of_views(subject, lambda view: FEW * view)


@declared
def one_token_again_and_again(subject: Subject) -> Inputs:
    views = subject.spec.inputs

    def repeated(name: str, value: Tensor) -> Tensor:
        return value.narrow(token_axis(views[name]), 0, 1).expand_as(value).contiguous()

    return subject.inputs(subject.lengths[-1]).map(repeated, views)


def _with_gates(subject: Subject, gate: float, log_decay: float) -> Inputs | None:
    spec = subject.spec
    if not spec.gates:
        return None
    logarithms = {part.name for part in coefficient.parts(spec.optimizer.log_decay) if hasattr(part, "name")}

    def filled(name: str, value: Tensor) -> Tensor:
        return torch.full_like(value, log_decay if name in logarithms else gate)

    return subject.inputs(subject.lengths[-1]).map(filled, spec.gates)


@declared
def closed_gates(subject: Subject) -> Inputs | None:
    return _with_gates(subject, 0.0, CLOSED)


@declared
def open_gates(subject: Subject) -> Inputs | None:
    return _with_gates(subject, 1.0, 0.0)


@declared
def many_tokens(subject: Subject) -> Inputs:
    return subject.inputs(subject.lengths[-1] if subject.fixed else LONG)
