"""Bodies that take factors, determinants and exponentials of matrices, and systems of which one side has more axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, linalg

import nestloop as nl
from nestloop.errors import IndefiniteMatrixError, NoPlanError, ShapeMismatchError
from nestloop.lang.schedule import Schedule
from nestloop.lowering import ops
from nestloop.lowering.recorder import record
from tests.lowering.comparison import Inputs, assert_exact, random_inputs, run
from tests.refusals import marked

pytestmark = pytest.mark.usefixtures("quick_builds")
SIZES = {"d": 4, "H": 2}
SCHEDULES: dict[str, Schedule] = {"online": nl.Online(), "causal": nl.Causal(4), "batch": nl.FullBatch(steps=2)}
Of = Callable[[Tensor, Tensor], Tensor]  # of tokens [n, 4] and a fast weight [4, 4]


def definite(w: Tensor) -> Tensor:
    return w @ w.mT + torch.eye(len(w))


def pairs(x: Tensor) -> Tensor:
    """A matrix of each token's: [n, 2, 2]."""
    return x.view(-1, 2, 2)


FUNCTIONS: dict[str, Of] = {
    "exponential": lambda x, w: x @ linalg.matrix_exp(w),
    "rotation": lambda x, w: x @ linalg.matrix_exp(w - w.mT),
    "Cholesky": lambda x, w: x @ linalg.cholesky(definite(w)),
    "Cholesky, upper": lambda x, w: x @ linalg.cholesky(definite(w), upper=True),
    "inverse by Cholesky": lambda x, w: x @ torch.cholesky_inverse(linalg.cholesky(definite(w))),
    "solution by Cholesky": lambda x, w: torch.cholesky_solve(x.mT, linalg.cholesky(definite(w))).mT,
    "det": lambda x, w: x * torch.det(w),
    "slogdet": lambda x, w: x * linalg.slogdet(w)[1] * linalg.slogdet(w)[0],
    "logdet": lambda x, w: x * torch.logdet(definite(w)),
    "QR": lambda x, w: x @ linalg.qr(w)[0] + x @ linalg.qr(w)[1],
    "QR of a tall one": lambda x, w: x @ linalg.qr(w[:, :2])[0] @ w[:2],
    "QR of a wide one": lambda x, w: x[:, :2] @ linalg.qr(w[:2])[1],
    "eigenvalues": lambda x, w: x * linalg.eigvalsh(w + w.mT),
    "eigenvectors": lambda x, w: x @ linalg.eigh(w + w.mT, UPLO="U")[1].square(),
    "singular values": lambda x, w: x * linalg.svdvals(w),
    "singular vectors": lambda x, w: x @ linalg.svd(w)[0].square() + x @ linalg.svd(w, full_matrices=False)[2].square(),
    "spectral norm": lambda x, w: x * linalg.matrix_norm(w, 2) + x * linalg.matrix_norm(w, "nuc"),
    "each token's exponential": lambda x, w: linalg.matrix_exp(pairs(x)).flatten(1) @ w,
    "each token's Cholesky": lambda x, w: linalg.cholesky(pairs(x) @ pairs(x).mT + torch.eye(2)).flatten(1) @ w,
    "each token's QR": lambda x, w: linalg.qr(pairs(x))[0].flatten(1) @ w,
    "each token's determinant": lambda x, w: linalg.det(pairs(x))[:, None] * x,
    "each token's eigenvalues": lambda x, w: linalg.eigvalsh(pairs(x)).repeat(1, 2) @ w,
    "each token's singular values": lambda x, w: linalg.svdvals(pairs(x)).repeat(1, 2) @ w,
}


def triangle(w: Tensor) -> Tensor:
    return w.tril() + 3 * torch.eye(len(w))


SYSTEMS: dict[str, Of] = {
    "columns": lambda x, w: linalg.solve_triangular(triangle(w), x.mT, upper=False).mT,
    "rows": lambda x, w: linalg.solve_triangular(triangle(w), x, upper=False, left=False),
    "a column of each token": lambda x, w: linalg.solve_triangular(triangle(w), x[:, :, None], upper=False)[:, :, 0],
    "a row of each token": lambda x, w: linalg.solve_triangular(triangle(w), x[:, None], upper=False, left=False)[:, 0],
    "a copy for each token": lambda x, w: linalg.solve_triangular(
        triangle(w).expand(len(x), -1, -1), x[:, :, None], upper=False
    )[:, :, 0],
    "each token's own": lambda x, w: linalg.solve_triangular(triangle(w) + x[:, :, None], w, upper=False).sum(-1),
    "each token's own, on the right": lambda x, w: linalg.solve_triangular(
        triangle(w) + x[:, :, None], w, upper=False, left=False
    ).sum(-1),
    "any matrix, a column of each token": lambda x, w: linalg.solve(triangle(w), x[:, :, None])[:, :, 0],
    "any matrix, each token's own": lambda x, w: linalg.solve(
        triangle(w) + 0.1 * x[:, :, None], w.expand(len(x), -1, -1)
    ).sum(-1),
    "any matrix, vectors": lambda x, w: linalg.solve(triangle(w) + 0.1 * x[:, :, None], x),
    "any matrix, one vector": lambda x, w: linalg.solve(triangle(w) + 0.1 * x[:, :, None], w[0]),
}


