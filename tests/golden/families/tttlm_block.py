"""ttt-lm-pytorch ttt.py Block: norm, TTT layer, norm, SwiGLU, each with a residual; perhaps a convolution first."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import nestloop as nl
from tests.golden.case import Case, Family, Quantities, Run, one_of
from tests.golden.families.layer import Weights, leaves, named, take_gradients
from tests.golden.families.tttlm import SETTINGS, declaration, layout_of

LAYER = "seq_modeling_block."


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """The official RMSNorm, which rounds to float32 whatever it is given."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def block(w: Weights, x: Tensor, layer: nn.Module, laid_out: Weights) -> Tensor:
    """x [B, N, D] through the block, whose TTT layer is `layer`."""
    if "conv.conv.weight" in w:
        kernel = w["conv.conv.weight"]
        seen = F.pad(norm(x, w["conv.norm.weight"]).mT, (kernel.shape[-1] - 1, 0))
        x = x + F.conv1d(seen, kernel, w["conv.conv.bias"], groups=x.shape[-1]).mT
    x = x + functional_call(layer, laid_out, (norm(x, w["seq_norm.weight"]),))
    y = norm(x, w["ffn_norm.weight"])
    inner = F.silu(y @ w["mlp.gate_proj.weight"].T) * (y @ w["mlp.up_proj.weight"].T)
    return x + inner @ w["mlp.down_proj.weight"].T


def run(case: Case, how: Run) -> Iterator[tuple[str, Quantities]]:
    case.understood(*SETTINGS, "intermediate_size")
    one_of("cache", case.settings.get("cache", False), False)
    loop = declaration(case)
    x = leaves(case.tensors["in.x"], how)
    weights = {name: leaves(t, how) for name, t in case.inputs("param").items()}
    own = {name.removeprefix(LAYER): t for name, t in weights.items() if name.startswith(LAYER)}
    layer = nl.Layer(loop, x.shape[-1], case.setting("num_attention_heads"), backend=how.backend).to(how.dtype)
    out = block(weights, x, layer, layout_of(loop)(own))
    cot = case.tensors["in.cot"].to(how.dtype)
    yield loop.__mro__[1].__name__, {"out": out, **take_gradients((out * cot).sum(), {"x": x, **named(weights)})}


FAMILY = Family(
    "ttt-lm block",
    lambda case: case.settings.get("file") == "ttt.py" and case.settings.get("cls") == "Block",
    run,
    frozenset({"loss"}),
    exact=lambda case: 5e-6,  # its norms round to float32
)
