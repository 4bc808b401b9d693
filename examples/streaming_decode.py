"""Streaming: a layer reads a prompt at once, then goes on token by token; what it carries does not grow."""

import torch

import nestloop as nl
from nestloop import zoo

torch.manual_seed(0)
x = torch.randn(1, 200, 64)
for loop in (zoo.TTTMLP, zoo.GatedDeltaNet, zoo.Titans):
    layer = nl.Layer(loop, width=64, heads=4)
    with torch.no_grad():
        whole = layer(x)
        y, state = layer(x[:, :150], return_state=True)
        outputs = [y]
        for position in range(150, 200):
            y, state = layer(x[:, position : position + 1], state=state, return_state=True)
            outputs.append(y)
    difference = (torch.cat(outputs, 1) - whole).abs().max().item()
    numbers = sum(t.numel() for t in torch.utils._pytree.tree_leaves(state) if isinstance(t, torch.Tensor))
    print(f"{loop.__name__:14} largest difference {difference:.1e}   carries {numbers} numbers")
