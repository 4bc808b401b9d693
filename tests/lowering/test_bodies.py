"""What bodies are written with: PyTorch's functions, and values from which nothing flows back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nestloop as nl
from nestloop.errors import NoPlanError
from nestloop.lang.schedule import Schedule
from tests.lowering.body_loops import COUNTING, LOOPS, CountedInChunks, Linear, Nothing, Recall
from tests.lowering.comparison import Inputs, differences, random_inputs, run, run_in_parts

SIZES = {"d": 4, "D": 8, "H": 2, "m": 3, "N": 7}
FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine_similarity": lambda x, y: F.cosine_similarity(x, y, dim=-1),
    "binary_cross_entropy": lambda x, y: F.binary_cross_entropy_with_logits(x, y.sigmoid(), reduction="none"),
    "cross_entropy": lambda x, y: F.cross_entropy(x, y.softmax(-1), reduction="none"),
    "kl_div": lambda x, y: F.kl_div(x.log_softmax(-1), y.softmax(-1), reduction="none"),
    "max": lambda x, y: x.max(-1).values * y.min(-1).values,
    "largest size": lambda x, y: torch.linalg.vector_norm(x, float("inf"), -1),
    "a mask as a factor": lambda x, y: x * (x > y) * ~(y > 1),
    "a mask alone": lambda x, y: (x > 0) * 0.5 + (y > 0).sum(-1, keepdim=True) * 0.25 * x,
    "any": lambda x, y: x * (y > 0).any(-1, keepdim=True),
    "prod": lambda x, y: x.prod(-1),
    "trace": lambda x, y: torch.einsum("nii->n", x[:, :, None] * y[:, None, :]),
    "attention": lambda x, y: F.scaled_dot_product_attention(*(t.unflatten(-1, (2, 2)) for t in (x, y, x))).flatten(1),
    "attention of groups": lambda x, y: F.scaled_dot_product_attention(
        x.reshape(-1, 1, 2, 2), y.reshape(-1, 1, 2, 2), x.reshape(-1, 1, 2, 2), is_causal=True
    ).flatten(1),
    "truth values": lambda x, y: (
        x.masked_fill(torch.tensor([[True, False, False, True]]), -1.0) * torch.tensor([True, True, False, False])
    ),
    "products of features": lambda x, y: (x[:, :, None] * y[:, None])[:, *torch.triu_indices(4, 4, 1)],
    "elements of lists": lambda x, y: (x[:, :, None] * y[:, None])[:, [0, -1, 1], [1, 2, 2]],
    "two places of numbers": lambda x, y: (x[:, :, None] * y[:, None])[:, *torch.tril_indices(4, 3, -1)[[1, 0]]],
    "elements for each token": lambda x, y: (
        torch.arange(16).to(x.dtype).reshape(4, 4)[x.argmax(-1), y.argmax(-1)][:, None] * x
    ),
    "another diagonal": lambda x, y: (
        torch.diagonal_scatter(x[:, :, None] * y[:, None], y[:, 1:], 1, 1, 2).diagonal(-1, 1, 2) * y[:, :3]
        + torch.diagonal_scatter(x[:, :, None] * y[:, None], y, 0, 2, 1).sum(1)[:, :3]
    ),
    "a derivative's diagonal": lambda x, y: (
        torch.func.vmap(lambda a: torch.func.jacrev(lambda b: b.sin() * b.sum())(a).diagonal())(x) * y
    ),
    "other values": lambda x, y: torch.select_scatter(x, y[:, 0], 1, -2) * y,
    "dropouts of nothing": lambda x, y: F.dropout(x, 0.0) + F.dropout(y, 0.3, training=False),
    "sums of products": lambda x, y: (
        torch.addmv(y[:, 0], x, y.new_ones(4), beta=0.5)[:, None]
        + torch.linalg.multi_dot([x, torch.eye(4, dtype=x.dtype), x.new_ones(4, 3)])
        + torch.addbmm(x.new_ones(4, 3), x.new_ones(2, 4, 4), x.new_ones(2, 4, 3), alpha=0.1).sum(0)
        + torch.dist(x.new_ones(4), x.new_zeros(4))
    ),
    "a hard sigmoid": lambda x, y: F.hardsigmoid(4 * x) * y,
    "inverse": lambda x, y: (
        torch.linalg.inv(torch.eye(2, dtype=x.dtype, device=x.device) + y.unflatten(-1, (2, 2)) / 9).flatten(1).mul(x)
    ),
    "whole numbers": lambda x, y: x - x.round() + (2 * x).ceil() * x - y.frac() + torch.remainder(x, 0.3),
    "hyperbolic": lambda x, y: torch.asinh(x) + torch.atanh(0.1 * x.tanh()) + torch.erfc(x) + torch.hypot(x, y),
    "angles": lambda x, y: torch.atan2(x, y) + torch.asin(0.5 * x.tanh()) + torch.acos(0.5 * y.tanh()),
    "numbers as tensors": lambda x, y: (
        x * torch.tensor(0.5) - y.new_tensor(3) + torch.where(x > y, torch.as_tensor(2), torch.tensor(0.25))
    ),
    "whole numbers in arithmetic": lambda x, y: (
        x * (torch.arange(x.shape[-1]) * 1.0 + 0.0) + y @ torch.diag((torch.arange(y.shape[-1]) * 2) * 0.5).to(y.dtype)
    ),
    "a root of a negative number": lambda x, y: x + (torch.full_like(y, -8.0) ** 0.5).nan_to_num(),
    "nan_to_num": lambda x, y: torch.nan_to_num(x) * y,
    "nan_to_num of infinities": lambda x, y: x + 1e-300 * torch.nan_to_num(torch.where(y > 0, float("inf"), y)),
    "clamped by NaN": lambda x, y: x.clamp(torch.where(y > 0, float("nan"), y), y.abs()).nan_to_num(),
    "the sign of NaN": lambda x, y: x + torch.where(y > 0, float("nan"), y).sign(),
}


def with_function(function: Callable[[Tensor, Tensor], Tensor]) -> type[nl.Loop]:
    class Loop(Recall):
        learner = Linear

        def loss(self, f, t):
            made = function(f(t.k), t.v)
            return (made - 0.3).square().reshape(made.shape[0], -1).sum(-1)

        def readout(self, f, t):
            return function(f(t.q), t.q)

    return Loop


def inputs_of(loop: type[nl.Loop], dtype: torch.dtype) -> tuple[Inputs, dict[str, Tensor]]:
    """The same inputs in a dtype, and what the reference makes of them in float64."""
    reference = nl.compile(loop, backend="reference")
    inputs = random_inputs(reference.spec, SIZES, tokens=7, seed=3)
    wanted = run(reference, inputs)
    for group in (inputs.views, inputs.weights):
        group.update({name: t.detach().to(dtype).requires_grad_() for name, t in group.items()})
    return inputs, wanted


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str):
    loop = with_function(FUNCTIONS[name])
    inputs, wanted = inputs_of(loop, torch.float64)
    errors = differences(run(nl.compile(loop, backend="torch"), inputs), wanted)
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("function", [F.softplus, F.elu, F.selu, F.celu], ids=lambda function: function.__name__)
def test_a_loss_that_ends_in_a_function(function: Callable[[Tensor], Tensor], backend: str):
    """What flows back into the function is the weight of the step, a number where the code runs."""

    class Last(Recall):
        schedule = nl.FullBatch(steps=2)

        def loss(self, f, t):
            return function(f(t.k) - t.v).mean(-1) + function(-(f(t.k) * t.v).sum(-1))

    inputs, wanted = inputs_of(Last, torch.float64)
    errors = differences(run(nl.compile(Last, backend=backend), inputs), wanted)
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
@pytest.mark.parametrize("loop", LOOPS + COUNTING, ids=lambda loop: loop.__name__)
def test_loops(loop: type[nl.Loop], backend: str):
    if backend == "triton":
        pytest.importorskip("triton")
    exact = backend != "triton"
    inputs, wanted = inputs_of(loop, torch.float64 if exact else torch.float32)
    found = {name: t.double() for name, t in run(nl.compile(loop, backend=backend), inputs).items()}
    errors = differences(found, wanted)
    assert max(errors.values()) < (1e-10 if exact else 2e-5), errors


@pytest.mark.parametrize("schedule", [nl.FullBatch(steps=2), nl.Shuffled(batches=2), nl.Chunked(4)], ids=repr)
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_a_loss_that_is_a_mean_by_hand(schedule: Schedule, backend: str):
    """The number of tokens as a factor: of no token, and yet not the same for all tiles."""

    def loss(self: Any, f: Any, t: Any) -> Tensor:
        return (f(t.k) - t.v).square().sum(-1) / self.n

    loop = type("Mean", (Recall,), {"loss": loss, "learner": Linear, "schedule": schedule})
    inputs, wanted = inputs_of(loop, torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # not generated PyTorch where C++ was asked for
        errors = differences(run(nl.compile(loop, backend=backend), inputs), wanted)
    assert max(errors.values()) < 1e-10, errors


def is_the_reference(loop: type[nl.Loop], backend: str, tokens: int) -> None:
    """Of so many tokens."""
    inputs = random_inputs(loop.spec, SIZES, tokens=tokens)
    found, wanted = (run(nl.compile(loop, backend=one), inputs) for one in (backend, "reference"))
    assert max(differences(found, wanted).values()) < 1e-10


OF_THE_LENGTH: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "a power": lambda x, n: x.tanh() ** n,
    "a power of what it is made of": lambda x, n: x.tanh() ** (n - 1) + (x.abs() + 1) ** -n,
    "a root": lambda x, n: (x.abs() + 0.1) ** (1 / n),
    "its power": lambda x, n: n ** x.tanh() + (1 / n) ** x.tanh(),
    "a factor in a sum": lambda x, n: torch.add(x, x * x, alpha=n) + torch.sub(x, x.tanh(), alpha=n / 2),
    "a derivative of powers": lambda x, n: torch.func.grad(lambda y: (y.tanh() ** n + (1 / n) ** y + n**y).sum())(x),
    "in a tensor's place": lambda x, n: torch.xlogy(n, 1 + x.square()) + torch.where(x > 0, n, x),
}


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("name", OF_THE_LENGTH)
def test_numbers_of_the_length(name: str, backend: str, tokens: int):
    class Counts(Recall):
        schedule = nl.FullBatch(steps=2)

        def loss(self, f, t):
            return OF_THE_LENGTH[name](f(t.k) - t.v, self.n).sum(-1)

    is_the_reference(Counts, backend, tokens)


CONTRASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "the diagonal": lambda scores: -scores.log_softmax(-1).diagonal(),
    "labels": lambda scores: F.cross_entropy(scores, torch.arange(len(scores)), reduction="none"),
}


@pytest.mark.parametrize("given", [nl.FullBatch(steps=2), nl.Shuffled(2), nl.Shuffled(3, reduction="sum")], ids=str)
@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("name", CONTRASTS)
def test_a_token_against_all_others(name: str, backend: str, given: Schedule):
    """The contrastive loss of InfoNCE (arXiv 1807.03748), of all tokens or of those of a batch."""

    class Contrast(Recall):
        schedule = given

        def loss(self, f, t):
            return CONTRASTS[name](F.normalize(f(t.k), dim=-1) @ F.normalize(t.v, dim=-1).T / 0.5)

    inputs, wanted = inputs_of(Contrast, torch.float64)
    errors = differences(run(nl.compile(Contrast, backend=backend), inputs), wanted)
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("tokens", [1, 2, 5, 7])
@pytest.mark.parametrize("shift", [1, -1, 5])
def test_rows_that_are_rolled(shift: int, tokens: int):
    """By less than their number, and by more."""

    class Rolled(Recall):
        schedule = nl.FullBatch(steps=2)

        def loss(self, f, t):
            return (f(t.k) - t.v.roll(shift, 0)).square().sum(-1)

    is_the_reference(Rolled, "torch", tokens)


JOINED: dict[str, Callable[[Tensor], Tensor]] = {
    "the first counts three times": lambda losses: torch.cat([3 * losses[:1], losses[1:]]),
    "rolled": lambda losses: losses.roll(1, 0),
    "halves": lambda losses: torch.cat([losses[len(losses) // 2 :], 2 * losses[: len(losses) // 2]]),
}


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("name", JOINED)
def test_losses_that_are_joined(name: str, backend: str, tokens: int):
    """What flows back is a constant on n - 1 rows, which nothing else has."""

    class Joined(Recall):
        schedule = nl.FullBatch(steps=2)

        def loss(self, f, t):
            return JOINED[name]((f(t.k) - t.v).square().sum(-1))

    is_the_reference(Joined, backend, tokens)


@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
def test_a_place_that_is_not_there_is_nan(backend: str):
    """PyTorch refuses it; of generated code, on a GPU above all, no part waits for that."""
    if backend == "triton":
        pytest.importorskip("triton")

    class Beyond(Recall):
        def readout(self, f, t):
            return f(t.q).gather(1, t.v[:, :1].long())

    inputs = random_inputs(Beyond.spec, SIZES, tokens=7, dtype=torch.float32)
    inputs.views["v"] = torch.tensor([-1.0, 0.0, 1.0, 3.0, 4.0, 1e6, 2.0]).reshape(1, 1, 7, 1).expand(2, 2, 7, 4)
    z, _ = nl.compile(Beyond, backend=backend)(inputs.views, inputs.weights)
    assert z[0, 0].isnan().squeeze(-1).tolist() == [True, False, False, False, True, True, False]


@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
def test_rows_of_a_table_are_read_as_they_are(backend: str):
    """In bfloat16 products round; what a table holds is not computed with."""

    class Read(Recall):
        table = nl.slow(5, "d")

        def readout(self, f, t):
            return self.table[t.q.argmax(-1)]

    inputs = random_inputs(Read.spec, SIZES, tokens=7, dtype=torch.float32)
    views = {**inputs.views, "k": inputs.views["k"].bfloat16()}
    found, wanted = (nl.compile(Read, backend=one)(views, inputs.weights)[0] for one in (backend, "reference"))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_whole_numbers_that_wrap_around_are_pytorchs_alone(backend: str):
    class Narrow(Recall):
        def readout(self, f, t):
            return f(t.q) * (300 * t.q).long().to(torch.int8)

    inputs, wanted = inputs_of(Narrow, torch.float64)
    errors = differences(run(nl.compile(Narrow, backend="torch"), inputs), wanted)
    assert max(errors.values()) < 1e-10, errors
    with pytest.raises(NoPlanError, match=r"whole numbers of torch\.int8, which wrap around"):
        nl.compile(Narrow, backend=backend)(inputs.views, inputs.weights)


def test_nothing_flows_through_what_is_detached():
    inputs, _ = inputs_of(Nothing, torch.float64)
    found = run(nl.compile(Nothing, backend="torch"), inputs, losses=False)
    assert not found["gradient of q"].any() and not found["gradient of s"].any()
    assert found["gradient of w1"].any()


STREAMS = [loop for loop in LOOPS + COUNTING if loop.spec.streams and loop is not CountedInChunks]


@pytest.mark.parametrize("loop", STREAMS, ids=lambda loop: loop.__name__)
def test_token_by_token(loop: type[nl.Loop]):
    inputs, wanted = inputs_of(loop, torch.float64)
    errors = differences(run_in_parts(nl.compile(loop, backend="torch"), inputs, [1, 2, 6]), wanted)
    assert max(errors.values()) < 1e-10, errors
