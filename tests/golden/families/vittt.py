"""ViTTT ttt_block.py TTT: the gated branch and the depthwise branch of ViT^3 under one projection."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from nestloop import zoo
from tests.golden.case import Case, Family, Quantities, Run
from tests.golden.families.layer import Layout, Weights, run_layer

VIEWS = ("q", "k", "v")


def branches(inner_lr: float) -> tuple[Any, ...]:
    """The zoo's two branches, at another inner learning rate where the file has one."""
    if inner_lr == 1.0:
        return zoo.ViT3

    class Gated(zoo.GatedBranch):
        optimizer = dataclasses.replace(zoo.GatedBranch.spec.optimizer, lr=inner_lr)

    class Depthwise(zoo.DepthwiseBranch):
        optimizer = dataclasses.replace(zoo.DepthwiseBranch.spec.optimizer, lr=inner_lr)

    return Gated, Depthwise


def layout_of(width: int, heads: int) -> Layout:
    d = width // heads

    def layout(weights: Weights) -> Weights:
        qkv = weights["qkv.weight"]  # [3W + 3d, W]: q, k, v of the gated branch, then of the convolution
        bias = weights.get("qkv.bias", torch.zeros(qkv.shape[0], dtype=qkv.dtype))
        mapped = {
            "branches.0.fast.w1": weights["w1"][0],
            "branches.0.fast.w2": weights["w2"][0],
            "branches.1.fast.w3": weights["w3"][None],
            "out.weight": weights["proj.weight"],
            "out.bias": weights["proj.bias"],
        }
        splits = [width] * 3 + [d] * 3
        parts = list(zip(qkv.split(splits), bias.split(splits), strict=True))
        for branch, of_branch in enumerate((parts[:3], parts[3:])):
            for view, (weight, view_bias) in zip(VIEWS, of_branch, strict=True):
                mapped[f"branches.{branch}.views.{view}.weight"] = weight
                mapped[f"branches.{branch}.views.{view}.bias"] = view_bias
        return mapped

    return layout


def run(case: Case, how: Run) -> Iterator[tuple[str, Quantities]]:
    width, heads = case.setting("dim"), case.setting("num_heads")
    loops = branches(float(case.setting("inner_lr")))
    grid = {"h": case.setting("h"), "w": case.setting("w")}
    yield "ViT3", run_layer(case, how, loops, heads, layout_of(width, heads), **grid)


FAMILY = Family(
    "ViTTT block",
    lambda case: case.settings.get("file") == "ttt_block.py" and case.settings.get("cls") == "TTT",
    run,
    frozenset({"loss"}),
)
