"""Record cases from `official.py`, in the form of the recorded files: for settings that no given file has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.golden import official

Weights = dict[str, Tensor]
Outputs = dict[str, Tensor]


def record(path: Path, settings: dict[str, Any], inputs: Outputs, weights: Weights, run: Callable[..., Any]) -> None:
    """Run in float64 and float32 from the same float32 numbers; write inputs, outputs and gradients.

    run: (inputs, weights) -> outputs by name, with a scalar `loss` among them.
    """
    tensors: dict[str, Tensor] = {f"in.{name}": t for name, t in inputs.items() if name != "order"}
    tensors |= {f"param.{name}": t for name, t in weights.items()}
    if "order" in inputs:
        tensors["sgd.order"] = inputs["order"]
    for dtype, prefix in ((torch.float64, "f64."), (torch.float32, "")):
        leaves = {n: t.to(dtype).requires_grad_() if t.is_floating_point() else t for n, t in inputs.items()}
        parameters = {n: t.to(dtype).requires_grad_() for n, t in weights.items()}
        outputs = run(leaves, parameters)
        differentiated = {n: t for n, t in leaves.items() if n in ("x", "image")}
        differentiated |= {f"param.{name}": t for name, t in parameters.items()}
        gradients = torch.autograd.grad(outputs["loss"], list(differentiated.values()))
        outputs |= {f"grad.{name}": g for name, g in zip(differentiated, gradients, strict=True)}
        for name, value in outputs.items():
            tensors[f"{prefix}{name}"] = value.detach().reshape(value.shape or (1,)).contiguous()
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, {k: json.dumps(v) for k, v in settings.items()})


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> Weights:
    """Float32 parameters: kernels of size 1/sqrt(fan-in), scales near one, biases near zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        matrix = not name.endswith(("bias", "scale"))
        # attention's kernels are [W, H, d], all others end in [fan-in, fan-out]
        attention = len(shape) == 3 and name.endswith(("query.kernel", "key.kernel", "value.kernel"))
        size = shape[0 if attention else -2] ** -0.5 if matrix else 0.1
        weights[name] = noise * size + (1.0 if name.endswith("scale") else 0.0)
    return weights


def layer(
    path: Path,
    cls: str,
    settings: dict[str, Any],
    batch: int,
    tokens: int,
    width: int,
    seed: int = 0,
    weights: Weights | None = None,
) -> None:
    """Record one mttt layer: `cls` is LinearAttention, SelfAttention or TTTLayer."""
    settings = {"cls": f"inner_loop.py:{cls}", "B": batch, "N": tokens, "width": width, **settings}
    generator = torch.Generator().manual_seed(seed)
    x, cot = (torch.randn(batch, tokens, width, generator=generator) for _ in range(2))
    inputs = {"x": x, "cot": cot}
    if settings.get("SGD"):
        order = torch.rand(settings["heads"], tokens, generator=generator).argsort(-1)
        inputs["order"] = order.expand(batch, -1, -1)
    weights = weights or drawn(layer_shapes(cls, settings, width), seed)
    if settings.get("inner_encoder_init") == "zero":
        weights["inner_Dense_0.kernel"].zero_()

    def run(leaves: Outputs, parameters: Weights) -> Outputs:
        if cls == "TTTLayer":
            out, losses = official.ttt_layer(parameters, leaves["x"], settings, leaves.get("order"))
            return {"out": out, "inner_losses": losses, "loss": (out * leaves["cot"]).sum()}
        function = official.linear_attention if cls == "LinearAttention" else official.self_attention
        out = function(parameters, leaves["x"], settings)
        return {"out": out, "loss": (out * leaves["cot"]).sum()}

    record(path, settings, inputs, weights, run)


