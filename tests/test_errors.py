"""Bodies that cannot be compiled, parts that are missing, calls that do not fit: every message, whole."""

import copy
import functools
import inspect
import math
import pickle
import random
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop import errors
from nestloop.errors import (
    CapturedTensorError,
    CompileError,
    DataDependentError,
    DimExpressionError,
    InPlaceError,
    InputError,
    KernelShapeError,
    LossNotPerTokenError,
    MissingPartError,
    NothingReturnedError,
    OrderError,
    ReadoutShapeError,
    ShapeMismatchError,
    SideEffectError,
    SignatureError,
    TokenMixingError,
    TransformError,
    UnadmittedOpError,
    UnknownBackendError,
    UnknownNameError,
    UnresolvedDimError,
    UnusedFastWeightError,
)
from nestloop.lang import binding
from nestloop.lowering import watched
from tests.refusals import marked, refused

OUTER = torch.ones(8)
LOG: list[object] = []
COUNT = 0


class Linear(nl.Learner):
    w = nl.fast("d", "d")

    def forward(self, x):
        return x @ self.w


class Squares(nl.Loop):
    """A loop to change one part of; declared without a learner, it is not yet checked."""

    k, q, v = nl.view("d"), nl.view("d"), nl.view("d")

    def loss(self, f, t):
        return (f(t.k) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)


class Good(Squares):
    learner = Linear


class Ordered(Good):
    schedule = nl.Shuffled(2)


def layer_of(body, part="loss", backend="auto", **declared):
    """A layer of the loop with one body (or another part) changed."""
    return nl.Layer(type("Loop", (Squares,), {"learner": Linear, part: body, **declared}), 16, 2, backend=backend)


MISMATCH = "In the {} of Loop, {} got axes that do not fit."
FIT = "axes of equal sizes; PyTorch says: "
FIT_FIX = "make the axes agree: transpose one side, or declare the weight with the other dims"


def mismatch(body, op, given, says, part="loss", **declared):
    def run():
        layer_of(body, part, **declared)

    with pytest.raises(ShapeMismatchError) as caught:
        run()
    lines = str(caught.value).splitlines()
    assert lines[0] == MISMATCH.format(part, op)
    assert lines[1].startswith(f"  at:    {__file__}:") and lines[1].endswith("# HERE")
    assert lines[2:] == [f"  given: {given}", f"  need:  {FIT}{says}", f"  fix:   {FIT_FIX}"]


def test_shapes_are_named_by_dims_even_where_sizes_are_equal():
    def loss(self, f, t):
        return (f(t.k) @ self.g).sum(-1)  # HERE

    mismatch(
        loss,
        "matmul",
        "f(t.k) is [n, d], self.g is [e, D]; d = 8 meets e = 24",
        "a and b must have same reduction dim, but got [n, 8] X [24, 16].",
        e=nl.dim(24),
        g=nl.slow("e", "D"),
    )
    mismatch(  # D and r are both 16
        loss,
        "matmul",
        "f(t.k) is [n, d], self.g is [r, D]; d = 8 meets r = 16",
        "a and b must have same reduction dim, but got [n, 8] X [16, 16].",
        r=nl.dim(16),
        g=nl.slow("r", "D"),
    )


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


def test_a_fast_weight_is_used_by_the_loss():
    def step():
        class Biased(Linear):
            b = nl.fast("d")  # HERE

        layer_of(Squares.loss, learner=Biased)

    refused(
        step,
        UnusedFastWeightError,
        "The loss of Loop does not depend on the fast weight 'b'.",
        given="Biased.b, which no path from the loss reaches",
        need="a loss that every fast weight enters: the inner loop would never change it",
        fix="use self.b in forward, or declare it as nl.slow(...)",
    )


def detached(self, f, t):
    return (f(t.k).detach() - t.v).square().sum(-1)  # HERE


def largest(self, f, t):
    return (f(t.k).argmax(-1) * t.v.sum(-1)).square()  # HERE


def compared(self, f, t):
    return ((f(t.k) > 0) * t.v).sum(-1)  # HERE


def signs(self, f, t):
    return (f(t.k).sign() - t.v).square().sum(-1)  # HERE


def rounded(self, f, t):
    return (f(t.k).round() - t.v).square().sum(-1)  # HERE


