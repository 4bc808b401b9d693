"""A small character-level language model of Python's own manual: TTT-MLP beside softmax attention, both curves."""

from pydoc_data import topics

import torch
import torch.nn.functional as F
from torch import nn

import nestloop as nl
from nestloop import zoo


class Attention(zoo.SelfAttention):
    schedule = nl.Sliding(128)  # each character sees itself and the 127 before it


class Model(nn.Module):
    def __init__(self, loop, letters, width=64):
        super().__init__()
        self.read, self.mix = nn.Embedding(letters, width), nl.Layer(loop, width, heads=4)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256), nn.GELU(), nn.Linear(256, width))
        self.norm, self.write = nn.LayerNorm(width), nn.Sequential(nn.LayerNorm(width), nn.Linear(width, letters))

    def forward(self, text):
        x = self.read(text)
        x = x + self.mix(self.norm(x))
        return self.write(x + self.mlp(x))


letters = sorted(set(manual := "".join(topics.topics.values())))
data = torch.tensor([letters.index(letter) for letter in manual])
for name, loop in (("attention", Attention), ("TTT-MLP", zoo.TTTMLP)):
    torch.manual_seed(0)
    model = Model(loop, len(letters))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(60):
        text = data[torch.randint(len(data) - 129, (8, 1)) + torch.arange(129)]
        losses.append(F.cross_entropy(model(text[:, :-1]).mT, text[:, 1:]))
        optimizer.zero_grad(), losses[-1].backward(), optimizer.step()
    print(f"{name:9}", *(f"{sum(losses[i : i + 10]) / 10:.2f}" for i in range(0, 60, 10)), "nats a character")
