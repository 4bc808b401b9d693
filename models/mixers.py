"""The token mixers a model can name: the zoo's loops under the names that model names and recipes use."""

from __future__ import annotations

import difflib
from typing import Any

from nestloop import errors, zoo

MIXERS: dict[str, Any] = {
    "self_attention": zoo.SelfAttention,
    "linear_attention": zoo.LinearAttention,  # identity features, constant normaliser
    "linear_attention_elu": zoo.LinearAttentionElu,  # elu + 1 features, adaptive normaliser
    "mttt_linear": zoo.MTTTLinear,
    "mttt_mlp": zoo.MTTTMLP,
    "mttt_mlp4": zoo.MTTTMLP4,  # 4 full-batch steps
    "mttt_mlp_sgd4": zoo.MTTTMLPSGD4,  # 4 shuffled mini-batches
    "vit3": zoo.ViT3,
}


def resolve(mixer: Any) -> Any:
    """The loop, or tuple of loops, that `mixer` names; a loop or tuple is returned as it is."""
    if not isinstance(mixer, str):
        return mixer
    if mixer not in MIXERS:
        raise unknown("mixer", mixer, MIXERS, "pass the loop itself for one that is not in the table")
    return MIXERS[mixer]


def grid_dims(loop: Any) -> tuple[str, ...]:
    """Names of the two dims that hold the grid's rows and columns; empty for a loop that needs no grid."""
    branches = loop if isinstance(loop, tuple) else (loop,)
    return next((branch.spec.grid for branch in branches if branch.spec.grid), ())


def name_of(mixer: Any) -> str | None:
    """The name under which the table holds `mixer`, itself a name or a loop; None for any other loop."""
    if isinstance(mixer, str):
        return mixer if mixer in MIXERS else None
    return next((name for name, loop in MIXERS.items() if loop is mixer), None)


def unknown(kind: str, name: str, known: Any, otherwise: str) -> errors.UnknownModelError:
    """The error for a name that no table holds, with the nearest names that one does."""
    nearest = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return errors.UnknownModelError(
        f"there is no {kind} named {name!r}",
        given=repr(name),
        need="one of " + ", ".join(list(known)[:12]) + (", ..." if len(known) > 12 else ""),
        fix=("did you mean " + " or ".join(nearest) + "? " if nearest else "") + otherwise,
    )
