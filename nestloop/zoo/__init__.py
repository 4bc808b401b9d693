"""The systems of the literature, by declaration only."""

from __future__ import annotations

from typing import Any

from nestloop.lang.loop import Loop
from nestloop.zoo import listing
from nestloop.zoo.decay import (
    GLA,
    HGRN2,
    RWKV6,
    CausalLinearAttention,
    CausalLinearAttentionElu,
    CosFormer,
    LightningAttention,
    LightningAttentionFla,
    Mamba2,
    NormAttention,
    RetNet,
    SimpleGLA,
)
from nestloop.zoo.delta import (
    GDN2,
    KDA,
    PGDN,
    Comba,
    DeltaNet,
    DeltaProduct,
    GatedDeltaNet,
    GeneralizedDeltaRule,
    Longhorn,
    LonghornDiagonal,
)
from nestloop.zoo.estimators import LocalLinearAttention, Parallax
from nestloop.zoo.in_context import InContextAutoregression, InContextGD
from nestloop.zoo.lact import CausalLaCT, CausalLaCTMuon, LaCT, LaCTMuon
from nestloop.zoo.log_linear import LogLinearAttention
from nestloop.zoo.memories import Atlas, Memora, Moneta, OmegaNet, Yaad
from nestloop.zoo.mttt import (
    MTTTMLP,
    MTTTMLP4,
    MTTTMLPSGD4,
    LinearAttention,
    LinearAttentionElu,
    MTTTLinear,
    SelfAttention,
)
from nestloop.zoo.nested import ContinuumMemory, SelfModifyingTitans
from nestloop.zoo.solvers import Mesa, MesaNet
from nestloop.zoo.titans import TNT, NeuralMemory, Titans, TNTLocal
from nestloop.zoo.tttlm import TTTMLP, TTTLinear, TTTLinearMamba, TTTMLPMamba
from nestloop.zoo.vit3 import DepthwiseBranch, GatedBranch, TransformerToTTT, ViT3

__all__ = [
    "GDN2",
    "GLA",
    "HGRN2",
    "KDA",
    "MTTTMLP",
    "MTTTMLP4",
    "MTTTMLPSGD4",
    "PGDN",
    "RWKV6",
    "TNT",
    "TTTMLP",
    "Atlas",
    "CausalLaCT",
    "CausalLaCTMuon",
    "CausalLinearAttention",
    "CausalLinearAttentionElu",
    "Comba",
    "ContinuumMemory",
    "CosFormer",
    "DeltaNet",
    "DeltaProduct",
    "DepthwiseBranch",
    "GatedBranch",
    "GatedDeltaNet",
    "GeneralizedDeltaRule",
    "InContextAutoregression",
    "InContextGD",
    "LaCT",
    "LaCTMuon",
    "LightningAttention",
    "LightningAttentionFla",
    "LinearAttention",
    "LinearAttentionElu",
    "LocalLinearAttention",
    "LogLinearAttention",
    "Longhorn",
    "LonghornDiagonal",
    "MTTTLinear",
    "Mamba2",
    "Memora",
    "Mesa",
    "MesaNet",
    "Moneta",
    "NeuralMemory",
    "NormAttention",
    "OmegaNet",
    "Parallax",
    "RetNet",
    "SelfAttention",
    "SelfModifyingTitans",
    "SimpleGLA",
    "TNTLocal",
    "TTTLinear",
    "TTTLinearMamba",
    "TTTMLPMamba",
    "Titans",
    "TransformerToTTT",
    "ViT3",
    "Yaad",
    "catalogue",
    "loops",
]


# Loops that are checked against tensors recorded from an official implementation (tests/golden).
GOLDEN = frozenset(
    {
        GLA,
        KDA,
        MTTTMLP,
        MTTTMLP4,
        MTTTMLPSGD4,
        CausalLinearAttention,
        Comba,
        DeltaNet,
        DeltaProduct,
        DepthwiseBranch,
        GatedBranch,
        GatedDeltaNet,
        LightningAttentionFla,
        LinearAttention,
        LinearAttentionElu,
        MTTTLinear,
        Mesa,
        RetNet,
        CausalLaCT,
        CausalLaCTMuon,
        LaCT,
        NeuralMemory,
        SelfAttention,
        SimpleGLA,
        TTTLinear,
        TTTLinearMamba,
        TTTMLP,
    }
)


def loops() -> list[type[Loop]]:
    """Every loop of the zoo, by the year and number of its paper."""
    found = {value for name, value in globals().items() if name in __all__ and hasattr(value, "spec")}
    return sorted(found, key=lambda loop: (loop.paper, loop.__name__))


def catalogue() -> list[dict[str, Any]]:
    """A row for every loop: name, arXiv id, lines of code (learner included), state, schedules, form, golden."""
    return [listing.row(loop, loop in GOLDEN) for loop in loops()]
