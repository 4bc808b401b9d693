"""The comparison of streams with the reference can fail: every fault planted here is seen by a few tokens of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import nestloop as nl
from nestloop.lowering import lower
from nestloop.lowering.emit.stream import StreamEmitter
from nestloop.lowering.streams import chunked, coefficients, dual, forms, solved
from nestloop.lowering.streams.coefficients import Coefficients, Rows
from nestloop.lowering.streams.step import Step
from tests.lowering.comparison import differences, run, run_in_parts
from tests.lowering.random_streams import RandomStream

aten = torch.ops.aten
Patch = pytest.MonkeyPatch

VICTIMS = {
    "momentum": RandomStream(
        "biased", "L2", "plain", nl.Causal(3), "gate", decay="gate", momentum=("gate",), grouped=True
    ),
    "before": RandomStream("linear", "L2", "plain", nl.Causal(3, "before"), "gate"),
    "delta": RandomStream("linear", "L2", "plain", nl.Online(), "gate", decay="gate", decay_order="before"),
    "scale": RandomStream("biased", "L2", "plain", nl.Causal(3), "gate", scale="gate"),
    "anchor": RandomStream("MLP", "L2", "plain", nl.Chunked(2, "apply-update", anchor=4), "gate", decay="gate"),
    "held": RandomStream("linear", "held key", "plain", nl.Online(), "gate"),
    "nonlinear": RandomStream("MLP", "L2", "plain", nl.Causal(3), "gate"),
}


@pytest.fixture(autouse=True)
def nothing_is_kept(tmp_path: Path, monkeypatch: Patch):
    """Faulty code stays out of every cache."""
    monkeypatch.setenv("NESTLOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lower, "_PLANS", {})


def worst(victim: str, tokens: int = 8, compiled: type[nl.Loop] | None = None) -> float:
    """The largest difference from the reference of one victim, over its values and gradients."""
    loop = VICTIMS[victim].declare()
    inputs = VICTIMS[victim].inputs(loop, tokens)
    found = run(nl.compile(compiled or loop, backend="torch"), inputs)
    return max(differences(found, run(nl.compile(loop, backend="reference"), inputs)).values())


@pytest.mark.parametrize("victim", VICTIMS)
def test_without_a_fault_the_backends_agree(victim: str):
    assert worst(victim) < 1e-12


def shifted(function: Callable[..., Coefficients], *parts: str) -> Callable[..., Coefficients]:
    """Coefficients of which some parts are those of the row above."""

    def faulty(optimizer: Any, weight: Any, rows: Rows, first_only: Any = None) -> Coefficients:
        made = function(optimizer, weight, rows, first_only)
        above = coefficients.before(rows, made)
        return replace(made, **{part: getattr(above, part) for part in parts})

    return faulty


def lower_without_diagonal(rows: Rows, strictly: bool = False) -> Tensor:
    return rows.like.new_ones(rows.count, rows.count).tril(-1)


def scale_above(step: Step, name: str, slow: Any, keys: Any, of: Any = Step.row_scale) -> Tensor:
    row = step.rows(keys, slow).position()
    return coefficients.exact((row[:, None] - row[None, :] == 1).to(torch.float32), of(step, name, slow, keys))


def after_the_gradient(step: Step, rows: Rows, after: Coefficients) -> Coefficients:
    return coefficients.before(rows, after)


FAULTS: dict[str, tuple[str, Callable[[Patch], None]]] = {
    "the token's own step is left out": ("momentum", lambda m: m.setattr(Rows, "lower", lower_without_diagonal)),
    "the token's own step is taken too early": ("before", lambda m: m.setattr(dual, "before", lambda rows, c: c)),
    "the decay of the row above": (
        "momentum", lambda m: m.setattr(dual, "coefficients", shifted(coefficients.coefficients, "base"))
    ),
    "the momentum of the row above": (
        "momentum", lambda m: m.setattr(dual, "coefficients", shifted(coefficients.coefficients, "momenta"))
    ),
    "a mix of the row above": (
        "momentum", lambda m: m.setattr(dual, "coefficients", shifted(coefficients.coefficients, "mix"))
    ),
    "the decay after the gradient": ("delta", lambda m: m.setattr(solved, "_taken", after_the_gradient)),
    "the scale of the row above": ("scale", lambda m: m.setattr(Step, "row_scale", scale_above)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_step_is_seen(fault: str, monkeypatch: Patch):
    victim, plant = FAULTS[fault]
    plant(monkeypatch)
    assert worst(victim) > 1e-6


SOURCE_FAULTS = {
    "the wrong state is kept": ("momentum", r"_group // _spacing - 1", "0"),
    "a state is kept one chunk late": ("momentum", r"_kept\.append\(\((.*)\)\)$", r"_kept.insert(0, (\1))"),
    "the anchor stays where it was": ("anchor", r"if _from % 4 == 0:", "if _from == 0:"),
    "the cotangent of an anchor is lost": ("anchor", r"d_w = add\(d_w, d_w__anchor\)", "pass"),
    "a cotangent of the state is lost": ("momentum", r"d_w = c_w$", "d_w = zeros(d_w)"),
    "a cotangent of the momentum is lost": ("momentum", r"d_w__momentum = c_w__momentum$", "pass"),
    "losses of another chunk": ("before", r"d_losses\[:, :, _from:_to\]", "d_losses[:, :, : _to - _from]"),
}


@pytest.mark.parametrize("fault", SOURCE_FAULTS)
def test_a_fault_in_the_generated_scan_is_seen(fault: str, monkeypatch: Patch):
    victim, pattern, replacement = SOURCE_FAULTS[fault]
    written = StreamEmitter._module

    def faulty(self: StreamEmitter, parts: list[str], title: str) -> str:
        text, count = re.subn(pattern, replacement, written(self, parts, title), flags=re.MULTILINE)
        assert count, f"{pattern} does not occur in\n{text}"
        return text

    monkeypatch.setattr(StreamEmitter, "_module", faulty)
    assert worst(victim) > 1e-6


def test_a_dropped_second_order_term_is_seen(monkeypatch: Patch):
    """Without gelu's second derivative the backward of a chunk treats the inner cotangents as constants."""
    made_piece = forms.make_piece
    dropped = 0

    def faulty(*args: Any, **settings: Any) -> Any:
        nonlocal dropped
        piece = made_piece(*args, **settings)
        graph: fx.Graph = piece.backward.graph
        hidden = VICTIMS["nonlinear"].sizes["m"]
        terms = [
            n
            for n in graph.find_nodes(op="call_function", target=aten.add.Tensor)
            if n.meta["val"].ndim == 2
            and isinstance(n.meta["val"].shape[1], int)  # comparing n with a number decides on n
            and n.meta["val"].shape[1] == hidden
            and all(isinstance(a, fx.Node) and a.meta["val"].ndim == 2 for a in n.args)
        ]
        if terms:
            terms[-1].replace_all_uses_with(terms[-1].args[0])
            graph.eliminate_dead_code()
            dropped += 1
        return piece

    monkeypatch.setattr(forms, "make_piece", faulty)
    assert worst("nonlinear") > 1e-6 and dropped


def test_a_weight_that_is_not_held_is_seen():
    loop = VICTIMS["held"].declare()

    def loss(self: Any, f: Any, t: Any) -> Tensor:
        return (f(t.k) * (f(t.p) - t.v)).sum(-1)

    learning = type("Learning", (loop,), {"loss": loss})
    assert worst("held", compiled=learning) > 1e-6


def test_a_gradient_that_no_longer_waits_is_seen(monkeypatch: Patch):
    """Of a chunk that several calls bring, only a sequence in parts knows."""
    monkeypatch.setattr(chunked, "_add", lambda waiting, value: value)
    loop = replace(VICTIMS["anchor"], schedule=nl.Chunked(4, "apply-update")).declare()
    inputs = VICTIMS["anchor"].inputs(loop, 8)
    op, reference = (nl.compile(loop, backend=backend) for backend in ("torch", "reference"))
    assert max(differences(run(op, inputs), run(reference, inputs)).values()) < 1e-12
    assert max(differences(run_in_parts(op, inputs, [2]), run(reference, inputs)).values()) > 1e-6
