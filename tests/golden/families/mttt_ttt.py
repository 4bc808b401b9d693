"""mttt inner_loop.py TTTLayer: any learner, decoder, number of steps, rates and order of its settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import nestloop as nl
from nestloop import zoo
from nestloop.zoo.mttt import MLP, BiasedLinear, Linear, PlainMLP
from tests.golden.case import Case, Family, NotUnderstood, Quantities, Run, one_of
from tests.golden.families.layer import Layout, Weights, linear, per_head, run_layer
from tests.golden.families.recipe import regenerate
from tests.golden.official import ttt_shapes

LEARNERS: dict[tuple[str, bool], type[nl.Learner]] = {
    ("mlp_1", False): Linear,
    ("mlp_1", True): BiasedLinear,
    ("mlp_2", False): PlainMLP,
    ("mlp_2", True): MLP,
}
FAST = {
    "w": "inner_Dense_0.kernel",
    "b": "inner_Dense_0.bias",
    "w1": "inner_Dense_0.kernel",
    "b1": "inner_Dense_0.bias",
    "w2": "inner_Dense_1.kernel",
    "b2": "inner_Dense_1.bias",
}
ZOO = (zoo.MTTTMLP, zoo.MTTTMLP4, zoo.MTTTMLPSGD4)


def declarations(settings: dict[str, Any], weights_start_at_zero: bool) -> list[Any]:
    """The loops that the settings describe: the zoo's where it has one, else composed from its parts.

    With initial weights of zero, MTTT-Linear's frozen ones are a second declaration of the same layer.
    """
    kind = one_of("inner_encoder", settings["inner_encoder"], "mlp_1", "mlp_2")
    learner_class = LEARNERS[kind, bool(settings["inner_encoder_bias"])]
    base: Any = zoo.MTTTMLP if settings["decoder_LN"] else zoo.MTTTLinear
    steps = settings["inner_itr"]
    # the official code casts the rates to float32, also in its float64 runs
    rates = tuple(float(np.float32(rate)) for rate in settings["inner_lr"][:steps])
    if steps < 1 or len(rates) != steps:
        raise NotUnderstood(f"inner_itr = {steps} with inner_lr = {settings['inner_lr']}: one rate per step")
    batches: Any = nl.Shuffled(steps) if settings["SGD"] else nl.FullBatch(steps)

    class Composed(base):
        learner = learner_class
        schedule = batches
        optimizer = nl.SGD(lr=rates)

    def equal(loop: Any) -> bool:
        spec = loop.spec
        decodes_alike = issubclass(loop, zoo.MTTTMLP) == settings["decoder_LN"]
        ones = spec.optimizer.lr == 1.0 and set(rates) == {1.0}
        return ones and decodes_alike and spec.learner is learner_class and spec.schedule == batches

    found: list[Any] = [loop for loop in ZOO if equal(loop)] or [Composed]
    linear_from_zero = weights_start_at_zero and learner_class is Linear and base is zoo.MTTTLinear
    if linear_from_zero and steps == 1 and not settings["SGD"] and rates == (1.0,):
        found.append(zoo.MTTTLinear)
    return found


def layout_of(loop: Any) -> Layout:
    """From the file's parameters to those of a layer of `loop`, without the weights that it freezes."""

    def layout(weights: Weights) -> Weights:
        mapped = {
            "views.k.weight": per_head(weights["phi.kernel"]),
            "views.k.bias": weights["phi.bias"].flatten(),
            "views.q.weight": per_head(weights["psi.kernel"]),
            "views.q.bias": weights["psi.bias"].flatten(),
            "slow.g": weights["g.kernel"],
            "slow.g_bias": weights["g_bias"].flatten(),
            "out.weight": linear(weights["h.kernel"].flatten(0, 1)),
            "out.bias": weights["h_bias"].flatten(),
        }
        if issubclass(loop, zoo.MTTTMLP):
            mapped["slow.scale"] = weights["decoder_LN.scale"]
            mapped["slow.shift"] = weights["decoder_LN.bias"]
        for name, fast in loop.spec.fast.items():
            if fast.learned:
                mapped[f"fast.{name}"] = weights[FAST[name]]
        return mapped

    return layout


def starts_at_zero(weights: Weights) -> bool:
    return not torch.any(weights["inner_Dense_0.kernel"])


def run(case: Case, how: Run) -> Iterator[tuple[str, Quantities]]:
    order: dict[str, Any] = {"order": case.tensors["sgd.order"]} if case.setting("SGD") else {}
    stored = case.inputs("param")
    if "param_recipe" in case.settings:
        stored = regenerate(case, ttt_shapes(case.settings, case.tensors["in.x"].shape[-1]))
    for loop in declarations(case.settings, starts_at_zero(stored)):
        yield (
            loop.__name__,
            run_layer(case, how, loop, case.setting("heads"), layout_of(loop), stored, **order),
        )


FAMILY = Family(
    "mttt TTT layer",
    lambda case: case.settings.get("cls") == "inner_loop.py:TTTLayer",
    run,
    frozenset({"loss"}),
)
