"""Every row of `lowering.ops` in Triton, interpreted: what its spelling computes is what the op computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from nestloop.lowering import ops
from nestloop.lowering.emit.triton import TritonFunction
from nestloop.lowering.ops.row import Element, Unsupported
from nestloop.lowering.runtime import cache
from tests.lowering.ops.cases import case
from tests.lowering.ops.test_cpp_rows import SPELLED

pytest.importorskip("triton")
from nestloop.lowering.runtime.interpreter import interpreted

pytestmark = pytest.mark.oldest_triton

POWER = "pow.Tensor_Tensor: Triton has no power of one tensor to another, of negative bases too"
# What Triton has no spelling for, and why.
REFUSED = {
    "pow.Tensor_Tensor": POWER,
    **{
        f"{name}.default": f"{name}.default: Triton has no {name}"
        for name in ("asin", "acos", "atan", "atan2", "lgamma")
    },
    "a negative base": "powers of -2 in Triton",
    "a negative base of tensors": POWER,
    "a batch of triangles": "a batch of triangles",
    "product 4 x 0 x 3": "a tile [] without elements",
}

KERNEL = """
import triton
import triton.language as tl

from nestloop.lowering.emit import elements, tiles


{function}


@triton.jit
def kernel({pointers}, scratch, S: tl.constexpr, PRODUCT: tl.constexpr):
    n = 16
{body}
"""


def graph_of(target: Any, arguments: Any, settings: dict[str, Any]) -> tuple[fx.GraphModule, list[Tensor]]:
    graph = fx.Graph()
    given: list[Tensor] = []

    def placeholder(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(f"x{len(given)}")
        node.meta["val"] = value
        given.append(value)
        return node

    node = graph.call_function(target, tree_map(placeholder, tuple(arguments)), settings)
    node.meta["val"] = target(*arguments, **settings)
    graph.output(((node,),)).meta["val"] = None
    graph.output_node().args = ((node,),)
    return fx.GraphModule({}, graph), given


def in_memory(name: str, function: TritonFunction) -> tuple[str, str]:
    """Places and mask of a tile that lies densely in memory."""
    sizes = [size.at(16) for size in function.tiles[name]]
    rank, index, masks = len(sizes), [], []
    for axis, size in enumerate(sizes):
        beside = f"[{', '.join(':' if d == axis else 'None' for d in range(rank))}]" if rank > 1 else ""
        position = f"tl.arange(0, {function.padded(function.tiles[name][axis])}){beside}"
        step = 1
        for later in sizes[axis + 1 :]:
            step *= later
        index.append(f"{position} * {step}")
        masks.append(f"({position} < {size})")
    return " + ".join(index) or "0", " & ".join(masks)


def run(target: Any, arguments: Any, settings: dict[str, Any], product: str = "ieee") -> Tensor:
    module, given = graph_of(target, arguments, settings)
    function = TritonFunction("op", module, ["y"], (), "The op.", {}, 16)
    body = []
    for name in function.inputs:
        places, mask = in_memory(name, function)
        masked = f", mask={mask}, other=0" if mask else ""
        loaded = f"tl.load({name}_p + {places}{masked})"
        body.append(f"    {name} = {loaded}")
    body.append(f"    (y,) = op({', '.join(['n', *function.inputs, 'scratch', 'S', 'PRODUCT'])})")
    places, mask = in_memory("y", function)
    body.append(f"    tl.store(y_p + {places}, y{f', mask={mask}' if mask else ''})")
    pointers = ", ".join([*[f"{n}_p" for n in function.inputs], "y_p"])
    text = KERNEL.format(function=function.write(), pointers=pointers, body="\n".join(body))
    kernel = cache.load(cache.write("op", text)).kernel
    expected = target(*arguments, **settings)
    made = torch.full(expected.shape, float("nan")).to(expected.dtype)
    import triton.language as tl

    # Whole numbers are in the compute dtype, as all numbers are.
    given = [t.double() if t.dtype == torch.int64 else t.contiguous() for t in given]
    tensors = {f"x{i}_p": t for i, t in enumerate(given) if f"x{i}" in function.inputs}
    scratch = torch.full((max(function.scratch, 1),), float("nan"), dtype=torch.float64)
    settings_of = {"S": tl.float64 if product == "ieee" else tl.float32, "PRODUCT": product}
    interpreted(kernel, (1,), {**tensors, "y_p": made, "scratch": scratch, **settings_of})
    return made


@pytest.mark.parametrize("name", SPELLED)
def test_what_is_spelled_is_what_the_op_computes(name: str) -> None:
    target, arguments, settings = case(name)
    if name in REFUSED:
        with pytest.raises(ops.NoSpelling) as refusal:
            run(target, arguments, settings)
        assert str(refusal.value) == REFUSED[name]
        return
    expected = target(*arguments, **settings)
    found = run(target, arguments, settings)
    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=1e-12, atol=1e-13)


UNARY = [
    row.name
    for row in ops.ROWS.values()
    if row.kind is ops.Kind.POINTWISE and isinstance(row.cpp, Element) and row.name not in REFUSED
    if len(row.target._schema.arguments) == 1
]
ENDS = [1e-30, 1e-8, 1e-4, 0.03, 0.3, 0.9, 1.0, 1.5, 3.0, 5.0, 6.0, 9.0, 20.0, 50.0, 80.0, 88.0, 1e4, 1e10, 1e20, 3e38]


@pytest.mark.parametrize("name", UNARY)
def test_the_ends_of_float32(name: str) -> None:
    """As accurate as PyTorch there, or to some units of the last place."""
    target, (given,), settings = case(name)
    if given.dtype == torch.bool:
        return
    ends = torch.tensor(ENDS)
    x = torch.cat([ends, -ends])
    exact = target(x.double(), **settings)
    found, usual = run(target, (x,), settings, "tf32x3"), target(x, **settings)
    fine = torch.isclose(found.double(), exact.float().double(), rtol=3e-6, atol=1e-38, equal_nan=True)
    assert (fine | (found == usual) | (found.isnan() & usual.isnan())).all(), x[~fine].tolist()


TRIANGLE = torch.ops.aten.linalg_solve_triangular.default


def triangle(n: int, near: float, upper: bool) -> tuple[Tensor, Tensor]:
    """A system of a delta rule whose keys are `near` each other, and right sides; float64."""
    generator = torch.Generator().manual_seed(n)
    keys = torch.randn(1, 32, generator=generator, dtype=torch.float64)
    keys = keys + near * torch.randn(n, 32, generator=generator, dtype=torch.float64)
    keys = torch.nn.functional.normalize(keys, dim=-1)
    system = 0.99 * keys @ keys.mT + 0.01 * torch.eye(n, dtype=torch.float64)
    right = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return (system.triu() if upper else system.tril()), right


@pytest.mark.parametrize("upper", [False, True], ids=["lower", "upper"])
@pytest.mark.parametrize("n", [3, 16, 17, 50, 64, 100, 128])
def test_triangles_of_keys_that_are_alike_are_solved_as_accurately_as_pytorch_solves_them(n: int, upper: bool) -> None:
    for near in (0.0, 0.01, 0.3):
        system, right = triangle(n, near, upper)
        for settings in ({"upper": upper, "unitriangular": True}, {"upper": upper}):
            exact = TRIANGLE(system, right, **settings)
            made = run(TRIANGLE, (system, right), settings)
            torch.testing.assert_close(made, exact, rtol=0, atol=1e-13 * exact.abs().max().item())
            single = (system.float(), right.float())
            exact = TRIANGLE(*[t.double() for t in single], **settings)
            found, pytorch = run(TRIANGLE, single, settings, "tf32x3"), TRIANGLE(*single, **settings)
            error, usual = ((x.double() - exact).norm() / exact.norm() for x in (found, pytorch))
            assert error <= 4 * usual


SOLVES = """
import triton
import triton.language as tl

