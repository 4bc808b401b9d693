"""ViT^3 (arXiv 2512.01643), a gated branch and a depthwise-convolution branch, and Transformer-to-TTT (2605.02772)."""

from __future__ import annotations

import torch.nn.functional as F

import nestloop as nl


class Gated(nl.Learner):
    """(x W1) * silu(x W2)."""

    w1 = nl.fast("d", "d", init="trunc_normal(0.02)")
    w2 = nl.fast("d", "d", init="trunc_normal(0.02)")

    def forward(self, x):
        return (x @ self.w1) * F.silu(x @ self.w2)


class Depthwise(nl.Learner):
    """A 3x3 depthwise convolution over the token grid."""

    h, w = nl.grid()
    w3 = nl.fast("d", 1, 3, 3, init="trunc_normal(0.02)")

    def forward(self, x):  # [h*w, d]
        image = x.T.reshape(1, self.d, self.h, self.w)
        return F.conv2d(image, self.w3, padding=1, groups=self.d).reshape(self.d, -1).T


class GatedBranch(nl.Loop):
    """One full-batch step on -mean <v, f(k)> / 3, the gradient clipped per column."""

    paper = "2512.01643"
    learner = Gated
    optimizer = nl.SGD(lr=1.0, transform=nl.soft_clip(-2))
    k, q, v = nl.view("d", bias=True), nl.view("d", bias=True), nl.view("d", bias=True)

    def loss(self, f, t):
        return -(f(t.k) * t.v).sum(-1) * 9**-0.5

    def readout(self, f, t):
        return f(t.q)


class DepthwiseBranch(GatedBranch):
    """The same with the convolution, one extra head, the gradient clipped per kernel."""

    learner = Depthwise
    heads = 1
    optimizer = nl.SGD(lr=1.0, transform=nl.soft_clip(-2, -1))


ViT3 = (GatedBranch, DepthwiseBranch)


class SwiGLU(Gated):
    """(silu(x W1) * (x W2)) W3."""

    w3 = nl.fast("d", "d", init="trunc_normal(0.02)")

    def forward(self, x):
        return (F.silu(x @ self.w1) * (x @ self.w2)) @ self.w3


class TransformerToTTT(nl.Loop):
    """One full-batch step on -mean <v, f(k)> / sqrt(d), not clipped, with keys that are normalised over tokens."""

    paper = "2605.02772"
    learner = SwiGLU
    h, w = nl.grid()
    q = nl.view("d", bias=True, make=nl.conv2d(3, residual=True))
    k = nl.view("d", bias=True, make=[nl.instance_norm(1.0), nl.conv2d(3, residual=True)])
    v = nl.view("d", bias=True)

    def loss(self, f, t):
        return -(f(t.k) * t.v).sum(-1) * self.d**-0.5

    def readout(self, f, t):
        return f(t.q)
