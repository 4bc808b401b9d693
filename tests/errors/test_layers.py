"""Layers that do not fit, and what they are called with."""

import numpy as np
import pytest
import torch

import nestloop as nl
from nestloop.errors import (
    InputError,
)
from tests.errors.squares import Good, Squares, layer_of
from tests.refusals import refused


def test_masks_of_attention():
    layer, x = layer_of(Squares.loss), torch.randn(2, 5, 16)
    causal = layer_of(Squares.loss, schedule=nl.Causal(4))
    torch.testing.assert_close(layer(x, attn_mask=None, is_causal=False), layer(x), rtol=0, atol=0)
    torch.testing.assert_close(causal(x, attn_mask=None, is_causal=True), causal(x), rtol=0, atol=0)

    def masked():
        causal(x, attn_mask=torch.ones(5, 5))  # HERE

    def ordered():
        layer(x, is_causal=True)  # HERE

    refused(
        masked,
        InputError,
        "A nested loop takes no mask of attention.",
        given="attn_mask=Tensor [5, 5]",
        need="None",
        fix="leave it out: what a token sees, the loop's schedule says",
    )
    refused(
        ordered,
        InputError,
        "Loop is not causal: its tokens see later ones.",
        given="is_causal=True, schedule FullBatch",
        need="a loop whose tokens see those before them alone",
        fix="declare schedule = nl.Causal(16) in the loop",
    )


def test_layers_that_do_not_fit():
    layer = nl.Layer(Good, 16, 2)

    def indivisible():
        nl.Layer(Good, 16, 3)  # HERE

    def headless():
        nl.Layer(Good, 16, 0)  # HERE

    def unknown():
        nl.Layer(Good, 16, 2, e=3)  # HERE

    def ragged():
        parts = [torch.ones(3, 16), torch.ones(5, 16)]
        nl.Layer(Good, 16, 2)(torch.nested.nested_tensor(parts, layout=torch.jagged))  # HERE

    def flat():
        layer(torch.randn(3, 16))  # HERE

    def whole():
        layer(torch.ones(1, 3, 16, dtype=torch.int64))  # HERE

    def wider():
        nl.Layer(Good, 16, 2, D=7)  # HERE

    def again():
        layer(torch.randn(1, 3, 16), D=16)  # HERE

    def many():
        nl.Layer(Good, 16, 2, H=2)  # HERE

    def called():
        layer(torch.randn(1, 3, 16), h=3)  # HERE

    def array():
        layer(np.zeros((1, 3, 16)))  # HERE

    def nothing():
        layer(None)  # HERE

    def wide():
        layer(torch.zeros(1, 3, 16, dtype=torch.float64))  # HERE

    refused(
        indivisible,
        InputError,
        "The width does not divide into heads.",
        given="width=16, heads=3",
        need="a width that is a multiple of heads, or the size of d",
        fix="write nl.Layer(..., width=15, heads=3), or pass d=...",
    )
    refused(
        headless,
        InputError,
        "The heads of a layer is not a positive whole number.",
        given="heads=0",
        need="1 or more",
        fix="write nl.Layer(..., width=384, heads=6)",
    )
    of_the_layer = ((wider, "D=7", "D", "width"), (again, "D=16", "D", "width"), (many, "H=2", "H", "heads"))
    for step, given, name, own in of_the_layer:
        refused(
            step,
            InputError,
            f"The size of the dim '{name}' is the layer's own.",
            given=given,
            need=f"the {own} that the layer is made with",
            fix=f"leave {name} out",
        )
    for step, given, name in ((unknown, "e=3", "e"), (called, "h=3", "h")):
        refused(
            step,
            InputError,
            f"No loop of the layer has a dim '{name}'.",
            given=given,
            need="one of d",
            fix=f"remove it, or declare {name} = nl.dim() in a loop",
        )
    refused(
        ragged,
        InputError,
        "The layer's input is a nested tensor.",
        given="torch.jagged, 3 axes",
        need="[sequences, tokens, 16], all sequences of one length",
        fix="pass x.values()[None] with cu_seqlens=x.offsets()",
    )
    refused(
        flat,
        InputError,
        "The layer's input is not [B, N, D].",
        given="[3, 16]",
        need="[sequences, tokens, 16]",
        fix="pass x with three axes, the last one the layer's width",
    )
    refused(
        whole,
        InputError,
        "The layer's input is not of a floating type.",
        given="torch.int64",
        need="float64, float32, bfloat16 or float16",
        fix="pass x.float()",
    )
    for step, given, fix in (
        (array, "ndarray [1, 3, 16]", "pass torch.as_tensor(x)"),
        (nothing, "None", "pass a tensor"),
    ):
        need = "a tensor [sequences, tokens, 16]"
        refused(step, InputError, "The layer's input is not a tensor.", given=given, need=need, fix=fix)
    refused(
        wide,
        InputError,
        "The layer's input is not of the dtype of its parameters.",
        given="torch.float64",
        need="torch.float32",
        fix="pass x.to(torch.float32), or make the layer with dtype=torch.float64",
    )


@pytest.mark.parametrize("heads, fitting", [(2, 3), (4, 3), (8, 6)])
def test_views_of_groups_take_a_multiple_of_heads(heads, fitting):
    def step():
        class Memory(nl.Learner):
            w = nl.fast("d", "d")

            def forward(self, x):
                return x @ self.w

        class Loop(nl.Loop):
            learner = Memory
            k, v = nl.view("d", group=3), nl.view("d")  # HERE

            def loss(self, f, t):
                return (f(t.k) - t.v).square().sum(-1)

            def readout(self, f, t):
                return f(t.k)

        nl.Layer(Loop, 16, heads)

    refused(
        step,
        InputError,
        "The heads of the view 'k' do not group.",
        given=f"H = {heads}, group = 3",
        need="a number of heads that is a multiple of 3",
        fix=f"write nl.Layer(..., heads={fitting})",
    )
