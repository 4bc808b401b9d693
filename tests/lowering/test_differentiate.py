"""The differentiated pieces: their gradients are PyTorch's, and every op of theirs comes from a line of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nestloop import zoo
from nestloop.errors import Location
from nestloop.lowering import ops
from nestloop.lowering.capture import capture_with
from nestloop.lowering.differentiate import Piece, pieces
from nestloop.lowering.tracer import Tracer

SIZES = {"d": 4, "D": 8, "H": 2}
LOOPS: list[Any] = [zoo.MTTTLinear, zoo.MTTTMLP, zoo.MTTTMLPSGD4, zoo.GatedBranch, zoo.LinearAttentionElu]


def differentiated(loop: Any, losses: bool) -> dict[str, Piece]:
    tracer = Tracer(loop.spec, SIZES, None)
    return pieces(capture_with(tracer), tracer, losses)


@pytest.mark.parametrize("loop", LOOPS)
def test_every_captured_op_knows_its_line(loop: Any):
    captured = capture_with(Tracer(loop.spec, SIZES, None))
    for module in (captured.loss, captured.readout):
        assert module is not None
        calls = [n for n in module.graph.nodes if n.op == "call_function" and not ops.is_size_op(n.target)]
        assert calls
        for node in calls:
            where = node.meta.get("where")
            assert isinstance(where, Location) and where.text, node.format_node()
            assert Path(where.file).parent.name == "zoo"


@pytest.mark.parametrize("loop", LOOPS)
def test_every_piece_is_made_of_ops_with_a_row(loop: Any):
    for piece in differentiated(loop, True).values():
        for module in (piece.forward, piece.backward):
            calls = [n for n in module.graph.nodes if n.op == "call_function"]
            assert all(ops.admitted(n.target) for n in calls)
            assert all(isinstance(n.meta.get("val"), torch.Tensor) or ops.is_size_op(n.target) for n in calls)


@pytest.mark.parametrize("loop", LOOPS)
def test_losses_that_nobody_wants_cost_nothing(loop: Any):
    with_losses, without = (differentiated(loop, losses) for losses in (True, False))
    assert set(with_losses) - set(without) == {"final_loss"}
    for name, piece in without.items():
        assert not any("loss" in result for result in piece.results)
        assert len(piece.forward.graph.nodes) <= len(with_losses[name].forward.graph.nodes)


def test_derivative_ops_keep_the_line_they_come_from():
    for piece in differentiated(zoo.MTTTMLP, False).values():
        calls = [n for n in piece.backward.graph.nodes if n.op == "call_function" and not ops.is_size_op(n.target)]
        placed = [n for n in calls if "where" in n.meta]
        assert len(placed) >= 0.75 * len(calls) or "update" in piece.name


def test_a_start_frozen_at_zero_leaves_less_to_do():
    made = differentiated(zoo.MTTTLinear, False)
    first = [name for name in made if name.startswith("first_")]
    assert first

    def products(piece: Piece) -> int:
        return sum(n.target is torch.ops.aten.mm.default for n in piece.forward.graph.nodes)

    assert sum(products(made[name]) for name in first) < sum(products(made[n.removeprefix("first_")]) for n in first)
