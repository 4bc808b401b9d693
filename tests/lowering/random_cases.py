"""How many declarations are drawn, and how: the same ones in every run, others for each seed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings

CASES = int(os.environ.get("NESTLOOP_RANDOM_CASES", "0"))  # to hunt among; 0 for those of every run


def drawn(seeded: int, families: int, count: int) -> Callable[[Any], Any]:
    """A decorator over `given`: `count` cases, or a family's share of those to hunt among."""

    def decorate(test: Any) -> Any:
        return seed(seeded + CASES)(
            settings(
                max_examples=CASES // families or count,
                derandomize=False,  # seeded above: another set of cases for each family
                database=None,
                phases=[Phase.generate],  # a case takes seconds: a failing one is printed as it was drawn
                deadline=None,
                suppress_health_check=list(HealthCheck),
            )(test)
        )

    return decorate
