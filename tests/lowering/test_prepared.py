"""What walks of a state do not wait for is cut off, and both parts together give what the whole does; so do other
functions of a chunk that take of it what is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx

import nestloop as nl
from nestloop import zoo
from nestloop.lang.state import identifier
from nestloop.lowering import names, ops
from nestloop.lowering.capture import capture_with
from nestloop.lowering.recorder import Located, record
from nestloop.lowering.simplify import simplify
from nestloop.lowering.streams import prepared as cut
from nestloop.lowering.streams.affine import reached
from nestloop.lowering.streams.forms import choose, pieces_of
from nestloop.lowering.streams.prepared import Prepared, prepared, taking
from nestloop.lowering.tracer import Tracer

ROWS = 16
TALL, WIDE = 32, 64  # rows and features at which solutions are worth memory


# A graph, which of its results are wanted, and what waits.
Function = tuple[fx.GraphModule, list[bool], set[str]]


def walks(loop: type[nl.Loop], d: int = 4) -> dict[str, Function]:
    """The graphs that walk a loop's state and its cotangent."""
    return {name: function for name, function in functions(loop, d).items() if name in ("advance", "cotangents")}


def functions(loop: type[nl.Loop], d: int = 4) -> dict[str, Function]:
    """Those, and what every chunk computes beside them: its read-out, and the cotangents of its tokens."""
    spec = names.safe(loop.spec, True)
    tracer = Tracer(spec, {**dict.fromkeys(("d", "dk", "dv", "dx", "dy"), d), "H": 1, "D": d}, None, torch.float32)
    captured = capture_with(tracer)
    form, _ = choose(captured, tracer)
    pieces, states, _ = pieces_of(captured, tracer, form, False, False)
    chunk, carry = pieces["chunk"], {identifier(name) for name in spec.fast}
    left = [name for name in chunk.results if name.endswith("_new")]
    pulled = {f"d_{name}_new" for name in carry}
    return {
        "advance": (states["advance"], [name.removesuffix("_new") in carry for name in left], carry),
        "cotangents": (chunk.backward, [name in carry for name in chunk.wrt], pulled),
        "outputs": (chunk.forward, [name not in left for name in chunk.results], carry | pulled),
        "tokens": (chunk.backward, [name not in carry for name in chunk.wrt], carry | pulled),
    }


def drawn(module: fx.GraphModule, tokens: int) -> dict[str, Tensor]:
    """Random inputs by name."""
    given = {}
    for node in module.graph.find_nodes(op="placeholder"):
        shape = [size if isinstance(size, int) else tokens for size in node.meta["val"].shape]
        given[node.name] = 0.5 * torch.randn(shape, dtype=torch.float64)
    return given


def computed(module: fx.GraphModule, given: dict[str, Tensor]) -> list[Tensor | None]:
    placeholders = module.graph.find_nodes(op="placeholder")
    for node in module.graph.nodes:  # as generated code, which has the dtype of its inputs
        if node.kwargs.get("dtype") == torch.float32:
            node.kwargs = {**node.kwargs, "dtype": torch.float64}
    torch.set_default_dtype(torch.float64)
    try:
        return list(Located(module).run(*[given[node.name] for node in placeholders]))
    finally:
        torch.set_default_dtype(torch.float32)


def in_two(made: Prepared, given: dict[str, Tensor]) -> list[Tensor | None]:
    handed = {n: value for n, value in zip(made.handed, computed(made.ahead, given), strict=True) if value is not None}
    return computed(made.rest, {**given, **handed})


def solved(module: fx.GraphModule) -> int:
    called = [node for node in module.graph.nodes if node.op == "call_function" and node.target in ops.ROWS]
    return sum(ops.row(node.target).kind is ops.Kind.SOLVE for node in called)


def read(module: fx.GraphModule) -> set[str]:
    """The inputs that a graph needs."""
    return {node.name for node in module.graph.find_nodes(op="placeholder") if node.users}


def assert_same(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None], which: Sequence[bool]) -> None:
    for one, other, asked in zip(found, wanted, which, strict=True):
        assert (one is None) == (other is None or not asked)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


SOLVED = [zoo.DeltaNet, zoo.GatedDeltaNet, zoo.KDA, zoo.GDN2, zoo.Comba, zoo.Longhorn, zoo.DeltaProduct]


