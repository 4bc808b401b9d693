"""The layers of ttt-lm-pytorch and LaCT written out in plain PyTorch, in their own layouts of parameters.

Gradients of the inner losses are autograd's (TTT) or written out (LaCT); nothing of nestloop is used.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
TRIPLES = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def ttt_shapes(s: dict[str, Any]) -> Shapes:
    """Names and shapes of a TTTLinear's or TTTMLP's parameters."""
    width, heads = s["hidden_size"], s["num_attention_heads"]
    d = width // heads
    hidden = 4 * d if s["ttt_layer_type"] == "mlp" else d
    shapes: Shapes = {
        "W1": (heads, d, hidden),
        "b1": (heads, 1, hidden),
        "learnable_token_idx": (s["mini_batch_size"],),
    }
    if s["ttt_layer_type"] == "mlp":
        shapes |= {"W2": (heads, hidden, d), "b2": (heads, 1, d)}
    shapes |= {"learnable_ttt_lr_bias": (heads, 1), "learnable_ttt_lr_weight": (heads, 1, width)}
    shapes |= {"ttt_norm_bias": (heads, d), "ttt_norm_weight": (heads, d)}
    shapes |= {"post_norm.bias": (width,), "post_norm.weight": (width,)}
    names = [
        "q_proj",
        "v_proj",
        "o_proj",
        *([] if s["share_qk"] else ["k_proj"]),
        *(["g_proj"] if s["use_gate"] else []),
    ]
    shapes |= {f"{name}.weight": (width, width) for name in names}
    for name in "qk" if s["share_qk"] else "":
        shapes |= {f"conv_{name}.weight": (width, 1, s["conv_kernel"]), f"conv_{name}.bias": (width,)}
    return shapes


def _norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * scale + shift


def ttt_layer(w: Weights, x: Tensor, s: dict[str, Any]) -> Tensor:
    """TTTLinear or TTTMLP, x [B, N, D], token by token."""
    sequences, tokens, width = x.shape
    heads, size = s["num_attention_heads"], s["mini_batch_size"]
    d, mlp = width // heads, s["ttt_layer_type"] == "mlp"
    q = x @ w["q_proj.weight"].T
    if s["share_qk"]:
        padded = F.pad(q.mT, (s["conv_kernel"] - 1, 0))
        q, k = (F.conv1d(padded, w[f"conv_{n}.weight"], w[f"conv_{n}.bias"], groups=width).mT for n in "qk")
    else:
        k = x @ w["k_proj.weight"].T
    place = (torch.arange(tokens) % size).float()[:, None]
    angle = place * (1.0 / s["rope_theta"] ** (torch.arange(0, d, 2).float() / d))
    turn = torch.complex(angle.cos().to(x.dtype), angle.sin().to(x.dtype))

    def split(t: Tensor, turned: bool = True) -> Tensor:  # [B, N, D] -> [B, H, N, d]
        t = t.unflatten(-1, (heads, d)).transpose(1, 2).contiguous()
        if not turned:
            return t
        return torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn).flatten(-2)

    q, k, v = split(q), split(k), split(x @ w["v_proj.weight"].T, False)
    gate = torch.einsum("bnc,hc->bhn", x, w["learnable_ttt_lr_weight"][:, 0]) + w["learnable_ttt_lr_bias"]
    eta = s["ttt_base_lr"] * torch.sigmoid(gate) / d
    tau = ((1.0 / torch.arange(1, size + 1)).to(x.dtype) + w["learnable_token_idx"]).clamp_min(0)

    def f(fast: list[Tensor], z: Tensor) -> Tensor:
        y = z @ fast[0] + fast[1]
        return F.gelu(y, approximate="tanh") @ fast[2] + fast[3] if mlp else y

    rows = torch.zeros_like(q).unbind(0)
    made = []
    for b in range(len(rows)):
        for h in range(heads):
            anchor = fast = [w[name][h] for name in (["W1", "b1", "W2", "b2"] if mlp else ["W1", "b1"])]
            norm = (w["ttt_norm_weight"][h], w["ttt_norm_bias"][h])
            for t in range(tokens):
                if t % size == 0:
                    anchor, total = fast, [torch.zeros_like(one) for one in fast]
                key, query = k[b, h, t : t + 1], q[b, h, t : t + 1]
                loss = 0.5 * (_norm(f(anchor, key), *norm) - (v[b, h, t : t + 1] - key)).square().sum()
                gradients = torch.autograd.grad(loss, anchor, create_graph=True)
                total = [sum_ + eta[b, h, t] * g for sum_, g in zip(total, gradients, strict=True)]
                fast = [one - tau[t % size] * sum_ for one, sum_ in zip(anchor, total, strict=True)]
                made.append(query + _norm(f(fast, query), *norm))
    z = torch.cat(made).reshape(sequences, heads, tokens, d).transpose(1, 2).flatten(2)
    z = _norm(z, w["post_norm.weight"], w["post_norm.bias"])
    if s["use_gate"]:
        z = F.gelu(x @ w["g_proj.weight"].T, approximate="tanh") * z
    return z @ w["o_proj.weight"].T


def lact_shapes(s: dict[str, Any]) -> Shapes:
    """Names and shapes of a LaCT layer's parameters."""
    width, d = s["dim"], s["head_dim"]
    heads, hidden = width // d, int(d * s["inter_multi"])
    shapes: Shapes = {"to_qkv.weight": (3 * width, width), "o_proj.weight": (width, width), "o_norm.weight": (d,)}
    shapes |= {"lr_proj.weight": (3 * heads, width)}
    shapes |= {"w0": (heads, hidden, d), "w1": (heads, d, hidden), "w2": (heads, hidden, d)}
    if s["cls"].startswith("Causal"):
        shapes |= {"ttt_scale_proj.weight": (heads, width), "ttt_scale_proj.bias": (heads,)}
        if s["use_momentum"]:
            shapes |= {"momentum_proj.0.weight": (heads, width), "momentum_proj.0.bias": (heads,)}
    if "window_size" in s:
        shapes |= {"qk_scale": (width, 2), "qk_offset": (width, 2)}
    return shapes


