"""Optimizers that are declared, for loops and streams drawn at random: smooth enough to be compared to 1e-9."""

from __future__ import annotations

from functools import partial
from typing import Any

import nestloop as nl


class Averages(nl.Optimizer):
    """RMSProp on averages of all steps that pulls weights to zero: it reads each kind of thing that an update may."""

    v, steps = nl.moment(), nl.moment(scalar=True)
    beta = nl.coefficient(0.8)
    pull = 0.01

    def update(self, w, g, s):
        v = s.beta * s.v + (1 - s.beta) * g.square()
        steps = s.steps + 1
        return g / (v / steps + 0.3).sqrt() + self.pull * w, {"v": v, "steps": steps}


# Adam's first update is a sign but for these.
RULES: dict[str, Any] = {"": nl.SGD, "Adam": partial(nl.Adam, eps=0.1, eps_root=0.01), "averages": Averages}


def settings_of(rule: str, beta: Any = None, **settings: Any) -> dict[str, Any]:
    """What one is made with; `beta`: a coefficient of its own, where it has one. A transform is `SGD`'s alone."""
    if rule:
        settings.pop("transform")
    if rule == "averages" and beta is not None:
        settings["beta"] = beta
    return settings
