"""The MTTT-MLP layer as people write it without a compiler: `vmap(grad)`, and its closed form by hand.

Each peer is a function of x [B, N, D] and the parameters of `nestloop.Layer(zoo.MTTTMLP, D, H)`, by its
names. B images, H heads, N tokens, D width, d head width, m = 4d hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

Parameters = dict[str, Tensor]
FAST = ("w1", "b1", "w2", "b2")


def learner(fast: Parameters, x: Tensor) -> Tensor:
    return F.gelu(x @ fast["w1"] + fast["b1"], approximate="tanh") @ fast["w2"] + fast["b2"]


def views(p: Parameters, x: Tensor) -> tuple[Tensor, Tensor]:
    """k and q [B, H, N, d]."""
    heads = p["slow.g"].shape[0]
    k, q = (F.linear(x, p[f"views.{v}.weight"], p[f"views.{v}.bias"]) for v in "kq")
    return k.unflatten(-1, (heads, -1)).transpose(1, 2), q.unflatten(-1, (heads, -1)).transpose(1, 2)


def project(p: Parameters, z: Tensor) -> Tensor:
    """z [B, H, N, d] -> [B, N, D]."""
    return F.linear(z.transpose(1, 2).flatten(2), p["out.weight"], p["out.bias"])


def linear(fast: Parameters, x: Tensor) -> Tensor:
    return x @ fast["w"]


def zero_weight(p: Parameters) -> Tensor:
    """What MTTT-Linear's fast weights [H, d, d] start from."""
    heads, d, _ = p["slow.g"].shape
    return p["slow.g"].new_zeros(heads, d, d)


def vmap_grad(p: Parameters, x: Tensor, steps: int = 1) -> Tensor:
    """The loop as its definition: gradients of one head's loss, mapped over heads and images.

    MTTT-Linear's where the parameters have no norm, with `steps` steps on all tokens.
    """
    heads, width, normed = p["slow.g"].shape[0], x.shape[-1], "slow.scale" in p
    names, learns = (FAST, learner) if normed else (("w",), linear)

    def head(k: Tensor, q: Tensor, x: Tensor, fast: Parameters, slow: Parameters) -> Tensor:
        def loss(fast: Parameters) -> Tensor:
            decoded = learns(fast, k) @ slow["g"] + p["slow.g_bias"]
            if normed:
                decoded = F.layer_norm(decoded, (width,), eps=1e-6) * slow["scale"] + slow["shift"]
            return 0.5 * heads * (decoded - x).square().mean()

        for _ in range(steps):
            gradients = grad(loss)(fast)
            fast = {name: fast[name] - gradients[name] for name in names}
        return learns(fast, q)

    fast = {name: p[f"fast.{name}"] for name in FAST} if normed else {"w": zero_weight(p)}
    slow = {name: p[f"slow.{name}"] for name in (("g", "scale", "shift") if normed else ("g",))}
    over_heads = vmap(head, in_dims=(0, 0, None, 0, 0))
    over_images = vmap(over_heads, in_dims=(0, 0, 0, None, None))
    return project(p, over_images(*views(p, x), x, fast, slow))


def closed_form(p: Parameters, x: Tensor) -> Tensor:
    """The same with the inner gradient derived by hand, as batched products over images and heads."""
    heads, (images, tokens, width) = p["fast.w1"].shape[0], x.shape
    k, q = (t.flatten(0, 1) for t in views(p, x))  # [B*H, N, d]

    def per_image(name: str) -> Tensor:  # [H, ...] -> [B*H, ...], biases with an axis of tokens
        t = p[name] if p[name].dim() == 3 else p[name][:, None]
        return t.expand(images, *t.shape).flatten(0, 1)

    w1, b1, w2, b2 = (per_image(f"fast.{name}") for name in FAST)
    g, scale, shift = (per_image(f"slow.{name}") for name in ("g", "scale", "shift"))
    target = x[:, None].expand(-1, heads, -1, -1).flatten(0, 1)  # [B*H, N, D]

    h = torch.baddbmm(b1, k, w1)  # [B*H, N, m]
    a = F.gelu(h, approximate="tanh")
    u = torch.baddbmm(b2, a, w2) @ g + p["slow.g_bias"]  # [B*H, N, D]
    centred = u - u.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    normed = centred * inverse
    by_normed = (normed * scale + shift - target) * (heads / (tokens * width)) * scale
    mean, projection = by_normed.mean(-1, keepdim=True), (by_normed * normed).mean(-1, keepdim=True)
    by_u = inverse * (by_normed - mean - normed * projection)
    by_y = by_u @ g.mT  # [B*H, N, d]
    by_h = torch.ops.aten.gelu_backward(by_y @ w2.mT, h, approximate="tanh")  # [B*H, N, m]
    w1, b1 = w1 - k.mT @ by_h, b1 - by_h.sum(1, keepdim=True)
    w2, b2 = w2 - a.mT @ by_y, b2 - by_y.sum(1, keepdim=True)

    z = torch.baddbmm(b2, F.gelu(torch.baddbmm(b1, q, w1), approximate="tanh"), w2)  # [B*H, N, d]
    return project(p, z.unflatten(0, (images, heads)))
