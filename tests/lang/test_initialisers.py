"""Initialisers: by name, head by head, refused where they are written."""

import math

import pytest
import torch

import nestloop as nl
from nestloop import zoo
from nestloop.errors import (
    UnknownInitError,
)
from nestloop.lang.init import INITIALISERS, fill
from tests.refusals import refused

INITS = (
    "one of zeros, ones, constant(value), xavier_uniform = xavier_uniform(1.0), lecun_normal = lecun_normal(1.0), "
    "uniform = uniform(1.0), normal = normal(0.02), trunc_normal = trunc_normal(0.02), eye = eye(1.0), "
    "retention = retention(5.0), log_retention = log_retention(5.0), alibi = alibi(1.0), lightning = lightning(1.0)"
)


@pytest.mark.parametrize(
    "init",
    ["xavier", "normal(a)", "normal(1-2)", "constant", "zeros(3)", "", torch.nn.init.zeros_],
    ids=lambda init: getattr(init, "__name__", init),
)
def test_unknown_initialisers(init):
    def step():
        nl.fast("d", "d", init=init)  # HERE

    refused(
        step,
        UnknownInitError,
        "The initialiser is not one nestloop knows.",
        given=repr(init),
        need=INITS,
        fix='write init="zeros" or init="normal(0.02)"',
    )


def test_initialisers_that_need_axes():
    def eye():
        nl.slow("d", init="eye")  # HERE

    def scalar():
        nl.slow(init="xavier_uniform(2)")  # HERE

    fix = 'write init="zeros", init="ones" or init="normal(0.02)"'
    what = "The initialiser {} does not fit a weight with so few axes."
    refused(eye, UnknownInitError, what.format("eye"), given="'eye' for 1 axis", need="2 axes or more", fix=fix)
    refused(
        scalar,
        UnknownInitError,
        what.format("xavier_uniform"),
        given="'xavier_uniform(2)' for no axes",
        need="an axis",
        fix=fix,
    )


def test_initialisers_spread_by_no_negative_number():
    def step():
        nl.fast("d", "d", init="normal(-0.02)")  # HERE

    refused(
        step,
        UnknownInitError,
        "The initialiser normal takes no number below 0.",
        given="'normal(-0.02)'",
        need="how far the numbers it draws spread: 0 or more",
        fix='write init="normal(0.02)"',
    )


@pytest.mark.parametrize("name", INITIALISERS)
def test_every_initialiser_fills_head_by_head(name):
    text = "constant(-0.5)" if name == "constant" else name
    torch.manual_seed(0)
    filled = fill(torch.full((2, 40, 60), math.nan), text, per_head=True)
    expected = {"zeros": 0.0, "ones": 1.0, "constant": -0.5, "eye": 1 / 60}.get(name, 0.0)
    assert filled.isfinite().all()
    assert abs(filled.mean() - expected) < 0.01
    if name == "xavier_uniform":
        assert filled.abs().max() == pytest.approx(math.sqrt(6 / 100), rel=1e-2)
    if name == "lecun_normal":
        assert filled.std() == pytest.approx(math.sqrt(1 / 40), rel=0.05)
    if name in ("normal", "trunc_normal"):
        assert filled.std() == pytest.approx(0.02, rel=0.05)
        assert fill(torch.empty(2, 40, 60), f"{name}(0.5)", True).std() == pytest.approx(0.5, rel=0.05)


def test_maps_are_filled_as_if_each_were_alone_and_kernels_as_pytorch_fills_them():
    class Both(nl.Learner):
        maps, kernel = nl.fast(3, "d", "2*d"), nl.fast("d", 1, 3, 3)

        def forward(self, x):
            return x

    class Maps(nl.Learner):
        w = nl.fast(3, "d", "d")

        def forward(self, x):
            return torch.einsum("nd,mde->ne", x, self.w)

    assert Both.fast["maps"].maps and not Both.fast["kernel"].maps
    bounds = {"maps": math.sqrt(6 / (40 + 80)), "kernel": math.sqrt(6 / (9 + 9 * 40))}
    for name, shape in {"maps": (3, 40, 80), "kernel": (40, 1, 3, 3)}.items():
        filled = fill(torch.full((2, *shape), math.nan), "xavier_uniform", True, Both.fast[name].maps)
        assert filled.abs().max() == pytest.approx(bounds[name], rel=2e-2)
    layer = nl.Layer(type("Many", (zoo.TTTLinear,), {"learner": Maps}), width=64, heads=2)
    assert layer.fast["w"].detach().abs().max() == pytest.approx(math.sqrt(6 / 64), rel=2e-2)


@pytest.mark.parametrize(
    "init, heads, expected",
    [
        ("log_retention", 3, [math.log(1 - 2.0**-5), math.log(1 - 2.0**-6), math.log(1 - 2.0**-7)]),
        ("lightning(0.75)", 4, [0.0, -1.5, -3.0, -4.5]),
        ("alibi(1.00001)", 4, [-1.00001 * 2.0**-i for i in (2, 4, 6, 8)]),
        ("alibi(0.5)", 3, [-0.5 * 2.0**-i for i in (4, 8, 2)]),
    ],
)
def test_decays_differ_from_head_to_head(init, heads, expected):
    filled = fill(torch.empty(heads, dtype=torch.float64), init, per_head=True)
    torch.testing.assert_close(filled, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
