"""Vision layers that learn on a token grid, beside the same written out in PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop import zoo
from tests.equality import equal

B, D, HEADS = 2, 12, 3
ROWS, COLUMNS = 4, 5
d, N = D // HEADS, ROWS * COLUMNS


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
def test_transformer_to_ttt(backend):
    layer = nl.Layer(zoo.TransformerToTTT, D, HEADS, backend=backend).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    x = torch.randn(B, N, D, dtype=torch.float64, requires_grad=True)
    named = dict(layer.named_parameters())

    def heads(flat):
        return flat.unflatten(-1, (HEADS, d)).transpose(1, 2)

    def near(flat, name):
        image = flat.mT.reshape(B, D, ROWS, COLUMNS)
        weight, bias = (named[f"views.{name}.conv2d.{part}"] for part in ("weight", "bias"))
        return flat + F.conv2d(image, weight, bias, padding=1, groups=D).flatten(2).mT

    def projected(name):
        path = f"views.{name}" + ("" if name == "v" else ".project")
        return F.linear(x, named[f"{path}.weight"], named[f"{path}.bias"])

    q, v = heads(near(projected("q"), "q")), heads(projected("v"))
    k = heads(near(F.instance_norm(projected("k").mT, eps=1.0).mT, "k"))

    def f(weights, x):
        return (F.silu(x @ weights[0]) * (x @ weights[1])) @ weights[2]

    weights = [named[f"fast.w{i}"].expand(B, HEADS, d, d) for i in (1, 2, 3)]
    loss = -(f(weights, k) * v).sum(-1).mean(-1).sum() * d**-0.5
    after = [w - g for w, g in zip(weights, torch.autograd.grad(loss, weights, create_graph=True), strict=True)]
    y = layer.out(f(after, q).transpose(1, 2).flatten(2))
    equal(layer(x, h=ROWS, w=COLUMNS), y, [x, *named.values()], 1e-11)
