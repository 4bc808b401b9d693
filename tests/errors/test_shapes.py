"""Axes that do not fit within a body."""

import pytest
import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop.errors import (
    ShapeMismatchError,
)
from tests.errors.squares import Squares, layer_of, steps_into
from tests.refusals import refused

MISMATCH = "In the {} of Loop, {} got axes that do not fit."
FIT = "axes of equal sizes; PyTorch says: "
FIT_FIX = "make the axes agree: transpose one side, or declare the weight with the other dims"


def mismatch(body, op, given, says, part="loss", one_size="", **declared):
    def run():
        layer_of(body, part, **declared)

    with pytest.raises(ShapeMismatchError) as caught:
        run()
    lines = str(caught.value).splitlines()
    assert lines[0] == MISMATCH.format(part, op)
    assert lines[1].startswith(f"  at:    {__file__}:") and lines[1].endswith("# HERE")
    assert lines[2:] == [f"  given: {given}", f"  need:  {FIT}{says}", f"  fix:   {FIT_FIX}{one_size}"]


def test_shapes_are_named_by_dims_even_where_sizes_are_equal():
    def loss(self, f, t):
        return (f(t.k) @ self.g).sum(-1)  # HERE

    mismatch(
        loss,
        "matmul",
        "f(t.k) is [n, d], self.g is [e, D]; d = 8 meets e = 24",
        "a and b must have same reduction dim, but got [n, 8] X [24, 16].",
        one_size="; or give d and e one size",
        e=nl.dim(24),
        g=nl.slow("e", "D"),
    )
    mismatch(  # D and r are both 16
        loss,
        "matmul",
        "f(t.k) is [n, d], self.g is [r, D]; d = 8 meets r = 16",
        "a and b must have same reduction dim, but got [n, 8] X [16, 16].",
        one_size="; or give d and r one size",
        r=nl.dim(16),
        g=nl.slow("r", "D"),
    )


@pytest.mark.parametrize("norm", [F.layer_norm, F.rms_norm])
@pytest.mark.parametrize("shape", [(3,), (1,), (3, 8), (2, 3, 8)])
def test_a_norm_of_another_shape(norm, shape):
    def loss(self, f, t):
        return norm(f(t.k), shape).sum(-1)  # HERE

    listed = ", ".join(map(str, shape))
    says = f"Given normalized_shape=[{listed}], expected input with shape [*, {listed}]"
    mismatch(loss, norm.__name__, "f(t.k) is [n, d]", says)


def test_functions_that_are_written_otherwise():
    def loss(self, f, t):
        return F.cosine_similarity(f(t.k), t.v[:, :3], -1)  # HERE

    says = "The size of tensor a (8) must match the size of tensor b (3) at non-singleton dimension 1"
    mismatch(loss, "cosine_similarity", "f(t.k) is [n, d], t.v[:, :3] is [n, 3]; d = 8 meets 3", says)


def test_shapes_of_expressions_slices_and_tokens():
    def compound(self, f, t):
        return (f(t.k) - self.g).sum(-1)  # HERE

    def sliced(self, f, t):
        return (f(t.k) - t.v[:, :3]).square().sum(-1)  # HERE

    def tokens(self, f, t):
        return torch.matmul(f(t.k), t.v).sum(-1)  # HERE

    def joined(self, f, t):
        return F.linear(f(t.k), torch.cat([self.g, self.g], 1)).sum(-1)  # HERE

    broadcast = "The size of tensor a (8) must match the size of tensor b ({}) at non-singleton dimension 1)"
    mismatch(
        compound,
        "sub",
        "f(t.k) is [n, d], self.g is [4 * d]; d = 8 meets 4 * d = 32",
        broadcast.format(32),
        g=nl.slow("4*d"),
    )
    mismatch(sliced, "sub", "f(t.k) is [n, d], t.v[:, :3] is [n, 3]; d = 8 meets 3", broadcast.format(3))
    mismatch(
        tokens,
        "matmul",
        "f(t.k) is [n, d], t.v is [n, d]; d = 8 meets n",
        "a and b must have same reduction dim, but got [n, 8] X [n, 8].",
    )
    mismatch(
        joined,
        "linear",
        "f(t.k) is [n, d], torch.cat([self.g, self.g], 1) is [D, 2*d]; d = 8 meets 2*d = 16",
        "a and b must have same reduction dim, but got [n, 8] X [16, 16].",
        g=nl.slow("D", "d"),
    )


