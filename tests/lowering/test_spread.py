"""Tiles of products over warps: what the model expects of Triton's layouts is what Triton chooses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import pytest

from benchmarks import static
from nestloop import zoo
from nestloop.lowering.emit.triton_chains import MOST_REGISTERS, worth_while
from nestloop.lowering.runtime.triton_plan import TritonPlan
from nestloop.lowering.schedule.devices import DEVICES
from nestloop.lowering.schedule.roofline import EXACT
from nestloop.lowering.schedule.spread import BOTH, COLUMNS, ROWS, Spread, along, copies


@pytest.mark.parametrize("axis", [ROWS, COLUMNS, BOTH])
def test_its_text_is_read_again(axis: str):
    spread = Spread(16, 64, axis)
    assert Spread.parse(str(spread)) == spread


def test_copies_are_of_warps_beyond_the_axis():
    assert [Spread(32, 32, ROWS).copies(warps) for warps in (1, 2, 4, 8)] == [1, 1, 2, 4]
    assert [Spread(16, 32, COLUMNS).copies(warps) for warps in (1, 4, 8)] == [1, 1, 2]
    assert [Spread(16, 16).copies(warps) for warps in (1, 2, 4)] == [1, 1, 2]
    wide = Spread(64, 32, ROWS)
    assert [wide.copies(warps) for warps in (4, 8)] == [1, 2]
    assert wide.copies(8, DEVICES["mi300x"]) == 1.0
    assert (along(32, 32), along(16, 32), along(64, 16)) == (ROWS, COLUMNS, ROWS)


def test_the_average_is_by_flops():
    products = {Spread(32, 32, ROWS): 3, Spread(16, 32, ROWS): 1}
    assert copies(products, 4) == (3 * 2 + 4) / 4
    assert copies({}, 8) == copies(dict.fromkeys(products, 0), 8) == 1  # of a kernel that calls none


def test_fewer_warps_where_the_others_would_compute_the_same():
    square = {Spread(32, 32, ROWS): 10}
    assert worth_while(4, square, alive=4096) == 2
    assert worth_while(8, {Spread(16, 16, ROWS): 1, Spread(16, 32, ROWS): 1}, alive=512) == 1
    assert worth_while(4, square, alive=3 * 32 * MOST_REGISTERS) == 4  # what a thread holds does not fit two
    assert worth_while(8, {**square, Spread(64, 64, ROWS): 1}, alive=4096) == 8  # wide instructions take four together
    assert worth_while(4, {}, alive=512) == worth_while(4, {Spread(16, 16, ROWS): 0}, alive=512) == 4


def test_the_last_product_is_one_whose_axis_all_warps_share():
    """TTT-Linear's cotangents end with products of chunks of 16 rows and of the state: behind the latter, of 32 rows
    and columns, four warps would compute all others four times."""
    functions = kernel("TTTLinear", "backward", 32).work["functions"]
    spreads = [Spread.parse(text) for text in functions["chunk_vjp"]["products"]]
    assert {spread.along for spread in spreads} == {COLUMNS}
    assert {(spread.rows, spread.columns) for spread in spreads} == {(16, 16), (16, 32), (32, 32)}


def kernel(loop: str, name: str, d: int) -> TritonPlan:
    plans = static.plans(getattr(zoo, loop), d).values()
    return next(one for plan in plans if isinstance(plan, TritonPlan) for one in plan.forms if name in one.kernels)


def expected(plan: TritonPlan, name: str, warps: int) -> float:
    """The copies of a kernel's products, as the model has it."""
    products: Counter[Spread] = Counter()
    for called in plan.work["kernels"][name]["calls"]:
        function = plan.work["functions"][called]
        for which, terms in (("products", 1), ("exact", EXACT)):
            products.update({Spread.parse(text): terms * flops for text, flops in function[which].items()})
    return copies(products, warps)


def found(text: str) -> float:
    """The same, of the layouts in Triton's own code, ttgir."""
    layouts = {
        layout[1]: (int(layout[2]), int(layout[3]))
        for layout in re.finditer(r"^#(mma\d*) = #ttg\.nvidia_mma<\{versionMajor = 2.*?\[(\d+), (\d+)\]", text, re.M)
    }

    def dots() -> Iterator[tuple[int, float]]:
        for line in text.splitlines():
            if match := re.search(r" tt\.dot .*: tensor<\d+x(\d+)x.*-> tensor<(\d+)x(\d+)xf32, #(mma\d*)>", line):
                inner, rows, columns = map(int, match.groups()[:3])
                over_rows, over_columns = layouts[match[4]]
                again = max(1, 16 * over_rows / rows) * max(1, 8 * over_columns / columns)
                yield inner * rows * columns, again

    counted = list(dots())
    return sum(flops * again for flops, again in counted) / sum(flops for flops, _ in counted)


@pytest.mark.parametrize(
    ("loop", "name", "d"),
    [
        ("GatedDeltaNet", "forward_outputs", 32),
        ("GLA", "forward_states", 32),
        ("RWKV6", "backward_cotangents", 32),
        ("TTTLinear", "forward", 32),
        ("TTTLinear", "backward", 32),
    ],
)
def test_layouts_are_those_that_triton_chooses(loop: str, name: str, d: int):
    pytest.importorskip("triton")
    from nestloop.lowering.runtime import offline

    plan = kernel(loop, name, d)
    for warps in (2, 4):
        text = offline.compiled(plan.with_warps((warps, warps)), name, "sm_90").text["ttgir"]
        assert found(text) == pytest.approx(expected(plan, name, warps)), f"{warps} warps"
    assert expected(plan, name, plan.options(name)["num_warps"]) < 1.6
