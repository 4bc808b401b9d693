"""A vision transformer whose token mixer is your own loop, learning to tell stripes by their direction."""

import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop import models


class Bottleneck(nl.Learner):
    down, up = nl.fast("d", "d//2"), nl.fast("d//2", "d")

    def forward(self, x):
        return torch.tanh(x @ self.down) @ self.up


class Denoise(nl.Loop):
    learner = Bottleneck
    k, q, v = nl.view("d"), nl.view("d"), nl.view("d")

    def loss(self, f, t):
        return F.huber_loss(f(t.k), t.v, reduction="none").sum(-1)

    def readout(self, f, t):
        return t.q + f(t.q)


torch.manual_seed(0)
vit = models.ViT(Denoise, 32, depth=2, heads=2, num_classes=2, image_size=16, patch_size=4, channels=1)
optimizer = torch.optim.Adam(vit.parameters(), lr=2e-3)
for step in range(61):
    labels = torch.randint(2, (32,))
    wave = torch.sin(torch.arange(16) * 1.5 + 6.3 * torch.rand(32, 1, 1)).expand(32, 16, 16)
    images = torch.where(labels[:, None, None] == 1, wave, wave.mT) + 0.3 * torch.randn(32, 16, 16)
    loss = F.cross_entropy(logits := vit(images[:, None]), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step:2d}   loss {loss:.3f}   accuracy {(logits.argmax(-1) == labels).float().mean():.2f}")
