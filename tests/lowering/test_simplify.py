"""Each identity of `simplify`, and that none of them ever changes a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from nestloop.lowering import ops
from nestloop.lowering.emit.tile import TileFunction
from nestloop.lowering.runtime import tiles
from nestloop.lowering.simplify import simplify

aten = torch.ops.aten
X = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(3, 4)
Y = torch.linspace(0.5, 3, 12, dtype=torch.float64).reshape(3, 4)


def traced(function: Callable[..., Any], *tensors: Tensor) -> fx.GraphModule:
    module = make_fx(function, decomposition_table=ops.decompositions())(*tensors)
    for node, name in zip(module.graph.find_nodes(op="placeholder"), "xyzw", strict=False):
        node.meta["declared"] = name
    return module


def simplified(
    function: Callable[..., Any], *tensors: Tensor, known: Mapping[str, float] | None = None, **settings: Any
) -> tuple[fx.GraphModule, list[str]]:
    """The simpler graph and the ops left in it; its values are checked here."""
    tensors = tensors or (X, Y)
    module = simplify(traced(function, *tensors), known, **settings)
    given_tensors = [
        torch.full_like(t, known[n]) if known and n in known else t for t, n in zip(tensors, "xyzw", strict=False)
    ]
    wanted = function(*given_tensors)
    found = evaluate(module, dict(zip("xyzw", given_tensors, strict=False)))
    for a, b in zip(found, [wanted] if isinstance(wanted, Tensor) else wanted, strict=True):
        if a is None:
            assert settings["zero_is_none"] and not b.any()
        else:
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    return module, [ops.row(n.target).name for n in _calls(module)]


def evaluate(module: fx.GraphModule, given_tensors: Mapping[str, Tensor]) -> list[Tensor | None]:
    """A simplified graph as it runs: as generated code, for one head and one sequence."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(module.graph, copied)
    anchor = next(n for n in graph.nodes if n.op == "placeholder")  # tells a graph of constants its dtype
    kept = graph.call_function(aten.neg.default, (anchor,))
    kept.meta["val"] = anchor.meta["val"]
    results = result if isinstance(result, tuple) else (result,)
    graph.output((*results, kept))
    axes = {n: tuple(map(str, n.meta["val"].shape)) for n in graph.nodes if n.op == "call_function"}
    function = TileFunction("f", fx.GraphModule(torch.nn.Module(), graph), "A graph.", axes)
    names = {**vars(tiles), "torch": torch, "F": F, "aten": aten}
    exec(function.write(None), names)
    made = iter(names["f"](*[given_tensors[n][None, None] for n in function.signature], None))
    shapes = [None if r is None else r.meta["val"].shape for r in results]
    return [None if shape is None else next(made).expand(1, 1, *shape)[0, 0] for shape in shapes]


def _calls(module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in module.graph.nodes if n.op == "call_function" and not ops.is_size_op(n.target)]