def loop_of(function: Of, schedule: Schedule) -> type[nl.Loop]:
    class Learner(nl.Learner):
        w = nl.fast("d", "d")

        def forward(self, x):
            return function(x, self.w) + x @ self.w

    class Loop(nl.Loop):
        learner, optimizer = Learner, nl.SGD(lr=0.1)
        k, q, v = nl.view("d"), nl.view("d"), nl.view("d")

        def loss(self, f, t):
            return F.huber_loss(f(t.k), t.v, reduction="none").sum(-1)

        def readout(self, f, t):
            return f(t.q)

    return type("Of", (Loop,), {"schedule": schedule})


def assert_is_the_reference(loop: type[nl.Loop], inputs: Inputs, backend: str = "torch") -> None:
    wanted = run(nl.compile(loop, backend="reference"), inputs)
    assert_exact(run(nl.compile(loop, backend=backend), inputs), wanted, loop, inputs)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_matrices_is_the_reference(name: str, schedule: str):
    loop = loop_of(FUNCTIONS[name], SCHEDULES[schedule])
    inputs = random_inputs(loop.spec, SIZES, tokens=6, scale={"k": 0.5})
    assert_is_the_reference(loop, inputs)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_is_the_reference(name: str, schedule: str, backend: str):
    """As many sequences as heads and features as tokens, so that axes of another may be taken for one."""
    loop = loop_of(SYSTEMS[name], SCHEDULES[schedule])
    inputs = random_inputs(loop.spec, SIZES, sequences=2, tokens=4 if schedule == "batch" else 6)
    assert_is_the_reference(loop, inputs, backend)


def own_system(x: Tensor, w: Tensor) -> Tensor:
    """To PyTorch, w holds a vector for each of four tokens, and is one matrix for all of any other number."""
    return linalg.solve(triangle(w) + 0.1 * x[:, :, None], w).reshape(len(x), -1)[:, :4]


@pytest.mark.parametrize("tokens", [4, 6])
def test_vectors_at_one_length_and_a_matrix_at_others(tokens: int):
    loop = loop_of(own_system, nl.FullBatch())
    inputs = random_inputs(loop.spec, SIZES, tokens=tokens)
    assert_is_the_reference(loop, inputs)


def test_vectors_at_one_length_and_a_matrix_at_others_are_refused_where_tokens_are_on_their_own():
    loop = loop_of(own_system, nl.Online())
    inputs, op = random_inputs(loop.spec, SIZES), nl.compile(loop)
    with pytest.raises(ShapeMismatchError, match="for vectors at one number of tokens, for a matrix at all others"):
        op(inputs.views, inputs.weights)


class Evidence(nl.Loop):
    """The negative log marginal likelihood of the values, of a Gaussian process whose kernel is learned."""

    class Features(nl.Learner):
        w = nl.fast("d", "d")

        def forward(self, x):
            return torch.tanh(x @ self.w)

    learner, optimizer, schedule = Features, nl.SGD(lr=0.1), nl.FullBatch(steps=2)
    k, q, v = nl.view("d"), nl.view("d"), nl.view("d")

    def loss(self, f, t):
        kernel = f(t.k) @ f(t.k).mT + torch.eye(len(t.k))
        half = linalg.solve_triangular(linalg.cholesky(kernel), t.v, upper=False)
        return half.square().sum(-1) + torch.logdet(kernel) / len(t.k)

    def readout(self, f, t):
        return f(t.q)


@pytest.mark.parametrize("tokens", [1, 4, 7])
def test_a_matrix_of_all_tokens(tokens: int):
    inputs = random_inputs(Evidence.spec, SIZES, tokens=tokens)
    assert_is_the_reference(Evidence, inputs)


@pytest.mark.parametrize("tokens", [3, 6])
def test_factors_of_all_tokens(tokens: int):
    """Whether there are more tokens than features decides on the axes of the factors."""

    def scaled(x: Tensor, w: Tensor) -> Tensor:
        return x * linalg.matrix_norm(x, "nuc") + linalg.qr(x)[0].square().sum(-1, keepdim=True) * (x @ w)

    loop = loop_of(scaled, nl.FullBatch(steps=2))
    inputs = random_inputs(loop.spec, SIZES, tokens=tokens)
    assert_is_the_reference(loop, inputs)


