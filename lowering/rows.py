"""What a body makes of one row, and of many: where a loop gives its bodies any number of rows, they must agree."""

from __future__ import annotations

import torch
from torch import fx

from nestloop.errors import CompileError, NoPlanError
from nestloop.lang.declaration import body_line
from nestloop.lang.loop import LoopSpec
from nestloop.lang.schedule import BatchSchedule, Causal
from nestloop.lowering.axes import counting
from nestloop.lowering.capture import Captured, capture_with
from nestloop.lowering.length import HINT
from nestloop.lowering.recorder import call, placeholders
from nestloop.lowering.tracer import Tracer

_BODIES = ("loss", "readout")
_TOLERANCE = 1e-6  # of the largest value: what counts its rows is off by a factor
_ROWS = 3  # any number tells: the graph is the same for all


def check_rows(tracer: Tracer) -> None:
    """Refuse bodies that decide on how many rows they are given, where that is not theirs to know: tiles of one call
    differ, and the reference gives those of a causal loop one token at a time.

    tracer: for any number of tokens; the bodies have been traced with it.

    Raises:
        TokenMixingError: a body of a causal loop makes another value of tokens together than of each alone.
        NoPlanError: another body is not the same for each number of rows.
    """
    spec = tracer.spec
    is_causal = isinstance(spec.schedule, Causal)
    body = _differing(tracer, _ROWS if is_causal else 1)
    if body is None:
        return
    if is_causal:
        where = body_line(getattr(spec.cls, body), spec.where)
        raise counting(spec, body, where, "another computation of tokens together than of each of them alone")
    raise decides(spec, "another computation of one token than of several, or of one number than of another")


def gives_several(spec: LoopSpec, tokens: int) -> bool:
    """Whether bodies of a batch schedule are given several numbers of tokens in a sequence of so many: batches are a
    part of it, and it is read out whole."""
    return isinstance(spec.schedule, BatchSchedule) and _batches(spec.schedule, tokens) != [tokens]


def _batches(schedule: BatchSchedule, tokens: int) -> list[int]:
    """How many tokens its batches hold, each number once."""
    return sorted({stop - start for start, stop in schedule.batches(tokens)})


def check_lengths(tracer: Tracer) -> None:
    """Refuse graphs of a batch schedule that hold for one number of tokens where bodies are given several.

    tracer: what has traced all of them, derivatives too.

    Raises:
        NoPlanError: they do.
    """
    spec, tokens = tracer.spec, tracer.tokens
    if tracer.fixed_tokens() is None or not gives_several(spec, tokens or HINT):
        return
    given = "a computation, or its derivative, that is another one for one number of tokens than for another"
    if tokens is not None:
        assert isinstance(spec.schedule, BatchSchedule)
        batches = " and ".join(map(str, _batches(spec.schedule, tokens)))
        given = f"a computation that does not hold for any number of tokens: batches are of {batches}, all are {tokens}"
    raise decides(spec, given)


def _differing(tracer: Tracer, rows: int) -> str | None:
    """The first body that does not make of so many rows what it makes of each."""
    if tracer.fixed_tokens() is not None:
        return tracer.decided or _BODIES[0]
    dtype = torch.float64  # in which they differ by what they compute, and not by how it is rounded
    try:
        of_many, of_one = _captured(tracer, dtype)
    except (CompileError, RuntimeError):  # with constants of a dtype of their own, say
        dtype = tracer.dtype
        of_many, of_one = _captured(tracer, dtype)
    bodies = ((b, getattr(of_many, b), getattr(of_one, b)) for b in _BODIES)
    return next((b for b, many, one in bodies if not _same(tracer, many, one, rows, dtype)), None)


def _captured(tracer: Tracer, dtype: torch.dtype) -> list[Captured]:
    """The bodies for any number of rows, and for one."""
    return [capture_with(Tracer(tracer.spec, tracer.sizes, n, dtype)) for n in (None, 1)]


def decides(spec: LoopSpec, given: str) -> NoPlanError:
    """That a body decides on its number of rows."""
    return NoPlanError(
        f"No backend but the reference has a plan for {spec.name}: a body decides on how many tokens its tile has.",
        where=spec.where,
        given=given,
        need="the same computation for any number of tokens",
        fix='write nl.compile(..., backend="reference"), or a body that holds for every self.n',
    )


def _same(tracer: Tracer, together: fx.GraphModule, single: fx.GraphModule, rows: int, dtype: torch.dtype) -> bool:
    """Whether a body has the same values for rows together, drawn at random, as for each of them alone."""
    spec, given, drawn = tracer.spec, {}, torch.Generator().manual_seed(0)
    tolerance = _TOLERANCE if dtype == torch.float64 else 1e3 * _TOLERANCE
    for name in placeholders(together):
        lead = [rows] if name in spec.inputs else []
        shape = [*lead, *tracer.tile(name, tokens=False).shape]
        given[name] = torch.rand(shape, generator=drawn, dtype=dtype)
    found = call(together, given)
    alone = [
        call(single, {n: t[row : row + 1] if n in spec.inputs else t for n, t in given.items()}) for row in range(rows)
    ]
    wanted = torch.cat(alone)
    largest = wanted.nan_to_num(posinf=0.0, neginf=0.0).abs().max().item() if wanted.numel() else 0.0
    return torch.allclose(found, wanted, rtol=0.0, atol=tolerance * largest, equal_nan=True)
