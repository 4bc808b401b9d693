"""Every loop of the zoo: short, documented, differentiable, and the same however a sequence is split."""

from __future__ import annotations

import dataclasses
import io
import re

import pytest
import torch

import nestloop as nl
from nestloop import zoo
from nestloop.lang.maps import PerPosition
from nestloop.lang.state import counts_tokens, state_numbers
from nestloop.lowering.capture import capture_with
from nestloop.lowering.streams.forms import choose
from nestloop.lowering.tracer import Tracer
from nestloop.zoo import listing
from tests.drawn import SIZES, draw

LOOPS = zoo.loops()
STREAMS = [loop for loop in LOOPS if loop.spec.streams and counts_tokens(loop.spec)]
TOKENS = 9
each = pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
each_stream = pytest.mark.parametrize("loop", STREAMS, ids=lambda loop: loop.__name__)


def op(loop):
    """A loop on the reference, with chunks short enough for a few tokens."""
    schedule = loop.spec.schedule
    if isinstance(schedule, nl.Chunked) and schedule.size > 4:
        loop = type(loop.__name__, (loop,), {"schedule": dataclasses.replace(schedule, size=4)})
    return nl.compile(loop, backend="reference")


def leaves_of(loop, views, weights):
    """What the outer loop has a gradient of; not a gate that says where a token lies and no more."""
    fixed = {
        name
        for name, gate in loop.spec.gates.items()
        if any(isinstance(one, PerPosition) and not one.learned for one in gate.maps)
    }
    given = {name: view for name, view in views.items() if name not in fixed}
    return given | {name: weight for name, weight in weights.items() if weight.requires_grad}


def test_every_exported_loop_is_listed():
    exported = {name for name in zoo.__all__ if hasattr(getattr(zoo, name), "spec")}
    assert {loop.__name__ for loop in LOOPS} == exported and len(exported) > 30
    assert [row["name"] for row in zoo.catalogue()] == [loop.__name__ for loop in LOOPS]
    assert zoo.GOLDEN <= set(LOOPS)


@pytest.mark.parametrize("loop", [loop for loop in LOOPS if loop.spec.streams], ids=lambda loop: loop.__name__)
def test_its_form_is_what_the_compiler_chooses(loop):
    spec = loop.spec
    tracer = Tracer(spec, {**SIZES, "H": 2, **spec.default_dims}, None)
    form, _ = choose(capture_with(tracer), tracer)
    assert listing.form(spec) == form.name


def test_forms_are_recorded_of_streams_alone():
    recorded = [name for names in listing.STREAM_FORMS.values() for name in names]
    assert sorted(recorded) == sorted(loop.__name__ for loop in LOOPS if loop.spec.streams)


def test_the_readme_names_every_loop(root):
    section = (root / "README.md").read_text(encoding="utf-8").partition("## The zoo")[2].partition("## Commands")[0]
    named = re.findall(r"`(\w+)`", "".join(line for line in section.splitlines() if line.startswith("|")))
    assert sorted(named) == sorted(loop.__name__ for loop in LOOPS)


@each
def test_it_is_short_and_says_what_it_is(loop):
    assert re.fullmatch(r"\d{4}\.\d{5}", loop.paper)
    assert loop.__doc__ and loop.__doc__.splitlines()[0].endswith((".", ":"))
    assert 2 <= listing.lines(loop) <= 20


@each
def test_it_runs_forward_and_backward(loop):
    tokens = 16 if loop.spec.grid else TOKENS  # three chunks of four: a momentum matters then
    views, weights = draw(loop.spec, tokens)
    order = torch.rand(2, tokens).argsort(-1) if loop.spec.schedule.needs_order else None
    z, _ = op(loop)(views, weights, order=order)
    heads = loop.spec.heads or 2
    assert z.shape[:3] == (2, heads, tokens) and z.isfinite().all()
    leaves = leaves_of(loop, views, weights)
    weight = torch.randn_like(z)
    for name, gradient in zip(leaves, torch.autograd.grad((z * weight).sum(), list(leaves.values())), strict=True):
        assert gradient.isfinite().all() and gradient.any(), name


def test_lines_are_those_of_code():
    assert listing.lines(zoo.CausalLinearAttention) == 4 + 7
    assert listing.lines(zoo.RetNet) == listing.lines(zoo.CausalLinearAttention) + 2  # its own two
    assert listing.lines(zoo.LightningAttention) == listing.lines(zoo.RetNet)  # and as many without a base
    assert listing.lines(zoo.MTTTMLP4) == listing.lines(zoo.MTTTMLP) + 1
    assert listing.lines(zoo.Moneta) == 6 + 10 + 2  # a function that a body calls counts
    assert listing.lines(zoo.LogLinearAttention) == 2 + 6 + 11  # and an optimizer of its own


