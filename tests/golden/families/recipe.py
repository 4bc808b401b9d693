"""Parameters that a file does not store but describes: drawn again from numpy's legacy generator.

`param_recipe` gives the seed and the order of the draws. How each draw was scaled is read from its recorded
first values, as an exact number: one that the recipe mentions, or a root of the parameter's sizes. Nothing is
taken on trust: what comes out must have the recorded first values, sum and absolute sum, or the file is
reported as not understood.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.golden.case import Case, NotUnderstood

Shapes = dict[str, tuple[int, ...]]


def regenerate(case: Case, shapes: Shapes) -> dict[str, Tensor]:
    """The parameters of `param_recipe`, float32, verified."""
    text = json.dumps(case.settings["param_recipe"]).replace("/", ".").replace("param.", "")
    seed = re.search(r"(?:RandomState\(|seed\D{0,5}?)(\d+)", text)
    if seed is None:
        raise NotUnderstood(f"param_recipe without a seed: {text}")
    for order in orders(text, shapes):
        drawn = draw_all(case, np.random.RandomState(int(seed[1])), {name: shapes[name] for name in order}, text)
        if drawn is not None:
            return drawn
    raise NotUnderstood(f"param_recipe does not give the recorded values: {text}")


def orders(text: str, shapes: Shapes) -> Iterator[list[str]]:
    """Orders in which the parameters may have been drawn: as the recipe mentions them, or sorted."""
    found = {name: re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text) for name in shapes}
    if all(found.values()):
        yield sorted(shapes, key=lambda name: found[name].start())  # type: ignore[union-attr]
    yield sorted(shapes)


def draw_all(case: Case, random: np.random.RandomState, shapes: Shapes, text: str) -> dict[str, Tensor] | None:
    """Draw parameter after parameter; None as soon as one has no scale that gives what was recorded."""
    drawn = {}
    for name, shape in shapes.items():
        if (constant := fit(case, name, shape, np.ones(shape), text)) is not None:
            drawn[name] = constant  # nothing was drawn for it
            continue
        state = random.get_state()
        for distribution in (random.standard_normal, random.random_sample):
            random.set_state(state)
            value = fit(case, name, shape, distribution(shape), text)
            if value is not None:
                drawn[name] = value
                break
        else:
            return None
    return drawn


def fit(case: Case, name: str, shape: tuple[int, ...], noise: np.ndarray[Any, Any], text: str) -> Tensor | None:
    """offset + scale * noise that has the recorded sums and first values, if there is one."""
    sums, head = recorded(case, f"sum.{name}").double(), recorded(case, f"head.{name}").float()
    start = noise.flatten()[: head.numel()]
    if np.ptp(start) == 0:
        guesses = [(0.0, head[0].item())] if bool((head == head[0]).all()) else []
    else:
        scale, offset = np.polyfit(start, head.double().numpy(), 1)
        # exact numbers near what the first values, themselves rounded to float32, say
        scales = [s for s in numbers(shape, text) if abs(s - abs(scale)) <= 1e-5 * abs(scale)]
        guesses = [(o, s) for s in scales for o in (0.0, 1.0, -s / 2) if abs(o - offset) <= 1e-5 * max(1.0, s)]
    for offset, scale in guesses:
        value = torch.from_numpy((offset + scale * noise).astype(np.float32))
        found = torch.stack([value.double().sum(), value.double().abs().sum()])
        same_head = torch.allclose(value.flatten()[: head.numel()], head, rtol=2e-7, atol=0)
        if same_head and torch.allclose(found, sums, rtol=0, atol=2e-7 * max(1.0, found[1].item())):
            return value
    return None


def recorded(case: Case, name: str) -> Tensor:
    """A recorded check of a parameter, flat."""
    kind, _, parameter = name.partition(".")
    found = case.tensors.get(f"check.{name}", case.tensors.get(f"check.{kind}.param.{parameter}"))
    if found is None:
        raise NotUnderstood(f"param_recipe without check.{name}")
    return found.flatten()


def numbers(shape: tuple[int, ...], text: str) -> Iterator[float]:
    """Scales an author may have chosen: numbers in the recipe, and factors of roots of the sizes."""
    written = {float(number) for number in re.findall(r"\d+\.?\d*(?:[eE]-?\d+)?", text)}
    sizes = {*shape, *(a * b for a, b in itertools.combinations(shape, 2)), sum(shape[-2:])}
    factors = {1.0, 2.0, 0.5, *written}
    yield from written
    yield from (factor * math.sqrt(k / size) for factor in factors for k in (1, 2, 3, 6) for size in sizes)
    yield 1.0
