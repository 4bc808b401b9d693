"""Tokens that see or count one another."""

import pytest
import torch

import nestloop as nl
from nestloop.errors import (
    TokenMixingError,
)
from tests.errors.squares import steps_into
from tests.refusals import refused


def mixes(self, f, t):
    return (f(t.k) - t.v.mean(0)).square().sum(-1)  # HERE


@pytest.mark.parametrize("schedule", [nl.Causal(4), nl.Online(), nl.Chunked(4, "apply-update")])
def test_tokens_of_a_stream_do_not_see_one_another(schedule):
    size = max(getattr(schedule, "chunk", 0), 16)
    why = "a later one must not reach an earlier one's output"
    if isinstance(schedule, nl.Chunked):
        why = "a chunk may come in several calls, each of which adds its gradient"
    refused(
        steps_into(mixes, schedule=schedule),
        TokenMixingError,
        f"Loop is {type(schedule).__name__}, but its loss mixes tokens.",
        given="mean over the token axis of [n, d]",
        need=f"tokens that are on their own: {why}",
        fix=f'schedule = nl.Chunked({size}, "update-apply"), whose tokens see one another within a chunk',
    )


def counts_rows(self, f, t):
    return (f(t.k) - t.v).square().sum(-1) / t.k.shape[0]  # HERE


def places(self, f, t):
    return f(t.k).sum(-1) * torch.arange(t.k.shape[0], device=t.k.device)  # HERE


@pytest.mark.parametrize("loss, op", [(counts_rows, "div"), (places, "arange")])
@pytest.mark.parametrize("schedule, n", [(nl.Causal(4), 1), (nl.Online(), 1), (nl.Chunked(4, "apply-update"), 4)])
def test_the_loss_of_a_stream_does_not_count_its_tokens(loss, op, schedule, n):
    refused(
        steps_into(loss, schedule=schedule),
        TokenMixingError,
        f"Loop is {type(schedule).__name__}, but its loss counts its tokens.",
        given=f"{op}, of a number of rows or of their places",
        need="tokens that are on their own: how many of them a body is given at once means nothing",
        fix=f"use self.n, which is {n} in each of its bodies, or pass the places as a view",
    )


def decides_on_one(self, f, t):  # HERE
    return (f(t.k) - t.v).square().sum(-1) * (2.0 if t.k.shape[0] == 1 else 1.0)


def decides_on_few(self, f, t):  # HERE
    return (f(t.k) - t.v).square().sum(-1) * (2.0 if len(t.k) > 2 else 1.0)


@pytest.mark.parametrize("loss", [decides_on_one, decides_on_few])
@pytest.mark.parametrize("schedule", [nl.Causal(4), nl.Online()])
def test_the_loss_of_a_causal_loop_does_not_decide_on_how_many_tokens_it_is_given(loss, schedule):
    refused(
        steps_into(loss, schedule=schedule),
        TokenMixingError,
        f"Loop is {type(schedule).__name__}, but its loss counts its tokens.",
        given="another computation of tokens together than of each of them alone",
        need="tokens that are on their own: how many of them a body is given at once means nothing",
        fix="use self.n, which is 1 in each of its bodies, or pass the places as a view",
    )
