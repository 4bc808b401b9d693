"""What a body makes of one row, and of many: where a loop gives its bodies any number of rows, they must agree."""

from __future__ import annotations

import torch
from torch import fx

from nestloop.errors import NoPlanError, TokenMixingError
from nestloop.lang.loop import LoopSpec, body_line
from nestloop.lang.schedule import Causal
from nestloop.lowering.capture import Captured, capture_with
from nestloop.lowering.recorder import Located
from nestloop.lowering.tracer import Tracer

_BODIES = ("loss", "readout")
_ROWS = 3  # any number tells: the graph is the same for all
_TOLERANCE = 1e-6  # of the largest value: what counts its rows is off by a factor


def check_rows(captured: Captured, tracer: Tracer) -> None:
    """Refuse bodies that decide on how many rows they are given, where that is not theirs to know: tiles of one call
    differ, and the reference gives those of a causal loop one token at a time.

    captured, tracer: for any number of tokens.

    Raises:
        TokenMixingError: a body of a causal loop makes another value of tokens together than of each alone.
        NoPlanError: another body is not the same for each number of rows.
    """
    spec = captured.spec
    free = tracer.fixed_tokens() is None
    # In float64, in which they differ by what they compute, and not by how it is rounded.
    of_many, of_one = (capture_with(Tracer(spec, tracer.sizes, rows, torch.float64)) for rows in (None, 1))
    causal = isinstance(spec.schedule, Causal)
    for body in _BODIES:
        if free and _same(tracer, getattr(of_many, body), getattr(of_one, body), _ROWS if causal else 1):
            continue
        if isinstance(spec.schedule, Causal):
            raise TokenMixingError(
                f"{spec.name} is {type(spec.schedule).__name__}, but its {body} counts its tokens.",
                where=body_line(getattr(spec.cls, body), spec.where),
                given="another computation of tokens together than of each of them alone",
                need="tokens that are on their own: how many of them a body is given at once means nothing",
                fix=f"use self.n, which is {spec.schedule.seen(0)} in each of its bodies, or pass the places as a view",
            )
        raise decides(spec, "another computation of one token than of several, or of one number than of another")


def decides(spec: LoopSpec, given: str) -> NoPlanError:
    """That a body decides on its number of rows."""
    return NoPlanError(
        f"The torch backend has no plan for {spec.name}: a body decides on how many tokens its tile has.",
        where=spec.where,
        given=given,
        need="the same computation for any number of tokens",
        fix='write nl.compile(..., backend="reference"), or a body that holds for every self.n',
    )


def _names(module: fx.GraphModule) -> list[str]:
    return [node.meta["declared"] for node in module.graph.find_nodes(op="placeholder")]


def _same(tracer: Tracer, together: fx.GraphModule, single: fx.GraphModule, rows: int) -> bool:
    """Whether a body has the same values for rows together, drawn at random, as for each of them alone."""
    spec, names, drawn = tracer.spec, _names(together), torch.Generator().manual_seed(0)
    given = {}
    for name in names:
        lead = [rows] if name in spec.inputs else []
        shape = [*lead, *tracer.tile(name, tokens=False).shape]
        given[name] = torch.rand(shape, generator=drawn, dtype=torch.float64)
    found = Located(together).run(*[given[name] for name in names])
    alone = [
        Located(single).run(*[given[n][row : row + 1] if n in spec.inputs else given[n] for n in names])
        for row in range(rows)
    ]
    wanted = torch.cat(alone)
    largest = wanted.nan_to_num(posinf=0.0, neginf=0.0).abs().max().item() if wanted.numel() else 0.0
    return torch.allclose(found, wanted, rtol=0.0, atol=_TOLERANCE * largest, equal_nan=True)