def test_cpp_says_what_it_has_not():
    with pytest.raises(NoPlanError) as refusal:
        op = nl.compile(Evidence, backend="cpp")
        run(op, random_inputs(Evidence.spec, SIZES))
    assert refusal.value.given == (
        "nestloop.cholesky.default: a Cholesky factor of a matrix, which generated PyTorch alone takes"
    )


class Whitened(nl.Loop):
    """Reads out by the Cholesky factor of what it has seen."""

    class Sums(nl.Learner):
        w, kk = (nl.fast("d", "d", init="zeros", learned=False) for _ in range(2))

        def forward(self, x):
            return x @ self.w

    learner, optimizer, schedule = Sums, nl.SGD(lr=1.0), nl.Causal(4)
    k, q, v = nl.view("d"), nl.view("d"), nl.view("d")
    ridge = nl.slow("d")

    def loss(self, f, t):
        return -(f(t.k) * t.v).sum(-1) - ((t.k @ f.kk) * t.k).sum(-1)

    def readout(self, f, t):
        return f(t.q) @ linalg.cholesky(f.kk + torch.diag(self.ridge))  # HERE


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_matrix_without_a_factor_is_refused_at_its_line(backend: str):
    inputs, op = random_inputs(Whitened.spec, SIZES), nl.compile(Whitened, backend=backend)
    inputs.weights["ridge"] = torch.full_like(inputs.weights["ridge"], 0.5).requires_grad_()
    fine = run(op, inputs, losses=False)
    assert all(value.isfinite().all() for value in fine.values())
    inputs.weights["ridge"] = torch.full_like(inputs.weights["ridge"], -50.0).requires_grad_()
    with pytest.raises(IndefiniteMatrixError) as refusal:
        op(inputs.views, inputs.weights)
    assert str(refusal.value) == (
        "A matrix of Whitened has no Cholesky factor.\n"
        f"  at:    {__file__}:{marked(Whitened.readout)}"
        "   return f(t.q) @ linalg.cholesky(f.kk + torch.diag(self.ridge))  # HERE\n"
        "  given: one that is not positive definite\n"
        "  need:  a symmetric matrix whose eigenvalues are positive, for every head, sequence and token\n"
        "  fix:   add a positive diagonal, as a ridge does: a + torch.diag(self.lamb), with lamb > 0"
    )


DISTRIBUTIONS: dict[str, Any] = {
    "normal": lambda made, t: -torch.distributions.Normal(made, 0.5).log_prob(t.v).sum(-1),
    "Student's": lambda made, t: -torch.distributions.StudentT(3.0, made, t.q.exp()).log_prob(t.v).sum(-1),
    "categorical": lambda made, t: -torch.distributions.Categorical(logits=made).log_prob(t.v.argmax(-1)),
    "gamma": lambda made, t: -torch.distributions.Gamma(made.exp(), 1.5).log_prob(t.v.exp()).sum(-1),
    "quantile": lambda made, t: torch.distributions.Normal(0.0, 1.0).icdf((made - t.v).sigmoid()).square().sum(-1),
    "divergence": lambda made, t: torch.distributions.kl_divergence(
        torch.distributions.Normal(made, 1.0), torch.distributions.Normal(t.v, 2.0)
    ).sum(-1),
    "of many": lambda made, t: -torch.distributions.MultivariateNormal(made, torch.eye(4)).log_prob(t.v),
    "soft margin": lambda made, t: F.soft_margin_loss(made, t.v, reduction="none").sum(-1),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_loss_by_a_distribution_is_the_reference(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # which `torch.compile` turns off

    class Likely(Evidence):
        schedule = nl.Online()  # type: ignore[assignment]

        def loss(self, f, t):
            return DISTRIBUTIONS[name](f(t.k), t)

    inputs = random_inputs(Likely.spec, SIZES)
    assert_is_the_reference(Likely, inputs)
    with pytest.raises(ValueError, match="scale"):  # others still look at what they are given
        torch.distributions.Normal(0.0, -1.0)


def test_every_matrix_function_is_tried():
    x, w = torch.empty(3, 4, device="meta"), torch.empty(4, 4, device="meta")
    with torch.device("meta"):
        graphs = [record(function, [x, w], ["x", "w"]).graph for function in FUNCTIONS.values()]
    tried = {node.target for graph in graphs for node in graph.nodes}
    rows = [row for row in ops.ROWS.values() if row.kind is ops.Kind.MATRIX]
    assert len(rows) == 11
    assert [row.name for row in rows if row.target not in tried] == []
