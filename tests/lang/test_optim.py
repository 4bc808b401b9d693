"""Norms of exactly zero: a transform of no gradient is none, and its derivative is that of what is left of it there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import nestloop as nl
from nestloop.errors import TransformError
from tests.lang.recall import Recall

COEFFICIENTS = ((2.0, -1.5, 0.5),) * 3


class Square(nl.Learner):
    w = nl.fast("d", "d")

    def forward(self, x):
        return x @ self.w


def joint(transform: Any) -> Any:
    return lambda gradient: transform.joint({"w": gradient})["w"]


# At zero each is a number times its argument.
TRANSFORMS: dict[str, tuple[Any, float]] = {
    "soft_clip": (nl.soft_clip(-2), 1.0),
    "soft_clip of everything": (nl.soft_clip(-2, -1), 1.0),
    "global_clip": (nl.global_clip(0.3), 1.0),
    "newton_schulz": (nl.newton_schulz(COEFFICIENTS, eps=0.1), 2.0**3 / 0.1),
    "newton_schulz, tall": (lambda g: nl.newton_schulz(COEFFICIENTS, eps=0.1)(g.mT).mT, 2.0**3 / 0.1),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_derivative_at_zero(name: str):
    transform, factor = TRANSFORMS[name]
    function = joint(transform) if name == "global_clip" else transform
    zero = torch.zeros(3, 4, dtype=torch.float64)
    assert torch.equal(function(zero), zero)
    slope = torch.autograd.functional.jacobian(function, zero).reshape(12, 12)
    torch.testing.assert_close(slope, factor * torch.eye(12, dtype=torch.float64))


def test_one_row_of_zeros_leaves_the_others_alone():
    gradient = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    masked = gradient * torch.tensor([[1.0], [0.0], [1.0], [1.0]])
    (whole,) = torch.autograd.grad(nl.soft_clip(-1)(masked)[[0, 2, 3]].sin().sum(), gradient)
    rows = gradient.detach()[[0, 2, 3]].requires_grad_()
    (alone,) = torch.autograd.grad(nl.soft_clip(-1)(rows).sin().sum(), rows)
    assert torch.equal(whole[[0, 2, 3]], alone) and not whole[1].any()


def test_not_a_number_stays_none():
    assert nl.soft_clip(-1)(torch.full((2, 3), math.nan)).isnan().all()


def test_a_restored_row_of_zeros():
    initial, weight = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
    initial[0] = weight[0] = weight[1] = 0
    made = nl.restore_norm(-1, eps=0.1)(weight, initial)
    assert not made[:2].any()
    over_weight, over_initial = torch.autograd.functional.jacobian(nl.restore_norm(-1, eps=0.1), (weight, initial))
    assert over_weight.isfinite().all() and over_initial.isfinite().all()
    slope = initial[1].norm() / 0.1  # of a weight of zero that had a norm
    torch.testing.assert_close(over_weight[1, :, 1], slope * torch.eye(4, dtype=torch.float64))
    assert not over_weight[0].any() and not over_initial[:2].any()


def outer_gradients(schedule: Any, backend: str, **optimizer: Any) -> dict[str, Tensor]:
    """Of a loop whose keys are zero: it learns nothing, yet what it would learn of other keys counts."""
    torch.manual_seed(0)
    loop = type("Loop", (Recall,), {"learner": Square, "schedule": schedule, "optimizer": nl.SGD(0.1, **optimizer)})
    views = {"k": torch.zeros(1, 2, 4, 3), "v": torch.randn(1, 2, 4, 3)}
    views = {name: view.double().requires_grad_() for name, view in views.items()}
    weight = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    z, state = nl.compile(loop, backend=backend)(views, {"w": weight})
    assert torch.equal(state["w"][0], weight)
    found = torch.autograd.grad(z.sum() + state["w"].sin().sum(), [*views.values(), weight])
    return dict(zip(("k", "v", "w"), found, strict=True))


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "global_clip"])
def test_outer_gradients_of_a_batch_that_teaches_nothing(name: str, backend: str):
    transform, factor = TRANSFORMS[name]
    made = outer_gradients(nl.FullBatch(2), backend, transform=transform)
    plain = outer_gradients(nl.FullBatch(2), "reference", transform=lambda gradient: gradient * factor)
    torch.testing.assert_close(made, plain)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_outer_gradients_of_a_chunk_that_teaches_nothing(name: str, backend: str):
    transform, factor = TRANSFORMS[name]
    made = outer_gradients(nl.Chunked(2), backend, transform=transform)
    plain = outer_gradients(nl.Chunked(2), "reference", transform=lambda gradient: gradient * factor)
    torch.testing.assert_close(made, plain)


CLIP = "nl.soft_clip takes its norm over axes of the fast weights."
AXES = "whole numbers, counted from the last axis: -1, -2"
JOINT = "The norm of nl.global_clip is none."
LARGEST = "a finite number above 0: the largest norm of all updates together"
ORTHOGONAL = "The coefficients of nl.newton_schulz are none."
TRIPLES = "three numbers (a, b, c) for each step; without any given, Muon's five steps"
TEXT: Any = "a"
HALF: Any = 0.5


@pytest.mark.parametrize(
    "make, what, given, need, fix",
    [
        (lambda: nl.soft_clip(TEXT), CLIP, "'a'", AXES, "transform=nl.soft_clip(-2)"),
        (lambda: nl.soft_clip(-1, HALF), CLIP, "-1, 0.5", AXES, "transform=nl.soft_clip(-2)"),
        *(
            (lambda norm=norm: nl.global_clip(norm), JOINT, repr(norm), LARGEST, "transform=nl.global_clip(1.0)")
            for norm in (-1.0, 0, "a", True, math.inf)
        ),
        *(
            (lambda c=c: nl.newton_schulz(c), ORTHOGONAL, repr(c), TRIPLES, "transform=nl.newton_schulz()")
            for c in (5, [], [(1.0, 2.0)], "abc", ((1.0, 2.0, "c"),))
        ),
        (
            lambda: nl.newton_schulz(eps=-1.0),
            "The eps of nl.newton_schulz is none.",
            "eps=-1.0",
            "a finite number, 0 or more",
            "transform=nl.newton_schulz()",
        ),
        (
            lambda: nl.newton_schulz(precision=TEXT),
            "The precision of nl.newton_schulz is not one of numbers.",
            "precision='a'",
            "a floating dtype of PyTorch's, or None for the gradient's own",
            "transform=nl.newton_schulz(precision=torch.bfloat16)",
        ),
        (
            lambda: nl.restore_norm(TEXT),
            "nl.restore_norm takes its norm over an axis of the fast weights.",
            "dim='a'",
            "a whole number, counted from the last axis: -1",
            "restore=nl.restore_norm(-1)",
        ),
    ],
)
def test_arguments_that_are_none(make, what, given, need, fix):
    with pytest.raises(TransformError) as caught:
        make()
    error = caught.value
    assert (error.what, error.given, error.need, error.fix) == (what, given, need, f"write nl.SGD(lr=1.0, {fix})")
    assert error.where is not None and error.where.file == __file__
