"""flash-linear-attention, fla/ops/*/naive.py: every function that is one of the zoo's loops, by its arguments' names.

Layouts are [B, T, H, D], or [B, H, T, D] ("head first"); states [B, H, dk, dv]. Chunked and parallel functions compute
what the recurrent ones do, and are checked against the same declaration.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

import nestloop as nl
from nestloop import zoo
from tests.golden.case import Case, Family, NotUnderstood, Quantities, Run
from tests.golden.families import fla_loops
from tests.golden.families.fla_call import END, START, Call, Function, Tensors

QKV = {"q": "q", "k": "k", "v": "v"}


def _fixed(loop: Any) -> Callable[[Case, Tensors], Any]:
    return lambda case, views: loop


def _delta(case: Case, views: Tensors) -> Any:
    """DeltaNet, with a rate per value channel where the file has one."""
    if views["beta"].ndim == 3:
        return zoo.DeltaNet

    class DeltaNet(zoo.DeltaNet):
        beta = nl.gate(dims=("dv",))
        optimizer = nl.SGD(lr=beta)

    return DeltaNet


def _kda(case: Case, views: Tensors) -> Any:
    """KDA with as many value heads a key head as the file has."""
    heads = views["v"].shape[1] // views["k"].shape[1]
    if heads == 2:
        return zoo.KDA

    class KDA(zoo.KDA):
        k, q = nl.view("dk", group=heads), nl.view("dk", group=heads)

    return KDA


def _gdn2(case: Case, views: Tensors) -> Any:
    """GDN-2; where the function has one gate beta for both, it is KDA."""
    return zoo.GDN2 if "erase" in views else _kda(case, views)


def _product(case: Case, views: Tensors) -> Any:
    """DeltaProduct of as many steps a token as there are keys; of one, its views are not those of micro-steps."""
    if views["k"].ndim == 4:
        return fla_loops.UnscaledGatedDeltaNet
    steps = views["k"].shape[3]
    if steps == 2:
        return zoo.DeltaProduct

    class DeltaProduct(zoo.DeltaProduct):
        schedule = nl.Online(micro=steps)

    return DeltaProduct


def _micro_steps(case: Case, views: Tensors) -> Tensors:
    """k, v and beta [B, H, T * n, *] as [B, H, T, n, *]; no decay where there is no g."""
    tokens, found = views["q"].shape[2], dict(views)
    steps = views["k"].shape[2] // tokens
    if "num_householder" in case.settings:
        steps = case.setting("num_householder", steps)
    if steps > 1:
        found |= {name: views[name].unflatten(2, (tokens, steps)) for name in ("k", "v", "beta")}
    return {"g": views["q"].new_zeros(views["q"].shape[:3]), **found}


def _without_decay(case: Case, views: Tensors) -> Tensors:
    return {"g": torch.zeros_like(views["k"]), **views}


def _one_key_head_each(case: Case, views: Tensors) -> Tensors:
    """Key heads and their gates, repeated for the value heads that share them; fixed settings are the zoo's."""
    for name, known in (("x", 1.5), ("eps", 1e-6), ("log_atk_scale", -0.2)):
        if case.settings.get(name) is not None:
            case.setting(name, known)
    group = views["v"].shape[1] // views["k"].shape[1]
    repeated = {n: views[n].repeat_interleave(group, 1) for n in ("q", "k", "ga", "ba")}
    return {**views, **repeated}


def _mesa_cg(case: Case, views: Tensors) -> Any:
    """MesaNet with the file's number of conjugate gradient steps."""
    count = fla_loops.count(case, ("max_CG_iteration", "iterations", "CG"), 30)
    return zoo.MesaNet if count == 30 else fla_loops.mesa_net(count)


MESA_STATES = {
    "kk": (("h_kk_init", "prev_h_kk", "h_kk0"), ("h_kk",)),
    "kv": (("h_kv_init", "prev_h_kv", "h_kv0"), ("h_kv",)),
}
MESA = {**QKV, "g": "g", "beta": "beta"}
DELTA = {**QKV, "beta": "beta"}
GATED = {**DELTA, "g": "g"}
COMBA = {**GATED, "p": "p"}
LOW_RANK = {**QKV, "alpha": "a", "beta": "b"}
GDN2 = {**QKV, "g": "g", "b": "erase", "w": "write", "beta": "beta"}
PGDN = {**DELTA, "g": "g", "g_atk": "ga", "beta_atk": "ba"}
TTT = {**QKV, "eta": "eta"}
TITANS = {**QKV, "theta": "theta", "alpha": "alpha", "eta": "eta"}
NORM = {"w": "scale", "b": "shift"}

