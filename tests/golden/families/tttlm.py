"""ttt-lm-pytorch ttt.py TTTLinear and TTTMLP: whole layers, any size, mini-batch, backbone and split."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import nestloop as nl
from nestloop import zoo
from tests.golden.case import Case, Family, Quantities, Run
from tests.golden.families.layer import Layout, Weights, run_layer

FAST = {"w": "W1", "b": "b1", "w1": "W1", "b1": "b1", "w2": "W2", "b2": "b2"}
SETTINGS: tuple[str, ...] = (
    "hidden_size",
    "num_attention_heads",
    "mini_batch_size",
    "ttt_layer_type",
    "ttt_base_lr",
    "rope_theta",
)
SETTINGS += ("share_qk", "use_gate", "conv_kernel", "cache", "decode_chunks", "clamp_test", "pre_conv", "transformers")


def declaration(case: Case) -> Any:
    """The loop that the settings describe: the zoo's, with other numbers where the file has them."""
    kind = case.setting("ttt_layer_type", "linear", "mlp")
    shares, gates = case.setting("share_qk", True, False), case.setting("use_gate", True, False)
    plain: Any = zoo.TTTLinear if kind == "linear" else zoo.TTTMLP
    mamba: Any = zoo.TTTLinearMamba if kind == "linear" else zoo.TTTMLPMamba
    base: Any = mamba if shares else plain
    rope = nl.rope(theta=float(case.setting("rope_theta")), period="chunk")

    class TTT(base):
        schedule = nl.Causal(case.setting("mini_batch_size"))
        eta = nl.gate(scale=f"{case.setting('ttt_base_lr')!r}/d")
        optimizer = nl.SGD(lr=eta, scale=base.tau)
        output = (mamba if gates else plain).output
        if shares:
            qk = nl.project()
            q = nl.view("d", of=qk, make=[nl.conv(case.setting("conv_kernel")), rope])
            k = nl.view("d", of=qk, make=[nl.conv(case.setting("conv_kernel")), rope])
        else:
            q, k = nl.view("d", make=[rope]), nl.view("d", make=[rope])

    return TTT


def layout_of(loop: Any) -> Layout:
    """From the file's parameters to the layer's."""

    def layout(weights: Weights) -> Weights:
        table = weights["learnable_token_idx"]
        places = torch.arange(1, len(table) + 1)
        # the official 1 / (i + 1) is rounded to float32, also in its float64 runs
        rounding = (1.0 / places).to(table.dtype) - 1.0 / places.to(table.dtype)
        mapped = {
            "views.v.weight": weights["v_proj.weight"],
            "views.eta.weight": weights["learnable_ttt_lr_weight"][:, 0],
            "views.eta.bias": weights["learnable_ttt_lr_bias"][:, 0],
            "views.tau.per_position.table": table + rounding,
            "slow.gamma": weights["ttt_norm_weight"],
            "slow.beta": weights["ttt_norm_bias"],
            "output.layer_norm.weight": weights["post_norm.weight"],
            "output.layer_norm.bias": weights["post_norm.bias"],
            "out.weight": weights["o_proj.weight"],
        }
        for name in loop.spec.fast:
            stored = weights[FAST[name]]
            mapped[f"fast.{name}"] = stored[:, 0] if name.startswith("b") else stored
        if hasattr(loop, "qk"):
            mapped["shared.qk.weight"] = weights["q_proj.weight"]
            for name in ("q", "k"):
                mapped[f"views.{name}.conv.weight"] = weights[f"conv_{name}.weight"]
                mapped[f"views.{name}.conv.bias"] = weights[f"conv_{name}.bias"]
        else:
            mapped |= {f"views.{name}.project.weight": weights[f"{name}_proj.weight"] for name in ("q", "k")}
        if "g_proj.weight" in weights:
            mapped["output.gated.weight"] = weights["g_proj.weight"]
        return mapped

    return layout


def parts_of(tokens: int, size: int) -> list[tuple[int, int]]:
    """(start, stop) of the full mini-batches together, and of the rest."""
    full = tokens // size * size
    return [(start, stop) for start, stop in ((0, full), (full, tokens)) if start < stop]


def inside(layer: nl.Layer, x: Tensor, primal: bool) -> Quantities:
    """Views, rates, outputs and states of each part, as the official code passes them on.

    primal: whether a mini-batch that is not full keeps the sum of its gradients, to be gone on from.
    """
    size, found = layer.spec.schedule.chunk, dict[str, Tensor]()
    views = layer.make_views(x)
    weights = {**layer.fast, **layer.slow}
    state = None
    for index, (start, stop) in enumerate(parts_of(x.shape[1], size)):
        part = {name: view[:, :, start:stop] for name, view in views.items()}
        z, state = layer.op(part, weights, state)
        batch = min(size, stop - start)
        cut = {name: view.unflatten(2, (-1, batch)) for name, view in part.items()}  # [B, H, mini-batches, K, ...]
        values = {"XQ": cut["q"], "XK": cut["k"], "XV": cut["v"], "ttt_out": z.transpose(1, 2).flatten(2)}
        values |= {"token_eta": cut["tau"][..., None], "ttt_lr_eta": cut["eta"][..., None, :]}
        for name in layer.spec.fast:
            update = state[f"{name}.update"] * float(primal and stop % size > 0)
            for kind, w in (("states", state[name]), ("grad", update)):
                values[f"state_out.{FAST[name]}_{kind}"] = w[:, :, None] if name.startswith("b") else w
        found |= {f"mid.part{index}.{name}": value for name, value in values.items()}
    return found


def run(case: Case, how: Run) -> Iterator[tuple[str, Quantities]]:
    case.understood(*SETTINGS)
    loop, splits = declaration(case), case.settings.get("decode_chunks") or []
    quantities = run_layer(
        case,
        how,
        loop,
        case.setting("num_attention_heads"),
        layout_of(loop),
        inside=partial(inside, primal=case.settings.get("cache", False)) if len(splits) < 2 else None,
        splits=splits or None,
    )
    yield loop.__mro__[1].__name__, quantities


FAMILY = Family(
    "ttt-lm layer",
    lambda case: case.settings.get("file") == "ttt.py" and case.settings.get("cls") in ("TTTLinear", "TTTMLP"),
    run,
    frozenset({"loss"}),
    # the official derivative of gelu has constants of eight digits
    exact=lambda case: 1e-8 if case.settings.get("ttt_layer_type") == "mlp" else 1e-10,
)
