"""The comparison with the reference can fail: every fault planted here is seen by it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import nestloop as nl
from nestloop.lowering import lower, ops, pipeline, simplify
from nestloop.lowering.emit.torch import TorchEmitter, TorchSource
from nestloop.lowering.runtime.code import Code
from tests.lowering.comparison import compare, random_inputs, tokens_at_a_time

aten = torch.ops.aten


class TwoLayers(nl.Learner):
    """tanh(x W1 + b) W2."""

    w1 = nl.fast("a", "3*a")
    b = nl.fast("3*a")
    w2 = nl.fast("3*a", "e")

    def forward(self, x):
        return torch.tanh(x @ self.w1 + self.b) @ self.w2


class Victim(nl.Loop):
    """Every part that a fault could be in: an order, a sum, a rate in the dims, several steps, losses."""

    learner = TwoLayers
    optimizer = nl.SGD(lr="1/(3*N)")
    schedule = nl.Shuffled(3, reduction="sum")
    k, q, v = nl.view("a"), nl.view("a"), nl.view("e")
    x = nl.view("e", shared=True)
    scale = nl.slow("e")

    def loss(self, f, t):
        return 0.5 * (f(t.k) * self.scale - t.v * t.x).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)


@pytest.fixture(autouse=True)
def nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Faulty code stays out of every cache."""
    monkeypatch.setenv("NESTLOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lower, "_PLANS", {})
    monkeypatch.setattr(Code, "rows", tokens_at_a_time(2), raising=False)


def worst() -> float:
    inputs = random_inputs(Victim.spec, {"a": 3, "e": 4, "H": 2}, sequences=2, tokens=8, order_per_sequence=True)
    return max(compare(Victim, inputs).values())


def test_without_a_fault_the_backends_agree():
    assert worst() < 1e-12


SOURCE_FAULTS = {
    "the rate is applied twice": (r"learning_rate\(_step,", "2 * learning_rate(_step,"),
    "the order is ignored": (r"\btake\((\w+), _order,", r"take(\1, None,"),
    "the mean instead of the sum": (r"'sum'", "'mean'"),
    "a token is left out": (r"tiles\(_start, _stop, ", "tiles(_start, max(_start + 1, _stop - 1), "),
    "tiles overwrite one another": (r"gradient_(\w+) = add\(gradient_\1, c_\1\)", r"gradient_\1 = c_\1"),
    "gradients of batches in the wrong order": (r"= _tile_(\w+) \+ _pieces_\1", r"= _pieces_\1 + _tile_\1"),
    "every step recomputed from the first state": (r"_starts\[_step\]", "_starts[0]"),
    "losses read at the wrong step": (r"d_losses\[\.\.\., _step\]", "d_losses[..., 0]"),
    "a running cotangent is lost": (r"d_(\w+) = add\(d_\1, c_\1\)", r"d_\1 = c_\1"),
    "read out with earlier weights": (r"\n    _z = \[\]", "\n    w1, w2 = _between[0][0], _between[0][2]\n    _z = []"),
}


@pytest.mark.parametrize("fault", SOURCE_FAULTS)
def test_a_fault_in_the_generated_code_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch):
    pattern, replacement = SOURCE_FAULTS[fault]
    emit = TorchEmitter.emit

    def faulty(self: TorchEmitter) -> TorchSource:
        source = emit(self)
        once = fault == "a token is left out"  # in forward; backward could not put the tokens back
        text, count = re.subn(pattern, replacement, source.text, count=int(once))
        assert count, f"{pattern} does not occur in\n{source.text}"
        return dataclasses.replace(source, text=text)

    monkeypatch.setattr(TorchEmitter, "emit", faulty)
    assert worst() > 1e-6


def test_a_dropped_second_order_term_is_seen(monkeypatch: pytest.MonkeyPatch):
    """tanh's second derivative: without it, the backward of a step treats the inner gradient as a constant."""
    pieces = pipeline.pieces
    dropped = 0

    def faulty(*args: Any) -> Any:
        nonlocal dropped
        made = pieces(*args)
        graph: fx.Graph = made["gradient"].backward.graph
        candidates = [
            n
            for n in graph.find_nodes(op="call_function", target=aten.add.Tensor)
            if all(isinstance(a, fx.Node) and a.meta["val"].ndim == n.meta["val"].ndim for a in n.args)
        ]
        victim = candidates[-1]
        victim.replace_all_uses_with(victim.args[0])
        graph.eliminate_dead_code()
        dropped += 1
        return made

    monkeypatch.setattr(pipeline, "pieces", faulty)
    assert worst() > 1e-6 and dropped


def test_a_wrong_derivative_is_seen(monkeypatch: pytest.MonkeyPatch):
    table = {**ops.decompositions(), aten.tanh_backward.default: lambda g, y: g * (1 - y)}
    monkeypatch.setattr(ops, "decompositions", lambda: table)
    assert worst() > 1e-6


def test_a_wrong_spelling_is_seen(monkeypatch: pytest.MonkeyPatch):
    wrong = dataclasses.replace(ops.ROWS[aten.tanh.default], spell=lambda o: f"{o[0]}.sin()")
    monkeypatch.setitem(ops.ROWS, aten.tanh.default, wrong)
    assert worst() > 1e-6


def test_a_wrong_identity_is_seen(monkeypatch: pytest.MonkeyPatch):
    fold = simplify._Rebuild._fold_factor

    def faulty(self: Any, node: fx.Node, args: list[Any], numbers: list[Any]) -> Any:
        lost_sign = node.target is aten.neg.default and isinstance(args[0], fx.Node)
        return args[0] if lost_sign else fold(self, node, args, numbers)

    monkeypatch.setattr(simplify._Rebuild, "_fold_factor", faulty)
    assert worst() > 1e-6
