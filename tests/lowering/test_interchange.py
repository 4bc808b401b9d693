"""Sums over tokens with blocks of a long axis outside: both parts of a graph together give what the whole does."""

from __future__ import annotations

import pytest
import torch
from torch import fx

import nestloop as nl
from nestloop import zoo
from nestloop.lowering import names, pipeline
from nestloop.lowering.schedule.interchange import interchanged
from tests.lowering.test_prepared import computed, drawn

SIZES = {"d": 6, "D": 40, "H": 2}
HIDDEN = 24


def piece_of(loop: type[nl.Loop], name: str) -> tuple[fx.GraphModule, list[str], list[str]]:
    """A piece, or its backward ("_vjp"): its graph, the names of its results, and of those that tokens add up to."""
    spec = names.safe(loop.spec, True)
    piece = pipeline.stages(spec, SIZES, None, losses=False, carried=False).pieces[name.removesuffix("_vjp")]
    if not name.endswith("_vjp"):
        return piece.forward, list(piece.results), [r for r in piece.results if r.startswith("gradient_")]
    views = [f"d_{n}" for n in spec.inputs]
    results = [f"d_{n}" for n in piece.wrt]
    return piece.backward, results, [r for r in results if r not in views and not r.startswith("d_projected")]


CASES: dict[tuple[type[nl.Loop], str], tuple[int, list[str]]] = {
    (zoo.MTTTMLP, "gradient"): (1, ["gradient_w1", "gradient_b1", "gradient_w2"]),
    (zoo.MTTTMLP, "gradient_vjp"): (2, ["d_w1", "d_b1", "d_w2", "d_k"]),
    (zoo.MTTTMLP, "readout_vjp"): (0, ["d_w1", "d_b1", "d_w2", "d_q"]),
    (zoo.MTTTMLPSGD4, "gradient_vjp"): (2, ["d_w1", "d_b1", "d_w2", "d_k"]),
}


@pytest.mark.parametrize(("loop", "name"), CASES, ids=[f"{loop.__name__}-{name}" for loop, name in CASES])
def test_both_parts_are_the_whole(loop: type[nl.Loop], name: str):
    module, results, summed = piece_of(loop, name)
    cut = interchanged(module, results, summed, HIDDEN, "row_")
    assert cut is not None
    handed, moved = CASES[loop, name]
    assert len(cut.handed) == handed
    assert [r for r, other in zip(results, cut.moved, strict=True) if other] == moved
    torch.manual_seed(0)
    given = {n: t + 10 if n.startswith("hoisted") and t.numel() == 1 else 0.3 * t for n, t in drawn(module, 7).items()}
    wanted = computed(module, given)
    rows = computed(cut.rows, given)
    rows, made = rows[: len(results)], dict(zip(cut.handed, rows[len(results) :], strict=True))
    sums = computed(cut.sums, given | {name: value for name, value in made.items() if value is not None})
    for result, whole, stays, other in zip(results, wanted, rows, sums, strict=True):
        assert stays is None or other is None, result
        found = other if stays is None else stays
        if whole is not None:
            torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)


def test_what_is_handed_on_has_no_long_axis():
    cut = interchanged(*piece_of(zoo.MTTTMLP, "gradient_vjp"), HIDDEN, "row_")
    assert cut is not None
    shapes = {n.name: n.meta["val"].shape[1:] for n in cut.sums.graph.find_nodes(op="placeholder")}
    assert [tuple(shapes[name]) for name in cut.handed] == [(6,), (6,)]


@pytest.mark.parametrize(("name", "size"), [("readout", HIDDEN), ("gradient", 7)])
def test_a_graph_without_such_sums_stays_as_it_is(name: str, size: int):
    assert interchanged(*piece_of(zoo.MTTTMLP, name), size, "row_") is None
