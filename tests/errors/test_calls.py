"""Tensors, orders and sizes that do not fit a call."""

import pytest
import torch

import nestloop as nl
from nestloop.errors import (
    InputError,
    OrderError,
    UnresolvedDimError,
)
from nestloop.lang import binding
from tests.errors.squares import Good, Linear, Ordered, Squares, inputs, layer_of
from tests.refusals import refused


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_tensors_that_do_not_fit(backend):
    op = nl.compile(Good, backend=backend)
    views, weights = inputs()
    loop, q, w = (f"  at:    {d.where}   {d.where.text}" for d in (Good.spec, Good.spec.views["q"], Linear.fast["w"]))

    def message(error, *arguments, **keywords):
        with pytest.raises(error) as caught:
            op(*arguments, **keywords)
        assert type(caught.value) is error
        return str(caught.value).splitlines()

    assert message(InputError, {**views, "z": 1}, weights) == [
        "The names of the views given to Good are not the declared ones.",
        loop,
        "  given: k, q, v, z",
        "  need:  k, q, v",
        "  fix:   remove z",
    ]
    assert message(InputError, views, {}) == [
        "The names of the weights given to Good are not the declared ones.",
        loop,
        "  given: none",
        "  need:  w",
        "  fix:   add w",
    ]
    assert message(InputError, list(views), weights) == [
        "The views of Good are passed by name.",
        loop,
        "  given: a list",
        "  need:  a dict with the keys k, q, v",
        "  fix:   pass {'k': ..., 'q': ..., 'v': ...}",
    ]
    assert message(InputError, {**views, "q": torch.randn(1, 2, 4)}, weights) == [
        "The view 'q' has the wrong shape.",
        q,
        "  given: [1, 2, 4]",
        "  need:  [B, H, N, d], 4 axes",
        "  fix:   pass q with the axes B, H, N, d",
    ]
    assert message(InputError, {**views, "q": torch.randn(1, 2, 5, 4)}, weights) == [
        "The view 'q' has the wrong shape; axis 2 is N = 3, given 5.",
        q,
        "  given: [1, 2, 5, 4]",
        "  need:  [B, H, N, d] = [1, 2, 3, 4]",
        "  fix:   pass q with the axes B, H, N, d",
    ]
    assert message(InputError, views, {"w": torch.randn(3, 5, 4)}) == [
        "The fast weight 'w' has the wrong shape; axis 0 is H = 2, given 3, axis 1 is d = 4, given 5.",
        w,
        "  given: [3, 5, 4]",
        "  need:  [H, d, d] = [2, 4, 4]",
        "  fix:   pass w with the axes H, d, d",
    ]
    assert message(InputError, views, weights, state={"w": torch.randn(7, 2, 4, 4)}) == [
        "The state's 'w' has the wrong shape; axis 0 is B = 1, given 7.",
        w,
        "  given: [7, 2, 4, 4]",
        "  need:  [B, H, d, d] = [1, 2, 4, 4]",
        "  fix:   pass w with the axes B, H, d, d",
    ]
    assert message(InputError, {**views, "q": views["q"].long()}, weights) == [
        "The view 'q' is not a tensor of a floating type.",
        q,
        "  given: torch.int64 [1, 2, 3, 4]",
        "  need:  a tensor of float64, float32, bfloat16 or float16",
        "  fix:   pass q.float()",
    ]
    assert message(InputError, {**views, "q": None}, weights)[2::2] == ["  given: None", "  fix:   pass a tensor"]
    assert message(InputError, {**views, "q": views["q"].to("meta")}, weights) == [
        "The view 'q' is on another device than the first view.",
        q,
        "  given: meta",
        "  need:  cpu",
        "  fix:   pass q.to('cpu')",
    ]
    assert message(InputError, views, weights, e=3) == [
        "Good has no dim 'e' whose size could be given.",
        loop,
        "  given: e=3",
        "  need:  one of D, d",
        "  fix:   remove it, or declare e = nl.dim() in the loop",
    ]
    assert message(InputError, views, weights, d=-1) == [
        "The size of the dim 'd' of Good is not a positive whole number.",
        loop,
        "  given: d=-1",
        "  need:  1 or more",
        "  fix:   write d=16",
    ]
    assert message(OrderError, views, weights, order=torch.arange(3)) == [
        "Good does not take an order: its schedule sees all tokens in every step.",
        loop,
        "  given: Tensor [3]",
        "  need:  no order",
        "  fix:   leave order out, or declare schedule = nl.Shuffled(4)",
    ]


def test_views_without_heads():
    where = Good.spec.where
    with pytest.raises(InputError) as caught:
        nl.compile(Good)({name: torch.zeros(1, 0, 3, 4) for name in "kqv"}, {"w": torch.zeros(0, 4, 4)})
    assert str(caught.value).splitlines() == [
        "The views of Good have no heads.",
        f"  at:    {where}   {where.text}",
        "  given: H = 0",
        "  need:  1 head or more",
        "  fix:   pass views [B, H, N, *]; a batch or a sequence may be empty",
    ]


