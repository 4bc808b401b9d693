"""LaCT minimal_implementations: the bidirectional layer, and the causal one with its window of attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

import nestloop as nl
from nestloop import zoo
from nestloop.zoo.lact import SwiGLU, Window, softplus_from
from tests.golden.case import Case, Family, Quantities, Run, one_of
from tests.golden.families.layer import Layout, Weights, run_layer

WINDOWED = "CausalLaCTSwiGLUWithSlidingWindowAttn"
KINDS = ("BidirectionalLaCTSwiGLU", "CausalLaCTSwiGLU", WINDOWED)
SETTINGS = ("dim", "head_dim", "base_lr", "use_muon", "inter_multi", "use_o_norm", "qk_l2_norm")
OF_CAUSAL = ("lact_chunk_size", "use_momentum", "ttt_scale_before_sum")
OF_WINDOW = ("attn_head_dim", "window_size")
# How far the bf16 Newton-Schulz of the official code is off, for the record.
MEASURED = ("bf16NS_vs_exact_out_rel", "bf16NS_vs_exact_grad_rel")


def exact_newton_schulz(case: Case) -> Case:
    """With Muon the official outputs hang on bfloat16 rounding; the file has those of exact products as `nsexact.*`."""
    if not case.settings.get("use_muon"):
        return case
    kept = {name: tensor for name, tensor in case.tensors.items() if name.startswith(("in.", "param."))}
    same = ("mid.q", "mid.k", "mid.v", "mid.lr", "mid.momentum")
    kept |= {name: t for name, t in case.tensors.items() if name.startswith(same)}
    kept |= {n.replace("nsexact.", ""): t for n, t in case.tensors.items() if "nsexact." in n}
    return Case(case.name, case.settings, kept)


def declaration(case: Case, causal: bool, windowed: bool) -> Any:
    """The zoo's loop, with the file's numbers."""
    one_of("use_o_norm", case.settings.get("use_o_norm", True), True)
    one_of("qk_l2_norm", case.settings.get("qk_l2_norm", True), True)
    one_of("ttt_scale_before_sum", case.settings.get("ttt_scale_before_sum", True), True)
    muon = case.setting("use_muon", True, False)
    base: Any = (zoo.CausalLaCTMuon if muon else zoo.CausalLaCT) if causal else (zoo.LaCTMuon if muon else zoo.LaCT)
    rate = softplus_from(case.setting("base_lr"))
    hidden = int(case.setting("head_dim") * case.settings.get("inter_multi", 1))
    given = base.spec.optimizer

    class Wide(SwiGLU):
        h = nl.dim(hidden)
        w0, w1, w2 = nl.fast("h", "d"), nl.fast("d", "h"), nl.fast("h", "d")

    class Named(base):
        learner = Wide
        lr0, lr1, lr2 = nl.gate(rate, bias=False), nl.gate(rate, bias=False), nl.gate(rate, bias=False)
        rates = {"w0": lr0, "w1": lr1, "w2": lr2}  # noqa: RUF012  read at once
        momentum = given.momentum if case.settings.get("use_momentum", causal) else None
        optimizer = nl.SGD(rates, given.transform, decay=given.decay, momentum=momentum, restore=given.restore)

    if not causal:
        return Named

    class Sliding(Window):
        schedule = nl.Sliding(case.setting("window_size") if windowed else 1)

    class Causal(Named):
        schedule = nl.Chunked(case.setting("lact_chunk_size"), "apply-update")
        beside = Sliding if windowed else None
        m = base.m if Named.momentum is not None else None

    return Causal


def layout_of(heads: int, causal: bool, attention: int | None) -> Layout:
    """From the file's parameters to the layer's."""

    def layout(weights: Weights) -> Weights:
        q, k, v = weights["to_qkv.weight"].chunk(3)
        rates = weights["lr_proj.weight"].unflatten(0, (heads, 3))
        mapped = {f"fast.w{i}": weights[f"w{i}"] for i in range(3)}
        mapped |= {f"views.lr{i}.weight": rates[:, i] for i in range(3)}
        mapped |= {"output.rms_norm.weight": weights["o_norm.weight"], "out.weight": weights["o_proj.weight"]}
        if not causal:
            return mapped | {f"views.{name}.project.weight": rows for name, rows in zip("qkv", (q, k, v), strict=True)}
        mapped |= {"shared.to_q.weight": q, "shared.to_k.weight": k, "shared.to_v.weight": v}
        for index, name in enumerate("qk" if attention else ""):
            for here, there in (("scale", "qk_scale"), ("offset", "qk_offset")):
                mapped[f"beside.views.{name}.affine.{here}"] = weights[there][:, index].unflatten(0, (-1, attention))
        mapped |= {f"output.gated.{name}": weights[f"ttt_scale_proj.{name}"] for name in ("weight", "bias")}
        if "momentum_proj.0.weight" in weights:
            mapped |= {f"views.m.{name}": weights[f"momentum_proj.0.{name}"] for name in ("weight", "bias")}
        return mapped

    return layout


def inside(layer: nl.Layer, x: Tensor) -> Quantities:
    """Views, rates and the read-out before its norm, [B * H, N, *]."""
    views = layer.make_views(x)
    z, _ = layer.op(views, {**layer.fast, **layer.slow})
    found = {"q": views["q"], "k": views["k"], "v": views["v"], "ttt_out": z}
    found |= {f"lr{i}": views[f"lr{i}"][..., None] for i in range(3)}
    if "m" in views:
        found["momentum"] = views["m"][..., None]
    return {f"mid.{name}": value.flatten(0, 1) for name, value in found.items()}


def base_of(loop: Any) -> str:
    """The name of the zoo's loop that `loop` is made from."""
    return next(cls.__name__ for cls in loop.__mro__ if cls.__module__.startswith("nestloop.zoo"))


def run(case: Case, how: Run) -> Iterator[tuple[str, Quantities]]:
    cls = case.setting("cls", *KINDS)
    causal, windowed = cls.startswith("Causal"), cls == WINDOWED
    case.understood(*SETTINGS, *MEASURED, *(OF_CAUSAL if causal else ()), *(OF_WINDOW if windowed else ()))
    heads = case.setting("dim") // case.setting("head_dim")
    attention = case.setting("attn_head_dim") if windowed else None
    loop, layout = declaration(case, causal, windowed), layout_of(heads, causal, attention)
    dims = {} if attention is None else {"a": attention}
    yield base_of(loop), run_layer(case, how, loop, heads, layout, inside=inside, dims=dims)


FAMILY = Family(
    "LaCT layer",
    lambda case: (
        str(case.settings.get("file", "")).startswith("minimal_implementations/") and case.settings.get("cls") in KINDS
    ),
    run,
    frozenset({"loss"}),
    # Newton-Schulz blows small singular values up, and the rounding of a gradient with them
    amplifies=lambda case: 10.0 if case.settings.get("use_muon") else 2.0,
    read=exact_newton_schulz,
)
