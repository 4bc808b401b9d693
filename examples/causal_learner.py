"""A new causal learner: a memory that predicts each token before it learns it, and follows a teacher that changes."""

import torch
import torch.nn.functional as F

import nestloop as nl


class Memory(nl.Learner):
    w1, w2 = nl.fast("d", "2*d"), nl.fast("2*d", "d", init="zeros")

    def forward(self, x):
        return torch.tanh(x @ self.w1) @ self.w2


class Follow(nl.Loop):
    learner, schedule = Memory, nl.Online(read="before")
    k, v = nl.view("d"), nl.view("d")
    eta, kept = nl.gate(), nl.gate()  # how much each token counts, and how much of the weights stays
    optimizer = nl.SGD(lr=eta, decay=kept)

    def loss(self, f, t):
        return F.huber_loss(f(t.k), t.v, reduction="none").sum(-1)

    def readout(self, f, t):
        return f(t.k)


torch.manual_seed(0)
k = F.normalize(torch.randn(4, 1, 240, 8), dim=-1)  # [sequences, heads, tokens, d]
first, second = torch.randn(2, 4, 1, 8, 8)
v = torch.cat([torch.tanh(k[:, :, :120] @ first), torch.tanh(k[:, :, 120:] @ second)], 2)  # another teacher half way
weights = {"w1": torch.randn(1, 8, 16), "w2": torch.zeros(1, 16, 8)}
for name, eta, kept in (("learns", 0.2, 1.0), ("forgets", 0.2, 0.98), ("does not", 0.0, 1.0)):
    errors, state = [], None
    for key, value in zip(k.split(60, 2), v.split(60, 2), strict=True):  # a state is all that goes from piece to piece
        rates = {"eta": torch.full(key.shape[:3], eta), "kept": torch.full(key.shape[:3], kept)}
        z, state = nl.compile(Follow)({"k": key, "v": value, **rates}, weights, state)
        errors.append((z - value).square().mean().item())
    print(f"{name:9}", "  ".join(f"{error:.3f}" for error in errors), "  error on 60 tokens each")
