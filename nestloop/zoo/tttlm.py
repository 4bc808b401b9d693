"""Learning to (learn at test time): RNNs with expressive hidden states, arXiv 2407.04620: TTT-Linear and TTT-MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop.zoo.mttt import MLP, BiasedLinear


class NormedLinear(BiasedLinear):
    """x + LN(x W + b); the norm is the outer loop's."""

    w, b = nl.fast("d", "d", init="normal(0.02)"), nl.fast("d")
    gamma, beta = nl.slow("d", init="ones"), nl.slow("d", init="zeros")

    def forward(self, x):
        return x + F.layer_norm(super().forward(x), (self.d,), self.gamma, self.beta, 1e-6)


class NormedMLP(MLP):
    """x + LN(gelu(x W1 + b1) W2 + b2)."""

    w1, b1 = nl.fast("d", "4*d", init="normal(0.02)"), nl.fast("4*d")
    w2, b2 = nl.fast("4*d", "d", init="normal(0.02)"), nl.fast("d")
    gamma, beta = nl.slow("d", init="ones"), nl.slow("d", init="zeros")

    def forward(self, x):
        return x + F.layer_norm(super().forward(x), (self.d,), self.gamma, self.beta, 1e-6)


class TTTLinear(nl.Loop):
    """TTT-Linear: W_t = W_0 - tau_t sum_{s <= t} eta_s dl_s/dW(W_0), W_0 the weights before a mini-batch (sec. 2.4).

    tau_t is learned for each place in the mini-batch, eta_s a gate of each token (sec. 2.7).
    """

    paper = "2407.04620"
    learner, schedule = NormedLinear, nl.Causal(16)
    q, k, v = nl.view("d", make=[nl.rope(period="chunk")]), nl.view("d", make=[nl.rope(period="chunk")]), nl.view("d")
    eta = nl.gate(scale="1/d")
    tau = nl.gate(torch.relu, of=nl.per_position(offset=lambda i: 1 / (i + 1)))
    optimizer = nl.SGD(lr=eta, scale=tau)
    output = (nl.layer_norm(1e-6, over="width"), nl.project())

    def loss(self, f, t):
        return 0.5 * (f(t.k) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)


class TTTMLP(TTTLinear):
    """TTT-MLP: the same with a two-layer MLP and a tenth of the rate."""

    learner = NormedMLP
    eta = nl.gate(scale="0.1/d")
    optimizer = nl.SGD(lr=eta, scale=TTTLinear.tau)


class TTTLinearMamba(TTTLinear):
    """TTT-Linear in the Mamba backbone: k and q share a projection, with a convolution each; a gate on the output."""

    qk = nl.project()
    q, k = (nl.view("d", of=p, make=[nl.conv(4), nl.rope(period="chunk")]) for p in (qk, qk))
    output = (TTTLinear.output[0], nl.gated(lambda x: F.gelu(x, approximate="tanh")), nl.project())


class TTTMLPMamba(TTTMLP):
    """TTT-MLP in the Mamba backbone."""

    qk, q, k, output = TTTLinearMamba.qk, TTTLinearMamba.q, TTTLinearMamba.k, TTTLinearMamba.output
