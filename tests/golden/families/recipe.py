"""Parameters that a file does not store but describes: drawn again from numpy's legacy generator.

A recipe is understood when it is {"seed": n, "params": [entry, ...]} with entries in the order of the draws,
each {"name", "shape"} and `std` (normal), `low` and `high` (uniform) or `value` (constant, not drawn), and
`mean` added where it is given. What comes out must have the recorded sums and first values; a recipe in any
other form is reported as not understood.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.golden.case import Case, NotUnderstood

FIELDS = {"name", "shape", "std", "low", "high", "value", "mean"}
HEAD = 8  # recorded first values


def regenerate(case: Case) -> dict[str, Tensor]:
    """The parameters of `param_recipe`, float32, checked against `check.sum.*` and `check.head.*`."""
    recipe = case.settings["param_recipe"]
    if not isinstance(recipe, dict) or set(recipe) != {"seed", "params"}:
        raise NotUnderstood(f"param_recipe = {recipe!r}")
    random = np.random.RandomState(recipe["seed"])
    drawn = {entry["name"]: draw(random, entry) for entry in recipe["params"]}
    for name, tensor in drawn.items():
        verify(case, name, tensor)
    return drawn


def draw(random: np.random.RandomState, entry: dict[str, Any]) -> Tensor:
    """One parameter, the next of the generator's stream."""
    if not {"name", "shape"} <= set(entry) <= FIELDS:
        raise NotUnderstood(f"param_recipe has the entry {entry!r}")
    shape = tuple(entry["shape"])
    if "value" in entry:
        values = np.full(shape, float(entry["value"]))
    elif "std" in entry:
        values = random.standard_normal(shape) * entry["std"]
    elif "low" in entry and "high" in entry:
        values = random.uniform(entry["low"], entry["high"], shape)
    else:
        raise NotUnderstood(f"param_recipe has the entry {entry!r}")
    return torch.from_numpy((values + entry.get("mean", 0.0)).astype(np.float32))


def verify(case: Case, name: str, tensor: Tensor) -> None:
    """Compare with the recorded sum, absolute sum and first values."""
    sums, head = case.tensors.get(f"check.sum.{name}"), case.tensors.get(f"check.head.{name}")
    if sums is None or head is None:
        raise NotUnderstood(f"param_recipe draws {name}, which has no check.sum and check.head")
    found = torch.stack([tensor.double().sum(), tensor.double().abs().sum()])
    same_sums = torch.allclose(found, sums.double().flatten(), rtol=1e-5, atol=1e-5 * found[1].item())
    if not same_sums or not torch.allclose(
        tensor.flatten()[:HEAD], head.float().flatten(), rtol=1e-6, atol=0
    ):
        raise NotUnderstood(f"param_recipe gives other values for {name} than check.sum and check.head")
