"""A linear system without a solution is refused at the user's line, on every backend and in any schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nestloop as nl
from nestloop import zoo
from nestloop.errors import SingularSystemError
from tests.lowering.comparison import Inputs, random_inputs, run
from tests.refusals import marked

pytestmark = pytest.mark.usefixtures("quick_builds")


class Ridge(zoo.Mesa):
    """The Mesa layer, causal."""

    def readout(self, f, t):
        system = f.kk + torch.diag(self.lamb)
        return f(torch.linalg.solve(system, t.q.T).T)  # HERE


class Whole(Ridge):
    """The same of all tokens at once: one step of every token's own rate."""

    schedule = nl.FullBatch(reduction="sum")  # type: ignore[assignment]
    optimizer = nl.SGD(lr=1.0)
    beta, g = nl.gate(), nl.gate()


class Triangle(Whole):
    """A triangle instead, with the diagonal that it has."""

    def readout(self, f, t):
        system = torch.tril(f.kk) + torch.diag(self.lamb)
        return f(torch.linalg.solve_triangular(system, t.q.T, upper=False).T)  # HERE


class Twice(Whole):
    """Two systems, of which the second is the singular one."""

    def readout(self, f, t):
        system = f.kk + torch.diag(self.lamb)
        queries = torch.linalg.solve(system + torch.eye(4), t.q.T)
        return f(torch.linalg.solve(system, queries).T)  # HERE


SOLVES: dict[Any, str] = {
    Triangle: "torch.linalg.solve_triangular(system, t.q.T, upper=False)",
    Twice: "torch.linalg.solve(system, queries)",
}
LOOPS = pytest.mark.parametrize("loop", [Ridge, Whole, Triangle, Twice])


def inputs_of(loop: type[nl.Loop]) -> Inputs:
    """Inputs with lamb > 0; without it, the fourth of five tokens' keys would leave a row of zeros."""
    inputs = random_inputs(loop.spec, {"dk": 4, "dv": 3, "H": 2}, sequences=3, tokens=5)
    with torch.no_grad():
        inputs.views["k"][..., 2] = 0  # a feature that no key has
        inputs.weights["lamb"].abs_().add_(0.1)
    return inputs


@LOOPS
@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
def test_a_singular_system_is_refused_at_its_line(loop: Any, backend: str):
    if backend == "reference" and loop is Triangle:
        pytest.skip("the reference is PyTorch, which divides by the diagonal that there is")
    inputs, op = inputs_of(loop), nl.compile(loop, backend=backend)
    fine = run(op, inputs, losses=False)
    assert all(t.isfinite().all() for t in fine.values())
    lamb = inputs.weights["lamb"]
    inputs.weights["lamb"] = torch.where(torch.arange(4) == 2, 0.0, lamb.detach()).requires_grad_()
    with pytest.raises(SingularSystemError) as caught:
        op(inputs.views, inputs.weights)
    body = (Ridge if loop is Whole else loop).readout
    line, file = marked(body), body.__code__.co_filename
    solve = SOLVES.get(loop, "torch.linalg.solve(system, t.q.T)")
    assert str(caught.value) == (
        f"A linear system of {loop.__name__} is singular.\n"
        f"  at:    {file}:{line}   return f({solve}.T)  # HERE\n"
        "  given: a matrix with a pivot that is exactly zero\n"
        "  need:  a matrix with an inverse, for every head, sequence and token\n"
        "  fix:   add a positive diagonal, as a ridge does: a + torch.diag(self.lamb), with lamb > 0"
    )
    inputs.weights["lamb"] = lamb
    again = run(op, inputs, losses=False)  # nothing is left of it
    assert all(torch.equal(again[name], value) for name, value in fine.items())