def _unit(x: Tensor) -> Tensor:
    return x / (x.norm(dim=-1, keepdim=True) + 1e-5)


def _orthogonal(g: Tensor) -> Tensor:
    x = g.mT if g.shape[-2] > g.shape[-1] else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in TRIPLES:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if g.shape[-2] > g.shape[-1] else x


def _ascent(w: list[Tensor], k: Tensor, v: Tensor, rates: Tensor) -> list[Tensor]:
    """Gradients of sum <v, w1 (silu(w0 k) * w2 k)> for w0, w1, w2, at token rates [3, ..., n, 1]."""
    gate, up, back = k @ w[0].mT, k @ w[2].mT, v @ w[1]
    sigma = torch.sigmoid(gate)
    first = (back * up * sigma * (1 + gate * (1 - sigma))).mT @ (k * rates[0])
    return [first, v.mT @ (F.silu(gate) * up * rates[1]), (back * F.silu(gate)).mT @ (k * rates[2])]


def lact_layer(w: Weights, x: Tensor, s: dict[str, Any]) -> Tensor:
    """A LaCT layer, x [B, N, D], with exact Newton-Schulz."""
    width, d, muon = s["dim"], s["head_dim"], s["use_muon"]
    heads, tokens, causal = width // d, x.shape[1], s["cls"].startswith("Causal")
    qkv = x @ w["to_qkv.weight"].T
    q, k, v = (t.unflatten(-1, (heads, d)).transpose(1, 2) for t in F.silu(qkv).chunk(3, -1))
    q, k = _unit(q), _unit(k)
    rates = F.softplus(x @ w["lr_proj.weight"].T + math.log(math.expm1(s["base_lr"])))
    rates = rates.unflatten(-1, (heads, 3, 1)).permute(3, 0, 2, 1, 4)  # [3, B, H, N, 1]
    fast = [w[f"w{i}"].expand(x.shape[0], *w[f"w{i}"].shape) for i in range(3)]
    norms = [one.norm(dim=-1, keepdim=True) for one in fast]

    def stepped(made: list[Tensor]) -> list[Tensor]:
        return [_unit(one) * norm for one, norm in zip(made, norms, strict=True)]

    def apply(fast: list[Tensor], q: Tensor) -> Tensor:
        return (F.silu(q @ fast[0].mT) * (q @ fast[2].mT)) @ fast[1].mT

    if not causal:
        found = _ascent(fast, k, v, rates)
        z = apply(stepped([(_orthogonal(g) if muon else one) + g for one, g in zip(fast, found, strict=True)]), q)
    else:
        size, parts, momenta = s["lact_chunk_size"], [], [torch.zeros_like(one) for one in fast]
        for start in range(0, tokens, size):
            now = slice(start, start + size)
            parts.append(apply(fast, q[:, :, now]))
            found = _ascent(fast, k[:, :, now], v[:, :, now], rates[:, :, :, now])
            if s["use_momentum"]:
                kept = torch.sigmoid(x[:, now] @ w["momentum_proj.0.weight"].T + w["momentum_proj.0.bias"]).mean(1)
                found = [g + kept[..., None, None] * old for g, old in zip(found, momenta, strict=True)]
                momenta = found
            found = [_orthogonal(g) for g in found] if muon else found
            fast = stepped([one + g for one, g in zip(fast, found, strict=True)])
        z = torch.cat(parts, 2)
    z = F.rms_norm(z.transpose(1, 2), (d,), w["o_norm.weight"], 1e-5)
    if causal:
        z = z * F.silu(x @ w["ttt_scale_proj.weight"].T + w["ttt_scale_proj.bias"])[..., None]
    z = z.flatten(2)
    if "window_size" in s:
        q, k, v = qkv.chunk(3, -1)
        q, k = (t * w["qk_scale"][:, i] + w["qk_offset"][:, i] for i, t in enumerate((q, k)))
        place = torch.arange(tokens)
        back = place[:, None] - place
        seen = (back >= 0) & (back < s["window_size"])
        q, k, v = (t.unflatten(-1, (-1, s["attn_head_dim"])).transpose(1, 2) for t in (q, k, v))
        z = z + F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
    return z @ w["o_proj.weight"].T
