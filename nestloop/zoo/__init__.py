"""The systems of the literature, by declaration only."""

from __future__ import annotations

import inspect
from typing import Any

from nestloop.lang.loop import LoopSpec
from nestloop.zoo.lact import CausalLaCT, CausalLaCTMuon, LaCT, LaCTMuon
from nestloop.zoo.mttt import (
    MTTTMLP,
    MTTTMLP4,
    MTTTMLPSGD4,
    LinearAttention,
    LinearAttentionElu,
    MTTTLinear,
    SelfAttention,
)
from nestloop.zoo.titans import NeuralMemory, Titans
from nestloop.zoo.tttlm import TTTMLP, TTTLinear, TTTLinearMamba, TTTMLPMamba
from nestloop.zoo.vit3 import DepthwiseBranch, GatedBranch, ViT3

__all__ = [
    "MTTTMLP",
    "MTTTMLP4",
    "MTTTMLPSGD4",
    "TTTMLP",
    "CausalLaCT",
    "CausalLaCTMuon",
    "DepthwiseBranch",
    "GatedBranch",
    "LaCT",
    "LaCTMuon",
    "LinearAttention",
    "LinearAttentionElu",
    "MTTTLinear",
    "NeuralMemory",
    "SelfAttention",
    "TTTLinear",
    "TTTLinearMamba",
    "TTTMLPMamba",
    "Titans",
    "ViT3",
    "catalogue",
]


def catalogue() -> list[dict[str, Any]]:
    """Every loop of the zoo: name, arXiv id, lines of code (learner included), state, schedule, what runs."""
    loops = [globals()[name] for name in __all__ if name not in ("ViT3", "catalogue")]
    return [_entry(loop.spec) for loop in loops]


def _entry(spec: LoopSpec) -> dict[str, Any]:
    from nestloop.inspection import state_size  # brings the compiler along, which a declaration does not need

    schedule = spec.schedule
    zero = any(fast.frozen_zero for fast in spec.fast.values())
    return {
        "name": spec.name,
        "arXiv": spec.cls.paper,
        "lines": _lines(spec),
        "state per head": state_size(spec),
        "schedule": "all tokens" if spec.is_kernel_estimator else f"{type(schedule).__name__}({schedule.steps})",
        "form": "softmax attention" if spec.is_kernel_estimator else "linear attention" if zero else "primal",
        "about": (spec.cls.__doc__ or "").strip().splitlines()[0],
    }


def _lines(spec: LoopSpec) -> int:
    """Lines of code of the loop and its learner, with the zoo's own bases; docstrings and blank lines aside."""
    total = 0
    for cls in dict.fromkeys([*spec.cls.__mro__, *spec.learner.__mro__]):
        if cls.__module__.startswith("nestloop.zoo."):
            lines = inspect.getsource(cls).splitlines()
            aside = ('"""', "#", "paper =")
            total += sum(1 for line in lines if line.strip() and not line.strip().startswith(aside))
    return total