@pytest.mark.parametrize("schedule", [nl.FullBatch(1), nl.Online(), nl.Chunked(4)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    "loss, through",
    [
        (detached, "detach"),
        (largest, "argmax"),
        (compared, "gt"),
        (signs, "sign"),
        (rounded, "round"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fast_weight_is_moved_by_the_loss(loss, through, schedule):
    def step():
        layer_of(loss, schedule=schedule)

    with pytest.raises(UnusedFastWeightError) as caught:
        step()
    assert str(caught.value).splitlines() == [
        "The loss of Loop has no gradient in the fast weight 'w'.",
        f"  at:    {__file__}:{marked(loss)}   {inspect.getsource(loss).splitlines()[-1].strip()}",
        f"  given: Linear.w, whose way to the loss ends at {through}: its derivative is zero",
        "  need:  a loss that every fast weight moves: the inner loop would never change it",
        f"  fix:   leave {through} out on one way from self.w to the loss, or declare w as nl.slow(...)",
    ]


def held_alone(self, f, t):
    return (f.held(t.k) - t.v).square().sum(-1)


def held_beside(self, f, t):
    return (f.held(t.k) * f(t.k) - t.v).square().sum(-1)


def detached_beside(self, f, t):
    return (f(t.k).detach() * f(t.k) - t.v).square().sum(-1)


def chosen(self, f, t):
    y = f(t.k)
    return (torch.where(y > 0, y, y.floor()) - t.v).square().sum(-1)


def sorted_values(self, f, t):
    return (f(t.k).topk(2).values.sum(-1) - t.v.sum(-1)).square()


def test_a_loss_learns_where_one_way_has_a_derivative():
    with pytest.raises(UnusedFastWeightError, match="does not depend on the fast weight 'w'"):
        layer_of(held_alone)

    class Zero(nl.Learner):
        a, b = nl.fast("d", "d", init="zeros", learned=False), nl.fast("d", "d", init="zeros", learned=False)

        def forward(self, x):
            return (x @ self.a) * (x @ self.b)  # at its first step neither moves the other

    for loss in (held_beside, detached_beside, chosen, sorted_values):
        layer_of(loss)
    for schedule in (nl.FullBatch(1), nl.Online()):
        layer_of(Squares.loss, learner=Zero, schedule=schedule)


def add_in_place(self, f, t):
    y = f(t.k)
    y += t.v  # HERE
    return y.sum(-1)


def assign(self, f, t):
    y = f(t.k)
    y[:, 0] = 0  # HERE
    return y.sum(-1)


def assign_to_a_view(self, f, t):
    t.k[0] = 1  # HERE
    return f(t.k).sum(-1)


def method(self, f, t):
    return f(t.k).add_(1).sum(-1)  # HERE


def function(self, f, t):
    return torch.relu_(f(t.k)).sum(-1)  # HERE


def flag(self, f, t):
    return F.relu(f(t.k), inplace=True).sum(-1)  # HERE


def out(self, f, t):
    y = f(t.k)
    torch.mul(y, 2, out=y)  # HERE
    return y.sum(-1)


@pytest.mark.parametrize(
    "loss, name",
    [
        (add_in_place, "add_"),
        (assign, "__setitem__"),
        (assign_to_a_view, "__setitem__"),
        (method, "add_"),
        (function, "relu_"),
        (flag, "relu"),
        (out, "mul"),
    ],
)
def test_bodies_do_not_write_into_tensors(loss, name):
    refused(
        steps_into(loss),
        InPlaceError,
        "A body of Loop writes into a tensor.",
        given=f"{name} on [n, 8]",
        need="values that are computed, not overwritten: the graph has no memory",
        fix="write y = x + z instead of x += z, torch.where or torch.cat instead of an assignment to x[...]",
    )


def steps_into(loss, **declared):
    """A step that makes a layer with this loss, whose source is the loss's own."""

    def step():
        layer_of(loss, **declared)

    step.__wrapped__ = loss  # type: ignore[attr-defined]
    return step


def branch(self, f, t):
    y = f(t.k)
    if y.sum() > 0:  # HERE
        y = -y
    return y.sum(-1)


def item(self, f, t):
    return f(t.k).sum(-1) * t.k.sum().item()  # HERE


def integer(self, f, t):
    return f(t.k).sum(-1) * int(t.k.sum())  # HERE


def numbers(self, f, t):
    return f(t.k).sum(-1) * t.k.tolist()[0][0]  # HERE


def nonzero(self, f, t):
    return f(t.k).sum(-1) * len(torch.nonzero(t.k))  # HERE


def root(self, f, t):
    return f(t.k).sum(-1) / math.sqrt(t.k.square().sum())  # HERE


def array(self, f, t):
    return torch.from_numpy(np.tanh(f(t.k))).sum(-1)  # HERE


CHOICE = "choose between values with torch.where(condition, a, b)"


@pytest.mark.parametrize(
    "loss, name, fix",
    [
        (branch, "__bool__", CHOICE),
        (item, "item", "leave .item() out: a tensor of one number is multiplied as a number is"),
        (integer, "__int__", CHOICE),
        (numbers, "tolist", CHOICE),
        (nonzero, "nonzero", CHOICE),
        (root, "__float__", "leave float() out, and write torch.sqrt(x) for math.sqrt(x)"),
        (array, "__array__", "call PyTorch's function of that name: torch.tanh(x) for np.tanh(x)"),
    ],
)
def test_bodies_do_not_look_at_values(loss, name, fix):
    refused(
        steps_into(loss),
        DataDependentError,
        "A body of Loop looks at the values of a tensor.",
        given=f"{name}, which needs them, as an if, int(), float(), .item() and .tolist() on a tensor do",
        need="control flow that depends on shapes and numbers only: the body is traced once for all values",
        fix=fix,
    )


def backward(self, f, t):
    f(t.k).sum().backward()  # HERE
    return t.k.grad.sum(-1)


def taken_of_values(self, f, t):
    (slope,) = torch.autograd.grad(f(t.k).sum(), t.k)  # HERE
    return slope.sum(-1)


@pytest.mark.parametrize("loss, name", [(backward, "backward"), (taken_of_values, "grad")])
def test_derivatives_in_a_body_are_of_functions(loss, name):
    refused(
        steps_into(loss),
        UnadmittedOpError,
        "A body of Loop takes a derivative of what it has recorded.",
        given=name,
        need="derivatives of functions: a body is traced, and records nothing",
        fix="write torch.func.grad(energy)(x), where energy is a function of x that returns one number",
    )


def fft(self, f, t):
    return torch.fft.fft(f(t.k)).real.sum(-1)  # HERE


def lgamma(self, f, t):
    return torch.lgamma(f(t.k)).sum(-1)  # HERE


@pytest.mark.parametrize(
    "loss, name, op",
    [(fft, "_fft_r2c", "aten._fft_r2c.default"), (lgamma, "lgamma", "aten.lgamma.default")],
)
def test_ops_outside_the_admitted_set(loss, name, op):
    with pytest.raises(UnadmittedOpError) as caught:
        layer_of(loss)
    near = str(caught.value.need).partition("; near it: ")[2]
    refused(
        steps_into(loss),
        UnadmittedOpError,
        f"Loop uses {name}, which is outside the ops nestloop compiles.",
        given=op,
        need="an op with a row in lowering/ops" + (f"; near it: {near}" if near else ""),
        fix="write it with admitted ops, or add a row for it (CONTRIBUTING.md); backend='reference' takes any op",
    )


def dropout(self, f, t):
    return F.dropout(f(t.k)).sum(-1)  # HERE


def test_bodies_draw_no_random_numbers():
    refused(
        steps_into(dropout),
        UnadmittedOpError,
        "Loop uses dropout, which draws random numbers.",
        given="dropout",
        need="a body that is a function of its tensors: backward computes it again",
        fix="leave it out of the inner loop, or draw outside and pass the numbers as a view",
    )


def python_s(self, f, t):
    return f(t.k).sum(-1) * random.gauss(0, 1)  # HERE


def numpy_s(self, f, t):
    return f(t.k).sum(-1) * float(np.random.rand())  # HERE


@pytest.mark.parametrize("loss, name", [(python_s, "random"), (numpy_s, "numpy.random")])
def test_bodies_draw_no_random_numbers_without_torch(loss, name, monkeypatch):
    monkeypatch.setattr(watched, "_is_alone", lambda: True)  # other tests may have left threads
    refused(
        steps_into(loss),
        UnadmittedOpError,
        f"Loop uses {name}, which draws random numbers.",
        given=name,
        need="a body that is a function of its tensors: backward computes it again",
        fix="leave it out of the inner loop, or draw outside and pass the numbers as a view",
    )


def test_numbers_that_other_threads_draw_are_no_body_s():
    def loss(self, f, t):
        other = threading.Thread(target=random.random)
        other.start()
        return f(t.k).square().sum(-1)

    done = threading.Event()
    waiting = threading.Thread(target=done.wait)
    waiting.start()
    try:
        layer_of(loss)
    finally:
        done.set()
        waiting.join()


def under_autocast(self, f, t):
    y = f(t.k)
    with torch.autocast("cpu", torch.bfloat16):
        return (y - t.v).sum(-1)  # HERE


def test_bodies_are_not_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        layer_of(Squares.loss)  # a call's own is another matter
    refused(
        steps_into(under_autocast),
        UnadmittedOpError,
        "A body of Loop is under autocast.",
        given="torch.autocast, which generated code has nothing of",
        need="values in the compute dtype: float32, or float64 where a tensor of the call is",
        fix="leave it out: products of low-precision views are in that precision, sums and states in float32",
    )


def without_gradients(self, f, t):
    with torch.no_grad():  # HERE
        target = f(t.v)
    return (f(t.k) - target).square().sum(-1)


def behind_the_gradient(self, f, t):
    y = f(t.k)
    return (y - y.data).square().sum(-1)  # HERE


def test_bodies_do_not_read_data():
    refused(
        steps_into(behind_the_gradient),
        UnadmittedOpError,
        "Loop reads x.data, which hides a value from gradients.",
        given="x.data",
        need="values that say themselves whether gradients flow through them",
        fix="write x.detach()",
    )


def test_bodies_do_not_turn_gradients_off():
    refused(
        steps_into(without_gradients),
        UnadmittedOpError,
        "Loop turns gradients off.",
        given="torch.no_grad or torch.set_grad_enabled(False)",
        need="values that say themselves whether gradients flow through them",
        fix="write x.detach() where nothing is to flow back, f.held(x) for the learner's weights",
    )


def captured(self, f, t):
    return (f(t.k) * OUTER).sum(-1)  # HERE


def captured_numbers(self, f, t):
    return f(t.k).sum(-1) * OUTER.sum().item()  # HERE


def constant(self, f, t):
    return f(t.k).sum(-1) * torch.tensor([2.0] * 300).sum()  # HERE


@pytest.mark.parametrize("loss, given", [(captured, "[8]"), (captured_numbers, "[8]"), (constant, "[300]")])
def test_tensors_from_outside(loss, given):
    refused(
        steps_into(loss),
        CapturedTensorError,
        "A body of Loop uses a tensor from outside its declaration.",
        given=f"a tensor {given}",
        need="weights and views that are declared; numbers may come from anywhere",
        fix="declare it, scale = nl.slow('d'), or write the number itself",
    )


def parameter(self, f, t):
    return (f(t.k) * torch.nn.Parameter(torch.ones(()))).sum(-1)  # HERE


def test_tensors_made_in_a_body():
    refused(
        steps_into(parameter),
        CapturedTensorError,
        "A body of Loop makes a tensor constant.",
        given="a tensor made from numbers, used as _tensor_constant0",
        need="Python numbers, or weights that are declared",
        fix="write the number itself, or declare it: scale = nl.slow('d', init='constant(0.5)')",
    )


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


def test_tokens_of_a_shuffled_batch_do_not_see_one_another():
    refused(
        steps_into(mixes, schedule=nl.Shuffled(2)),
        TokenMixingError,
        "Loop is Shuffled, but its loss mixes tokens.",
        given="mean over the token axis of [n, d]",
        need="a loss whose every token is on its own: the tokens of a shuffled batch are not neighbours, nor all",
        fix="schedule = nl.FullBatch(steps=2), or a learner that keeps tokens apart",
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


def asks_for_a_graph(self, f, t):
    return f(t.k).sum(-1) * (2.0 if t.k.requires_grad else 1.0)  # HERE


def asks_for_a_device(self, f, t):
    return f(t.k).sum(-1) * (2.0 if f.w.is_cuda else 1.0)  # HERE


@pytest.mark.parametrize("loss, what", [(asks_for_a_graph, "requires_grad"), (asks_for_a_device, "is_cuda")])
def test_a_body_does_not_ask_what_is_not_the_same_for_every_call(loss, what):
    refused(
        steps_into(loss),
        UnadmittedOpError,
        f"A body of Loop asks a tensor for {what}, which is not the same for every call.",
        given=f"x.{what}",
        need="a body that computes the same on every device, with gradients or without",
        fix="leave the question out of the body; backend='reference' asks the call's own tensors",
    )


def rounds(self, f, t):
    return (f(t.k).bfloat16() - t.v).square().sum(-1)  # HERE


def widens(self, f, t):
    return f(t.k).double().square().sum(-1).float()  # HERE


def rounds_a_factor(self, f, t):
    return f(t.k.half()).square().sum(-1)  # HERE


def widens_a_factor(self, f, t):
    return (t.k.double() @ f.w).float().square().sum(-1)  # HERE


@pytest.mark.parametrize(
    "loss, dtype",
    [
        (rounds, "torch.bfloat16"),
        (widens, "torch.float64"),
        (rounds_a_factor, "torch.float16"),
        (widens_a_factor, "torch.float64"),
    ],
)
def test_values_have_the_compute_dtype(loss, dtype):
    refused(
        steps_into(loss),
        UnadmittedOpError,
        "Loop rounds a value to another precision.",
        given=f"a conversion to {dtype}",
        need="values in the compute dtype: float32, or float64 where a tensor of the call is",
        fix="leave it out: products of low-precision views are in that precision, sums and states in float32",
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


def prints(self, f, t):
    print("seen")  # HERE
    return f(t.k).sum(-1)


def counts(self, f, t):
    global COUNT  # HERE
    COUNT += 1
    return f(t.k).sum(-1)


def remembers(self, f, t):
    self.last = f(t.k)  # HERE
    return self.last.sum(-1)


def forgets(self, f, t):
    del t.k  # HERE
    return f(t.k).sum(-1)


def logs(self, f, t):
    LOG.append(f(t.k))  # HERE
    return f(t.k).sum(-1)


def overwrites(self, f, t):
    LOG[0] = f(t.k)  # HERE
    return f(t.k).sum(-1)


def evades(self, f, t):
    self.__dict__["last"] = t.k  # HERE
    return f(t.k).sum(-1)


def sets(self, f, t):
    object.__setattr__(self, "last", t.k)  # HERE
    return f(t.k).sum(-1)


def generates(self, f, t):
    yield f(t.k)  # HERE


@pytest.mark.parametrize(
    "loss, effect, given",
    [
        (prints, "it calls print", "print('seen')"),
        (counts, "it writes to the outer name COUNT", "global COUNT"),
        (remembers, "it stores into the attribute self.last", "self.last"),
        (forgets, "it stores into the attribute t.k", "t.k"),
        (logs, "it changes LOG, which is not its own", "LOG.append(f(t.k))"),
        (overwrites, "it changes LOG, which is not its own", "LOG[0]"),
        (evades, "it changes self.__dict__, which is not its own", "self.__dict__['last']"),
        (sets, "it stores into an attribute", "object.__setattr__(self, 'last', t.k)"),
        (generates, "it is a coroutine or a generator", "(yield f(t.k))"),
    ],
)
def test_bodies_have_no_side_effects(loss, effect, given):
    refused(
        steps_into(loss),
        SideEffectError,
        f"{loss.__name__} has a side effect: {effect}.",
        given=given,
        need="a body that only computes its result: it is traced once, so the effect would happen once, "
        "at compile time",
        fix="compute with local names and return the result; inner losses are an output of the op (return_losses=True)",
    )
    assert LOG == [] and COUNT == 0


def test_what_stands_beside_a_lambda_is_none_of_its_effects():
    def made(loss=lambda self, f, t: (f(t.k) - t.v).square().sum(-1), **more):
        body = {"loss": loss}
        body.update(more)
        return type("Loop", (Squares,), {"learner": Linear, **body})

    assert nl.Layer(made(readout=lambda self, f, t: f(t.q)), 16, 2)(torch.randn(1, 3, 16)).shape == (1, 3, 16)
    with pytest.raises(SideEffectError, match="it calls print"):
        made(loss=lambda self, f, t: print(t) or f(t.k).sum(-1))


def test_a_list_of_its_own_is_no_side_effect():
    def loss(self, f, t):
        terms = {}
        terms["k"] = [f(t.k)]
        terms["k"].append(f(t.v))
        return sum(term.square().sum(-1) for term in terms["k"])

    assert layer_of(loss)(torch.randn(1, 3, 16)).shape == (1, 3, 16)


def test_a_body_stores_nothing_even_where_its_source_cannot_be_read():
    loss = eval("lambda self, f, t: setattr(self, 'x', 1)", {"setattr": setattr})

    def step():
        layer_of(loss)

    with pytest.raises(SideEffectError) as caught:
        step()
    assert str(caught.value).splitlines()[0] == "A body of Loop stores into self.x."


def test_names_that_nothing_declares():
    def weight():
        class Typo(nl.Learner):
            w = nl.fast("d", "d")

            def forward(self, x):
                return x @ self.w3  # HERE

        layer_of(Squares.loss, learner=Typo)

    def slow():
        layer_of(lambda self, f, t: f(t.k).sum(-1) * self.scale)  # HERE

    def view():
        layer_of(lambda self, f, t: f(t.x).sum(-1))  # HERE

    refused(
        weight,
        UnknownNameError,
        "Typo declares no 'w3'.",
        given="w3",
        need="one of its weights and dims: D, H, N, d, n, w",
        fix='declare w3 = nl.fast("d", "d") in a learner, w3 = nl.slow("d") or w3 = nl.dim(64)',
    )
    refused(
        slow,
        UnknownNameError,
        "Loop declares no 'scale'.",
        given="scale",
        need="one of its weights and dims: D, H, N, d, n",
        fix='declare scale = nl.fast("d", "d") in a learner, scale = nl.slow("d") or scale = nl.dim(64)',
    )
    refused(
        view,
        UnknownNameError,
        "The loop declares no view 'x'.",
        given="t.x",
        need="one of its views and gates: k, q, v",
        fix='declare x = nl.view("d")',
    )


def test_names_that_another_owns():
    def view():
        layer_of(lambda self, f, t: f(self.k).sum(-1))  # HERE

    def weight():
        layer_of(lambda self, f, t: (t.k @ self.w).sum(-1))  # HERE

    def bare():
        class Plain(nl.Learner):
            w = nl.fast("d", "d")

            def forward(self, x):
                return x @ w  # type: ignore[name-defined]  # noqa: F821  # HERE

        layer_of(Squares.loss, learner=Plain)

    refused(
        view,
        UnknownNameError,
        "Loop reads 'k' from itself, but every token has its own.",
        given="self.k",
        need="views and gates from t, weights and dims from self",
        fix="write t.k",
    )
    refused(
        weight,
        UnknownNameError,
        "Loop reads 'w' from itself, but it is its learner's.",
        given="self.w",
        need="weights of the learner from f, the loop's own from self",
        fix="write f.w",
    )
    refused(
        bare,
        UnknownNameError,
        "A body of Loop names 'w' alone.",
        given="w",
        need="names of a class body by their owner: Python looks for bare ones outside it",
        fix="write self.w in the learner, f.w in the loop",
    )


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


def test_an_undeclared_name_reads_the_same_on_the_reference():
    def step():
        loop = type("Loop", (Good,), {"loss": lambda self, f, t: f(t.k).sum(-1) * self.scale})  # HERE
        nl.compile(loop, backend="reference")(*inputs())

    refused(
        step,
        UnknownNameError,
        "Loop declares no 'scale'.",
        given="scale",
        need="one of its weights and dims: H, N, d, n",
        fix='declare scale = nl.fast("d", "d") in a learner, scale = nl.slow("d") or scale = nl.dim(64)',
    )


@pytest.mark.parametrize("schedule", [nl.Shuffled(2), nl.Causal(4), nl.Online()])
def test_a_body_of_a_part_of_the_tokens_does_not_know_the_length(schedule):
    def step():
        layer_of(lambda self, f, t: f(t.k).sum(-1) / self.N, schedule=schedule)  # HERE

    refused(
        step,
        UnknownNameError,
        "Loop declares no 'N'.",
        given="N",
        need="one of its weights and dims: D, H, d, n",
        fix="use self.n, the tokens of one step: under this schedule a body is compiled for every length",
    )


def test_signatures():
    def loss():
        layer_of(lambda self, f: f)  # HERE

    def readout():
        layer_of(lambda self, t: t.q, "readout")  # HERE

    def kernel():
        layer_of(lambda self, q: q, "kernel", learner=nl.KernelEstimator)  # HERE

    what = "The {} of Loop does not take ({})."
    for step, name, takes, arguments in (
        (loss, "loss", "f", "f, t"),
        (readout, "readout", "t", "f, t"),
        (kernel, "kernel", "q", "q, k"),
    ):
        refused(
            step,
            SignatureError,
            what.format(name, arguments),
            given=f"{name}(self, {takes})",
            need=f"{name}(self, {arguments})",
            fix=f"write def {name}(self, {arguments}): return ...",
        )


def test_bodies_are_functions():
    def step():
        class Loop(Good):
            @property  # HERE
            def loss(self):
                return 0

    refused(
        step,
        SignatureError,
        "The loss of Loop is not a function.",
        given="a property",
        need="a method loss(self, f, t)",
        fix="write def loss(self, f, t): return ..., without a decorator",
    )


def test_bodies_keep_nothing():
    def step():
        class Keeping(nl.Learner):
            w = nl.fast("d", "d")

            @functools.cache  # noqa: B019  # HERE
            def forward(self, x):
                return x @ self.w

    refused(
        step,
        SideEffectError,
        "test_bodies_keep_nothing.<locals>.step.<locals>.Keeping.forward has a side effect: it keeps what it has "
        "computed.",
        given="functools.cache or functools.lru_cache",
        need="a body that only computes its result: it is traced once, so the effect would happen once, "
        "at compile time",
        fix="compute with local names and return the result; inner losses are an output of the op (return_losses=True)",
    )


def test_a_forward_called_with_too_much():
    def step():
        class Pair(nl.Learner):
            w = nl.fast("d", "d")

            def forward(self, x, y):  # type: ignore[override]
                return x @ self.w + y

        layer_of(lambda self, f, t: f(t.k).sum(-1), learner=Pair)  # HERE

    refused(
        step,
        CompileError,
        "The loss of Loop cannot be traced: TypeError.",
        given="test_a_forward_called_with_too_much.<locals>.step.<locals>.Pair.forward() missing 1 required "
        "positional argument: 'y'",
        need="plain PyTorch on tensors, numbers and the declared names",
        fix="run the body by hand on small tensors; backend='reference' calls it unchanged",
    )


OF_THE_OPTIMIZER = {
    "transform": ("transform", "a gradient", lambda body: body),
    "gradient_transform": ("gradient transform", "a gradient", lambda body: body),
    "restore": ("restore", "a fast weight", lambda body: lambda w, initial: body(w)),
}


@pytest.mark.parametrize("part", OF_THE_OPTIMIZER)
def test_functions_of_the_optimizer_keep_shapes_and_are_bodies_too(part):
    called, what, taking = OF_THE_OPTIMIZER[part]
    chunked = {"schedule": nl.Chunked(4, "apply-update")}

    def shape():
        optimizer = nl.SGD(**{part: taking(lambda g: g.sum(-1))})  # HERE
        layer_of(Squares.loss, optimizer=optimizer, **chunked)

    def written():
        layer_of(Squares.loss, optimizer=nl.SGD(**{part: taking(lambda g: g.clamp_(-1, 1))}), **chunked)  # HERE

    refused(
        shape,
        TransformError,
        f"The {called} of SGD changes the shape of {what}.",
        given="[8]",
        need="[8, 8], the shape of the fast weight",
        fix="return one number for every element; reduce with keepdim=True inside",
    )
    refused(
        written,
        InPlaceError,
        "A body of Loop writes into a tensor.",
        given="clamp_ on [8, 8]",
        need="values that are computed, not overwritten: the graph has no memory",
        fix="write y = x + z instead of x += z, torch.where or torch.cat instead of an assignment to x[...]",
    )


class Biased(nl.Learner):
    w, b = nl.fast("d", "d"), nl.fast("d")

    def forward(self, x):
        return x @ self.w + self.b


@pytest.mark.parametrize(
    "part, made, text",
    [
        ("transform", nl.soft_clip(-2), "soft_clip(-2)"),
        ("gradient_transform", nl.newton_schulz(), "newton_schulz(5 steps)"),
        ("restore", nl.restore_norm(1), "restore_norm(1)"),
    ],
)
def test_functions_of_the_optimizer_fit_every_fast_weight(part, made, text):
    def step():
        optimizer = nl.SGD(**{part: made})  # HERE
        layer_of(Squares.loss, learner=Biased, optimizer=optimizer)

    refused(
        step,
        TransformError,
        f"The {part.replace('_', ' ')} of Loop's optimizer does not fit the fast weight 'b'.",
        given=f"{text} for fast weight b[d]",
        need="fast weights of 2 axes or more",
        fix="write a function that takes [d] too, or join the weight to another: "
        'w = nl.fast("d + 1", "d"), on x with a column of ones',
    )
    assert layer_of(Squares.loss, learner=Biased, optimizer=nl.SGD(transform=nl.soft_clip(-1))) is not None


@pytest.mark.parametrize(
    "part, maker, made",
    [
        ("transform", nl.soft_clip, "nl.soft_clip(-2)"),
        ("gradient_transform", nl.newton_schulz, "nl.newton_schulz()"),
        ("restore", nl.restore_norm, "nl.restore_norm(-1)"),
    ],
)
def test_functions_of_the_optimizer_are_made(part, maker, made):
    def step():
        layer_of(Squares.loss, optimizer=nl.SGD(**{part: maker}))  # HERE

    refused(
        step,
        TransformError,
        f"The {part.replace('_', ' ')} of Loop's optimizer is not called.",
        given=f"{part}=nl.{maker.__name__}",
        need=f"what it makes, {made}",
        fix=f"write nl.SGD(lr=1.0, {part}={made})",
    )


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


PARTS = "a learner, views, a schedule, an optimizer, and the bodies they call for"


def no_learner_class():
    class Loop(Squares):  # HERE
        learner = 3  # type: ignore[assignment]


def no_fast_weight():
    class Identity(nl.Learner):
        def forward(self, x):
            return x

    class Loop(Squares):  # HERE
        learner = Identity


def no_view():
    class Loop(nl.Loop):  # HERE
        learner = Linear


def no_loss():
    class Loop(nl.Loop):  # HERE
        learner = Linear
        k = nl.view("d")


def no_readout():
    class Loop(nl.Loop):  # HERE
        learner = Linear
        k = nl.view("d")
        loss = Squares.loss


def no_schedule():
    class Loop(Squares):  # HERE
        learner = Linear
        schedule = 4  # type: ignore[assignment]


def no_optimizer():
    class Loop(Squares):  # HERE
        learner = Linear
        optimizer = 0.1  # type: ignore[assignment]


def no_heads():
    class Loop(Squares):  # HERE
        learner = Linear
        heads = 0


def no_kernel():
    class Loop(Squares):  # HERE
        learner = nl.KernelEstimator


def no_values():
    class Loop(nl.Loop):  # HERE
        learner = nl.KernelEstimator
        q, k = nl.view("d"), nl.view("d")

        def kernel(self, q, k):
            return torch.exp(q @ k.T)


@pytest.mark.parametrize(
    "step, what, given, fix",
    [
        (no_learner_class, "learner is not a Learner class", "3", "learner = MLP, the class itself"),
        (no_fast_weight, "its learner Identity has no fast weight", "no nl.fast", 'declare w = nl.fast("d", "d")'),
        (no_view, "it has no view", "no nl.view", 'declare k = nl.view("d")'),
        (no_loss, "it has no loss", "no method loss", "add def loss(self, f, t): return ..."),
        (no_readout, "it has no readout", "no method readout", "add def readout(self, f, t): return ..."),
        (no_schedule, "its schedule is not one", "4", "schedule = nl.FullBatch(steps=1)"),
        (no_optimizer, "its optimizer is not one", "0.1", "optimizer = nl.SGD(lr=1.0)"),
        (no_heads, "its heads are not a number of them", "0", 'heads = 4, or heads = "D/64"'),
        (no_kernel, "it has no kernel", "no method kernel", "add def kernel(self, q, k): return ..."),
        (no_values, "its kernel estimator takes views q, k and v", "views q, k", 'declare v = nl.view("d")'),
    ],
)
def test_missing_parts(step, what, given, fix):
    refused(step, MissingPartError, f"The loop Loop: {what}.", given=given, need=PARTS, fix=fix)


def test_a_learner_without_forward():
    def step():
        class Bare(nl.Learner):  # HERE
            w = nl.fast("d", "d")

    refused(
        step,
        MissingPartError,
        "The learner Bare has no forward.",
        given="fast weights w",
        need="f(W; x) as a method",
        fix="add def forward(self, x): return ...",
    )


def test_only_declared_loops_are_compiled():
    def layer():
        nl.Layer(3, 16, 2)  # type: ignore[arg-type]  # HERE

    def branches():
        nl.Layer((Good, Linear), 16, 2)  # type: ignore[arg-type]  # HERE

    for step, given in ((layer, 3), (branches, Linear)):
        refused(
            step,
            MissingPartError,
            "Only a declared loop can be compiled.",
            given=repr(given),
            need="a subclass of nl.Loop with a learner (the class, not an instance)",
            fix="write class MTTT(nl.Loop): learner = MLP; ..., then nl.compile(MTTT) or nl.Layer(MTTT, ...)",
        )


def test_a_compiled_loop_has_a_learner():
    class Bare(nl.Loop):
        k = nl.view("d")

    with pytest.raises(MissingPartError) as caught:
        nl.compile(Bare)
    assert str(caught.value).splitlines() == [
        "The loop Bare: it has no learner.",
        f"  at:    {Bare.declared_at}   class Bare(nl.Loop):",
        "  given: no learner",
        f"  need:  {PARTS}",
        "  fix:   learner = MLP, the class itself",
    ]


def test_messages_do_not_hold_whole_tensors_arrays_and_modules():
    def layer():
        nl.compile(nl.Layer(Good, 16, 2))  # type: ignore[arg-type]  # HERE

    def dims():
        nl.fast(torch.zeros(4, 4))  # type: ignore[arg-type]  # HERE

    with pytest.raises(MissingPartError, match=r"given: a Layer\n"):
        layer()
    refused(
        dims,
        DimExpressionError,
        "The dim expression Tensor [4, 4] is not arithmetic over dim names.",
        given="a Tensor",
        need="names, numbers, + - * / //, ** with a number up to 16, and parentheses",
        fix='write it like "d", "4*d" or "H/(N*D)"',
    )
    with pytest.raises(MissingPartError, match=r"given: a SGD\n"):
        type("Loop", (Good,), {"optimizer": torch.optim.SGD([torch.zeros(1)], 0.1)})
    with pytest.raises(InputError, match=r"given: ndarray \[1, 2, 3, 4\]\n"):
        nl.compile(Good)(*inputs(k=np.zeros((1, 2, 3, 4))))
    assert errors.shown("x" * 500) == "a str" and errors.shown(0.5) == "0.5"


def test_unknown_backend():
    def step():
        nl.compile(Good, backend="cuda")  # HERE

    refused(
        step,
        UnknownBackendError,
        "There is no such backend.",
        given="'cuda'",
        need="'auto', 'reference', 'torch', 'cpp', 'triton'",
        fix='write backend="auto"',
    )


def inputs(tokens=3, **changed):
    views = {name: torch.randn(1, 2, tokens, 4) for name in "kqv"}
    return {**views, **changed}, {"w": torch.randn(2, 4, 4)}


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


def test_layers_that_do_not_fit():
    layer = nl.Layer(Good, 16, 2)

    def indivisible():
        nl.Layer(Good, 16, 3)  # HERE

    def headless():
        nl.Layer(Good, 16, 0)  # HERE

    def unknown():
        nl.Layer(Good, 16, 2, e=3)  # HERE

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


def test_a_dim_without_a_size():
    def step():
        wide = nl.view("e")  # HERE
        layer_of(lambda self, f, t: f(t.k).sum(-1) + t.wide.sum(-1), wide=wide)

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


@pytest.mark.parametrize(
    "kind", [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, nl.NestloopError)]
)
def test_errors_cross_processes_whole(kind):
    assert kind.__doc__ is not None and issubclass(kind, nl.NestloopError)
    error = kind("what.", where=errors.Location(__file__, 3), given="g", need="n", fix="f")
    for twin in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(twin) is kind and str(twin) == str(error)
        assert (twin.what, twin.where, twin.given, twin.need, twin.fix) == (
            error.what,
            error.where,
            error.given,
            error.need,
            error.fix,
        )


def test_a_message_has_only_the_parts_it_was_given():
    assert str(nl.NestloopError("what.")) == "what."
    missing = errors.Location("no/such/file.py", 7)
    assert str(nl.NestloopError("what.", where=missing, fix="f")) == "what.\n  at:    no/such/file.py:7\n  fix:   f"
    assert missing.short == "file.py:7" and missing.text == ""
