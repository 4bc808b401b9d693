"""Kernel estimators beyond the locally constant one, which is softmax attention (`zoo.SelfAttention`)."""

from __future__ import annotations

import torch

import nestloop as nl
from nestloop.zoo.mttt import SelfAttention


class LocalLinearAttention(SelfAttention):
    """Local linear attention: at each query a line is fitted to all tokens, with a ridge on its slope.

    The intercept of argmin_{b, W} 1/2 sum_i kernel(q, k_i) |v_i - b - W (k_i - q)|^2 + lamb / 2 |W|^2. The cost grows
    with the square of d: a system of d equations for each query.
    """

    paper = "2510.01450"
    lamb = nl.slow(init="constant(1.0)")

    def fit(self, weight, t, s):
        total = weight.sum(-1, keepdim=True)
        mean = weight @ s.k / total
        outer = (s.k[:, :, None] * s.k[:, None, :]).flatten(1)
        around, offset = (weight @ outer / total).unflatten(-1, (self.d, self.d)), mean - t.q
        second = around - mean[:, :, None] * mean[:, None, :] + offset[:, :, None] * offset[:, None, :]
        ridge = self.lamb / total[:, :, None] * torch.eye(self.d)
        slope = torch.linalg.solve(second + ridge, offset)
        weight = weight * (1 + (t.q * slope).sum(-1, keepdim=True) - slope @ s.k.T)
        return weight @ s.v / weight.sum(-1, keepdim=True)


class Parallax(SelfAttention):
    """Parallax: local linear attention whose slope is a second, learned query r in the place of the solved one."""

    paper = "2605.29157"
    r = nl.view("d", bias=True)

    def fit(self, weight, t, s):
        weight = weight / weight.sum(-1, keepdim=True)
        line = weight * (t.r @ s.k.T)
        return (1 + line.sum(-1, keepdim=True)) * (weight @ s.v) - line @ s.v
