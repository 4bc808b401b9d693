"""Functions of flash-linear-attention that no given file has, recorded from recurrences written out."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.golden import official_fla as official
from tests.golden import record
from tests.golden.check import check_file

B, T, H, K, V = 2, 11, 2, 4, 3
STATE = {"S0": (B, H, K, V)}


def shapes(layout="tokens first", values=H, steps=1, **more):
    """q, k, v of a layout, and more arguments by their trailing axes: beta=() is [B, T, H]."""

    def place(heads, *features, tokens=T):
        return (B, heads, tokens, *features) if layout == "head first" else (B, tokens, heads, *features)

    made = {"q": place(H, K), "k": place(H, K, tokens=T * steps), "v": place(values, V, tokens=T * steps)}
    per_step = {"beta"} if steps > 1 else set()
    keyed = {"g_atk", "beta_atk"}
    for name, features in more.items():
        made[name] = place(H if name in keyed else values, *features, tokens=T * steps if name in per_step else T)
    return made


HEADS = "head first"
GATED = {"beta": (), "g": ()}
CASES: dict[str, tuple[Any, ...]] = {
    "linear, chunk": ("linear_attn", "naive_chunk_linear_attn", official.linear, shapes(), {"scale": 0.7}, ("o",)),
    "linear": ("linear_attn", "naive_recurrent_linear_attn", official.linear, shapes(), {}, ()),
    "retention": ("retention", "naive_retention", official.retention, shapes(HEADS), {}, ("o",)),
    "simple gla, chunk": ("simple_gla", "naive_chunk_simple_gla", official.decayed, shapes(g=()) | STATE, {}, ()),
    "simple gla, parallel": (
        "simple_gla",
        "naive_parallel_simple_gla",
        official.decayed,
        shapes(g=()),
        {"scale": 2.0},
        ("o",),
    ),
    "gla": ("gla", "naive_recurrent_gla", partial(official.decayed, name="gk"), shapes(gk=(K,)), {}, ()),
    "delta, chunk": ("delta_rule", "delta_rule_chunkwise", official.delta, shapes(HEADS, beta=()), {}, ()),
    "delta, parallel": ("delta_rule", "delta_rule_parallel", official.delta, shapes(HEADS, beta=()), {}, ("o",)),
    "delta, rates per channel": (
        "delta_rule",
        "delta_rule_recurrence",
        official.delta,
        shapes(HEADS, beta=(V,)) | STATE,
        {},
        (),
    ),
    "gated delta, chunk": (
        "gated_delta_rule",
        "naive_chunk_gated_delta_rule",
        official.delta,
        shapes(**GATED) | STATE,
        {"scale": 0.3, "chunk_size": 4},
        (),
    ),
    **{
        f"delta product, {n} steps": (
            "gated_delta_product",
            "naive_recurrent_gated_delta_product",
            official.product,
            shapes(steps=n, **gates) | STATE,
            {"num_householder": n, "scale": 0.1},
            (),
        )
        for n, gates in ((1, GATED), (2, GATED), (4, {"beta": ()}))
    },
    "kda": ("kda", "naive_recurrent_kda", official.delta, shapes(beta=(), g=(K,)) | STATE, {"scale": None}, ()),
    "kda, six value heads": (
        "kda",
        "naive_chunk_kda",
        official.delta,
        shapes(values=6, beta=(), g=(K,)) | {"S0": (B, 6, K, V)},
        {},
        (),
    ),
    "comba, recurrent": (
        "comba",
        "naive_recurrent_comba",
        partial(official.comba, before=True),
        shapes(p=(K,), **GATED) | STATE,
        {},
        (),
    ),
    "comba, chunk": (
        "comba",
        "naive_chunk_comba",
        partial(official.comba, before=False),
        shapes(p=(K,), **GATED),
        {"scale": 1.0},
        (),
    ),
    "gdn-2": (
        "gdn2",
        "naive_recurrent_gdn2",
        official.gdn2,
        shapes(g=(K,), b=(K,), w=(V,)) | STATE,
        {},
        (),
    ),
    "gdn-2, one gate": ("gdn2", "naive_chunk_gdn2", official.gdn2, shapes(g=(K,), beta=()), {}, ()),
    "preconditioned": (
        "precond_gated_delta_rule",
        "naive_recurrent_precond_gated_delta_rule",
        official.preconditioned,
        shapes(values=4, g_atk=(), beta_atk=(), **GATED) | {"S0": (B, 4, K, V)},
        {"x": 1.5},
        (),
    ),
    "iplr": ("iplr", "iplr_recurrence", official.low_rank, shapes(HEADS, alpha=(K,), beta=(K,)) | STATE, {}, ()),
    "dplr": (
        "dplr",
        "dplr_chunkwise",
        official.low_rank,
        shapes(HEADS, alpha=(K,), beta=(K,), gk=(K,)) | STATE,
        {"chunk_size": 4},
        (),
    ),
    "mesa": (
        "mesa_net",
        "naive_mesa_net_exact",
        official.mesa,
        shapes(**GATED) | {"lamb": (H, K), "h_kk_init": (B, H, K, K), "h_kv_init": (B, H, K, V)},
        {},
        (),
    ),
    **{
        f"mesa, {n} steps": (
            "mesa_net",
            "naive_mesa_net_CG",
            partial(official.mesa, steps=n),
            shapes(**GATED) | {"lamb": (H, K)},
            settings,
            (),
        )
        for n, settings in ((30, {}), (3, {"max_CG_iteration": 3}))
    },
}
SQUARE = {"w": (H, K), "b": (H, K), "S0": (B, H, K, K)}
CASES |= {
    "ttt": (
        "ttt",
        "chunk_ttt_linear_ref",
        official.ttt,
        shapes(eta=(1,)) | {"v": (B, T, H, K)} | SQUARE | {"hb0": (B, H, 1, K)},
        {"mini_batch_size": 4},
        (),
    ),
    "ttt, head first": (
        "ttt",
        "chunk_ttt_linear_ref",
        official.ttt,
        shapes(HEADS, eta=(1,)) | {"v": (B, H, T, K), "w": (H, K), "b": (H, K)},
        {"mini_batch_size": 11, "head_first": True, "scale": 0.9},
        (),
    ),
    "titans": (
        "titans",
        "chunk_titans_linear_ref",
        official.titans,
        shapes(theta=(1,), alpha=(1,), eta=(1,)) | {"v": (B, T, H, K)} | SQUARE,
        {"chunk_size": 4},
        (),
    ),
}


def recorded(path, name, **changed):
    folder, func, run, given, settings, returns = CASES[name]
    layout = HEADS if given["q"][1] == H else "tokens first"
    record.fla(path, folder, func, run, given, {**settings, **changed, "layout": layout}, returns=returns)


@pytest.mark.parametrize("name", CASES)
def test_functions_of_other_settings(tmp_path, name):
    recorded(tmp_path / "case.safetensors", name)
    report = check_file(tmp_path / "case.safetensors", "torch")
    assert report.not_understood is None, report.not_understood
    assert not report.missed, report.line()


def change(path, settings=(), renamed=lambda name: name, **tensors):
    with safe_open(path, framework="pt") as file:
        kept = {renamed(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        metadata = {**file.metadata(), **dict(settings)}
    save_file({**kept, **tensors}, path, metadata)


def test_states_of_other_names_are_found_by_their_shape(tmp_path):
    path = tmp_path / "case.safetensors"
    recorded(path, "ttt")
    names = {"S0": "memory", "hb0": "offset", "S": "last", "hb": "last_offset"}
    change(path, renamed=lambda name: ".".join(names.get(part, part) for part in name.split(".")))
    report = check_file(path, "torch")
    assert report.not_understood is None and not report.missed, report.line()
    found = {error.name for error in report.errors[torch.float64]}
    assert {"TTT:last", "TTT:last_offset", "TTT:grad.memory", "TTT:grad.offset"} <= found


@pytest.mark.parametrize(
    "settings, tensors, reason",
    [
        ({"func": '"naive_other"'}, {}, "no loop for naive_other of fla/ops/linear_attn"),
        ({"normalize": "true"}, {}, "normalize = True sums keys over heads, not tokens"),
        ({}, {"in.u": torch.zeros(2)}, "no place for the input u of naive_recurrent_linear_attn"),
        ({}, {"cot.A": torch.zeros(2)}, "no output A"),
    ],
)
def test_what_no_loop_can_run_is_not_understood(tmp_path, settings, tensors, reason):
    path = tmp_path / "case.safetensors"
    recorded(path, "linear")
    change(path, settings, **tensors)
    assert check_file(path, "torch").not_understood == reason


def test_a_wrong_state_is_a_miss(tmp_path):
    path = tmp_path / "case.safetensors"
    recorded(path, "gated delta, chunk")
    with safe_open(path, framework="pt") as file:
        state = file.get_tensor("f64.S")
    change(path, **{"f64.S": state * (1 + 1e-8)})
    report = check_file(path, "torch")
    assert [e.name for errors in report.errors.values() for e in errors if e.missed] == ["GatedDeltaNet:S"]
