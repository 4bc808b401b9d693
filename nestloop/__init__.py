"""nestloop: a compiler for nested learning loops.

    import nestloop as nl

Declare a learner and a loop (`Learner`, `Loop`, `fast`, `slow`, `view`, `gate`), compile it (`compile`), or make it a
layer (`Layer`); look at every stage (`inspect`, `explain`).
"""

from typing import TYPE_CHECKING, Any

from nestloop.compile import CompiledLoop, compile
from nestloop.errors import NestloopError
from nestloop.lang.declare import dim, fast, gate, grid, slow, view
from nestloop.lang.learner import KernelEstimator, Learner
from nestloop.lang.loop import Loop
from nestloop.lang.optim import SGD, soft_clip
from nestloop.lang.schedule import FullBatch, Shuffled
from nestloop.layer import Layer

if TYPE_CHECKING:
    from nestloop.inspection import explain, inspect

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "CompiledLoop",
    "FullBatch",
    "KernelEstimator",
    "Layer",
    "Learner",
    "Loop",
    "NestloopError",
    "Shuffled",
    "compile",
    "dim",
    "explain",
    "fast",
    "gate",
    "grid",
    "inspect",
    "slow",
    "soft_clip",
    "view",
]


def __getattr__(name: str) -> Any:
    """`inspect` and `explain` bring the whole compiler along: imported when they are first used."""
    if name in ("inspect", "explain"):
        from nestloop import inspection

        return getattr(inspection, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
