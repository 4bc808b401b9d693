"""What must hold of any loop: a property is one function here, which `nl.check` finds by itself, and yields rows.

A claim that is algebra is compared in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from nestloop.checks.certificate import Row
from nestloop.checks.comparison import call, run, run_in_parts, weighted, with_gradients
from nestloop.checks.inputs import Inputs
from nestloop.checks.subject import Subject, entered, furthest
from nestloop.lang.binding import token_axis
from nestloop.lang.schedule import Chunked, Program, Stream, sees_later
from nestloop.lowering.capture import capture

Property = Callable[[Subject], Iterator[Row]]
PROPERTIES: dict[str, Property] = {}
declared = entered(PROPERTIES)

# Of a central difference over five points: errors of the fourth power, and of eps over it; a kink in between, as elu
# has one, is not met by both. The finer ones are asked where these do not hold: of what bends within less.
STEPS = (1e-4, 1e-5)
FINER = (1e-6, 1e-7)
DIFFERENCES = 1e-5  # what these may be off by
SPLIT_TOKENS = 23  # of a sequence that is walked token by token


@declared
def definition(subject: Subject) -> Iterator[Row]:
    """The reference's gradients are derivatives: of all it computes along a random direction, by central differences.

    They are not where a body holds values constant (`detach`, `f.held`).
    """
    tokens = subject.short
    if _holds(subject, tokens):
        why = "not compared: a body holds values constant, which differences do not"
        yield Row("definition", "reference", "float64", tokens, None, DIFFERENCES, why)
        return
    inputs = subject.inputs(tokens)
    gradients = subject.reference(inputs)
    torch.manual_seed(subject.seed + 1)
    directions = {name: torch.randn_like(leaf) for name, leaf in inputs.leaves().items()}
    claimed = {name: (gradients[f"gradient of {name}"] * by).sum().item() for name, by in directions.items()}
    largest = max(map(abs, claimed.values()))

    def off(name: str, steps: Sequence[float]) -> float:
        """By how much, of its size, the closest difference is."""

        def moved(by: float) -> float:
            near = inputs.map(lambda other, value: value + by * directions[name] if other == name else value)
            return weighted(call(subject.op("reference"), near)).item()

        slopes = [(8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h) for h in steps]
        size = max(abs(claimed[name]), 1e-3 * largest, 1e-9)
        return min(abs(slope - claimed[name]) for slope in slopes) / size

    relative = {name: off(name, STEPS) for name in directions}
    relative |= {name: min(by, off(name, FINER)) for name, by in relative.items() if by > DIFFERENCES}
    worst = max(relative, key=relative.__getitem__)
    row = Row("definition", "reference", "float64", tokens, relative[worst], DIFFERENCES, f"gradient of {worst}")
    yield subject.told(row, inputs)


def _holds(subject: Subject, tokens: int) -> bool:
    """Whether a body, or a function of the optimizer, holds a value constant."""
    if subject.spec.holds:
        return True
    plain = {name: size for name, size in subject.sizes.items() if name not in ("B", "N", "n")}
    return capture(subject.op("reference").renamed, plain, tokens).detached


@declared
def agreement(subject: Subject) -> Iterator[Row]:
    """Generated code computes what the reference does: values, states, inner losses and every gradient."""
    for dtype in ("float64", *subject.dtypes):
        lengths = subject.lengths if dtype == "float64" else subject.lengths[-1:]
        given = [(tokens, subject.given(subject.inputs(tokens), dtype)) for tokens in lengths]
        yield from _agreement("agreement", subject, dtype, given)


def _agreement(check: str, subject: Subject, dtype: str, calls: Sequence[tuple[int, Inputs]]) -> Iterator[Row]:
    """Every backend with code for a dtype against the reference, on calls of so many tokens."""
    wanted = [subject.reference(given) for _, given in calls]
    bounds = [subject.bound(given, right, dtype) for (_, given), right in zip(calls, wanted, strict=True)]
    for backend in subject.having(dtype):
        for (tokens, given), right, bound in zip(calls, wanted, bounds, strict=True):
            error, worst = furthest(subject.run(backend, given), right)
            if error > bound:
                bound = max(bound, subject.moved(given, right, dtype))
            yield subject.told(Row(check, backend, dtype, tokens, error, bound, worst), given)


@declared
def from_a_state(subject: Subject) -> Iterator[Row]:
    """The same of a batch schedule that starts from fast weights of each sequence's own."""
    spec, tokens = subject.spec, subject.short
    if spec.streams or spec.is_kernel_estimator:
        return  # what `splits` is about
    inputs = subject.inputs(tokens)
    _, ended, *_ = subject.op("reference")(inputs.views, inputs.weights, None, inputs.order)
    inputs.state = {name: value.detach().requires_grad_() for name, value in ended.items()}
    yield from _agreement("from a state", subject, "float64", [(tokens, subject.given(inputs, "float64"))])