@pytest.mark.parametrize("loop", [*SOLVED, zoo.Mesa], ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("tokens", [ROWS, 5])
def test_both_parts_give_what_the_whole_does(loop: type[nl.Loop], tokens: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cut, "_WORTH", 1)
    for module, which, waits in walks(loop).values():
        made = prepared(module, which, waits, ROWS, "ready_")
        if made is None:
            continue
        torch.manual_seed(tokens)
        given = drawn(module, tokens)
        assert_same(in_two(made, given), computed(module, given), which)
        assert not read(made.ahead) & waits and not read(made.ahead) & set(made.handed)
        assert not solved(made.rest) and not any(waits & {n.name} for n in reached(made.ahead.graph, made.handed))


@pytest.mark.parametrize("loop", SOLVED, ids=lambda loop: loop.__name__)
def test_no_system_is_solved_in_a_walk(loop: type[nl.Loop]):
    for module, which, waits in walks(loop).values():
        made = prepared(module, which, waits, ROWS, "ready_")
        assert made is not None and solved(made.ahead) and not solved(made.rest)


@pytest.mark.parametrize("loop", [zoo.CausalLinearAttention, zoo.RetNet, zoo.GLA], ids=lambda loop: loop.__name__)
def test_what_spares_little_stays(loop: type[nl.Loop]):
    for module, which, waits in walks(loop).values():
        assert prepared(module, which, waits, ROWS, "ready_") is None


def cuts(loop: type[nl.Loop]) -> dict[str, Prepared]:
    """The walks of a loop in two, by name."""
    found = {name: prepared(*walk, TALL, f"{name}_") for name, walk in walks(loop, WIDE).items()}
    return {name: made for name, made in found.items() if made is not None}


@pytest.mark.parametrize("loop", SOLVED, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize(("name", "before"), [("outputs", ["advance"]), ("tokens", ["advance", "cotangents"])])
def test_solutions_that_are_there_are_taken(loop: type[nl.Loop], name: str, before: list[str]):
    made = cuts(loop)
    module, which, waits = functions(loop, WIDE)[name]
    found = taking(module, which, waits, [made[walk] for walk in before], TALL)
    assert found is not None and not solved(found.rest)
    for tokens in (TALL, 5):
        torch.manual_seed(tokens)
        given = drawn(module, tokens)
        handed = {
            n: t for walk in before for n, t in zip(made[walk].handed, computed(made[walk].ahead, given), strict=True)
        }
        taken = {n: t for n, t in handed.items() if n in found.handed and t is not None}
        assert set(taken) == set(found.handed)
        assert_same(computed(found.rest, {**given, **taken}), computed(module, given), which)


def test_nothing_is_taken_where_it_spares_little():
    module, which, waits = functions(zoo.DeltaNet, WIDE)["outputs"]
    made = cuts(zoo.DeltaNet)["advance"]
    assert taking(module, which, waits, [made], TALL) is not None
    assert taking(module, which, waits, [], TALL) is None
    other = traced(lambda k, w: (k @ w,), k=(TALL, 4), w=(4, 4))
    assert taking(other, [True], {"w"}, [made], TALL) is None


def delta(k: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    """A system whose right side waits for s, in a sum."""
    right = (k * 2) @ s - torch.tanh(v)
    x = torch.linalg.solve_triangular((k @ k.mT).tril(-1), right, upper=False, unitriangular=True)
    return s + k.mT @ x + k.mT @ v, v.abs()


def traced(function: Callable[..., tuple[Tensor, ...]], **given: tuple[int, int]) -> fx.GraphModule:
    examples = [torch.empty(size, dtype=torch.float64, device="meta") for size in given.values()]
    return simplify(record(function, examples, [*given]))


def traced_delta() -> fx.GraphModule:
    return traced(delta, k=(ROWS, 4), v=(ROWS, 64), s=(4, 64))


def test_a_solution_is_handed_on_and_elements_of_tokens_are_computed_again():
    module = traced_delta()
    made = prepared(module, [True, True], {"s"}, ROWS, "ready_")
    assert made is not None and len(made.handed) == 2 and solved(made.ahead) == 2
    assert torch.ops.aten.abs.default in {node.target for node in made.rest.graph.nodes}
    given = drawn(module, ROWS)
    assert_same(in_two(made, given), computed(module, given), [True, True])


def test_a_result_that_is_not_wanted_is_in_neither_part():
    made = prepared(traced_delta(), [True, False], {"s"}, ROWS, "ready_")
    assert made is not None
    for part in (made.ahead, made.rest):
        assert torch.ops.aten.abs.default not in {node.target for node in part.graph.nodes}


def test_every_value_keeps_the_line_that_it_comes_from():
    module = traced_delta()
    for node in module.graph.nodes:
        node.meta["where"] = node.name
    made = prepared(module, [True, True], {"s"}, ROWS, "ready_")
    assert made is not None
    lines = {node.name for node in module.graph.nodes}
    for part in (made.ahead, made.rest):
        called = [node for node in part.graph.nodes if node.op == "call_function"]
        assert called and all(node.meta.get("where") in lines for node in called)


def test_terms_that_do_not_wait_are_added_up_first():
    def terms(a: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        return (b.mT @ b - (s + a.mT @ a - a.mT @ b) + b.mT @ a,)

    module = traced(terms, a=(4, 4), b=(4, 4), s=(4, 4))
    whole = cut._copied(module, [True])
    cut._free_terms(whole.graph, {"s"})
    whole.graph.eliminate_dead_code()
    waiting = [node for node in reached(whole.graph, {"s"}) if node.op == "call_function"]
    assert len(waiting) == 2  # -s, and one sum
    given = drawn(module, ROWS)
    assert_same(computed(whole, given), computed(module, given), [True])
