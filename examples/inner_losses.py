"""Inner losses, step by step: a layer's fast weights learn each sequence anew, before anything is trained."""

import torch

import nestloop as nl
from nestloop import zoo

torch.manual_seed(0)
x = torch.randn(8, 64, 48)  # [sequences, tokens, width]
for name, loop in {"1 step": zoo.MTTTMLP, "4 steps": zoo.MTTTMLP4, "4 shuffled batches": zoo.MTTTMLPSGD4}.items():
    layer = nl.Layer(loop, width=48, heads=3).eval()
    with torch.no_grad():
        out, losses = layer(x, return_losses=True)  # losses [sequences, heads, steps + 1]
    print(f"{name:20}", "  ".join(f"{loss:.4f}" for loss in losses.mean((0, 1))))