FUNCTIONS: dict[tuple[str, str], Function] = {
    ("linear_attn", "naive_recurrent_linear_attn"): Function(_fixed(zoo.CausalLinearAttention), QKV),
    ("linear_attn", "naive_chunk_linear_attn"): Function(_fixed(zoo.CausalLinearAttention), QKV),
    ("retention", "naive_retention"): Function(_fixed(zoo.RetNet), QKV, head_first=True),
    ("gla", "naive_recurrent_gla"): Function(_fixed(zoo.GLA), {**QKV, "gk": "g"}),
    **{
        ("simple_gla", f"naive_{form}_simple_gla"): Function(_fixed(zoo.SimpleGLA), {**QKV, "g": "g"})
        for form in ("recurrent", "chunk", "parallel")
    },
    **{
        ("delta_rule", f"delta_rule_{form}"): Function(_delta, DELTA, head_first=True)
        for form in ("recurrence", "chunkwise", "parallel")
    },
    **{
        ("gated_delta_rule", f"naive_{form}_gated_delta_rule"): Function(_fixed(zoo.GatedDeltaNet), GATED)
        for form in ("recurrent", "chunk")
    },
    ("gated_delta_product", "naive_recurrent_gated_delta_product"): Function(
        _product, GATED, scaled=False, prepare=_micro_steps
    ),
    ("kda", "naive_recurrent_kda"): Function(_kda, GATED),
    ("kda", "naive_chunk_kda"): Function(_kda, GATED),
    ("comba", "naive_chunk_comba"): Function(_fixed(zoo.Comba), COMBA),
    ("comba", "naive_recurrent_comba"): Function(_fixed(fla_loops.DecayedComba), COMBA),
    ("gdn2", "naive_recurrent_gdn2"): Function(_gdn2, GDN2),
    ("gdn2", "naive_chunk_gdn2"): Function(_gdn2, GDN2),
    ("precond_gated_delta_rule", "naive_recurrent_precond_gated_delta_rule"): Function(
        _fixed(zoo.PGDN),
        PGDN,
        states={"w": (START, END), "a": (("A0", "initial_A_state"), ("A", "final_A_state"))},
        prepare=_one_key_head_each,
    ),
    **{
        ("iplr", f"iplr_{form}"): Function(
            _fixed(zoo.GeneralizedDeltaRule), LOW_RANK, head_first=True, prepare=_without_decay
        )
        for form in ("recurrence", "chunkwise")
    },
    **{
        ("dplr", f"dplr_{form}"): Function(_fixed(zoo.GeneralizedDeltaRule), {**LOW_RANK, "gk": "g"}, head_first=True)
        for form in ("recurrence", "chunkwise")
    },
    ("mesa_net", "naive_mesa_net_exact"): Function(_fixed(zoo.Mesa), MESA, {"lamb": "lamb"}, MESA_STATES, scaled=False),
    ("mesa_net", "naive_mesa_net_CG"): Function(_mesa_cg, MESA, {"lamb": "lamb"}, MESA_STATES, scaled=False),
    ("ttt", "chunk_ttt_linear_ref"): Function(
        fla_loops.ttt,
        TTT,
        NORM,
        {"w": (START, END), "b": (("hb0", "initial_state_bias"), ("hb", "final_state_bias"))},
        prepare=fla_loops.padded("eta"),
    ),
    ("titans", "chunk_titans_linear_ref"): Function(
        fla_loops.titans, TITANS, NORM, scaled=False, prepare=fla_loops.padded("theta", "alpha", "eta")
    ),
}


def function_of(case: Case) -> Function:
    folder, name = str(case.settings["file"]).split("/")[-2], case.setting("func")
    found = FUNCTIONS.get((folder, name))
    if found is None:
        raise NotUnderstood(f"no loop for {name} of fla/ops/{folder}")
    if case.settings.get("normalize"):
        raise NotUnderstood("normalize = True sums keys over heads, not tokens")
    return found


def run(case: Case, how: Run) -> Iterator[tuple[str, Quantities]]:
    call = Call(case, how, function_of(case))
    loops = [call.loop, lightning(case)] if "lightning" in str(case.settings.get("note", "")) else [call.loop]
    for loop in loops:
        yield loop.__name__, call.quantities(loop)


def lightning(case: Case) -> Any:
    """Lightning Attention at the layer that the file's note names."""
    layer, layers = (fla_loops.count(case, [name], 0) for name in ("layer_idx", "num_layers"))
    if not layers:
        raise NotUnderstood("a lightning file that does not name its layer")

    class LightningAttentionFla(zoo.LightningAttentionFla):
        g = nl.slow(init=f"lightning({1 - layer / layers})", learned=False)
        optimizer = nl.SGD(log_decay=g)

    return LightningAttentionFla


FAMILY = Family(
    "flash-linear-attention",
    lambda case: re.fullmatch(r"fla/ops/(.+/)?naive\.py", str(case.settings.get("file"))) is not None,
    run,
    frozenset({"A"}),  # the attention matrix of a parallel form
)