@declared
def splits(subject: Subject) -> Iterator[Row]:
    """A sequence in several calls, its state handed on, also token by token, is the whole."""
    schedule = subject.spec.schedule
    if not isinstance(schedule, Stream) or isinstance(schedule, Program):
        return
    tokens = subject.lengths[-1] if len(subject.lengths) == 1 else min(subject.lengths[-1], SPLIT_TOKENS)
    own = schedule.period if isinstance(schedule, Chunked) and schedule.order == "update-apply" else 1
    several = [cut for cut in (1, 4, tokens - 2) if 0 < cut < tokens] if own == 1 else [own]
    for cuts in (sorted({*several}), list(range(own, tokens, own))):
        if not cuts or cuts[-1] >= tokens or _is_refused(subject, [0, *cuts, tokens]):
            continue
        what = "token by token" if len(cuts) == tokens - 1 else f"cut before {', '.join(map(str, cuts[:4]))}"
        for backend, op, given in subject.calls(subject.inputs(tokens), subject.walking):
            parts, whole = run_in_parts(op, given, cuts), run(op, given)
            yield subject.between(f"splits, {what}", backend, given, parts, whole)


@declared
def packed(subject: Subject) -> Iterator[Row]:
    """Sequences packed one after another are each as if it were alone."""
    spec, tokens = subject.spec, subject.lengths[-1]
    if spec.schedule.needs_order or spec.grid or isinstance(spec.schedule, Program) or tokens < 4:
        return
    inputs = subject.inputs(tokens).of_sequence(0)
    bounds = [0, tokens // 3, tokens // 3 + 1, tokens]
    if _is_refused(subject, bounds):
        return
    for backend, op, given in subject.calls(inputs, subject.walking):
        together, *_ = op(given.views, given.weights, cu_seqlens=bounds, **given.dims)
        alone = [
            op(given.of_tokens(spec, start, stop), given.weights, **given.dims)[0] for start, stop in pairwise(bounds)
        ]
        found, wanted = (with_gradients({"z": z}, given) for z in (together, torch.cat(alone, 2)))
        yield subject.between("packed", backend, given, found, wanted)


def _is_refused(subject: Subject, bounds: Sequence[int]) -> bool:
    """Whether the definition takes no sequence as long as one of the parts between these bounds."""
    return any(subject.refuses(length) for length in {stop - start for start, stop in pairwise(bounds)})


@declared
def a_sequence_alone(subject: Subject) -> Iterator[Row]:
    """A sequence does not depend on the others of its batch."""
    if subject.sizes["B"] < 2:
        return
    for backend, op, given in subject.calls(subject.inputs(subject.lengths[-1]), subject.here):
        with torch.no_grad():
            batch, alone = (call(op, one) for one in (given, given.of_sequence(1)))
        wanted = {name: value[1:2] for name, value in batch.items()}
        yield subject.between("a sequence alone", backend, given, alone, wanted)


@declared
def strides(subject: Subject) -> Iterator[Row]:
    """Views are read, and their gradients written, in any layout: here [B, N, H, *] behind the axes [B, H, N, *]."""
    views = subject.spec.inputs

    def turned(name: str, value: Tensor) -> Tensor:
        axis = token_axis(views[name])
        return value.transpose(1, axis).contiguous().transpose(1, axis)

    for backend, op, given in subject.calls(subject.inputs(subject.lengths[-1]), subject.here):
        wanted, found = (run(op, one) for one in (given, given.map(turned, views)))
        yield subject.between("strides", backend, given, found, wanted)


@declared
def causality(subject: Subject) -> Iterator[Row]:
    """Where a token is read with what came before it alone, no later one changes its read-out."""
    views, tokens = subject.spec.inputs, subject.lengths[-1]
    if sees_later(subject.spec.schedule) or tokens < 2:
        return
    cut = tokens // 2

    def later(name: str, value: Tensor) -> Tensor:
        axis = token_axis(views[name])
        return torch.cat([value.narrow(axis, 0, cut), value.narrow(axis, cut, tokens - cut).flip(axis) / 2], axis)

    for backend, op, given in subject.calls(subject.inputs(tokens), subject.here):
        with torch.no_grad():
            wanted, found = ({"z": call(op, one)["z"][:, :, :cut]} for one in (given, given.map(later, views)))
        yield subject.between("causality", backend, given, found, wanted)


@declared
def determinism(subject: Subject) -> Iterator[Row]:
    """A call made again gives the same bits, gradients too."""
    tokens, dtype = subject.lengths[-1], "float32"
    given = subject.given(subject.inputs(tokens), dtype)
    for backend in subject.here:
        once, again = (subject.run(backend, given) for _ in range(2))
        error, worst = (0.0, "z") if _same(again, once) else furthest(again, once)
        yield Row("determinism", backend, dtype, tokens, error, 0.0, worst)


def _same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """Whether all numbers are the same, and what is none is none in both."""
    return all(torch.allclose(found[name], value, 0.0, 0.0, equal_nan=True) for name, value in wanted.items())