def layer_shapes(cls: str, settings: dict[str, Any], width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a mttt layer's parameters."""
    heads = settings["heads"]
    d = width // heads
    if cls == "TTTLayer":
        return official.ttt_shapes(settings, width)
    if cls == "LinearAttention":
        names = ("query", "key", "value", "proj")
        kernels: dict[str, tuple[int, ...]] = {f"{name}.kernel": (width, width) for name in names}
        return kernels | {f"{name}.bias": (width,) for name in names}
    shapes: dict[str, tuple[int, ...]] = {"out.kernel": (heads, d, width), "out.bias": (width,)}
    for name in ("query", "key", "value"):
        shapes |= {f"{name}.kernel": (width, heads, d), f"{name}.bias": (heads, d)}
    return shapes


def model(path: Path, settings: dict[str, Any], batch: int, rows: int, cols: int, seed: int = 0) -> None:
    """Record one whole model on images [batch, rows, cols, 3]."""
    width, patch, depth = settings["width"], settings["patch"], settings["depth"]
    grid = [rows // patch, cols // patch]
    settings = {"cls": "model.py:Model", "posemb": "sincos2d", "posemb_grid": grid, "image": rows, **settings}
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "image": torch.randn(batch, rows, cols, 3, generator=generator),
        "onehot": torch.rand(batch, settings["classes"], generator=generator).softmax(-1),
    }
    inner = {**settings["inner"], "heads": settings["heads"]}
    if inner.get("SGD"):
        orders = torch.rand(depth, settings["heads"], grid[0] * grid[1], generator=generator).argsort(-1)
        inputs["order"] = orders[:, None].expand(-1, batch, -1, -1)
    name, _ = official.MODEL_MIXERS[settings["layer_type"]]
    cls = {"MultiHeadDotProductAttention_0": "SelfAttention"}.get(name, name.removesuffix("_0"))
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.kernel": (patch, patch, 3, width),
        "embedding.bias": (width,),
        "pre_logits.kernel": (width, width),
        "pre_logits.bias": (width,),
        "head.kernel": (width, settings["classes"]),
        "head.bias": (settings["classes"],),
        "Transformer.encoder_norm.scale": (width,),
        "Transformer.encoder_norm.bias": (width,),
    }
    for index in range(depth):
        block = f"Transformer.encoderblock_{index}"
        for norm in ("LayerNorm_0", "LayerNorm_1"):
            shapes |= {f"{block}.{norm}.scale": (width,), f"{block}.{norm}.bias": (width,)}
        for dense, (fan_in, fan_out) in {
            "0": (width, settings["mlp_dim"]),
            "1": (settings["mlp_dim"], width),
        }.items():
            shapes[f"{block}.MlpBlock_0.Dense_{dense}.kernel"] = (fan_in, fan_out)
            shapes[f"{block}.MlpBlock_0.Dense_{dense}.bias"] = (fan_out,)
        shapes |= {f"{block}.{name}.{k}": shape for k, shape in layer_shapes(cls, inner, width).items()}
    weights = drawn(shapes, seed)
    positions = position_table(grid[0], grid[1], width)

    def run(leaves: Outputs, parameters: Weights) -> Outputs:
        pos_emb = positions.to(leaves["image"].dtype)
        logits, inner_losses = official.model(parameters, leaves["image"], settings, pos_emb, inputs.get("order"))
        loss = -(leaves["onehot"] * torch.log_softmax(logits, -1)).sum(-1).mean()
        return {"logits": logits, "inner_losses": inner_losses, "loss": loss, "pos_emb": pos_emb}

    record(path, settings, inputs, weights, run)


