"""Axes that are one, and those along which places never meet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from nestloop.lowering.emit.triton_strips import strips_of
from nestloop.lowering.emit.triton_values import TRITON
from nestloop.lowering.ops.strided import Extent, NoSpelling
from nestloop.lowering.schedule.apart import Block, JoinedAxes, axis_of, tell_apart
from nestloop.lowering.schedule.reading import read
from nestloop.lowering.schedule.values import Value

STATE, KEYS = (48, 48), (16, 48)  # of axes of one size, which sizes do not tell apart


def traced(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> fx.GraphModule:
    """The graph of a function of a state, keys and values, or of what has these shapes."""
    given = [torch.randn(shape) for shape in shapes or (STATE, KEYS, KEYS)]
    module = make_fx(lambda *tensors: (function(*tensors),), tracing_mode="fake")(*given)
    for node, name in zip(module.graph.find_nodes(op="placeholder"), ("w", "k", "v"), strict=False):
        node.name = node.target = name
    return module


def values_of(module: fx.GraphModule) -> tuple[list[Value], dict[str, Value]]:
    values = read(module, ["w_new"], [False], ["k", "v"], language=TRITON)
    made = {value.result: value for value in values.computed if value.result is not None}
    return values.computed, {**values.inputs, **made}


def apart(module: fx.GraphModule) -> tuple[bool, bool]:
    """Whether the state's rows are apart, and its columns."""
    values, tensors = values_of(module)
    joined = JoinedAxes(values)
    rows, columns = (joined.root(axis_of(tensors["w_new"], axis)) for axis in (0, 1))
    return tuple(root not in joined.summed | joined.whole for root in (rows, columns))  # type: ignore[return-value]


def linear(w: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return w + k.mT.mm(v)


def delta(w: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return w + k.mT.mm(v - k.mm(w))


def normed(w: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (w + k.mT.mm(v)) / w.sum(-1, keepdim=True)


def solved(w: Tensor, k: Tensor, v: Tensor) -> Tensor:
    system = k.mm(k.mT).tril(-1) + torch.ones(16, 16)
    return w + k.mT.mm(torch.linalg.solve_triangular(system, v - k.mm(w), upper=False))


def of_keys(w: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return w + k.mT.mm(k) + v.sum()


def turned(w: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return w.flip(1) + k.mT.mm(v)


def placed(w: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return w.tril() + k.mT.mm(v)


def turned_over(w: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return w + v.mT.mm(k).mT


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (linear, (True, True)),
        (turned_over, (True, True)),
        (delta, (False, True)),
        (normed, (True, False)),
        (solved, (False, True)),
        (of_keys, (False, False)),  # a block of both axes would be of one
        (turned, (True, False)),
        (placed, (False, False)),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_axes_are_apart_where_nothing_adds_up_over_them_nor_looks_elsewhere(
    function: Callable[..., Tensor], wanted: tuple[bool, bool]
):
    assert apart(traced(function)) == wanted


@pytest.mark.parametrize(
    ("functions", "axis"),
    [
        ([linear], 1),
        ([linear, delta], 1),
        ([linear, normed], 0),
        ([delta, normed], None),
        ([of_keys], None),
    ],
    ids=lambda given: "-".join(f.__name__ for f in given) if isinstance(given, list) else str(given),
)
def test_a_strip_is_of_the_last_axis_that_all_functions_leave_apart(
    functions: list[Callable[..., Tensor]], axis: int | None
):
    walks = [(traced(function), ["w_new"]) for function in functions]
    found = strips_of(walks, ["k", "v"], {"w": STATE}, {"w": ["rows", "columns"]}, {"w": "w", "w_new": "w"})
    if axis is None:
        assert found is None
        return
    assert found is not None and found.is_strip and found.count == 2
    assert (found.name, found.axes) == (["rows", "columns"][axis], {"w": axis, "w_new": axis})


def test_an_axis_is_told_from_others_of_its_size_wherever_values_have_it():
    values, tensors = values_of(traced(delta))
    block = Block(Extent(0, 48, axis="columns"), 16, {"w": 1}, is_strip=True)
    tell_apart(values, tensors, block)
    whole = Extent(0, 48)
    assert tensors["w"].shape == (whole, block.size) and tensors["w_new"].shape == (whole, block.size)
    assert tensors["v"].shape[1] == block.size and tensors["k"].shape[1] == whole
    for value in values:
        for view in value.reads:  # what a view reads has the axis where the view has it
            assert (block.size in view.shape) == (block.size in view.base.shape)


def test_an_axis_along_which_places_meet_is_refused_for_strips():
    for function, name in ((delta, "w"), (turned, "w")):
        values, tensors = values_of(traced(function))
        axis = 0 if function is delta else 1
        block = Block(Extent(0, 48, axis="rows"), 16, {name: axis}, is_strip=True)
        with pytest.raises(NoSpelling) as refusal:
            tell_apart(values, tensors, block)
        assert str(refusal.value) == "places of its axis rows meet"
