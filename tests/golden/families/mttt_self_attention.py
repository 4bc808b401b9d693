"""flax MultiHeadDotProductAttention: kernels [W, H, d], output kernel [H, d, W], all biases."""

from __future__ import annotations

from collections.abc import Iterator

from nestloop import zoo
from tests.golden.case import Case, Family, Quantities, Run
from tests.golden.families.layer import Weights, linear, run_layer


def layout(weights: Weights) -> Weights:
    """query, key, value, out of the file -> a layer's parameters."""
    mapped = {"out.weight": linear(weights["out.kernel"].flatten(0, 1)), "out.bias": weights["out.bias"]}
    for view, name in (("q", "query"), ("k", "key"), ("v", "value")):
        mapped[f"views.{view}.weight"] = linear(weights[f"{name}.kernel"].flatten(1))
        mapped[f"views.{view}.bias"] = weights[f"{name}.bias"].flatten()
    return mapped


def run(case: Case, how: Run) -> Iterator[tuple[str, Quantities]]:
    yield "SelfAttention", run_layer(case, how, zoo.SelfAttention, case.setting("heads"), layout)


FAMILY = Family(
    "mttt self-attention",
    lambda case: str(case.settings.get("cls", "")).startswith("inner_loop.py:SelfAttention"),
    run,
    frozenset({"loss"}),
)
