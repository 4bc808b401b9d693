"""Deep memories with other losses, retentions and updates. No code of theirs is public: each entry says what it fixes.

Keys and queries come as the papers feed them (convolution, unit length, polynomial features).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import nestloop as nl


class ResidualMLP(nl.Learner):
    """x + gelu(x W2) W1."""

    w2, w1 = nl.fast("d", "4*d"), nl.fast("4*d", "d")

    def forward(self, x):
        return x + F.gelu(x @ self.w2) @ self.w1


class OmegaNet(nl.Loop):
    """OmegaNet: M_t = alpha_t M_{t-1} - grad sum_{i = t-c+1}^{t} gamma_i |M(k_i) - v_i|^2, o_t = M_t(q_t), c = 4.

    Gradients are taken at the weights a chunk of 16 starts with. The paper's gamma depends on both positions in a way
    it leaves open; here a token keeps its own. Its polynomial features are the views'.
    """

    paper = "2505.23735"
    learner, schedule = ResidualMLP, nl.Causal(16)
    k, q, v = nl.view("d"), nl.view("d"), nl.view("d")
    gamma, alpha = nl.gate(), nl.gate()
    optimizer = nl.SGD(lr=gamma, decay=alpha, window=4)

    def loss(self, f, t):
        return (f(t.k) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)


class Atlas(nl.Loop):
    """Atlas: S <- theta S + grad, M <- alpha M - eta NS(S), Newton-Schulz as Muon's, o_t = M(q_t).

    Orthogonalising needs the whole sum, so a chunk of 16 takes one step, read by the chunks after it; theta and alpha
    are then the chunk's means, and the sum over the chunk stands for the paper's window over single tokens.
    """

    paper = "2505.23735"
    learner, schedule = ResidualMLP, nl.Chunked(16, "apply-update")
    k, q, v = nl.view("d"), nl.view("d"), nl.view("d")
    gamma, theta, alpha, eta = nl.gate(), nl.gate(), nl.gate(), nl.slow(init="constant(0.1)")
    optimizer = nl.SGD(lr=eta, transform=nl.newton_schulz(), momentum=theta, decay=alpha)

    def loss(self, f, t):
        return t.gamma * (f(t.k) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)


class NormedMLP(nl.Learner):
    """x + LN(gelu(x W2) W1)."""

    w2, w1 = nl.fast("d", "4*d"), nl.fast("4*d", "d")

    def forward(self, x):
        return self.at(x, self.w2, self.w1)

    def at(self, x, w2, w1):
        return x + F.layer_norm(F.gelu(x @ w2) @ w1, (self.d,))


def _normed(w):
    """W / |W|_q^(q-2), q = 4."""
    return w / w.pow(4).sum().sqrt()


class Moneta(nl.Loop):
    """Moneta: A_t = alpha_t A_{t-1} - eta_t dl/dW, W_t = A_t / |A_t|_4^2, l = |M_W(k) - v|_3^3.

    |e| is sqrt(e^2 + 1e-6). The state is A; the gradient is W's, taken at the start of a chunk of 16, and W is
    normalised for every token. The paper's gates are per channel, its sign a tanh of a steepness it does not give.
    """

    paper = "2504.13173"
    learner, schedule = NormedMLP, nl.Causal(16)
    k, q, v = nl.view("d"), nl.view("d"), nl.view("d")
    eta, alpha = nl.gate(), nl.gate()
    optimizer = nl.SGD(lr=eta, decay=alpha)

    def loss(self, f, t):
        own = [a + _normed(b) - b for a, b in ((f.w2, f.held.w2), (f.w1, f.held.w1))]  # W, with the gradient left at A
        return ((f.at(t.k, *own) - t.v).square() + 1e-6).pow(1.5).sum(-1)

    def readout(self, f, t):
        return f.at(t.q, _normed(f.w2), _normed(f.w1))


class Yaad(nl.Loop):
    """Yaad: W_t = alpha_t W_{t-1} - eta_t grad, of |e|^2 / 2 where |e| <= delta_t, of delta_t |e|_1 beyond.

    e = M(k) - v. The threshold delta is the token's own; |e|_1 sums sqrt(e^2 + 1e-6). Gradients are taken at the start
    of a chunk of 16. The paper's gates are per channel.
    """

    paper = "2504.13173"
    learner, schedule = NormedMLP, nl.Causal(16)
    k, q, v = nl.view("d"), nl.view("d"), nl.view("d")
    eta, alpha, delta = nl.gate(), nl.gate(), nl.gate(F.softplus)
    optimizer = nl.SGD(lr=eta, decay=alpha)

    def loss(self, f, t):
        square = (f(t.k) - t.v).square()
        far = t.delta * (square + 1e-6).sqrt().sum(-1)
        return torch.where(square.sum(-1) <= t.delta.square(), 0.5 * square.sum(-1), far)

    def readout(self, f, t):
        return f(t.q)


class Memora(Moneta):
    """Memora: W_t = softmax(alpha_t log W_{t-1} - eta_t dl/dW), l = |M_W(k) - v|^2: each row of W is a distribution.

    The state is A = log W up to a constant of each row, which a softmax does not see: A_t = alpha_t A_{t-1} - eta_t
    dl/dW, exactly. The gradient is W's, taken at the start of a chunk of 16. The paper's gates are per channel.
    """

    def loss(self, f, t):
        own = [a + b.softmax(-1) - b for a, b in ((f.w2, f.held.w2), (f.w1, f.held.w1))]  # W, the gradient left at A
        return (f.at(t.k, *own) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f.at(t.q, f.w2.softmax(-1), f.w1.softmax(-1))
