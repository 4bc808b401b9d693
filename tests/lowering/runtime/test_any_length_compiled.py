"""One graph of `torch.compile` and of `torch.export` serves sequences of any length, with gradients and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import nestloop as nl
from nestloop import zoo
from tests.lowering.runtime.calls import TRACES_STATES_OF_VIEWS

pytestmark = pytest.mark.usefixtures("quick_builds")

SIZES: dict[type[nl.Loop], dict[str, Any]] = {
    zoo.MTTTMLP: {},
    zoo.MTTTMLPSGD4: {},
    zoo.TTTLinear: {},
    zoo.DeltaNet: {"dk": 8, "dv": 8},
}
LENGTHS = (20, 37, 64, 9, 130)
over_loops = pytest.mark.parametrize("loop", SIZES, ids=lambda loop: loop.__name__)


def layer(loop: type[nl.Loop]) -> nl.Layer:
    torch.manual_seed(0)
    return nl.Layer(loop, 16, 2, **SIZES.get(loop, {})).eval()


def tokens(length: int) -> Tensor:
    return torch.randn(2, length, 16, generator=torch.Generator().manual_seed(length))


@over_loops
def test_one_graph_for_every_length(loop: type[nl.Loop], graphs: Any):
    model = layer(loop)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in LENGTHS:
        a, b = tokens(length).requires_grad_(), tokens(length).requires_grad_()
        made, wanted = compiled(a), model(b)  # eager calls in between change nothing
        torch.testing.assert_close(made, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(z.square().sum(), x)[0] for z, x in ((made, a), (wanted, b))))
    assert graphs() == 1


@over_loops
def test_and_one_where_no_gradient_is_taken(loop: type[nl.Loop], graphs: Any):
    model = layer(loop)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for length in LENGTHS:
            torch.testing.assert_close(compiled(tokens(length)), model(tokens(length)))
    assert graphs() == 1
    frozen = layer(loop).requires_grad_(False)
    torch.testing.assert_close(torch.compile(frozen, fullgraph=True, backend="aot_eager")(tokens(9)), frozen(tokens(9)))
    with torch.inference_mode():
        torch.testing.assert_close(compiled(tokens(20)), model(tokens(20)))


def test_tokens_one_at_a_time(graphs: Any):
    model = layer(zoo.DeltaNet)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = tokens(12)
    state: Any = None
    made = []
    with torch.no_grad():
        for token in x.split(1, 1):
            z, state = compiled(token, state=state, return_state=True)
            made.append(z)
        torch.testing.assert_close(torch.cat(made, 1), model(x), rtol=1e-4, atol=1e-5)
    assert graphs() <= 3


class Waiting(zoo.TTTLinear):
    """A chunk's gradient waits in the state until the chunk is complete."""

    schedule = nl.Chunked(6, "apply-update")  # type: ignore[assignment]
    optimizer = nl.SGD(lr=0.1)


class Pooled(Waiting):
    """Its decay is of a chunk's mean token."""

    kept = nl.gate(pooled=True)
    optimizer = nl.SGD(lr=0.1, decay=kept)


class Windowed(zoo.OmegaNet):
    """Each step takes the gradients of the last tokens."""

    schedule = nl.Causal(6)


@pytest.mark.parametrize("loop", [zoo.TTTLinear, Waiting, Pooled, Windowed], ids=lambda loop: loop.__name__)
def test_tokens_of_a_chunk_one_at_a_time(loop: type[nl.Loop], graphs: Any):
    """No place in a chunk has a graph of its own."""
    if loop in (Pooled, Windowed) and not TRACES_STATES_OF_VIEWS:
        pytest.skip("PyTorch 2.11 does not trace such a state")
    model = layer(loop)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, state, made = 0.1 * tokens(20), None, []
    with torch.no_grad():
        for token in x.split(1, 1):
            z, state = compiled(token, state=state, return_state=True)
            made.append(z)
        torch.testing.assert_close(torch.cat(made, 1), model(x), rtol=1e-4, atol=1e-5)
    # no state yet, its first place as a number, then inside a chunk, at its end, at its beginning, in a full window
    assert graphs() <= 6


