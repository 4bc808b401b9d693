"""What a body makes of one row, and of many: where a loop gives its bodies any number of rows, they must agree."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx
from torch.func import vmap

from nestloop.errors import NoPlanError, TokenMixingError
from nestloop.lang.loop import LoopSpec, body_line
from nestloop.lang.schedule import Causal
from nestloop.lowering.capture import Captured, capture_with
from nestloop.lowering.recorder import Located
from nestloop.lowering.tracer import Tracer

_BODIES = ("loss", "readout")
_ROWS = 3  # any number will tell: the graph is the same for all of them
_TOLERANCE = 1e-3  # of the largest value: what counts its rows is off by a factor


def of_each_token(captured: Captured, tracer: Tracer) -> tuple[Captured, Tracer]:
    """The bodies of a causal loop, which the reference gives one token at a time, for any number of tokens: as they
    were traced, where they hold for any, else those of one token under `vmap`.

    Raises:
        TokenMixingError: a body makes another value of tokens together than of each alone.
    """
    spec = captured.spec
    if tracer.tokens == 1:
        return captured, tracer
    one, alone = _of_one_row(tracer)
    fixed = tracer.fixed_tokens()
    for body in _BODIES:
        if not _same(tracer, getattr(captured, body), getattr(one, body), fixed or _ROWS):
            assert isinstance(spec.schedule, Causal)
            raise TokenMixingError(
                f"{spec.name} is {type(spec.schedule).__name__}, but its {body} counts its tokens.",
                where=body_line(getattr(spec.cls, body), spec.where),
                given="other values of tokens together than of each of them alone",
                need="tokens that are on their own: how many of them a body is given at once means nothing",
                fix=f"use self.n, which is {spec.schedule.seen(0)} in each of its bodies, or pass the places as a view",
            )
    if fixed is None:
        return captured, tracer
    again = Tracer(spec, tracer.sizes, tracer.tokens, tracer.dtype)
    mapped = {body: _mapped(again, getattr(one, body)) for body in _BODIES}
    again.reads_dtype = tracer.reads_dtype or alone.reads_dtype
    return replace(captured, **mapped, tokens=again.fixed_tokens(), one_token=one), again


def check_rows(captured: Captured, tracer: Tracer) -> None:
    """Refuse bodies that decide on the number of rows where one call has tiles of several.

    Raises:
        NoPlanError: a body is not the same for each number of rows.
    """
    spec = captured.spec
    if tracer.tokens == 1 or spec.grid is not None:  # all rows have the same columns
        return
    if tracer.tokens is not None:
        tracer = Tracer(spec, tracer.sizes, None, tracer.dtype)
        captured = capture_with(tracer)
    if tracer.fixed_tokens() is not None:
        raise decides(spec, "a body that holds for some numbers of them alone")
    one, _ = _of_one_row(tracer)
    if not all(_same(tracer, getattr(captured, body), getattr(one, body), 1) for body in _BODIES):
        raise decides(spec, "a body that does something else for one of them than for more")


def decides(spec: LoopSpec, given: str) -> NoPlanError:
    """That a body decides on its number of rows."""
    return NoPlanError(
        f"The torch backend has no plan for {spec.name}: a body decides on how many tokens its tile has.",
        where=spec.where,
        given=given,
        need="the same computation for any number of tokens",
        fix='write nl.compile(..., backend="reference"), or a body that holds for every self.n',
    )


def _of_one_row(tracer: Tracer) -> tuple[Captured, Tracer]:
    alone = Tracer(tracer.spec, tracer.sizes, 1, tracer.dtype)
    return capture_with(alone), alone


def _names(module: fx.GraphModule) -> list[str]:
    return [node.meta["declared"] for node in module.graph.find_nodes(op="placeholder")]


def _same(tracer: Tracer, together: fx.GraphModule, single: fx.GraphModule, rows: int) -> bool:
    """Whether a body has the same values for rows together, drawn at random, as for each of them alone."""
    spec, names, drawn = tracer.spec, _names(together), torch.Generator().manual_seed(0)
    given = {}
    for name in names:
        lead = [rows] if name in spec.inputs else []
        shape = [*lead, *tracer.tile(name, tokens=False).shape]
        given[name] = torch.rand(shape, generator=drawn, dtype=tracer.dtype)
    found = Located(together).run(*[given[name] for name in names])
    alone = [
        Located(single).run(*[given[n][row : row + 1] if n in spec.inputs else given[n] for n in names])
        for row in range(rows)
    ]
    wanted = torch.cat(alone)
    largest = wanted.nan_to_num(posinf=0.0, neginf=0.0).abs().max().item() if wanted.numel() else 0.0
    return torch.allclose(found, wanted, rtol=0.0, atol=_TOLERANCE * largest, equal_nan=True)


def _mapped(tracer: Tracer, single: fx.GraphModule) -> fx.GraphModule:
    """A body of one token for any number of them."""
    names, inputs = _names(single), tracer.spec.inputs

    def body(*given: Tensor) -> Tensor:
        row = [t.unsqueeze(0) if name in inputs else t for name, t in zip(names, given, strict=True)]
        return Located(single).run(*row).squeeze(0)

    over = vmap(body, in_dims=tuple(0 if name in inputs else None for name in names))
    return tracer.trace_on(over, [tracer.tile(name) for name in names], names)
