"""Streams in generated C++: float32 at any size, every loop of the zoo, any number of threads, states far apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import nestloop as nl
from nestloop import zoo
from tests.drawn import draw
from tests.lowering.comparison import Inputs, assert_equal, differences, run
from tests.lowering.runtime.test_native import Causally, doubled, inputs_of, single

SIZES = [(1, 5), (5, 16), (16, 5), (48, 100), (100, 48), (64, 64)]


@pytest.mark.parametrize(("a", "e"), SIZES, ids=[f"{a} to {e}" for a, e in SIZES])
@pytest.mark.parametrize("tokens", [1, 53])
def test_float32_is_the_reference_in_float64_to_rounding(a: int, e: int, tokens: int):
    inputs = inputs_of(Causally, a, e, tokens)
    wanted = run(nl.compile(Causally, backend="reference"), inputs)
    assert_equal(differences(doubled(run(nl.compile(Causally, backend="cpp"), single(inputs))), doubled(wanted)), 5e-6)


STREAMS = [loop for loop in zoo.loops() if loop.spec.streams and not loop.spec.is_kernel_estimator]


def drawn(loop: type[nl.Loop], tokens: int) -> Inputs:
    views, weights = draw(loop.spec, tokens)
    return Inputs(views, {n: w.detach().requires_grad_() for n, w in weights.items()}, None, None)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_builds")
@pytest.mark.parametrize("loop", STREAMS, ids=lambda loop: loop.__name__)
def test_every_loop_of_the_zoo_is_what_generated_pytorch_gives(loop: type[nl.Loop]):
    torch.manual_seed(0)
    inputs, losses = drawn(loop, 19), not isinstance(loop.spec.schedule, nl.Program)
    found, wanted = (run(nl.compile(loop, backend=backend), inputs, losses) for backend in ("cpp", "torch"))
    assert_equal(differences(found, wanted), 1e-9)


@pytest.mark.usefixtures("quick_builds")
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("loop", [zoo.TTTMLP, zoo.OmegaNet, zoo.NeuralMemory])
def test_backward_from_states_so_far_apart(loop: type[nl.Loop], every: int, states_kept: Callable[..., None]):
    states_kept(lambda count, budget, state: every)
    torch.manual_seed(0)
    inputs = drawn(loop, 40)
    assert_equal(differences(*[run(nl.compile(loop, backend=b), inputs) for b in ("cpp", "torch")]), 1e-9)


@pytest.mark.parametrize("loop", [Causally, zoo.DeltaProduct, zoo.OmegaNet, zoo.CausalLaCT])
def test_any_number_of_threads_gives_the_same_bits(loop: type[nl.Loop]):
    torch.manual_seed(0)
    inputs = inputs_of(loop, 6, 4, 40, 3) if loop is Causally else drawn(loop, 40)
    op, before, found = nl.compile(loop, backend="cpp"), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(run(op, single(inputs)))
    finally:
        torch.set_num_threads(before)
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found[1:]), name
