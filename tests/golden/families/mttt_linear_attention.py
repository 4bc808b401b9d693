"""mttt inner_loop.py LinearAttention: identity or elu + 1 features, constant or adaptive normaliser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F

from nestloop import zoo
from nestloop.zoo.mttt import Augmented, ZeroLinear
from tests.golden.case import Case, Family, Quantities, Run
from tests.golden.families.layer import Weights, linear, run_layer


class EluLinear(ZeroLinear):
    """(elu(x) + 1) W."""

    def forward(self, x):
        return (F.elu(x) + 1) @ self.w


class EluConstant(zoo.LinearAttention):
    """elu + 1 features with the constant normaliser."""

    learner = EluLinear


class AugmentedIdentity(Augmented):
    """x W with the column of the normaliser."""

    def forward(self, x):
        return x @ self.w


class IdentityAdaptive(zoo.LinearAttentionElu):
    """Identity features with the adaptive normaliser."""

    learner = AugmentedIdentity


LOOPS: dict[tuple[bool, str], Any] = {
    (False, "constant"): zoo.LinearAttention,
    (True, "adaptive"): zoo.LinearAttentionElu,
    (True, "constant"): EluConstant,
    (False, "adaptive"): IdentityAdaptive,
}


def layout(weights: Weights) -> Weights:
    """query, key, value, proj of the file -> a layer's parameters."""
    mapped = {"out.weight": linear(weights["proj.kernel"]), "out.bias": weights["proj.bias"]}
    for view, name in (("q", "query"), ("k", "key"), ("v", "value")):
        mapped[f"views.{view}.weight"] = linear(weights[f"{name}.kernel"])
        mapped[f"views.{view}.bias"] = weights[f"{name}.bias"]
    return mapped


def run(case: Case, how: Run) -> Iterator[tuple[str, Quantities]]:
    elu = case.setting("elu", True, False)
    loop = LOOPS[elu, case.setting("normalizer", "constant", "adaptive")]
    quantities = run_layer(case, how, loop, case.setting("heads"), layout)
    yield loop.__name__, {name: q for name, q in quantities.items() if name != "inner_losses"}


FAMILY = Family(
    "mttt linear attention",
    lambda case: case.settings.get("cls") == "inner_loop.py:LinearAttention",
    run,
    frozenset({"loss"}),
)
