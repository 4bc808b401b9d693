"""titans-pytorch NeuralMemory: memories of any depth, per-chunk gates, and the options that its maps and steps have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import nestloop as nl
from nestloop import zoo
from nestloop.zoo.titans import memory, residual
from tests.golden.case import Case, Family, NotUnderstood, Quantities, Run
from tests.golden.families.layer import Layout, Weights, run_layer

SETTINGS: tuple[str, ...] = (
    "dim",
    "chunk_size",
    "mem_mlp_depth",
    "mem_mlp_expansion",
    "momentum",
    "assoc-scan",
    "einx",
    "tensordict",
)
SETTINGS += ("heads", "dim_head", "batch_size", "momentum_order", "qk_rmsnorm", "post_rmsnorm", "max_grad_norm")
SETTINGS += ("spectral_norm_surprises", "default_step_transform_max_lr")


def soft_clamp(largest: float) -> Any:
    """softclamp_grad_norm: a gradient of norm n gets the norm h tanh(n / h) + h, h being half the largest."""
    half = largest / 2

    def clamp(gradient: Tensor) -> Tensor:
        norm = gradient.square().sum().sqrt()
        return gradient * ((norm / half).tanh() * half + half) / norm

    return clamp


def orthogonal(update: Tensor) -> Tensor:
    """Newton-Schulz of matrices; vectors stay as they are."""
    return nl.newton_schulz(eps=0.0)(update) if update.ndim == 2 else update


def declaration(case: Case) -> Any:
    """zoo.NeuralMemory with the file's options."""
    settings, base = case.settings, zoo.NeuralMemory
    heads, order = settings.get("heads", 1), settings.get("momentum_order", 1)
    normed = [nl.rms_norm(eps=None, scale=False), nl.affine(offset=False)]

    learner = residual(memory(case.setting("mem_mlp_depth"), case.setting("mem_mlp_expansion")))
    orders = range(order if settings.get("momentum", True) else 0)
    momenta = {f"eta{i}": nl.gate(of=base.store, pooled=True) for i in orders}
    theta = nl.gate(of=base.store, scale=float(settings.get("default_step_transform_max_lr", 1.0)))
    largest = settings.get("max_grad_norm")
    optimizer = nl.SGD(
        lr=theta,
        momentum=tuple(momenta.values()) or None,
        decay=base.kept,
        gradient_transform=None if largest is None else soft_clamp(largest),
        transform=orthogonal if settings.get("spectral_norm_surprises") else None,
    )
    parts: dict[str, Any] = {
        "learner": learner,
        "schedule": nl.Chunked(case.setting("chunk_size"), "apply-update", settings.get("batch_size") or 0, True),
        "theta": theta,
        "eta": None,
        **momenta,
        "optimizer": optimizer,
        "output": normed if settings.get("post_rmsnorm") else (),
    }
    if settings.get("qk_rmsnorm"):
        parts |= {"q": nl.view("d", of=base.retrieve, make=normed[:]), "k": nl.view("d", of=base.store, make=normed[:])}
    if heads > 1:
        parts["output"] = [*parts["output"], nl.gated(per_head=True, of=base.retrieve), nl.project()]
    return type("Named", (base,), parts)