def test_shapes_of_functions_with_many_operands():
    def cat(self, f, t):
        return torch.cat([f(t.k), self.g], 0).sum(-1)  # HERE

    def einsum(self, f, t):
        return torch.einsum("nd,ed->ne", f(t.k), self.g).sum(-1)  # HERE

    def norm(self, f, t):
        return F.layer_norm(f(t.k), (self.d,), self.g[0]).sum(-1)  # HERE

    def reshape(self, f, t):
        return f(t.k).reshape(-1, 7).sum(-1)  # HERE

    g = {"g": nl.slow("d", "4*d")}
    both = "f(t.k) is [n, d], self.g is [d, 4 * d]; d = 8 meets 4 * d = 32"
    mismatch(
        cat,
        "cat",
        both,
        "Sizes of tensors must match except in dimension 0. "
        "Expected 8 in dimension 1 but got 32 for tensor number 1 in the list",
        **g,
    )
    mismatch(
        einsum,
        "einsum",
        both,
        "einsum(): subscript d has size 32 for operand 1 which does not broadcast with previously seen size 8",
        **g,
    )
    mismatch(
        norm,
        "layer_norm",
        "f(t.k) is [n, d], self.g[0] is [4 * d]; d = 8 meets 4 * d = 32",
        "The size of tensor a (8) must match the size of tensor b (32) at non-singleton dimension 1)",
        **g,
    )
    mismatch(reshape, "reshape", "f(t.k) is [n, d]", "shape '[-1, 7]' is invalid for input of size 8*n")


def test_shapes_in_a_readout_a_learner_and_a_kernel():
    def readout(self, f, t):
        return f(t.q) + self.g  # HERE

    class Tall(nl.Learner):
        w = nl.fast("4*d", "d")

        def forward(self, x):
            return x @ self.w  # HERE

    def kernel(self, q, k):
        return torch.exp(q @ k)  # HERE

    mismatch(
        readout,
        "add",
        "f(t.q) is [n, d], self.g is [2 * d]; d = 8 meets 2 * d = 16",
        "The size of tensor a (8) must match the size of tensor b (16) at non-singleton dimension 1)",
        part="readout",
        g=nl.slow("2*d"),
    )
    mismatch(
        Squares.loss,
        "matmul",
        "x is [n, d], self.w is [4 * d, d]; d = 8 meets 4 * d = 32",
        "a and b must have same reduction dim, but got [n, 8] X [32, 8].",
        learner=Tall,
    )
    mismatch(
        kernel,
        "matmul",
        "q is [n, d], k is [n, d]; d = 8 meets n",
        "a and b must have same reduction dim, but got [n, 8] X [n, 8].",
        part="kernel",
        learner=nl.KernelEstimator,
    )


def axis_that_is_not_there(self, f, t):
    return (f(t.k) - t.v).square().sum(2)  # HERE


def subscripts_of_sequences_and_heads(self, f, t):
    return torch.einsum("bhnd,hde->bhne", t.k, f.w).sum(-1)  # HERE


@pytest.mark.parametrize(
    "loss, op, given, says, fix",
    [
        (
            axis_that_is_not_there,
            "sum",
            "(f(t.k) - t.v).square() is [n, d]",
            "Dimension out of range (expected to be in range of [-2, 1], but got 2)",
            "count axes from the last: .sum(-1), .transpose(-1, -2)",
        ),
        (
            subscripts_of_sequences_and_heads,
            "einsum",
            "t.k is [n, d], f.w is [d, d]",
            "einsum(): the number of subscripts in the equation (4) does not match the number of dimensions (2) for "
            "operand 0 and no ellipsis was given",
            'leave b and h out: torch.einsum("nd,de->ne", x, self.w)',
        ),
    ],
)
def test_axes_that_a_body_does_not_see(loss, op, given, says, fix):
    need = "axes of one head and sequence: a view is [n, *]; nestloop adds sequences and heads. PyTorch says: "
    refused(
        steps_into(loss),
        ShapeMismatchError,
        f"In the loss of Loop, {op} names axes that its tensor does not have.",
        given=given,
        need=need + says,
        fix=fix,
    )


def test_a_body_whose_sizes_fit_at_these_sizes_alone_is_legal():
    def loss(self, f, t):
        return (f(t.k) @ self.g - t.v.repeat(1, 2)).square().sum(-1)

    layer = layer_of(loss, e=nl.dim(8), g=nl.slow("e", "D"))
    assert layer(torch.randn(1, 3, 16)).shape == (1, 3, 16)


def test_sizes_that_only_these_numbers_spell_are_named_by_them():
    def loss(self, f, t):
        return (f(t.k).reshape(-1, 2, 4).flatten(1) @ self.g).sum(-1)

    with pytest.raises(ShapeMismatchError, match=r"\[n, d\], self.g is \[r, e\]; d = 8 meets r = 12"):
        layer_of(loss, r=nl.dim(12), e=nl.dim(24), g=nl.slow("r", "e"))
