"""The official layers written out in plain PyTorch, in their own layouts of parameters, to record more cases.

Inner gradients come from autograd over one head of one image at a time; nothing of nestloop is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def linear_attention(w: Weights, x: Tensor, settings: dict[str, Any]) -> Tensor:
    """mttt LinearAttention, x [B, N, W]."""
    q, k, v = (x @ w[f"{name}.kernel"] + w[f"{name}.bias"] for name in ("query", "key", "value"))
    if settings["elu"]:
        q, k = F.elu(q) + 1, F.elu(k) + 1
    q, k, v = (t.unflatten(-1, (settings["heads"], -1)).transpose(1, 2) for t in (q, k, v))
    adaptive = settings["normalizer"] == "adaptive"
    y = q @ (k.mT @ v) / (q @ k.sum(-2, keepdim=True).mT if adaptive else v.shape[-2] * v.shape[-1])
    return y.transpose(1, 2).flatten(2) @ w["proj.kernel"] + w["proj.bias"]


def self_attention(w: Weights, x: Tensor, settings: dict[str, Any]) -> Tensor:
    """flax MultiHeadDotProductAttention, x [B, N, W]."""
    q, k, v = (
        torch.einsum("bnw,whd->bhnd", x, w[f"{name}.kernel"]) + w[f"{name}.bias"][:, None]
        for name in ("query", "key", "value")
    )
    y = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v
    return torch.einsum("bhnd,hdw->bnw", y, w["out.kernel"]) + w["out.bias"]


def ttt_layer(w: Weights, x: Tensor, settings: dict[str, Any], order: Tensor | None) -> tuple[Tensor, Tensor]:
    """mttt TTTLayer, x [B, N, W]: output [B, N, W] and inner losses [T+1]."""
    heads, steps = settings["heads"], settings["inner_itr"]
    rates = torch.tensor(settings["inner_lr"], dtype=torch.float32).to(x.dtype)
    fast_names = [name for name in w if name.startswith("inner_Dense")]
    shape = (x.shape[0], heads)
    outputs, losses = [], torch.zeros(*shape, steps + 1, dtype=x.dtype)
    for b in range(shape[0]):
        embed = w["h_bias"]
        for h in range(heads):
            p = {name: t if name in ("g_bias", "h_bias") else t[h] for name, t in w.items()}

            def learner(fast: Weights, z: Tensor) -> Tensor:
                y = z @ fast["inner_Dense_0.kernel"] + fast.get("inner_Dense_0.bias", 0.0)
                if "inner_Dense_1.kernel" not in fast:
                    return y
                y = F.gelu(y, approximate="tanh")
                return y @ fast["inner_Dense_1.kernel"] + fast.get("inner_Dense_1.bias", 0.0)

            def loss(fast: Weights, s: Tensor, p: Weights = p, learner: Callable[..., Tensor] = learner) -> Tensor:
                r = learner(fast, s @ p["phi.kernel"] + p["phi.bias"]) @ p["g.kernel"] + p["g_bias"]
                if settings["decoder_LN"]:
                    r = F.layer_norm(r, r.shape[-1:], p["decoder_LN.scale"], p["decoder_LN.bias"], 1e-6)
                return 0.5 * (r - s).square().mean() * heads

            fast = {name: p[name] for name in fast_names}
            chunks = [x[b]] * steps if order is None else x[b][order[b, h]].chunk(steps)
            for t in range(steps):
                before = loss(fast, chunks[t])
                gradients = torch.autograd.grad(before, list(fast.values()), create_graph=True)
                fast = {n: fast[n] - rates[t] * g for n, g in zip(fast, gradients, strict=True)}
                losses[b, h, t] = before.detach()
            losses[b, h, steps] = loss(fast, x[b]).detach()
            embed = embed + learner(fast, x[b] @ p["psi.kernel"] + p["psi.bias"]) @ p["h.kernel"]
        outputs.append(embed)
    return torch.stack(outputs), losses.sum(1).mean(0)


def model(w: Weights, image: Tensor, settings: dict[str, Any], pos_emb: Tensor, orders: Any) -> tuple[Tensor, Tensor]:
    """mttt Model, image [B, rows, cols, C]: logits and inner losses [depth, T+1]."""
    patch = settings["patch"]
    kernel = w["embedding.kernel"].permute(3, 2, 0, 1)
    x = F.conv2d(image.permute(0, 3, 1, 2), kernel, w["embedding.bias"], stride=patch).flatten(2).mT + pos_emb

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.scale"], w[f"{name}.bias"], 1e-6)

    def dense(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.kernel"] + w[f"{name}.bias"]

    inner = []
    for index in range(settings["depth"]):
        block = f"Transformer.encoderblock_{index}"
        y, losses = norm(x, f"{block}.LayerNorm_0"), torch.full((2,), float("inf"), dtype=x.dtype)
        name, mixer = MODEL_MIXERS[settings["layer_type"]]
        parameters = {k.removeprefix(f"{block}.{name}."): t for k, t in w.items() if k.startswith(f"{block}.{name}.")}
        layer_settings = {**settings["inner"], "heads": settings["heads"]}
        if settings["layer_type"] == "TTT":
            y, losses = ttt_layer(parameters, y, layer_settings, None if orders is None else orders[index])
        else:
            y = mixer(parameters, y, layer_settings)
        x = x + y
        y = F.gelu(dense(norm(x, f"{block}.LayerNorm_1"), f"{block}.MlpBlock_0.Dense_0"), approximate="tanh")
        x = x + dense(y, f"{block}.MlpBlock_0.Dense_1")
        inner.append(losses)
    x = torch.tanh(dense(norm(x, "Transformer.encoder_norm").mean(1), "pre_logits"))
    return dense(x, "head"), torch.stack(inner)


MODEL_MIXERS: dict[str, tuple[str, Any]] = {
    "linear_attention": ("LinearAttention_0", linear_attention),
    "self_attention": ("MultiHeadDotProductAttention_0", self_attention),
    "TTT": ("TTTLayer_0", ttt_layer),
}


def vittt_block(w: Weights, x: Tensor, settings: dict[str, Any]) -> Tensor:
    """ViTTT's block, x [B, h*w, C]."""
    heads, lr = settings["num_heads"], settings["inner_lr"]
    c = x.shape[-1]
    d, grid = c // heads, (settings["h"], settings["w"])
    q1, k1, v1, q2, k2, v2 = F.linear(x, w["qkv.weight"], w.get("qkv.bias")).split([c] * 3 + [d] * 3, -1)
    outputs = []
    for b in range(x.shape[0]):
        parts = []
        for h in range(heads):
            q, k, v = (t[b, :, h * d : (h + 1) * d] for t in (q1, k1, v1))
            w1, w2 = w["w1"][0, h], w["w2"][0, h]
            inner = -(((k @ w1) * F.silu(k @ w2)) * v).sum(-1).mean() * 9**-0.5
            for_w1, for_w2 = torch.autograd.grad(inner, (w1, w2), create_graph=True)
            w1, w2 = (t - lr * g / (g.norm(dim=-2, keepdim=True) + 1) for t, g in ((w1, for_w1), (w2, for_w2)))
            parts.append((q @ w1) * F.silu(q @ w2))
        q, k, v = (t[b].T.reshape(1, d, *grid) for t in (q2, k2, v2))
        inner = -(F.conv2d(k, w["w3"], padding=1, groups=d) * v).sum() / k[0, 0].numel() * 9**-0.5
        (g,) = torch.autograd.grad(inner, w["w3"], create_graph=True)
        w3 = w["w3"] - lr * g / (g.norm(dim=(-2, -1), keepdim=True) + 1)
        parts.append(F.conv2d(q, w3, padding=1, groups=d).flatten(2)[0].T)
        outputs.append(torch.cat(parts, -1))
    return torch.stack(outputs) @ w["proj.weight"].T + w["proj.bias"]


def ttt_shapes(settings: dict[str, Any], width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a TTTLayer's parameters."""
    h = settings["heads"]
    d = width // h
    hidden = 4 * d if settings["inner_encoder"] == "mlp_2" else d
    shapes: dict[str, tuple[int, ...]] = {"inner_Dense_0.kernel": (h, d, hidden)}
    if settings["inner_encoder"] == "mlp_2":
        shapes["inner_Dense_1.kernel"] = (h, hidden, d)
    if settings["inner_encoder_bias"]:
        shapes |= {name.replace("kernel", "bias"): (h, shape[-1]) for name, shape in shapes.items()}
    for view in ("phi", "psi"):
        shapes |= {f"{view}.kernel": (h, width, d), f"{view}.bias": (h, d)}
    shapes |= {
        "g.kernel": (h, d, width),
        "h.kernel": (h, d, width),
        "g_bias": (1, width),
        "h_bias": (1, width),
    }
    if settings["decoder_LN"]:
        shapes |= {"decoder_LN.scale": (h, width), "decoder_LN.bias": (h, width)}
    return shapes
