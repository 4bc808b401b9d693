"""nestloop: a compiler for nested learning loops.

    import nestloop as nl

Declare a learner and a loop (`Learner`, `Loop`, `fast`, `slow`, `view`, `gate`), an optimizer where none of the
package's will do (`Optimizer`, `moment`, `coefficient`), compile it (`compile`), or make it a layer (`Layer`); look at
every stage (`inspect`, `explain`, `page`), at whether it is right (`check`), at what it takes here (`bench`), and at
what it should take on a GPU (`cost`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestloop.checks import check
    from nestloop.compiled import CompiledLoop, compile
    from nestloop.cost_table import cost
    from nestloop.errors import NestloopError
    from nestloop.inspection import explain, inspect
    from nestloop.inspector import page
    from nestloop.lang.declare import dim, fast, gate, grid, slow, view
    from nestloop.lang.features import affine, conv, cos_reweight, l2_norm, layer_norm, rms_norm, rope
    from nestloop.lang.learner import KernelEstimator, Learner
    from nestloop.lang.loop import Loop
    from nestloop.lang.maps import gated, per_position, project
    from nestloop.lang.moments import coefficient, moment
    from nestloop.lang.optim import SGD
    from nestloop.lang.optimizer import Adam, Optimizer
    from nestloop.lang.schedule import Causal, Chunked, FullBatch, Online, Program, Shuffled, Sliding
    from nestloop.lang.solve import conjugate_gradient
    from nestloop.lang.transforms import global_clip, newton_schulz, restore_norm, soft_clip
    from nestloop.lang.whole import conv2d, instance_norm
    from nestloop.layer import Layer
    from nestloop.saved import load_ops, save_ops
    from nestloop.timing import bench

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "Causal",
    "Chunked",
    "CompiledLoop",
    "FullBatch",
    "KernelEstimator",
    "Layer",
    "Learner",
    "Loop",
    "NestloopError",
    "Online",
    "Optimizer",
    "Program",
    "Shuffled",
    "Sliding",
    "affine",
    "bench",
    "check",
    "coefficient",
    "compile",
    "conjugate_gradient",
    "conv",
    "conv2d",
    "cos_reweight",
    "cost",
    "dim",
    "explain",
    "fast",
    "gate",
    "gated",
    "global_clip",
    "grid",
    "inspect",
    "instance_norm",
    "l2_norm",
    "layer_norm",
    "load_ops",
    "moment",
    "newton_schulz",
    "page",
    "per_position",
    "project",
    "restore_norm",
    "rms_norm",
    "rope",
    "save_ops",
    "slow",
    "soft_clip",
    "view",
]


# Where each name is at home, imported when it is first used: the command line answers without torch, a declaration
# comes without the compiler.
_HOME = {
    "nestloop.checks": ("check",),
    "nestloop.compiled": ("CompiledLoop", "compile"),
    "nestloop.cost_table": ("cost",),
    "nestloop.errors": ("NestloopError",),
    "nestloop.inspection": ("explain", "inspect"),
    "nestloop.inspector": ("page",),
    "nestloop.lang.declare": ("dim", "fast", "gate", "grid", "slow", "view"),
    "nestloop.lang.features": ("affine", "conv", "cos_reweight", "l2_norm", "layer_norm", "rms_norm", "rope"),
    "nestloop.lang.learner": ("KernelEstimator", "Learner"),
    "nestloop.lang.loop": ("Loop",),
    "nestloop.lang.maps": ("gated", "per_position", "project"),
    "nestloop.lang.moments": ("coefficient", "moment"),
    "nestloop.lang.optim": ("SGD",),
    "nestloop.lang.optimizer": ("Adam", "Optimizer"),
    "nestloop.lang.solve": ("conjugate_gradient",),
    "nestloop.lang.schedule": ("Causal", "Chunked", "FullBatch", "Online", "Program", "Shuffled", "Sliding"),
    "nestloop.lang.transforms": ("global_clip", "newton_schulz", "restore_norm", "soft_clip"),
    "nestloop.lang.whole": ("conv2d", "instance_norm"),
    "nestloop.layer": ("Layer",),
    "nestloop.saved": ("load_ops", "save_ops"),
    "nestloop.timing": ("bench",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOME.items():
        if name in names:
            value = globals()[name] = getattr(import_module(home), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
