"""What people write for causal loops without a compiler: the dual form by hand, and fla-core's chunked functions."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16
EPS = 1e-6

Tensors = Mapping[str, Tensor]


def _norm(z: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return gamma * (z - z.mean(-1, keepdim=True)) * (z.var(-1, unbiased=False, keepdim=True) + EPS).rsqrt() + beta


def _norm_gradient(z: Tensor, target: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """d/dz of 0.5 |LN(z) - target|^2."""
    std = (z.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
    centred = (z - z.mean(-1, keepdim=True)) / std
    g = (gamma * centred + beta - target) * gamma
    return (g - g.mean(-1, keepdim=True) - centred * (g * centred).mean(-1, keepdim=True)) / std


def _gelu_gradient(z: Tensor) -> Tensor:
    inside = torch.tanh(0.7978845608028654 * z * (1 + 0.044715 * z * z))
    slope = (1 - inside * inside) * (0.7978845608028654 + 0.1070322243 * z * z)
    return 0.5 * z * slope + 0.5 * (1 + inside)


def _rates(eta: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """C [.., b, b] of one chunk with 1 and tau_t eta_s, and its last row as a column."""
    return torch.tril(tau.unsqueeze(-1) * eta.unsqueeze(-2)), (tau[..., -1:] * eta).unsqueeze(-1)


def ttt_linear_chunk(state: Tensors, views: Tensors, weights: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
    """One chunk of TTT-Linear's core in the dual form (arXiv 2407.04620, appendix A): z [B, H, b, d], the state."""
    gamma, beta = (weights[name].unsqueeze(1) for name in ("gamma", "beta"))
    w, b, k, q, v = state["w"], state["b"], views["k"], views["q"], views["v"]
    mix, last = _rates(views["eta"], views["tau"])
    delta = _norm_gradient(k @ w + b, v - k, gamma, beta)
    z = q @ w + b - (mix * (q @ k.mT) + mix) @ delta
    after = {"w": w - k.mT @ (last * delta), "b": b - (last * delta).sum(-2, keepdim=True)}
    return q + _norm(z, gamma, beta), after


def ttt_mlp_chunk(state: Tensors, views: Tensors, weights: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
    """One chunk of TTT-MLP's core in the dual form: z [B, H, b, d], the state."""
    gamma, beta = (weights[name].unsqueeze(1) for name in ("gamma", "beta"))
    w1, b1, w2, b2 = (state[name] for name in ("w1", "b1", "w2", "b2"))
    k, q, v = (views[name] for name in "kqv")
    mix, last = _rates(views["eta"], views["tau"])
    z1 = k @ w1 + b1
    hidden = F.gelu(z1, approximate="tanh")
    delta2 = _norm_gradient(hidden @ w2 + b2, v - k, gamma, beta)
    delta1 = (delta2 @ w2.mT) * _gelu_gradient(z1)
    read = F.gelu(q @ w1 + b1 - (mix * (q @ k.mT) + mix) @ delta1, approximate="tanh")
    z = read @ w2 + b2 - (mix * (read @ hidden.mT) + mix) @ delta2
    after = {
        "w1": w1 - k.mT @ (last * delta1),
        "b1": b1 - (last * delta1).sum(-2, keepdim=True),
        "w2": w2 - hidden.mT @ (last * delta2),
        "b2": b2 - (last * delta2).sum(-2, keepdim=True),
    }
    return q + _norm(z, gamma, beta), after


CHUNKS = {"TTTLinear": ttt_linear_chunk, "TTTMLP": ttt_mlp_chunk}


def over_chunks(step: Callable[..., Any], views: Tensors, weights: Tensors) -> Tensor:
    """A loop over chunks: [B, H, N, d]."""
    heads = {name: weights[name] for name in ("w", "w1", "w2") if name in weights}
    state = heads | {name: weights[name].unsqueeze(1) for name in ("b", "b1", "b2") if name in weights}
    outputs = []
    for start in range(0, views["k"].shape[2], CHUNK):
        z, state = step(state, {n: t[:, :, start : start + CHUNK] for n, t in views.items()}, weights)
        outputs.append(z)
    return torch.cat(outputs, 2)


def ttt_linear(views: Tensors, weights: Tensors) -> Tensor:
    """TTT-Linear's core in the dual form, chunk by chunk."""
    return over_chunks(ttt_linear_chunk, views, weights)


def ttt_mlp(views: Tensors, weights: Tensors) -> Tensor:
    """TTT-MLP's core in the dual form, chunk by chunk."""
    return over_chunks(ttt_mlp_chunk, views, weights)


def fla_naive(op: str) -> ModuleType | None:
    """One op's naive functions of the fla-core package, loaded by file: its package imports Triton."""
    found = importlib.util.find_spec("fla")
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(found.submodule_search_locations[0]) / "ops" / op / "naive.py"
    spec = importlib.util.spec_from_file_location(f"fla_{op}_naive", path)
    if spec is None or spec.loader is None or not path.exists():
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fla_functions() -> dict[str, Callable[[Tensors], Tensor]]:
    """fla-core's own PyTorch functions by loop, on views [B, H, N, *]; chunked where it has one. Empty without it."""
    delta, gated, gla = fla_naive("delta_rule"), fla_naive("gated_delta_rule"), fla_naive("gla")
    if delta is None or gated is None or gla is None:
        return {}

    def turned(views: Tensors, *names: str) -> list[Tensor]:
        return [views[name].transpose(1, 2) for name in names]

    return {
        "DeltaNet": lambda views: delta.delta_rule_chunkwise(*(views[n] for n in ("q", "k", "v", "beta")))[0],
        "GatedDeltaNet": lambda views: gated.naive_chunk_gated_delta_rule(*turned(views, "q", "k", "v", "g", "beta"))[
            0
        ].transpose(1, 2),
        "GLA": lambda views: gla.naive_recurrent_gla(*turned(views, "q", "k", "v", "g"))[0].transpose(1, 2),
    }
