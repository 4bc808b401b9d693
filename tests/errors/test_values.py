"""Bodies that depend on values, on chance, or on what is outside the declaration."""

import math
import random
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nestloop.errors import (
    CapturedTensorError,
    DataDependentError,
    UnadmittedOpError,
)
from tests.errors.squares import Squares, layer_of, steps_into
from tests.refusals import refused

OUTER = torch.ones(8)


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


def fft(self, f, t):
    return torch.fft.fft(f(t.k)).real.sum(-1)  # HERE


def bessel(self, f, t):
    return torch.special.i0(f(t.k)).sum(-1)  # HERE


@pytest.mark.parametrize(
    "loss, name, op",
    [(fft, "_fft_r2c", "aten._fft_r2c.default"), (bessel, "i0", "aten.i0.default")],
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


def one_of_three(self, f, t):
    return f(t.k).sum(-1) * random.choice([0.5, 1.5, 2.5])  # HERE


def sometimes(self, f, t):
    if random.random() < 0.5:
        return f(t.k).sum(-1)  # HERE
    return f(t.v).square().sum(-1)


def draw_on(done):
    while not done.wait(1e-5):
        random.random(), np.random.rand()


@pytest.fixture(params=[None, threading.Event.wait, draw_on])
def other_thread(request):
    """Another thread that lives, one that is quiet or one that draws."""
    done = threading.Event()
    other = None if request.param is None else threading.Thread(target=request.param, args=[done])
    if other is not None:
        other.start()
    yield
    done.set()
    if other is not None:
        other.join()


@pytest.mark.parametrize("loss, name", [(python_s, "random"), (numpy_s, "numpy.random"), (one_of_three, "random")])
def test_bodies_draw_no_random_numbers_without_torch(loss, name, other_thread):
    refused(
        steps_into(loss),
        UnadmittedOpError,
        f"Loop uses {name}, which draws random numbers.",
        given=name,
        need="a body that is a function of its tensors: backward computes it again",
        fix="leave it out of the inner loop, or draw outside and pass the numbers as a view",
    )


def test_a_body_that_does_something_else_by_chance(other_thread):
    with pytest.raises(UnadmittedOpError, match="Loop uses random, which draws"):
        layer_of(sometimes)


def test_numbers_that_other_threads_draw_are_no_body_s(other_thread):
    another = random.random()  # a body that has not been compiled yet
    layer_of(lambda self, f, t: (f(t.k) * another - t.v).square().sum(-1), backend="torch")


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


def makes_wide_numbers(self, f, t):
    return ((f(t.k) - t.v) * torch.tensor([1.0, 2.0] * 4, dtype=torch.float64)).square().sum(-1)  # HERE


@pytest.mark.parametrize(
    "loss, dtype",
    [
        (rounds, "torch.bfloat16"),
        (makes_wide_numbers, "torch.float64"),
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
