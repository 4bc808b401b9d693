"""Stage `rewrite`: named rules with a precondition, each printed with why it fired or did not."""

from __future__ import annotations

from nestloop.lowering.capture import Captured
from nestloop.lowering.differentiate import Piece
from nestloop.lowering.rewrites.attention import attention_of, dot_product_scale, softmax_attention, softmax_weights
from nestloop.lowering.rewrites.gram import gram_form
from nestloop.lowering.rewrites.hoist import hoist
from nestloop.lowering.rewrites.linear_attention import linear_attention, zero_state
from nestloop.lowering.rewrites.project import project
from nestloop.lowering.rewrites.rule import Rewrite


def rewrites(captured: Captured, pieces: dict[str, Piece]) -> list[Rewrite]:
    """Every rule that reads a differentiated loop; the others rewrite the loss, or an estimator's fit, before that."""
    return [rule(captured, pieces) for rule in (zero_state, linear_attention, softmax_attention)]


__all__ = [
    "Rewrite",
    "attention_of",
    "dot_product_scale",
    "gram_form",
    "hoist",
    "project",
    "rewrites",
    "softmax_weights",
]
