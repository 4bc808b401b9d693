"""Inner optimizers: four steps to remember 24 pairs by gradient descent, by Adam, and by a rule declared here."""

import torch

import nestloop as nl
from nestloop.zoo.mttt import PlainMLP


class LookAhead(nl.Optimizer):  # Nesterov's momentum, with steps as long as the fast weight says
    m, beta = nl.moment(), nl.coefficient(0.5)

    def update(self, w, g, s):
        m = s.beta * s.m + g
        step = g + s.beta * m
        return step / (step.norm() + 1e-6) * w.norm(), {"m": m}


for rule, start in ((nl.SGD, 0.5), (nl.Adam, 0.02), (LookAhead, 0.1)):

    class Recall(nl.Loop):
        learner, schedule = PlainMLP, nl.FullBatch(steps=4)
        k, v, lr = nl.view("d"), nl.view("d"), nl.slow()
        optimizer = rule(lr=lr)

        def loss(self, f, t):
            return (f(t.k) - t.v).square().mean(-1)

        def readout(self, f, t):
            return f(t.k)

    torch.manual_seed(0)
    weights = {"w1": torch.randn(1, 8, 32) / 3, "w2": torch.randn(1, 32, 8) / 6, "lr": torch.full((1,), start)}
    outer, op = torch.optim.Adam([w.requires_grad_() for w in weights.values()], lr=0.01), nl.compile(Recall)
    for _ in range(150):
        keys, values = torch.randn(2, 32, 1, 24, 8).unbind()
        error = (op({"k": keys, "v": values}, weights)[0] - values).square().mean()
        outer.zero_grad()
        error.backward()
        outer.step()
    print(f"{rule.__name__:<9} error {error.item():.3f}, learned rate {weights['lr'].item():.3f}")
