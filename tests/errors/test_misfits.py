"""Layers and what they are called with: devices, dtypes, states of others, the arguments of attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import nestloop as nl
from nestloop.errors import InputError, MissingPartError, StateError
from tests.errors.squares import Good, Squares, layer_of
from tests.refusals import refused

X = torch.randn(2, 5, 16)
PARTS = (Squares.loss, "loss", "torch")
NAME: Any = "TTTLinear"


class Keeping(Good):
    schedule = nl.Online()
    k = nl.view("d", make=[nl.conv(3)])  # KEPT


def moved(given: Any, move: Any) -> Any:
    if isinstance(given, dict):
        return {name: moved(part, move) for name, part in given.items()}
    return move(given) if isinstance(given, torch.Tensor) else given


def test_devices():
    layer, online = layer_of(*PARTS), nl.Layer(Keeping, 16, 2, backend="torch")
    part = nl.Layer(Keeping, 16, 2, backend="torch")
    part.out.to("meta")
    _, state = online(X, return_state=True)

    def inputs():
        layer(X.to("meta"))  # HERE

    def whole():
        nl.Layer(Good, 16, 2, device="meta")(X)  # HERE

    def one():
        part(X)  # HERE

    def kept():
        online(X, state=moved(state, lambda tensor: tensor.to("meta")))  # HERE

    what, need = "The layer's input is on another device than its parameters.", "one device for all"
    empty = "layer.to_empty(device='cpu'), then layer.reset_parameters() or layer.load_state_dict(...)"
    there = "pass x.to('cpu'), or move the layer: layer.to('meta')"
    refused(inputs, InputError, what, given="x on meta, they on cpu", need=need, fix=there)
    refused(whole, InputError, what, given="x on cpu, they on meta", need=need, fix=empty)
    refused(one, InputError, what, given="x on cpu, out.weight on meta", need=need, fix=empty)
    refused(
        kept,
        StateError,
        "The state is on another device than the layer's input.",
        given="a state on meta",
        need="cpu",
        fix="move its tensors to x.device; torch.load(path, map_location='cpu') does",
    )


def test_dtypes():
    layer = nl.Layer(Keeping, 16, 2, backend="torch")
    layer.out.double()

    def one():
        layer(X)  # HERE

    def eighth():
        layer_of(*PARTS)(X.to(torch.float8_e4m3fn))  # HERE

    def sparse():
        layer_of(*PARTS)(X.to_sparse())  # HERE

    refused(
        one,
        InputError,
        "The layer's input is not of the dtype of its parameters.",
        given="x of torch.float32, out of torch.float64",
        need="one dtype for x and all projections",
        fix="make the layer's one: layer.to(torch.float32)",
    )
    refused(
        eighth,
        InputError,
        "The layer's input is not of a floating type.",
        given="torch.float8_e4m3fn",
        need="float64, float32, bfloat16 or float16",
        fix="pass x.float()",
    )
    what, given = "The layer's input is not dense.", "torch.sparse_coo"
    refused(sparse, InputError, what, given=given, need="torch.strided", fix="pass x.to_dense()")


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, "bf16"], ids=str)
def test_a_layer_of_a_dtype_that_is_not_floating(dtype):
    def step():
        nl.Layer(Good, 16, 2, dtype=dtype)  # HERE

    refused(
        step,
        InputError,
        "The dtype of a layer is not a floating type.",
        given=f"dtype={dtype!r}",
        need="torch.float64, torch.float32, torch.bfloat16 or torch.float16",
        fix="write nl.Layer(..., dtype=torch.bfloat16)",
    )


def test_a_layer_of_a_name():
    def step():
        nl.Layer(NAME, 16, 2)  # HERE

    refused(
        step,
        MissingPartError,
        "Only a declared loop can be compiled.",
        given="'TTTLinear'",
        need="a subclass of nl.Loop with a learner (the class, not an instance)",
        fix="write class MTTT(nl.Loop): learner = MLP; ..., then nl.compile(MTTT) or nl.Layer(MTTT, ...)",
    )


def test_calls_of_attention():
    layer = layer_of(*PARTS)

    def keys():
        layer(X, X, X)  # HERE

    def padding():
        layer(X, key_padding_mask=torch.zeros(2, 5))  # HERE

    def weights():
        layer(X, need_weights=False)  # HERE

    refused(
        keys,
        InputError,
        "A layer takes its input once: keys and values are views of it.",
        given="torch.float32 [2, 5, 16] beside x",
        need="x [B, N, D]",
        fix="write layer(x)",
    )
    for step, name, given, fix in (
        (padding, "key_padding_mask", "Tensor [2, 5]", "leave padding out: pack the sequences, with cu_seqlens"),
        (weights, "need_weights", "False", "leave it out"),
    ):
        what = f"A nested loop takes no {name}, which attention does."
        refused(step, InputError, what, given=f"{name}={given}", need="x [B, N, D]", fix=fix)


@pytest.mark.parametrize("position", [-1, "5", 5.0, torch.tensor(5)], ids=str)
def test_a_state_at_no_position(position):
    layer = nl.Layer(Keeping, 16, 2, backend="torch")
    _, state = layer(X, return_state=True)
    with pytest.raises(StateError) as caught:
        layer(X, state={**state, "position": position})
    assert caught.value.what == "The position in the state of Keeping is not a number of tokens."


@pytest.mark.parametrize("part", ["loop", "made"])
def test_a_state_without_a_part(part):
    layer = nl.Layer(Keeping, 16, 2, backend="torch")
    _, state = layer(X, return_state=True)
    with pytest.raises(StateError) as caught:
        layer(X, state={**state, part: None})
    assert caught.value.what == "The state is not one of this layer."


class Beside(Keeping):
    beside = Keeping


class Longer(Keeping):
    k = nl.view("d", make=[nl.conv(4)])


class Unkept(Keeping):
    k = nl.view("d")


SAME = "pass what this layer, or one of the same declaration, returned with return_state=True"


@pytest.mark.parametrize(
    "one, other, what, given, need",
    [
        (Unkept, Keeping, "whose maps keep other rows than those of Keeping.", "nothing of maps", "k.conv"),
        (Keeping, Unkept, "whose maps keep other rows than those of Unkept.", "k.conv", "nothing of maps"),
        (Keeping, Longer, "", "k.conv [2, 2, 16]", "[sequences, 3, 16]"),
        (Longer, Keeping, "", "k.conv [2, 3, 16]", "[sequences, 2, 16]"),
    ],
)
def test_a_state_of_another_layer(one, other, what, given, need):
    _, state = nl.Layer(one, 16, 2, backend="torch")(X, return_state=True)
    with pytest.raises(StateError) as caught:
        nl.Layer(other, 16, 2, backend="torch")(X, state=state)
    error = caught.value
    rows = "The state is of another layer: its convolution's rows do not fit."
    assert error.what == (f"The state is of a layer {what}" if what else rows)
    assert (error.given, error.need, error.fix) == (given, need, SAME)


def test_a_state_without_that_of_the_loop_beside():
    x = X.double()  # what an online loop of unbounded keys learns may grow by any factor, and its rounding with it
    _, state = nl.Layer(Keeping, 16, 2, backend="torch").double()(x, return_state=True)
    layer = nl.Layer(Beside, 16, 2, backend="torch").double()
    with pytest.raises(StateError, match="not one of this layer"):
        layer(x, state=state)
    first, state = layer(x[:, :2], return_state=True)
    rest = layer(x[:, 2:], state=state)
    torch.testing.assert_close(torch.cat([first, rest], 1), layer(x), rtol=1e-10, atol=1e-10)


def test_a_state_of_other_sequences():
    layer = nl.Layer(Keeping, 16, 2, backend="torch")
    _, state = layer(X, return_state=True)

    def step():
        layer(X[:1], state=state)  # HERE

    refused(
        step,
        StateError,
        "The state is of other sequences than the layer's input.",
        given="a state of 2 sequences, 1 in x",
        need="as many",
        fix="pass x with the sequences that the state is of, or none for new ones",
    )


def test_other_failures_stay_what_they_are():
    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError("the device has no dtype")

    layer = nl.Layer(Keeping, 16, 2, backend="torch")
    layer.out = Failing()
    with pytest.raises(RuntimeError, match="the device has no dtype") as caught:
        layer(X)
    assert type(caught.value) is RuntimeError
