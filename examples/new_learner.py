"""A new learner, from declaration to training: recall the values of keys that a sequence has shown."""

import torch
import torch.nn.functional as F

import nestloop as nl


class Memory(nl.Learner):
    w1, w2 = nl.fast("d", "2*d"), nl.fast("2*d", "d", init="zeros")

    def forward(self, x):
        return x + F.silu(x @ self.w1) @ self.w2


class Recall(nl.Loop):
    learner = Memory
    k, q, v = nl.view("d"), nl.view("d"), nl.view("d")
    eta = nl.gate()  # each token says how much it is worth learning from
    optimizer, schedule = nl.SGD(lr=eta), nl.FullBatch(steps=2, reduction="sum")

    def loss(self, f, t):
        return 0.5 * (f(t.k) - t.v).square().mean(-1)

    def readout(self, f, t):
        return f(t.q)


torch.manual_seed(0)
layer = nl.Layer(Recall, width=32, heads=2)
optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
for step in range(301):
    keys, values = F.normalize(torch.randn(2, 32, 8, 16), dim=-1)
    asked = torch.stack([torch.cat([keys, v], -1) for v in (values, torch.zeros_like(values))], 1)
    loss = (layer(asked.flatten(1, 2))[:, 8:, 16:] - values).square().sum(-1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step:3d}   error {loss.item():.3f}   (1.000 for answering zero)")