def position_table(rows: int, cols: int, width: int) -> Tensor:
    """[1, N, W]: sin x, cos x, sin y, cos y, one quarter of the width each."""
    table = torch.empty(rows, cols, 4, width // 4, dtype=torch.float64)
    for i in range(width // 4):
        omega = 10_000 ** -(i / (width / 4 - 1))
        x = torch.arange(cols, dtype=torch.float64) * omega
        y = torch.arange(rows, dtype=torch.float64)[:, None] * omega
        for quarter, values in enumerate((x.sin(), x.cos(), y.sin(), y.cos())):
            table[:, :, quarter, i] = values
    return table.reshape(1, rows * cols, width).float()


def vittt(path: Path, settings: dict[str, Any], batch: int, seed: int = 0) -> None:
    """Record one ViTTT block."""
    c, heads = settings["dim"], settings["num_heads"]
    d = c // heads
    settings = {"cls": "TTT", "file": "ttt_block.py", "B": batch, **settings}
    shapes: dict[str, tuple[int, ...]] = {
        "qkv.weight": (3 * c + 3 * d, c),
        "proj.weight": (c, c + d),
        "proj.bias": (c,),
        "w1": (1, heads, d, d),
        "w2": (1, heads, d, d),
        "w3": (d, 1, 3, 3),
    }
    if settings["qkv_bias"]:
        shapes["qkv.bias"] = (3 * c + 3 * d,)
    weights = drawn(shapes, seed)
    weights["qkv.weight"] *= (3 * c + 3 * d) ** 0.5 / c**0.5
    generator = torch.Generator().manual_seed(seed)
    tokens = settings["h"] * settings["w"]
    inputs = {name: torch.randn(batch, tokens, c, generator=generator) for name in ("x", "cot")}

    def run(leaves: Outputs, parameters: Weights) -> Outputs:
        out = official.vittt_block(parameters, leaves["x"], settings)
        return {"out": out, "loss": (out * leaves["cot"]).sum()}

    record(path, settings, inputs, weights, run)


def fla(
    path: Path,
    folder: str,
    func: str,
    run: Callable[[Outputs, dict[str, Any]], Outputs],
    shapes: dict[str, tuple[int, ...]],
    settings: dict[str, Any],
    seed: int = 0,
    returns: tuple[str, ...] = (),
) -> None:
    """Record one naive function of fla: `run` takes arguments heads first, `shapes` are in the layout of the file.

    Log decays are below zero, gates in (0, 1), keys of length one.
    returns: the outputs to record; all of them by default.
    """
    generator = torch.Generator().manual_seed(seed)
    head_first = settings.pop("layout") == "head first"

    def turned(tensor: Tensor) -> Tensor:
        return tensor if head_first else tensor.transpose(1, 2)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        if name.startswith("g"):
            return -0.3 * noise.square() - 0.02
        if name == "eta" and folder == "ttt":  # so small that its LayerNorms stay well conditioned in float32
            return 0.02 + 0.1 * noise.sigmoid()
        if name in ("beta", "beta_atk", "eta", "theta", "lamb") and folder not in ("iplr", "dplr"):
            return 0.1 + 0.5 * noise.sigmoid()
        if name == "alpha" and len(shape) == 4 and shape[-1] == 1:
            return 0.3 * noise.sigmoid()
        if name == "h_kk_init":
            return noise @ noise.mT
        return torch.nn.functional.normalize(noise, dim=-1) if name in ("k", "p", "alpha", "beta") else noise

    inputs = {name: draw(name, shape) for name, shape in shapes.items()}
    tensors = {f"in.{name}": t for name, t in inputs.items()}
    fixed = ("S0", "A0", "hb0", "w", "b", "lamb", "h_kk_init", "h_kv_init")
    settings = {"file": f"fla/ops/{folder}/naive.py", "func": func, **settings}
    for dtype, prefix in ((torch.float64, "f64."), (torch.float32, "")):
        leaves = {name: t.to(dtype).requires_grad_() for name, t in inputs.items()}
        given = {n: t if n in fixed and not _per_token(n, t) else turned(t) for n, t in leaves.items()}
        outputs = run(given, settings)
        outputs = {n: turned(t) if n == "o" else t for n, t in outputs.items() if not returns or n in returns}
        for name, value in outputs.items():
            if f"cot.{name}" not in tensors:
                tensors[f"cot.{name}"] = torch.randn(value.shape, generator=generator)
            tensors[f"{prefix}{name}"] = value.detach()
        total = sum((value * tensors[f"cot.{name}"].to(dtype)).sum() for name, value in outputs.items())
        for name, gradient in zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True):  # type: ignore[arg-type]
            tensors[f"{prefix}grad.{name}"] = gradient
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, {k: json.dumps(v) for k, v in settings.items()})


def _per_token(name: str, tensor: Tensor) -> bool:
    """GDN-2's gates w and b are per token; the LayerNorm's are [H, D]."""
    return name in ("w", "b") and tensor.ndim == 4
