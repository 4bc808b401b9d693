"""What loops are measured against on a GPU: fla-core's kernels, a jitted JAX layer, steps by `torch.compile`."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import nestloop as nl
from benchmarks import causal_peers
from nestloop.zoo.tttlm import BiasedLinear

Tensors = Mapping[str, Tensor]


class Reconstructed(BiasedLinear):
    """LN(x W + b) in the loss, y + LN(y) of y = x W + b where it is read: fla-core's TTT-Linear."""

    w, b = nl.fast("d", "d", init="zeros", learned=False), nl.fast("d", init="zeros", learned=False)
    gamma, beta = nl.slow("d", init="ones"), nl.slow("d", init="zeros")

    def forward(self, x):
        return F.layer_norm(super().forward(x), (self.d,), self.gamma, self.beta, 1e-6)


class TTTLinearFla(nl.Loop):
    """TTT-Linear as fla-core has it: one rate, of the token that reads, and queries scaled."""

    learner, schedule = Reconstructed, nl.Causal(16)
    q, k, v = nl.view("d"), nl.view("d"), nl.view("d")
    eta = nl.gate()
    optimizer = nl.SGD(lr=1.0, scale=eta)

    def loss(self, f, t):
        return 0.5 * (f(t.k) - (t.v - t.k)).square().sum(-1)

    def readout(self, f, t):
        y = self.d**-0.5 * t.q @ f.w + f.b
        return y + F.layer_norm(y, (self.d,), f.gamma, f.beta, 1e-6)


def fla_kernels() -> dict[str, Callable[[Tensors, Tensors], Tensor]]:
    """fla-core's Triton kernels by loop, on views [B, H, N, *] and weights; empty without it."""
    if importlib.util.find_spec("fla") is None:
        return {}

    def kernel(module: str, name: str) -> Any:
        return getattr(importlib.import_module(f"fla.ops.{module}"), name)

    def call(module: str, name: str, names: str, **settings: Any) -> Callable[[Tensors, Tensors], Tensor]:
        def run(views: Tensors, weights: Tensors) -> Tensor:
            given = [views[n].transpose(1, 2) for n in names.split()]
            return kernel(module, name)(*given, **settings)[0].transpose(1, 2)

        return run

    def ttt(views: Tensors, weights: Tensors) -> Tensor:
        q, k, v = (views[n].transpose(1, 2).contiguous() for n in "qkv")
        eta = views["eta"].transpose(1, 2)[..., None].contiguous()
        gamma, beta = (weights[n].to(q.dtype) for n in ("gamma", "beta"))  # its kernels take no other
        made = kernel("ttt", "chunk_ttt_linear")(q, k, v, gamma, beta, eta, chunk_size=16)
        return made[0].transpose(1, 2)

    return {
        "CausalLinearAttention": call("linear_attn", "chunk_linear_attn", "q k v", normalize=False),
        "LightningAttentionFla": call("lightning_attn", "chunk_lightning_attn", "q k v", layer_idx=0, num_layers=1),
        "GLA": call("gla", "chunk_gla", "q k v g"),
        "DeltaNet": call("delta_rule", "chunk_delta_rule", "q k v beta"),
        "GatedDeltaNet": call("gated_delta_rule", "chunk_gated_delta_rule", "q k v g beta"),
        "TTTLinearFla": ttt,
    }


def dual_form(name: str) -> Callable[[Tensors, Tensors], Tensor]:
    """The dual form of TTT-Linear or TTT-MLP by hand, by `torch.compile` of a chunk; products in the views' dtype."""
    step = torch.compile(causal_peers.CHUNKS[name], dynamic=False)

    def run(views: Tensors, weights: Tensors) -> Tensor:
        with torch.autocast(views["k"].device.type, dtype=views["k"].dtype):
            return causal_peers.over_chunks(step, views, weights)

    return run


def jax_layer(parameters: Tensors, steps: int = 1) -> Callable[[Any, Any], Any]:
    """x [B, N, D], cotangent -> (y, the cotangents of x and of every parameter), of the MTTT layer with these
    parameters, by `jax.jit`; products in bfloat16. Raises ImportError without JAX."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import jax.numpy as jnp

    values = {n: jnp.asarray(t.detach().float().cpu().numpy()) for n, t in parameters.items()}
    normed = "slow.scale" in values
    heads, d, _ = values["slow.g"].shape

    def dot(a: Any, b: Any) -> Any:
        low = [t.astype(jnp.bfloat16) for t in (a, b)]
        return jnp.matmul(*low, preferred_element_type=jnp.float32)

    def layer_norm(x: Any, weight: Any, bias: Any) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * weight + bias

    def learns(fast: Any, x: Any) -> Any:
        if not normed:
            return dot(x, fast["w"])
        return dot(jax.nn.gelu(dot(x, fast["w1"]) + fast["b1"], approximate=True), fast["w2"]) + fast["b2"]

    def head(k: Any, q: Any, x: Any, fast: Any, slow: Any, bias: Any) -> Any:
        def loss(fast: Any) -> Any:
            decoded = dot(learns(fast, k), slow["g"]) + bias
            decoded = layer_norm(decoded, slow["scale"], slow["shift"]) if normed else decoded
            return 0.5 * heads * ((decoded - x) ** 2).mean()

        for _ in range(steps):
            fast = jax.tree.map(lambda w, g: w - g, fast, jax.grad(loss)(fast))
        return learns(fast, q)

    def layer(p: Any, x: Any) -> Any:
        def view(name: str) -> Any:
            flat = dot(x, p[f"views.{name}.weight"].T) + p[f"views.{name}.bias"]
            return flat.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

        fast = {n.removeprefix("fast."): t for n, t in p.items() if n.startswith("fast.")}
        fast = fast if normed else {"w": jnp.zeros((heads, d, d))}
        slow = {n.removeprefix("slow."): t for n, t in p.items() if n.startswith("slow.") and n != "slow.g_bias"}
        over_heads = jax.vmap(head, in_axes=(0, 0, None, 0, 0, None))
        over_images = jax.vmap(over_heads, in_axes=(0, 0, 0, None, None, None))
        z = over_images(view("k"), view("q"), x, fast, slow, p["slow.g_bias"])
        flat = z.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
        return dot(flat, p["out.weight"].T) + p["out.bias"]

    @jax.jit
    def forward_backward(x: Any, cotangent: Any) -> Any:
        y, pull = jax.vjp(layer, values, x)
        return y, pull(cotangent)

    return forward_backward
