"""Products whose rows are tokens times groups: one for each group; and axes keep their tokens through a reshape."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nestloop as nl
from nestloop.errors import NoPlanError, TokenMixingError
from nestloop.lowering.axes import regroup
from nestloop.lowering.capture import capture
from nestloop.lowering.length import Length
from tests.lowering.comparison import Inputs, assert_equal, compare, differences, random_inputs, run

pytestmark = pytest.mark.usefixtures("quick_builds")

n = Length().size

# Of rows x [n, 8] and a weight p: rows [n, 8].
Product = Callable[[Tensor, Tensor], Tensor]
PRODUCTS: dict[str, tuple[tuple[int, ...], Product]] = {
    "of a view": ((4, 4), lambda x, p: (x.view(-1, 2, 4) @ p).reshape(-1, 8)),
    "of rows alone": ((4, 4), lambda x, p: (x.reshape(-1, 4) @ p).softmax(-1).reshape(-1, 8)),
    "turned": ((4, 4), lambda x, p: F.linear(x.unflatten(-1, (2, 4)), p).flatten(1)),
    "by letters": ((4, 4), lambda x, p: torch.einsum("ngk,kv->ngv", x.view(-1, 2, 4), p).flatten(1)),
    "of a stack": ((4, 4), lambda x, p: torch.cat((torch.stack(x.chunk(2, 1), 1) @ p).unbind(1), -1)),
    "of norms": ((4, 4), lambda x, p: (F.layer_norm(x.view(-1, 2, 4), (4,)) @ p).sum(1).repeat(1, 2)),
    "of two axes": ((2, 2), lambda x, p: (x.view(-1, 2, 2, 2) @ p).flatten(1)),
    "of numbers": ((1, 8), lambda x, p: (x.view(-1, 8, 1) @ p).sum(1)),
    "from the left": ((4, 4), lambda x, p: (p @ x.view(-1, 4, 2)).flatten(1)),
    "a weight for each": ((2, 4, 4), lambda x, p: torch.einsum("ngk,gkv->ngv", x.view(-1, 2, 4), p).flatten(1)),
    "many weights": ((2, 4, 4), lambda x, p: (x.view(-1, 2, 1, 4) @ p).flatten(1)),
    "a window": ((2, 2, 3), lambda x, p: F.conv1d(x.view(-1, 2, 4), p, padding=1).flatten(1)),
}
SCHEDULES: dict[str, Any] = {
    "batch": nl.FullBatch(steps=2),
    "causal": nl.Causal(4),
    "online": nl.Online(),
    "shuffled": nl.Shuffled(batches=2),
    "chunked": nl.Chunked(4, "update-apply"),
}


def grouped(name: str, schedule: str, declare: Callable[..., Any]) -> type[nl.Loop]:
    """A loop whose learner reads such a product, of a weight that is slow, or fast and learned with the other."""
    shape, product = PRODUCTS[name]

    class Grouped(nl.Learner):
        w, p = nl.fast(8, 8), declare(*shape)

        def forward(self, x):
            return product(x, self.p) @ self.w

    timed = SCHEDULES[schedule]

    class Loop(nl.Loop):
        learner, optimizer, schedule = Grouped, nl.SGD(lr=0.02), timed
        k, v, q = nl.view(8), nl.view(8), nl.view(8)

        def loss(self, f, t):
            return (f(t.k) - t.v).square().sum(-1)

        def readout(self, f, t):
            return f(t.q)

    return Loop


def inputs(loop: type[nl.Loop]) -> Inputs:
    return random_inputs(loop.spec, {}, tokens=7, scale={"p": 0.5})


@pytest.mark.parametrize("declare", [nl.slow, nl.fast])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_of_groups_is_what_the_reference_makes_of_it(name, schedule, declare):
    loop = grouped(name, schedule, declare)
    assert_equal(compare(loop, inputs(loop)), 1e-9)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("schedule", ["batch", "causal", "shuffled"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_and_what_is_generated_for_it_computes(name, schedule, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    loop = grouped(name, schedule, nl.fast)
    given = inputs(loop)
    found, wanted = (run(nl.compile(loop, backend=b), given) for b in (backend, "reference"))
    assert_equal(differences(found, wanted), 1e-9)


@pytest.mark.parametrize("name", ["of a view", "of rows alone", "turned", "by letters", "of a stack", "of norms"])
def test_every_product_has_one_row_for_each_token(name):
    captured = capture(grouped(name, "causal", nl.slow).spec, {}, None)
    products = [node for node in captured.readout.graph.nodes if node.target is torch.ops.aten.mm.default]
    assert len(products) == 3
    assert all(str(node.args[0].meta["val"].shape[0]) == "n" for node in products)


def test_groups_that_hold_several_tokens_are_refused():
    class Loop(grouped("of a view", "causal", nl.slow)):  # type: ignore[misc]
        def loss(self, f, t):
            return ((f(t.k) - t.v).view(2, -1, 4).mT @ t.v.view(2, -1, 4)).sum() + t.v.sum(-1)

    with pytest.raises(TokenMixingError):
        nl.compile(Loop)(inputs(Loop).views, inputs(Loop).weights)


def split(x: Tensor, axis: int) -> Tensor:
    size = x.shape[axis]  # of 7 tokens, in chunks of 3, none is so long
    return x.unflatten(axis, (2, size // 2)) if isinstance(size, int) and size in (2, 4, 8, 16) and x.ndim < 5 else x


# Of rows and one of their axes.
MOVES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "split": split,
    "joined": lambda x, axis: x.flatten(axis, axis + 1) if axis + 1 < x.ndim else x,
    "turned": lambda x, axis: x.transpose(axis, -1),
    "as rows": lambda x, axis: x.reshape(-1, 8),
    "as groups": lambda x, axis: x.reshape(-1, 2, 4),
    "groups first": lambda x, axis: x.reshape(2, -1, 4),
    "summed up": lambda x, axis: 0.5 * x.cumsum(axis),
    "backwards": lambda x, axis: x.flip(axis),
    "centred": lambda x, axis: x - x.mean(axis, keepdim=True),
    "shares": lambda x, axis: x.softmax(axis),
    "bent": lambda x, axis: torch.tanh(x),
}


def moved(moves: list[tuple[str, int]], timed: Any) -> type[nl.Loop]:
    """A loop whose learner reads what such moves make of its rows."""

    class Moved(nl.Learner):
        w, p = nl.fast(8, 8), nl.slow(4, 4)

        def forward(self, x):
            for name, axis in moves:
                x = MOVES[name](x, axis % x.ndim)
            return (x.reshape(-1, 2, 4) @ self.p).reshape(-1, 8) @ self.w

    class Loop(grouped("of a view", "causal", nl.slow)):  # type: ignore[misc]
        learner, schedule = Moved, timed

    return Loop


def test_what_moves_tokens_is_the_reference_or_refused():
    drawn, admitted = random.Random(0), 0
    for _ in range(150):
        moves = [(drawn.choice(list(MOVES)), drawn.randrange(4)) for _ in range(drawn.randint(1, 4))]
        schedule = drawn.choice([nl.Causal(3), nl.Online(), nl.Shuffled(batches=2), nl.Chunked(3, "apply-update")])
        loop = moved(moves, schedule)
        given = inputs(loop)
        try:
            found = run(nl.compile(loop, backend="torch"), given)
        except (TokenMixingError, NoPlanError):  # or a body that moves tokens takes another way for one of them
            continue
        admitted += 1
        errors = differences(found, run(nl.compile(loop, backend="reference"), given))
        assert max(errors.values()) < 1e-9, (moves, schedule, errors)
    assert admitted > 40


RESHAPES: dict[str, tuple[list[str], list[Any], list[Any], list[str]]] = {
    "split": (["n", "d"], [n, 8], [n, 2, 4], ["n", "2", "4"]),
    "joined to tokens": (["n", "2", "4"], [n, 2, 4], [2 * n, 4], ["n*2", "4"]),
    "taken apart again": (["n*2", "4"], [2 * n, 4], [n, 2, 4], ["n", "2", "4"]),
    "moved to the other side": (["n*2", "4"], [2 * n, 4], [n, 8], ["n", "2*4"]),
    "moved to the tokens": (["n", "d"], [n, 8], [2 * n, 4], ["n*2", "4"]),
    "all as one": (["n", "2", "d"], [n, 2, 4], [8 * n], ["n*2*4"]),
    "one as all": (["n*2*4"], [8 * n], [n, 4, 2], ["n", "2*2", "2"]),
    "tokens within": (["2", "n", "4"], [2, n, 4], [2 * n, 4], ["2*n", "4"]),
    "which stay within": (["2*n", "4"], [2 * n, 4], [2, n, 4], ["2", "n", "4"]),
    "or are mixed": (["2*n", "4"], [2 * n, 4], [n, 2, 4], ["n.n", "n.2", "4"]),
    "a grid": (["n", "d"], [12, 5], [3, 4, 5], ["n.3", "n.4", "d"]),
    "a grid as tokens": (["n.3", "n.4", "d"], [3, 4, 5], [12, 5], ["n.3*n.4", "d"]),
    "of no common parts": (["n", "d"], [4, 6], [6, 4], ["n.6", "n.4"]),
    "of features": (["a", "b"], [4, 6], [6, 4], ["6", "4"]),
    "axes of one": (["n", "1", "d"], [n, 1, 3], [1, n, 3], ["1", "n", "d"]),
    "one token": (["n", "d"], [1, 8], [1, 2, 4], ["n", "2", "4"]),
    "no features": (["n", "d"], [n, 0], [0], ["n.0"]),
}


@pytest.mark.parametrize("name", RESHAPES)
def test_axes_keep_their_tokens_through_a_reshape(name):
    source, before, after, wanted = RESHAPES[name]
    assert list(regroup(tuple(source), before, after)) == wanted