from nestloop.lowering.emit import elements, tiles


@triton.jit
def kernel(a_p, b_p, x_p, n, KIND: tl.constexpr):
    i = tl.arange(0, 32)
    j = tl.arange(0, 16)
    a = tl.load(a_p + i[:, None] * 32 + i[None, :])
    b = tl.load(b_p + i[:, None] * 16 + j[None, :])
    if KIND == "solve":
        x = tiles.solve(a, b, n)
    else:
        x = tiles.solve_triangular(a, b, i < n, KIND == "upper", False, tl.float64, "ieee")
    tl.store(x_p + i[:, None] * 16 + j[None, :], x)
"""


@pytest.mark.parametrize("kind", ["solve", "lower", "upper"])
def test_what_lies_beyond_a_system_is_left_out(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, m, generator=generator, dtype=torch.float64) for m in (32, 16))
    a[torch.arange(32), torch.arange(32)] += 9
    a[19:], a[:, 19:], b[19:] = 1e3, 1e3, 1e3
    made = torch.full_like(b, float("nan"))
    kernel = cache.load(cache.write("solves", SOLVES)).kernel
    interpreted(kernel, (1,), {"a_p": a, "b_p": b, "x_p": made, "n": 19, "KIND": kind})
    system = {"solve": a, "lower": a.tril(), "upper": a.triu()}[kind][:19, :19]
    torch.testing.assert_close(made[:19], torch.linalg.solve(system, b[:19]), rtol=1e-12, atol=1e-13)
    assert not made[19:].any()


def test_what_triton_cannot_spell_is_written_in_the_rows() -> None:
    unspelled = {
        row.name
        for row in ops.ROWS.values()
        if isinstance(row.cpp, Element) and isinstance(row.cpp.triton, Unsupported)
    }
    assert unspelled == {name for name in REFUSED if "." in name}


INVERSES = """
import triton
import triton.language as tl

