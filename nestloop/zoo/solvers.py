"""Read-outs that solve: the Mesa layer's least squares over everything seen, exactly and by conjugate gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import nestloop as nl


class NormalEquations(nl.Learner):
    """The two sides of a least-squares problem: k^T v in `kv`, k^T k in `kk`, from zero. Called, it is x kv."""

    kv = nl.fast("dk", "dv", init="zeros", learned=False)
    kk = nl.fast("dk", "dk", init="zeros", learned=False)

    def forward(self, x):
        return x @ self.kv


class Mesa(nl.Loop):
    """The Mesa layer: o_t = q_t (H_t + Lambda)^-1 G_t, the ridge regression from keys to values over the tokens so far.

    G_t = exp(g_t) G_{t-1} + beta_t k_t^T v_t and H_t = exp(g_t) H_{t-1} + beta_t k_t^T k_t; Lambda = diag(lamb) > 0.
    """

    paper = "2309.05858"
    learner, schedule = NormalEquations, nl.Online()
    k, q, v = nl.view("dk"), nl.view("dk"), nl.view("dv")
    beta, g, lamb = nl.gate(), nl.gate(F.logsigmoid), nl.slow("dk")
    optimizer = nl.SGD(lr=beta, log_decay=g)

    def loss(self, f, t):
        return -(f(t.k) * t.v).sum(-1) - ((t.k @ f.kk) * t.k).sum(-1)

    def readout(self, f, t):
        return f(torch.linalg.solve(f.kk + torch.diag(self.lamb), t.q.T).T)


class MesaNet(Mesa):
    """MesaNet: the same with 30 steps of conjugate gradients from x = 0, which stay some 5e-4 from the solution.

    The released chunk form's: 1e-5 is added to both denominators. Its decoding starts at q / (diag(H) + lamb) instead.
    """

    paper = "2506.05233"

    def readout(self, f, t):
        return f(nl.conjugate_gradient(lambda x: x @ f.kk + self.lamb * x, t.q, 30, eps=1e-5))