@pytest.mark.parametrize(
    "schedule, text",
    [
        (nl.FullBatch(2), "FullBatch(2)"),
        (nl.Shuffled(4), "Shuffled(4)"),
        (nl.Online(), "Online()"),
        (nl.Online(read="before", micro=2), 'Online(read="before", micro=2)'),
        (nl.Causal(), "Causal(16)"),
        (nl.Causal(8, reset=16), "Causal(8, reset=16)"),
        (nl.Chunked(8, "apply-update", inclusive=True), 'Chunked(8, "apply-update", inclusive=True)'),
        (nl.Chunked(1, anchor=0), 'Chunked(1, "update-apply", anchor=0)'),
        (nl.Program(("apply", 0, "N")), "Program(1 operations)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_schedules_are_shown_as_they_are_written(schedule, text):
    assert listing.schedule_text(schedule) == text


def test_legal_schedules():
    assert listing.legal(zoo.DeltaNet) == ["FullBatch", "Shuffled", "Causal", "Online", "Chunked", "Program"]
    assert listing.legal(zoo.GatedDeltaNet) == ["Online"]  # its gradient is taken at the decayed state
    assert listing.legal(zoo.Atlas) == ["Chunked", "Program"]  # it orthogonalises
    assert listing.legal(zoo.DepthwiseBranch) == ["FullBatch"]  # it needs the whole grid
    assert listing.legal(zoo.SelfAttention) == []


def test_states_are_counted():
    sizes = {row["name"]: row["state per head"] for row in zoo.catalogue()}
    assert sizes["DeltaNet"] == "dk * dv"
    assert sizes["Mesa"] == "dk * dv + dk * dk"
    assert sizes["Moneta"] == "2 * d * (4 * d) + 2 * (4 * d) * d"  # and its chunk's anchor
    assert sizes["SelfAttention"] == "the tokens themselves"


def in_pieces(loop, views, weights, lengths):
    """z and the state at the end, from calls of these lengths that hand the state on."""
    run, state, outputs, start = op(loop), None, [], 0
    axes = {name: 1 if view.shared else 2 for name, view in loop.spec.inputs.items()}
    for length in lengths:
        piece = {name: view.narrow(axes[name], start, length) for name, view in views.items()}
        z, state = run(piece, weights, state)
        outputs.append(z)
        start += length
    return torch.cat(outputs, 2), state


@each_stream
def test_a_split_sequence_is_the_whole_one(loop):
    views, weights = draw(loop.spec, 18)  # more than a chunk of sixteen
    whole, end = op(loop)(views, weights)
    leaves = [*leaves_of(loop, views, weights).values()]
    weight = torch.randn_like(whole)
    expected = torch.autograd.grad((whole * weight).sum(), leaves, retain_graph=True)
    for lengths in ([7, 0, 11], [1] * 18):
        z, state = in_pieces(loop, views, weights, lengths)
        torch.testing.assert_close(z, whole, rtol=1e-10, atol=1e-10)
        assert set(state) == set(end) and state["position"] == end["position"] == 18
        for name in loop.spec.entries:
            torch.testing.assert_close(state[name], end[name], rtol=1e-10, atol=1e-10)
        gradients = torch.autograd.grad((z * weight).sum(), leaves)
        for mine, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@each_stream
def test_a_state_is_kept_as_it_is(loop):
    views, weights = draw(loop.spec, 4)
    sizes = SIZES | loop.spec.default_dims
    _, state = op(loop)(views, weights)
    assert list(state) == [*loop.spec.entries, "position"]
    for name, entry in loop.spec.entries.items():
        rows = [entry.rows] if entry.rows else []
        assert list(state[name].shape) == [2, 2, *rows, *[e.size(sizes) for e in entry.like.dims]], name
    assert state_numbers(loop.spec, sizes) == sum(state[name][0, 0].numel() for name in loop.spec.entries)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    kept = torch.load(file, weights_only=True)
    mine, theirs = (op(loop)(views, weights, each)[0] for each in (state, kept))
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("loop", [zoo.Titans, zoo.CausalLaCT, zoo.OmegaNet], ids=lambda loop: loop.__name__)
def test_explain_counts_all_that_a_state_holds(loop):
    views, weights = draw(loop.spec, 4)
    _, state = op(loop)({n: v.float() for n, v in views.items()}, {n: w.float() for n, w in weights.items()})
    held = sum(state[name][0, 0].nbytes for name in loop.spec.entries)
    text = nl.explain(loop, H=2, **{name: SIZES[name] for name in loop.spec.dim_names & {*SIZES}})
    assert f" = {held // 4:,} numbers, {held:,} bytes in float32 per head and sequence" in text
    assert f"  {2 * held:,} bytes a sequence with H = 2" in text


@pytest.mark.parametrize("loop", [zoo.GatedDeltaNet, zoo.Mesa, zoo.OmegaNet], ids=lambda loop: loop.__name__)
def test_single_precision_follows_double(loop):
    views, weights = draw(loop.spec, TOKENS)
    exact, _ = op(loop)(views, weights)
    z, state = op(loop)({n: v.float() for n, v in views.items()}, {n: w.float() for n, w in weights.items()})
    assert z.dtype == torch.float32 and {t.dtype for t in state.values() if torch.is_tensor(t)} == {torch.float32}
    torch.testing.assert_close(z.double(), exact, rtol=1e-4, atol=1e-4)
