"""Every row of `lowering.ops` in C++: what its spelling computes is what the op computes, or its refusal says why.

All rows are built as one unit. A row that is taken apart into several loops, views or copies is tested as it is used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from nestloop.lowering import ops
from nestloop.lowering.emit.cpp import CppFunction
from nestloop.lowering.ops import Op
from nestloop.lowering.ops.row import Unsupported
from nestloop.lowering.runtime import compiler
from tests.lowering.ops.cases import CASES, case

REFUSED = [row for row in ops.ROWS.values() if isinstance(row.cpp, Unsupported)]
SPELLED = [name for name in CASES if name not in {row.name for row in REFUSED}]


def function(name: str, identifier: str) -> CppFunction:
    """The generated function of a case's op alone."""
    target, arguments, more = case(name)
    graph = fx.Graph()
    nodes = {}
    for index, tile in enumerate(t for t in tree_leaves(arguments) if isinstance(t, Tensor)):
        nodes[id(tile)] = graph.placeholder(f"x{index}")
        nodes[id(tile)].meta["val"] = tile
    node = graph.call_function(target, tree_map(lambda a: nodes.get(id(a), a), arguments), more)
    node.meta["val"] = target(*arguments, **more)
    graph.output((node,))
    return CppFunction(
        identifier, fx.GraphModule(torch.nn.Module(), graph), ["y"], [False], [n.name for n in nodes.values()], name, {}
    )


Call = Callable[[str, str], tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def results() -> Call:
    """(case, "float" or "double") -> what the C++ computes, and what the op does in float64."""
    functions = {name: function(name, f"row_{i}") for i, name in enumerate(SPELLED)}
    parts = ['#include "tiles.h"', *[f.write() for f in functions.values()]]
    for f in functions.values():
        assert not f.has_once  # a result alone: nothing is shared by tiles
        given = "".join(f", x[{name[1:]}]" for name in f.inputs)
        parts.append(
            f'extern "C" void call_{f.name}(const S* const* x, S* y) {{\n'
            f"    static S scratch[1 << 16];\n    {f.name}(0, 0{given}, y, scratch);\n}}"
        )
    source = "\n\n".join(parts) + "\n"
    libraries = {s: compiler.loaded("rows", source, s) for s in ("float", "double")}

    def call(name: str, scalar: str) -> tuple[Tensor, Tensor]:
        target, arguments, more = case(name)
        dtype = torch.float32 if scalar == "float" else torch.float64
        tiles = [t.to(dtype).contiguous() for t in tree_leaves(arguments) if isinstance(t, Tensor)]
        exact = target(*arguments, **more)
        found = torch.full(exact.shape, float("nan"), dtype=dtype)
        pointers = (ctypes.c_void_p * max(len(tiles), 1))(*[t.data_ptr() for t in tiles])
        getattr(libraries[scalar], f"call_{functions[name].name}")(pointers, ctypes.c_void_p(found.data_ptr()))
        return found, exact.double()

    return call


@pytest.mark.parametrize("name", SPELLED)
def test_the_spelling_is_the_op(name: str, results: Call):
    found, exact = results(name, "double")
    torch.testing.assert_close(found, exact, rtol=1e-13, atol=1e-14)
    found, exact = results(name, "float")
    torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.name)
def test_a_refusal_has_its_reason(row: Op):
    assert isinstance(row.cpp, Unsupported) and len(row.cpp.reason) > 10
    assert case(row.name)


FUNCTIONS: dict[str, tuple[str, Callable[[Tensor], Tensor], float]] = {
    "exp": ("exp_(x)", torch.exp, 88.0),
    "tanh": ("tanh_(x)", torch.tanh, 12.0),
    "erf": ("erf_(x)", torch.erf, 6.0),
    "sigmoid": ("sigmoid(x)", torch.sigmoid, 60.0),
}


@pytest.fixture(scope="module")
def elementary() -> ctypes.CDLL:
    loops = [
        f'extern "C" void f_{name}(long n, const S* from, S* to) {{\n#pragma omp simd\n'
        f"    for (long i = 0; i < n; i++) {{\n        const S x = from[i];\n        to[i] = {text};\n    }}\n}}"
        for name, (text, _, _) in FUNCTIONS.items()
    ]
    return compiler.loaded("elementary", "\n\n".join(['#include "tiles.h"', *loops]) + "\n", "float")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementary_functions_are_right_to_two_units(name: str, elementary: ctypes.CDLL):
    _, exact, limit = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(200_000, generator=generator) * 10.0 ** torch.randint(-6, 1, (200_000,), generator=generator)
    x = torch.cat([torch.linspace(-limit, limit, 400_001), small.clamp(-limit, limit)]).float()
    y = torch.empty_like(x)
    getattr(elementary, f"f_{name}")(ctypes.c_long(len(x)), *[ctypes.c_void_p(t.data_ptr()) for t in (x, y)])
    wanted = exact(x.double())
    unit = torch.maximum(wanted.abs() * 2.0**-23, torch.tensor(2.0**-126, dtype=torch.float64))  # at most
    assert ((y.double() - wanted).abs() / unit).max() <= 2.0


def test_elementary_functions_at_the_ends(elementary: ctypes.CDLL):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -200.0, 200.0])
    for name, (_, exact, _) in FUNCTIONS.items():
        y = torch.empty_like(x)
        getattr(elementary, f"f_{name}")(ctypes.c_long(len(x)), *[ctypes.c_void_p(t.data_ptr()) for t in (x, y)])
        torch.testing.assert_close(y, exact(x), rtol=1e-6, atol=0, equal_nan=True)