from nestloop.lowering.emit import elements, tiles


@triton.jit
def kernel(a_p, b_p, x_p, y_p, n, T: tl.constexpr, UPPER: tl.constexpr, UNIT: tl.constexpr):
    i = tl.arange(0, T)
    j = tl.arange(0, 16)
    a = tl.load(a_p + i[:, None] * T + i[None, :])
    b = tl.load(b_p + i[:, None] * 16 + j[None, :])
    inverse = tiles.inverse_triangular(a, i < n, UPPER, UNIT, tl.float64, "ieee")
    tl.store(x_p + i[:, None] * 16 + j[None, :], tiles.solved(inverse, b, i < n, tl.float64, "ieee"))
    tl.store(y_p + i[:, None] * 16 + j[None, :], tiles.solved(tl.trans(inverse), b, i < n, tl.float64, "ieee"))
"""


@pytest.mark.parametrize("unit", [True, False], ids=["unit", "pivots"])
@pytest.mark.parametrize("upper", [False, True], ids=["lower", "upper"])
@pytest.mark.parametrize(("size", "n"), [(16, 16), (32, 19), (64, 50)])
def test_one_inverse_solves_a_triangle_and_its_transpose(size: int, n: int, upper: bool, unit: bool) -> None:
    system, _ = triangle(n, 0.01, upper)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.full((size, m), 1e3, dtype=torch.float64) for m in (size, 16))  # what lies beyond is left out
    a[:n, :n], b[:n] = system, torch.randn(n, 16, generator=generator, dtype=torch.float64)
    x, y = torch.full_like(b, float("nan")), torch.full_like(b, float("nan"))
    kernel = cache.load(cache.write("inverses", INVERSES)).kernel
    tensors = {"a_p": a, "b_p": b, "x_p": x, "y_p": y}
    interpreted(kernel, (1,), {**tensors, "n": n, "T": size, "UPPER": upper, "UNIT": unit})
    for made, matrix, turned in ((x, system, upper), (y, system.mT, not upper)):
        exact = torch.linalg.solve_triangular(matrix, b[:n], upper=turned, unitriangular=unit)
        torch.testing.assert_close(made[:n], exact, rtol=0, atol=1e-12 * exact.abs().max().item())
        assert not made[n:].any()


OF_WHOLE = """
import triton
import triton.language as tl

from nestloop.lowering.emit import elements, tiles


@triton.jit
def kernel(a_p, b_p, x_p, S: tl.constexpr, WHOLE: tl.constexpr):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    tl.store(x_p + at, tiles.dot_of_whole(tl.load(a_p + at), tl.load(b_p + at), S, WHOLE))
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_factor_of_whole_numbers_takes_three_terms(side: str, dtype: torch.dtype):
    """No less exact than a product in the dtype, of numbers of any size, and of infinities too."""
    import triton.language as tl

    torch.manual_seed(0)
    whole = torch.randint(-256, 257, (16, 16)).to(dtype)
    other = (torch.randn(16, 16, dtype=torch.float64) * 10.0 ** torch.linspace(-12, 12, 16, dtype=torch.float64)).to(
        dtype
    )
    module = cache.load(cache.write("whole", OF_WHOLE))
    settings = {"S": tl.float32 if dtype == torch.float32 else tl.float64, "WHOLE": side}

    def made(whole: Tensor, other: Tensor) -> Tensor:
        a, b = (whole, other) if side == "left" else (other, whole)
        x = torch.empty(16, 16, dtype=dtype)
        interpreted(module.kernel, (1,), {"a_p": a.contiguous(), "b_p": b.contiguous(), "x_p": x, **settings})
        return x

    a, b = (whole.double(), other.double()) if side == "left" else (other.double(), whole.double())
    error = (made(whole, other).double() - a @ b).abs()
    assert (error <= 16 * torch.finfo(dtype).eps * (a.abs() @ b.abs())).all()
    other[3, 3], ones = -torch.inf, torch.ones_like(whole)
    found, wanted = made(ones, other), ones @ other if side == "left" else other @ ones
    assert torch.equal(found.isinf(), wanted.isinf()) and not found.isnan().any()


def test_sinh_far_from_zero() -> None:
    x = torch.tensor([-700.0, -40.0, -17.0, -1e-9, 0.0, 1e-9, 40.0, 700.0], dtype=torch.float64)
    torch.testing.assert_close(run(torch.ops.aten.sinh.default, (x,), {}), torch.sinh(x), rtol=1e-12, atol=0)