def layout_of(loop: Any, heads: int, order: int) -> Layout:
    """From the file's parameters to the layer's."""

    def layout(weights: Weights) -> Weights:
        mapped = {f"shared.{name}.weight": weights[f"{name}_norm.weight"] for name in ("store", "retrieve")}
        for name, there in (("q", "to_queries"), ("k", "to_keys"), ("v", "to_values")):
            mapped[f"views.{name}.project.weight"] = weights[f"{there}.weight"]
        for kind in ("weight", "bias"):
            mapped[f"views.theta.project.{kind}"] = weights[f"to_adaptive_step.0.{kind}"]
            mapped[f"views.kept.project.{kind}"] = weights[f"to_decay_factor.0.{kind}"]
            for i, gate in enumerate(loop.spec.optimizer.momentum or ()):
                rows = weights[f"to_momentum.0.{kind}"].unflatten(0, (heads, order))
                mapped[f"views.{gate.name}.project.{kind}"] = rows[:, i]
        for name in loop.spec.fast:
            mapped[f"fast.{name}"] = weights["W0." + official(name)]
        for name, there in (("q", "q_norm"), ("k", "k_norm")):
            if f"{there}.gamma" in weights:
                mapped[f"views.{name}.affine.scale"] = weights[f"{there}.gamma"][:, 0] + 1
        if "multihead_rmsnorm.gamma" in weights:
            mapped["output.affine.scale"] = weights["multihead_rmsnorm.gamma"][:, 0] + 1
        if heads > 1:
            mapped["output.gated.weight"] = weights["retrieve_gate.0.weight"]
            mapped["out.weight"] = weights["combine_heads.weight"]
        return mapped

    return layout


def official(name: str) -> str:
    """The name of a fast weight in the official state."""
    return "norm.gamma" if name == "gamma" else f"model.weights.{name[1:]}"


def inside(layer: nl.Layer, x: Tensor) -> Quantities:
    """What a chunk's store sees, the memory after every chunk, and the state at the end."""
    schedule, spec = layer.spec.schedule, layer.spec
    size, tokens = schedule.size, x.shape[1]
    views, weights = layer.make_views(x), {**layer.fast, **layer.slow}
    full = tokens // size * size
    memories = [{name: layer.fast[name].expand(x.shape[0], *layer.fast[name].shape) for name in spec.fast}]
    state = None
    for start in range(0, tokens, size):
        part = {name: view[:, :, start : start + size] for name, view in views.items()}
        _, state = layer.op(part, weights, state)
        memories += [state] if start + size <= tokens else []
    assert state is not None
    found = {}
    for name in spec.fast:
        each = torch.stack([memory[name] for memory in memories], 2)  # [B, H, chunks + 1, ...]
        last = state[name]
        renewed = schedule.anchor and tokens % schedule.anchor == 0
        found[f"updates.{official(name)}"] = each.flatten(0, 1)
        found[f"state.last_update.{official(name)}"] = last.flatten(0, 1)
        found[f"state.weights.{official(name)}"] = (last if renewed else state[f"{name}.anchor"]).flatten(0, 1)
        momenta = [state[f"{name}.momentum{i + 1 if i else ''}"] for i in range(spec.optimizer.orders)]
        if momenta:  # the official ones gather what is added, ours what is taken away
            found[f"state.last_momentum.{official(name)}"] = -torch.stack(momenta).flatten(1, 2)
    if not schedule.anchor and full:
        _, _, losses = layer.op(views, weights, return_losses=True)
        seen = {"keys": views["k"], "values": views["v"], "lr": views["theta"], "unweighted_loss": losses}
        for name, value in seen.items():
            found[f"mid.store0.{name}"] = value[:, :, :full].unflatten(2, (-1, size)).flatten(0, 2)
    return found


def run(case: Case, how: Run) -> Iterator[tuple[str, Quantities]]:
    case.understood(*SETTINGS)
    if not isinstance(case.setting("chunk_size"), int):
        raise NotUnderstood(f"chunk_size = {case.settings['chunk_size']!r}")
    heads = case.settings.get("heads", 1)
    loop = declaration(case)
    dims = {"d": case.settings["dim_head"]} if case.settings.get("dim_head") else {}
    layout = layout_of(loop, heads, case.settings.get("momentum_order", 1))
    yield zoo.NeuralMemory.__name__, run_layer(case, how, loop, heads, layout, inside=inside, dims={**dims})


FAMILY = Family(
    "titans-pytorch memory",
    lambda case: (
        case.settings.get("file") == "titans_pytorch/neural_memory.py" and case.settings.get("cls") == "NeuralMemory"
    ),
    run,
    frozenset({"loss"}),
)