IDENTITIES: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "x + 0": (lambda x, y: x + 0, []),
    "0 + x": (lambda x, y: torch.zeros_like(y) + x, []),
    "x - 0": (lambda x, y: x - torch.zeros_like(y), []),
    "0 - x": (lambda x, y: torch.zeros_like(y) - x, ["neg.default"]),
    "x * 1": (lambda x, y: x * torch.ones_like(y), []),
    "1 * x": (lambda x, y: 1 * x, []),
    "x / 1": (lambda x, y: x / 1, []),
    "x * 0": (lambda x, y: x * 0, ["full.default"]),
    "0 / x": (lambda x, y: torch.zeros_like(x) / y, ["full.default"]),
    "x ** 0": (lambda x, y: x**0, ["full.default"]),
    "x ** 1": (lambda x, y: x**1, []),
    "x ** 2": (lambda x, y: x**2, ["mul.Tensor"]),
    "-(-x)": (lambda x, y: torch.neg(-x), []),
    "(x a) b": (lambda x, y: x * 3 * 0.5, ["mul.Tensor"]),
    "-(x a)": (lambda x, y: -(x * 3), ["mul.Tensor"]),
    "(-x) a": (lambda x, y: (-x) * -1, []),
    "x 2 / 2": (lambda x, y: x * 2 * 0.5, []),
    "x + (-y)": (lambda x, y: x + -y, ["sub.Tensor"]),
    "(-x) + y": (lambda x, y: -x + y, ["sub.Tensor"]),
    "x - (-y)": (lambda x, y: x - -y, ["add.Tensor"]),
    "(-x) - y": (lambda x, y: -x - y, ["neg.default", "sub.Tensor"]),
    "(-x) + (-y)": (lambda x, y: -x + -y, ["neg.default", "sub.Tensor"]),
    "-(x - y)": (lambda x, y: -(x - y), ["sub.Tensor"]),
    "-(x - y), where x - y is read": (lambda x, y: ((d := x - y), -d), ["sub.Tensor", "neg.default"]),
    "x + x": (lambda x, y: x + x, ["mul.Tensor"]),
    "-x - x": (lambda x, y: -x - x, ["mul.Tensor"]),
    "(x + y) + y": (lambda x, y: x + y + y, ["mul.Tensor", "add.Tensor"]),
    "(x + x) + x": (lambda x, y: x + x + x, ["mul.Tensor", "add.Tensor"]),
    "2 x + 2 y": (lambda x, y: x * 2 + y * 2, ["add.Tensor", "mul.Tensor"]),
    "2 x - 2 y": (lambda x, y: x * 2 - y * 2, ["sub.Tensor", "mul.Tensor"]),
    "-2 x + 2 y": (lambda x, y: x * -2 + y * 2, ["sub.Tensor", "mul.Tensor"]),
    "3 x - y": (lambda x, y: x * 3 - y, ["mul.Tensor", "sub.Tensor"]),
    "(-x) (-y)": (lambda x, y: -x * -y, ["mul.Tensor"]),
    "(-x) / y": (lambda x, y: -(-x / y), ["div.Tensor"]),
    "1 - (-x)": (lambda x, y: 1 - -x, ["neg.default", "sub.Tensor"]),
    "a sum of -x": (lambda x, y: y - (-x).sum(0), ["sum.dim_IntList", "add.Tensor"]),
    "a running sum of -x": (lambda x, y: y - (-x).cumsum(0), ["cumsum.default", "add.Tensor"]),
    "a triangle of -x": (lambda x, y: y - (-x).tril(), ["tril.default", "add.Tensor"]),
    "a product of -x": (lambda x, y: y - (-x @ y.T) @ y, ["permute.default", "mm.default", "mm.default", "add.Tensor"]),
    "a product of -x and -y": (lambda x, y: -x @ -y.T, ["permute.default", "mm.default"]),
    "a transposed sum of products": (
        lambda x, y: (x.T @ y + y.T @ x).T,
        ["permute.default", "mm.default", "permute.default", "mm.default", "add.Tensor"],
    ),
    "transposed twice": (lambda x, y: x.permute(1, 0).permute(1, 0), []),
    "reshaped to itself": (lambda x, y: x.reshape(3, 4).clone(), []),
    "expanded to itself": (lambda x, y: x.expand(3, 4), []),
    "a broadcast that broadcasting does": (lambda x, y: x + y[:1].expand(3, 4), ["slice.Tensor", "add.Tensor"]),
    "a product with zeros": (lambda x, y: x @ torch.zeros_like(y).T, ["full.default"]),
    "a sum of ones": (lambda x, y: torch.ones_like(x).sum(0), ["full.default"]),
    "a mean of a number": (lambda x, y: torch.full_like(x, 3.0).mean(-1), ["full.default"]),
    "numbers": (lambda x, y: (torch.full_like(x, 3.0) * 2 - 1) / 5, ["full.default"]),
    "a slice of zeros": (lambda x, y: x[1:] + torch.zeros_like(y)[1:], ["slice.Tensor"]),
    "a triangle of zeros": (lambda x, y: x + torch.zeros_like(y).tril(), []),
    "a count is no constant": (lambda x, y: x + torch.arange(4), ["arange.start_step", "add.Tensor"]),
    "the same twice": (lambda x, y: x.tanh() + x.tanh(), ["tanh.default", "mul.Tensor"]),
    "dead": (lambda x, y: (x.exp(), x + y)[1], ["add.Tensor"]),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_an_identity(name: str):
    function, left = IDENTITIES[name]
    assert simplified(function)[1] == left


def test_a_number_goes_to_the_smaller_factor():
    module, left = simplified(lambda x, y: x * y[:, :1] * 3)
    assert left == ["slice.Tensor", "mul.Tensor", "mul.Tensor"]
    row, whole = [tuple(node.meta["val"].shape) for node in _calls(module)[1:]]
    assert (row, whole) == ((3, 1), (3, 4))


def test_a_number_stays_in_a_product():
    """Which a sum adds up in: behind it, the number would be one operation more for each element of the result."""
    module, left = simplified(lambda x, y: y + (x * -2 @ y.T) @ y)
    assert left == ["permute.default", "mul.Tensor", "mm.default", "mm.default", "sub.Tensor"]
    assert _calls(module)[1].args[1] == 2


def test_products_turn_only_where_nothing_else_reads_them():
    _, left = simplified(lambda x, y: ((made := x.T @ y + y.T @ x).T, made))
    assert left.count("mm.default") == 2 and left.count("permute.default") == 3
    _, left = simplified(lambda x, y: (x.T @ y + (y.T @ x).tanh()).T)
    assert left.count("mm.default") == 2 and left[-1] == "permute.default"


def test_zeros_are_followed_from_a_known_input():
    def step(w: Tensor, k: Tensor, v: Tensor) -> Tensor:
        error = k @ w - v
        return w - 0.5 * (k.T @ error)

    w, k, v = torch.ones(4, 2, dtype=torch.float64), X, X[:, :2]
    assert simplified(step, w, k, v)[1].count("mm.default") == 2
    left = simplified(step, w, k, v, known={"x": 0.0})[1]
    assert left.count("mm.default") == 1 and "sub.Tensor" not in left


