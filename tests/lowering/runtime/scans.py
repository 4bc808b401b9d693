"""Plans of streams in generated Triton, by the sizes that tests ask for."""

from __future__ import annotations

import nestloop as nl
from nestloop import zoo
from nestloop.lowering import pipeline
from nestloop.lowering.runtime.triton_plan import UNTUNED, Tiling
from tests.drawn import SIZES

# Loops without Triton, and why.
UNPLANNED = {
    zoo.LaCT: "a tile of all the tokens of a call is more than registers hold",
    zoo.LaCTMuon: "a tile of all the tokens of a call is more than registers hold",
}


def plan_of(loop: type[nl.Loop], tiling: Tiling = UNTUNED, **sizes: int):
    given = {**SIZES, "H": 2, **loop.spec.default_dims, **sizes}
    made = pipeline.stream_stages(loop.spec, given, None, losses=False, part="scan", triton=True, tiling=tiling)
    assert made.triton is not None, made.not_triton
    return made.triton
