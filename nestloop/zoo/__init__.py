"""The systems of the literature, by declaration only."""

from nestloop.zoo.mttt import (
    LinearAttention,
    LinearAttentionElu,
    MTTTLinear,
    MTTTMLP,
    MTTTMLP4,
    MTTTMLPSGD4,
    SelfAttention,
)
from nestloop.zoo.vit3 import DepthwiseBranch, GatedBranch, ViT3

__all__ = [
    "DepthwiseBranch",
    "GatedBranch",
    "LinearAttention",
    "LinearAttentionElu",
    "MTTTLinear",
    "MTTTMLP",
    "MTTTMLP4",
    "MTTTMLPSGD4",
    "SelfAttention",
    "ViT3",
]
