"""What a body returns: one loss a token, one row a token, one number a pair."""

import pytest
import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop.errors import (
    KernelShapeError,
    LossNotPerTokenError,
    NothingReturnedError,
    ReadoutShapeError,
)
from tests.errors.squares import Squares, layer_of
from tests.refusals import marked, refused

PER_TOKEN = "[n]: the loss of each of the tile's n tokens; the schedule's reduction adds them up"
PER_TOKEN_FIX = "reduce over the last axis only: .mean(-1) or .sum(-1)"


def test_a_loss_is_one_number_per_token():
    def whole():
        def loss(self, f, t):
            return f(t.k).sum()  # HERE

        layer_of(loss)

    def features():
        def loss(self, f, t):  # HERE
            return f(t.k)

        layer_of(loss)

    def nothing():
        def loss(self, f, t):  # HERE
            f(t.k)

        layer_of(loss)

    def averaged():
        def loss(self, f, t):
            return F.mse_loss(f(t.k), t.v)  # HERE

        layer_of(loss)

    def flat():
        def loss(self, f, t):
            return (f(t.k) - t.v).view(-1).square()  # HERE

        layer_of(loss)

    def shifted():
        def loss(self, f, t):
            return (f(t.k[:-1]) - t.v[1:]).square().sum(-1)  # HERE

        layer_of(loss)

    what, rows = "The loss of Loop is not one number per token.", "keep one row per token: no slice, no cat and no "
    for step, given, fix in (
        (whole, "[]", PER_TOKEN_FIX),
        (features, "[n, 8]", PER_TOKEN_FIX),
        (nothing, "None: the body returns nothing", "return the loss"),
        (averaged, "[]", 'write reduction="none" in it, and .mean(-1) or .sum(-1) after it'),
        (flat, "[8*n]", rows + ".view(-1) of the token axis"),
        (shifted, "[n - 1]", rows + ".view(-1) of the token axis"),
    ):
        refused(step, LossNotPerTokenError, what, given=given, need=PER_TOKEN, fix=fix)


def test_the_reference_refuses_what_bodies_return_too():
    def whole(self, f, t):  # HERE
        return f(t.k).sum()

    def turned(self, f, t):  # HERE
        return f(t.q).T

    def distances(self, q, k):  # HERE
        return (q - k).square().sum(-1)

    x = torch.randn(1, 3, 16)
    for schedule in (nl.FullBatch(), nl.Causal(2), nl.Chunked(2, "apply-update")):
        layer = layer_of(whole, backend="reference", schedule=schedule)
        with pytest.raises(LossNotPerTokenError) as of_loss:
            layer(x)
        assert_message(of_loss.value, whole, "The loss of Loop is not one number per token.", "[]", PER_TOKEN)
    with pytest.raises(ReadoutShapeError) as of_readout:
        layer_of(turned, "readout", backend="reference")
    need = "[n, *]: the output of each token"
    assert_message(of_readout.value, turned, "The read-out of Loop is not one row per token.", "[8, 4]", need)
    with pytest.raises(KernelShapeError) as of_kernel:
        layer_of(distances, "kernel", learner=nl.KernelEstimator, backend="reference")
    need = "[n, m]: how much each of the m keys counts at each of the n queries"
    assert_message(of_kernel.value, distances, "The kernel of Loop is not one number per query and key.", "[n]", need)


def assert_message(error, body, what, given, need):
    lines = str(error).splitlines()
    assert lines[0] == what
    assert lines[1].startswith(f"  at:    {__file__}:{marked(body)}")
    assert lines[2:4] == [f"  given: {given}", f"  need:  {need}"]


def test_a_readout_is_one_row_per_token():
    def turned():
        def readout(self, f, t):
            return f(t.q).T  # HERE

        layer_of(readout, "readout")

    def several():
        def readout(self, f, t):  # HERE
            return f(t.q), t.q

        layer_of(readout, "readout")

    what = "The read-out of Loop is not one row per token."
    need, fix = "[n, *]: the output of each token", "return f(t.q), one row per token"

    def doubled():
        def readout(self, f, t):
            return torch.cat([f(t.q), t.q])  # HERE

        layer_of(readout, "readout")

    refused(turned, ReadoutShapeError, what, given="[8, n]", need=need, fix=fix)
    rows = "keep one row per token: no slice, no cat and no .view(-1) of the token axis"
    refused(doubled, ReadoutShapeError, what, given="[2*n, 8]", need=need, fix=rows)
    refused(several, ReadoutShapeError, what, given="a tuple", need=need, fix=fix)


def test_a_kernel_is_one_number_per_pair():
    def step():
        def kernel(self, q, k):
            return (q - k).square().sum(-1)  # HERE

        layer_of(kernel, "kernel", learner=nl.KernelEstimator)

    refused(
        step,
        KernelShapeError,
        "The kernel of Loop is not one number per query and key.",
        given="[n]",
        need="[n, m]: how much each of the m keys counts at each of the n queries",
        fix="return torch.exp(q @ k.T), or another positive function of the two",
    )


def test_a_fit_is_one_row_per_query():
    def kernel(self, q, k):
        return torch.exp(q @ k.T)

    def turned():
        def fit(self, weight, t, s):
            return (weight @ s.v).T  # HERE

        layer_of(fit, "fit", kernel=kernel, v=nl.view("d"), learner=nl.KernelEstimator)

    def in_a_window():
        def fit(self, weight, t, s):  # HERE
            return s.v[:1]

        parts = {"kernel": kernel, "v": nl.view("d"), "learner": nl.KernelEstimator}
        layer_of(fit, "fit", **parts, schedule=nl.Sliding(3), backend="reference")

    what = "The fit of Loop is not one row per query."
    need, fix = "[n, *]: the estimate at each of the n queries", "return weight @ s.v / weight.sum(-1, keepdim=True)"
    fix += ", or another sum over keys"
    refused(turned, ReadoutShapeError, what, given="[8, n]", need=need, fix=fix)
    refused(in_a_window, ReadoutShapeError, what, given="[1, 8]", need=need, fix=fix)


def test_a_forward_returns_something():
    def step():
        class Forgetful(nl.Learner):
            w = nl.fast("d", "d")

            def forward(self, x):  # HERE
                x @ self.w

        layer_of(Squares.loss, learner=Forgetful)

    refused(
        step,
        NothingReturnedError,
        "The forward of Forgetful returns nothing.",
        given="None",
        need="f(W; x), a tensor [n, *]",
        fix="return what it has computed",
    )