def test_a_result_that_is_zero_is_none_where_asked():
    module, left = simplified(lambda x, y: (x * 0, x + y), zero_is_none=True)
    (results,) = next(n for n in module.graph.nodes if n.op == "output").args
    assert results[0] is None and left == ["add.Tensor"]
    assert sorted(simplified(lambda x, y: (x * 0, x + y))[1]) == ["add.Tensor", "full.default"]


def test_placeholders_keep_their_names_and_order():
    module, _ = simplified(lambda x, y: y + 0)
    assert [n.name for n in module.graph.find_nodes(op="placeholder")] == ["x", "y"]


def test_alpha_is_not_an_identity():
    assert simplified(lambda x, y: torch.add(x, y, alpha=2))[1] == ["add.Tensor"]
    simplified(lambda x, y: torch.sub(x, torch.ones_like(y), alpha=3))
    simplified(lambda x, y: torch.add(torch.zeros_like(x), y, alpha=0.5))


def test_masks_keep_their_dtype():
    simplified(lambda x, y: torch.where((x > 0) | torch.zeros_like(x, dtype=torch.bool), x, y))
    simplified(lambda x, y: torch.where(~torch.ones_like(x, dtype=torch.bool), x, y))


UNARY: list[Callable[[Tensor], Tensor]] = [
    torch.tanh,
    torch.neg,
    lambda a: a * 0,
    lambda a: a * 1,
    lambda a: a * -0.5,
    lambda a: a + 0,
    lambda a: 1 - a,
    lambda a: a**2,
    lambda a: a**0,
    lambda a: torch.zeros_like(a),
    lambda a: torch.full_like(a, 0.3),
    lambda a: a.T.clone().T,
    lambda a: a.sum(0, keepdim=True).expand(3, 4),
    lambda a: a.mean().expand(3, 4),
    lambda a: a.reshape(4, 3).reshape(3, 4),
    lambda a: torch.cat([a[:, 2:], a[:, :2]], 1),
    lambda a: a / 2,
    lambda a: a.abs().sqrt(),
    lambda a: a[:, :1] * -2.0 * a,
    lambda a: (-a).cumsum(0),
    lambda a: (a * 3)[:, 1:].sum(1, keepdim=True) - a,
]
BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add,
    torch.sub,
    torch.mul,
    lambda a, b: a / (b.abs() + 1),
    lambda a, b: torch.where(a > b, a, b * 0),
    lambda a, b: a @ (b.T @ b).tril(),
    torch.maximum,
    lambda a, b: torch.add(a, b, alpha=-2),
    lambda a, b: a[:1] * b,
    lambda a, b: (a.T @ -b - 2 * (b.T @ a)).T[:3],
    lambda a, b: a + b + b,
    lambda a, b: a + b[:1] + b[:1],
    lambda a, b: torch.add(a, b, alpha=3) + b,
    lambda a, b: -torch.sub(a, b, alpha=3),
    lambda a, b: torch.linalg.solve_triangular((a @ b.T).tril(-1), -a, upper=False, unitriangular=True),
]


@settings(max_examples=400, deadline=None)
@given(
    program=st.lists(
        st.tuples(st.integers(0, len(UNARY) + len(BINARY) - 1), st.integers(0, 99), st.integers(0, 99)),
        min_size=1,
        max_size=12,
    ),
    known=st.sampled_from([{}, {}, {"x": 0.0}, {"y": 1.0}]),
)
def test_values_never_change(program: list[tuple[int, int, int]], known: dict[str, float]):
    def run(*tensors: Tensor) -> Tensor:
        values = list(tensors)
        for op, first, second in program:
            a, b = values[first % len(values)], values[second % len(values)]
            values.append(UNARY[op](a) if op < len(UNARY) else BINARY[op - len(UNARY)](a, b))
        return values[-1]

    simplified(run, X, Y, known=known)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x @ torch.full((4, 5), 2.0, dtype=x.dtype),
        lambda x, y: torch.ones(2, 3, dtype=x.dtype) @ x + y.sum(),
        lambda x, y: x @ torch.ones_like(y).T,
        lambda x, y: y * (x[:, :1] @ torch.full((1, 4), -0.5, dtype=x.dtype)),
        lambda x, y: torch.bmm(x[:, None], torch.full((3, 4, 2), 3.0, dtype=x.dtype)),
        lambda x, y: x @ torch.full((4, 1), 2.0, dtype=x.dtype) + y,
    ],
)
def test_a_product_with_one_number_all_over_is_a_sum(function: Callable[..., Tensor]):
    _, left = simplified(function)
    assert not {"mm.default", "bmm.default"} & set(left)


def test_a_column_beside_a_product_is_a_sum_of_no_places():
    """Of an axis of one place, what stands there: the outer product with ones is as it was, wider."""
    _, left = simplified(lambda x, y: y * (x[:, :1] @ torch.ones(1, 4, dtype=x.dtype)))
    assert "sum.dim_IntList" not in left and "mm.default" not in left
