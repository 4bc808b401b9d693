"""Kernel estimators: curves from noisy points, by a constant at each query or a line, the width learned."""

import torch

import nestloop as nl


class Constant(nl.Loop):
    learner = nl.KernelEstimator
    q, k, v = nl.view("d"), nl.view("d"), nl.view("d")
    width = nl.slow(init="constant(0.5)")

    def kernel(self, q, k):
        return torch.exp(-((q[:, None] - k[None]).square().sum(-1) / self.width.square()))


class Line(Constant):
    def fit(self, weight, t, s):  # the intercept of a weighted regression on keys less the query, of one feature
        total, offset = weight.sum(-1, keepdim=True), s.k.T - t.q
        mean, second = ((weight * offset**n).sum(-1, keepdim=True) for n in (1, 2))
        weight = weight * (second - mean * offset)
        return weight @ s.v / (total * second - mean.square() + 1e-6)


torch.manual_seed(0)
x = torch.linspace(0, 1, 40).expand(64, 1, 40)[..., None]  # [curves, heads, points, features]
phase, slope = 6 * torch.rand(64, 1, 1, 1), 4 * torch.randn(64, 1, 1, 1)
curve = torch.sin(6 * x + phase) + slope * x
noisy = curve + 0.3 * torch.randn_like(curve)
for loop in (Constant, Line):
    op, width = nl.compile(loop), torch.full((1,), 0.5, requires_grad=True)
    optimizer = torch.optim.Adam([width], lr=0.03)
    for _ in range(60):
        error = (op({"q": x, "k": x, "v": noisy}, {"width": width})[0] - curve).square()
        optimizer.zero_grad()
        error.mean().backward()
        optimizer.step()
    ends = error[:, :, 0].mean()
    print(f"{loop.__name__:<9} width {width.item():.3f}   error {error.mean():.4f}   at the end {ends:.4f}")