@pytest.mark.skipif(not TRACES_STATES_OF_VIEWS, reason="PyTorch 2.11 does not trace such a state")
def test_pooled_gates_take_every_length(graphs: Any):
    model = layer(Pooled)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (20, 37, 66, 9, 131, 5, 130, 64, 3):
        a, b = tokens(length).requires_grad_(), tokens(length).requires_grad_()
        made, wanted = compiled(a), model(b)
        torch.testing.assert_close(made, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(z.square().sum(), x)[0] for z, x in ((made, a), (wanted, b))))
    assert graphs() <= 5  # with whole chunks or without, with a part of one or without, which may be one token


def test_tokens_one_at_a_time_where_every_size_is_a_symbol(graphs: Any):
    """Those of the state too, of which a dim may be an expression: "4*d"."""
    model = layer(zoo.TTTMLP)
    compiled = torch.compile(model, dynamic=True, backend="aot_eager")
    x, state, made = tokens(4), None, []
    with torch.no_grad():
        for token in x.split(1, 1):
            z, state = compiled(token, state=state, return_state=True)
            made.append(z)
        torch.testing.assert_close(torch.cat(made, 1), model(x), rtol=1e-4, atol=1e-5)


class Lengthwise(zoo.LinearAttention):
    """Has a graph for each number of tokens."""

    def loss(self, f, t):
        return super().loss(f, t) * (2.0 if self.n % 7 else 3.0)


@pytest.mark.parametrize(
    "loop", [Lengthwise, zoo.DepthwiseBranch, zoo.TransformerToTTT], ids=lambda loop: loop.__name__
)
def test_what_holds_for_one_length_has_a_graph_for_each(loop: type[nl.Loop], graphs: Any):
    model = layer(loop)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for length in (16, 25, 36, 16):
            torch.testing.assert_close(compiled(tokens(length)), model(tokens(length)))
    assert graphs() <= 3


@pytest.mark.parametrize("loop", [zoo.LinearAttention, zoo.SelfAttention, zoo.DeltaNet], ids=lambda loop: loop.__name__)
def test_ops_are_given_symbols_for_every_size(loop: type[nl.Loop], graphs: Any):
    op = nl.compile(loop)
    compiled = torch.compile(lambda views: op(views, {})[0], fullgraph=True, dynamic=True, backend="aot_eager")
    for length in LENGTHS:
        views = {name: torch.randn(2, 3, length, 4) for name in "qkv"}
        views |= {name: torch.rand(2, 3, length) for name in loop.spec.gates}
        torch.testing.assert_close(compiled(views), op(views, {})[0])
    assert graphs() == 1


@over_loops
def test_an_exported_program_takes_every_length(loop: type[nl.Loop]):
    model = layer(loop)
    several = torch.export.Dim("N", min=8, max=4096)
    program = torch.export.export(model, (tokens(20),), dynamic_shapes=({1: several},)).module()
    for length in LENGTHS:
        torch.testing.assert_close(program(tokens(length)), model(tokens(length)))


@over_loops
def test_an_exported_program_has_all_gradients(loop: type[nl.Loop]):
    """Its graph calls the op by its name."""
    model = layer(loop)
    program: Any = torch.export.export(
        model, (tokens(20),), dynamic_shapes=({1: torch.export.Dim("N", min=8, max=4096)},)
    )
    program = program.module()
    a, b = tokens(37).requires_grad_(), tokens(37).requires_grad_()
    (made, of_program), (wanted, of_model) = (
        (z, torch.autograd.grad(z.square().sum(), [x, *[p for p in module.parameters() if p.requires_grad]]))
        for module, x, z in ((program, a, program(a)), (model, b, model(b)))
    )
    torch.testing.assert_close(made, wanted)
    torch.testing.assert_close(of_program, of_model)


def test_an_exported_step_serves_the_places_in_a_chunk():
    """The state's position is a symbol there."""
    model, x = layer(zoo.TTTLinear), tokens(20)
    first, state = model(x[:, :5], return_state=True)
    free = torch.utils._pytree.tree_map(lambda v: torch.export.Dim.DYNAMIC if isinstance(v, int) else None, state)
    program: Any = torch.export.export(
        model,
        (x[:, 5:6],),
        {"state": state, "return_state": True},
        dynamic_shapes={"x": None, "state": free, "return_state": None},
    )
    program, made = program.module(), [first]
    for token in x[:, 5:16].split(1, 1):
        z, state = program(token, state=state, return_state=True)
        made.append(z)
    torch.testing.assert_close(torch.cat(made, 1), model(x[:, :16]), rtol=1e-4, atol=1e-5)
    assert state["position"] == 16
