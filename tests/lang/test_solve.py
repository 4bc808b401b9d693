"""Solvers for bodies, against PyTorch's."""

import pytest
import torch

import nestloop as nl


def problem(n=5, d=4):
    torch.manual_seed(0)
    a = torch.randn(d, d, dtype=torch.float64)
    return (a @ a.T + torch.eye(d)).requires_grad_(), torch.randn(n, d, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("started", [False, True])
def test_as_many_steps_as_dims_solve(started):
    a, b = problem()
    start = torch.randn_like(b) if started else None
    x = nl.conjugate_gradient(lambda x: x @ a, b, 4, start)
    exact = torch.linalg.solve(a, b.T).T
    weight = torch.randn_like(x)
    mine, theirs = (torch.autograd.grad((y * weight).sum(), b)[0] for y in (x, exact))
    torch.testing.assert_close(x, exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


def test_fewer_steps_come_closer_one_by_one():
    a, b = problem()
    exact = torch.linalg.solve(a, b.T).T
    off = [(nl.conjugate_gradient(lambda x: x @ a, b, n) - exact).norm().item() for n in range(5)]
    assert off == sorted(off, reverse=True) and off[0] == exact.norm() and off[-1] < 1e-9


def test_rows_that_are_solved_stay_where_they_are():
    a, b = problem()
    zero = torch.zeros_like(b)
    assert torch.equal(nl.conjugate_gradient(lambda x: x @ a, zero, 3, eps=1e-5), zero)
