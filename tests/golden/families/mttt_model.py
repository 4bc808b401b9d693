"""mttt model.py Model: the whole vision transformer, with any of its mixers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from nestloop import zoo
from nestloop.models.vit import ViT, sincos_positions
from tests.golden.case import Case, Family, NotUnderstood, Quantities, Run, one_of
from tests.golden.families import mttt_linear_attention, mttt_self_attention, mttt_ttt
from tests.golden.families.layer import (
    Layout,
    Weights,
    leaves,
    linear,
    named,
    take_gradients,
    total_losses,
)

MIXERS = {  # layer_type: the name flax gives the mixer's module
    "linear_attention": "LinearAttention_0",
    "self_attention": "MultiHeadDotProductAttention_0",
    "TTT": "TTTLayer_0",
}


def declarations(case: Case, weights: Weights) -> list[tuple[Any, Layout]]:
    """The mixers that the settings describe, each with its layout of parameters."""
    kind, inner = case.setting("layer_type", *MIXERS), case.settings.get("inner") or {}
    inner = inner.get(kind, inner)  # the official configuration nests the settings under the layer's type
    if kind == "self_attention":
        return [(zoo.SelfAttention, mttt_self_attention.layout)]
    if kind == "linear_attention":
        features = bool(inner["elu"]), one_of("normalizer", inner["normalizer"], "constant", "adaptive")
        return [(mttt_linear_attention.LOOPS[features], mttt_linear_attention.layout)]
    from_zero = all(mttt_ttt.starts_at_zero(block) for block in blocks(case, weights))
    return [(loop, mttt_ttt.layout_of(loop)) for loop in mttt_ttt.declarations(inner, from_zero)]


def blocks(case: Case, weights: Weights) -> list[Weights]:
    """The mixers' parameters, one dict a block."""
    module = MIXERS[case.setting("layer_type", *MIXERS)]
    prefixes = [f"Transformer.encoderblock_{index}.{module}." for index in range(case.setting("depth"))]
    return [{k.removeprefix(p): t for k, t in weights.items() if k.startswith(p)} for p in prefixes]


def map_parameters(case: Case, weights: Weights, layout: Layout) -> Weights:
    """The file's parameters -> those of `ViT`."""
    mapped = {
        "embedding.weight": linear(weights["embedding.kernel"].flatten(0, 2)),  # row, col, channel
        "embedding.bias": weights["embedding.bias"],
    }

    def norm(ours: str, theirs: str) -> None:
        mapped[f"{ours}.weight"], mapped[f"{ours}.bias"] = (
            weights[f"{theirs}.scale"],
            weights[f"{theirs}.bias"],
        )

    def dense(ours: str, theirs: str) -> None:
        mapped[f"{ours}.weight"] = linear(weights[f"{theirs}.kernel"])
        mapped[f"{ours}.bias"] = weights[f"{theirs}.bias"]

    for index, mixer in enumerate(blocks(case, weights)):
        block = f"Transformer.encoderblock_{index}"
        norm(f"blocks.{index}.norm1", f"{block}.LayerNorm_0")
        norm(f"blocks.{index}.norm2", f"{block}.LayerNorm_1")
        dense(f"blocks.{index}.mlp.up", f"{block}.MlpBlock_0.Dense_0")
        dense(f"blocks.{index}.mlp.down", f"{block}.MlpBlock_0.Dense_1")
        mapped.update({f"blocks.{index}.mixer.{name}": tensor for name, tensor in layout(mixer).items()})
    norm("encoder_norm", "Transformer.encoder_norm")
    dense("pre_logits", "pre_logits")
    dense("head", "head")
    return mapped


def orders(case: Case) -> list[Tensor] | None:
    """The recorded token orders, one [B, H, N] a block: stacked in one tensor, or one tensor a block."""
    found = {name: t for name, t in case.tensors.items() if name.startswith("sgd.") and "order" in name}
    if not found:
        return None
    depth = case.setting("depth")
    if len(found) == 1 and (stacked := next(iter(found.values()))).shape[0] == depth and stacked.dim() == 4:
        return list(stacked)
    numbered = {int(n[-1]): t for name, t in found.items() if (n := re.findall(r"\d+", name.replace("_0", "")))}
    if sorted(numbered) != list(range(depth)):
        numbered = {int(re.findall(r"\d+", name)[0]): t for name, t in found.items() if re.search(r"\d", name)}
    if sorted(numbered) != list(range(depth)):
        raise NotUnderstood(f"token orders {sorted(found)} for {depth} blocks")
    return [numbered[index] for index in range(depth)]


def run(case: Case, how: Run) -> Iterator[tuple[str, Quantities]]:
    case.setting("posemb", "sincos2d")
    weights = {name: leaves(tensor, how) for name, tensor in case.inputs("param").items()}
    image = leaves(case.tensors["in.image"], how)  # [B, rows, cols, C]
    onehot = case.tensors["in.onehot"].to(how.dtype)
    grid, width = case.setting("posemb_grid"), case.setting("width")
    patch = case.setting("patch")
    patch = patch if isinstance(patch, int) else one_of("patch", patch[0], patch[1])
    for loop, layout in declarations(case, weights):
        model = ViT(
            loop,
            width,
            case.setting("depth"),
            case.setting("heads"),
            num_classes=case.setting("classes"),
            image_size=(image.shape[1], image.shape[2]),
            patch_size=patch,
            channels=image.shape[3],
            mlp_ratio=case.setting("mlp_dim") // width,
            backend=how.backend,
        ).to(how.dtype)
        # the recorded float64 run used positions rounded in float32 by another library's sine
        model.positions = case.tensors["f64.pos_emb"][0].to(how.dtype)
        parameters_of_model = map_parameters(case, weights, layout)
        images = image.permute(0, 3, 1, 2)
        forward = {"return_losses": True, "order": orders(case)}
        logits, inner = functional_call(model, parameters_of_model, (images,), forward)
        loss = -(onehot * torch.log_softmax(logits, -1)).sum(-1).mean()
        gradients = take_gradients(loss, {"image": image, **named(weights)})
        yield (
            loop.__name__,
            {
                "logits": logits,
                "loss": loss.reshape(1),
                "inner_losses": inner_losses(case, inner),
                "pos_emb": sincos_positions(grid[0], grid[1], width)[None],
                **gradients,
            },
        )


def inner_losses(case: Case, inner: list[Tensor | None]) -> Tensor:
    """[depth, T+1]; two infinities for a mixer that is no TTT layer, as the official model returns."""
    if case.settings["layer_type"] != "TTT":
        return torch.full((len(inner), 2), float("inf"))
    return torch.stack([total_losses(losses) for losses in inner if losses is not None])


FAMILY = Family("mttt model", lambda case: case.settings.get("cls") == "model.py:Model", run)