def test_views_with_tokens_before_heads():
    op, where = nl.compile(Good), Good.spec.where
    views, weights = inputs()
    with pytest.raises(InputError) as caught:
        op({name: view.transpose(1, 2) for name, view in views.items()}, weights)
    assert str(caught.value).splitlines() == [
        "The views of Good have tokens before heads.",
        f"  at:    {where}   {where.text}",
        "  given: k [1, 3, 2, 4], q [1, 3, 2, 4], v [1, 3, 2, 4]",
        "  need:  [B, H, N, *]: sequences, heads, tokens",
        "  fix:   pass k.transpose(1, 2), q.transpose(1, 2), v.transpose(1, 2)",
    ]
    one = {**views, "q": views["q"].transpose(1, 2)}
    with pytest.raises(InputError, match="The view 'q' has the wrong shape; axis 1 is H = 2, given 3"):
        op(one, weights)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    "order, given",
    [
        (None, "no order"),
        (torch.zeros(2, 3, dtype=torch.int32), "torch.int32 [2, 3]"),
        (torch.zeros(2, 4, dtype=torch.int64), "torch.int64 [2, 4]"),
        ([[2, 0, 1], [0, 1, 2]], "[[2, 0, 1], [0, 1, 2]]"),
    ],
)
def test_orders_that_do_not_fit(backend, order, given):
    where = Ordered.spec.where
    with pytest.raises(OrderError) as caught:
        views, weights = inputs()
        nl.compile(Ordered, backend=backend)(views, weights, order=order)
    assert str(caught.value).splitlines() == [
        "Ordered is Shuffled and needs the order of its tokens.",
        f"  at:    {where}   {where.text}",
        f"  given: {given}",
        "  need:  int64 [H, N] = [2, 3], or [B, H, N]: each row a permutation of the tokens",
        "  fix:   order = torch.rand(H, N).argsort(-1)",
    ]


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
@pytest.mark.parametrize("second", [[1, 2, 3], [0, 1, -1], [2, 0, 2]])
def test_orders_that_are_no_permutations(backend, second):
    where = Ordered.spec.where
    with pytest.raises(OrderError) as caught:
        views, weights = inputs()
        nl.compile(Ordered, backend=backend)(views, weights, order=torch.tensor([[2, 0, 1], second]))
    assert str(caught.value).splitlines() == [
        "An order of Ordered is no permutation of its tokens.",
        f"  at:    {where}   {where.text}",
        f"  given: {second}",
        "  need:  each of 0 to 2 once",
        "  fix:   order = torch.rand(H, N).argsort(-1)",
    ]


@pytest.mark.parametrize("place", [3, -1, 10**9])
def test_cpp_reads_no_place_that_is_not_there(place, monkeypatch):
    monkeypatch.setattr(binding, "check_permutations", lambda *given: None)  # as in a compiled graph
    with pytest.raises(OrderError) as caught:
        views, weights = inputs()
        nl.compile(Ordered, backend="cpp")(views, weights, order=torch.tensor([[2, 0, 1], [0, 1, place]]))
    low, high = min(place, 0), max(place, 2)
    assert str(caught.value).splitlines() == [
        "An order is no permutation of the tokens.",
        f"  given: places from {low} to {high}",
        "  need:  each of 0 to 2 once",
        "  fix:   order = torch.rand(H, N).argsort(-1)",
    ]


def test_a_dim_without_a_size():
    def step():
        wide = nl.view("e")  # HERE
        layer_of(lambda self, f, t: f(t.k).sum(-1) + t.wide.sum(-1), wide=wide, e=nl.dim())

    refused(
        step,
        UnresolvedDimError,
        "The dim 'e' has no size.",
        given="'e' with sizes for D, H, d",
        need="a size for e",
        fix="pass e=... where the loop is compiled or the layer is made",
    )


def test_tokens_that_are_no_grid():
    def step():
        class Rows(nl.Learner):
            h, w = nl.grid()  # HERE
            m = nl.fast("d", "d")

            def forward(self, x):
                return x.reshape(self.h, self.w, self.d).cumsum(0).reshape(-1, self.d) @ self.m

        layer = layer_of(Squares.loss, learner=Rows)
        assert layer(torch.randn(1, 9, 16)).shape == layer(torch.randn(1, 9, 16), h=1).shape
        layer(torch.randn(1, 10, 16), h=3)

    refused(
        step,
        UnresolvedDimError,
        "The 10 tokens of Loop are not a grid of h = 3 by w = 3.",
        given="N = 10",
        need="h * w = N; without sizes a square",
        fix="pass h=..., w=... with the call",
    )
