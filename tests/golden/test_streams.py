"""Layers of TTT-LM and LaCT of settings that no given file has, recorded from plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.golden import official_streams as official
from tests.golden import record
from tests.golden.check import check_file

TTT = {
    "file": "ttt.py",
    "cls": "TTTLinear",
    "ttt_layer_type": "linear",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "mini_batch_size": 4,
    "ttt_base_lr": 1.0,
    "rope_theta": 10000.0,
    "share_qk": False,
    "use_gate": False,
    "conv_kernel": 4,
}
MLP = {"ttt_layer_type": "mlp", "cls": "TTTMLP", "ttt_base_lr": 0.1}
BIDIRECTIONAL = {
    "file": "minimal_implementations/bidirectional_lact_layer.py",
    "cls": "BidirectionalLaCTSwiGLU",
    "dim": 16,
    "head_dim": 8,
    "base_lr": 0.05,
    "use_muon": False,
    "inter_multi": 1,
}
CAUSAL = {
    **BIDIRECTIONAL,
    "file": "minimal_implementations/causal_lact_with_sliding_window_attn.py",
    "cls": "CausalLaCTSwiGLU",
    "lact_chunk_size": 4,
    "use_momentum": True,
}
WINDOW = {"cls": "CausalLaCTSwiGLUWithSlidingWindowAttn", "window_size": 3, "attn_head_dim": 4}


def recorded(path, settings, layer, shapes, tokens):
    """A file of `layer` on random weights: scales near one, biases and offsets near zero."""
    width = settings.get("hidden_size", settings.get("dim"))
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(2, tokens, width, generator=generator) for name in ("x", "cot")}
    weights = {}
    for name, shape in shapes.items():
        scale = ("norm" in name and "bias" not in name) or name == "qk_scale"
        small = name.endswith("bias") or name.startswith(("b", "learnable_token", "qk")) or scale
        noise = torch.randn(shape, generator=generator) * (0.1 if small else shape[-1] ** -0.5)
        weights[name] = noise + scale

    def run(leaves, parameters):
        out = layer(parameters, leaves["x"], settings)
        return {"out": out, "loss": (out * leaves["cot"]).sum()}

    record.record(path, {"B": 2, "N": tokens, **settings}, inputs, weights, run)
    if settings.get("use_muon"):  # the official names of what exact products give
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {n: file.get_tensor(n) for n in file.keys()}, file.metadata()  # noqa: SIM118
        named = {
            n
            if n.startswith(("in.", "param."))
            else "f64." * n.startswith("f64.") + f"nsexact.{n.removeprefix('f64.')}": t
            for n, t in tensors.items()
        }
        save_file(named, path, metadata)


def checked(path):
    report = check_file(path, "reference")
    assert report.not_understood is None and not report.missed, report.not_understood or report.line()


@pytest.mark.parametrize(
    "changed, tokens",
    [
        ({"share_qk": True}, 10),
        ({"use_gate": True, "mini_batch_size": 3}, 8),
        ({"share_qk": True, "use_gate": True, "conv_kernel": 2, "rope_theta": 100.0}, 9),
        ({**MLP, "share_qk": True, "use_gate": True}, 6),
        ({**MLP, "num_attention_heads": 1, "mini_batch_size": 8}, 3),
    ],
    ids=str,
)
def test_ttt_layers_of_other_settings(tmp_path, changed, tokens):
    settings = {**TTT, **changed}
    recorded(tmp_path / "case.safetensors", settings, official.ttt_layer, official.ttt_shapes(settings), tokens)
    checked(tmp_path / "case.safetensors")


@pytest.mark.parametrize(
    "settings",
    [
        {**BIDIRECTIONAL, "use_muon": True},
        {**BIDIRECTIONAL, "inter_multi": 2},
        {**CAUSAL, "use_muon": True, "inter_multi": 1.5},
        {**CAUSAL, **WINDOW, "use_momentum": False},
        {**CAUSAL, **WINDOW, "use_muon": True, "lact_chunk_size": 5},
    ],
    ids=lambda s: f"{s['cls']} muon={s['use_muon']} x{s['inter_multi']}",
)
def test_lact_layers_of_other_settings(tmp_path, settings):
    recorded(tmp_path / "case.safetensors", settings, official.lact_layer, official.lact_shapes(settings), 13)
    checked(tmp_path / "case.safetensors")


@pytest.mark.parametrize("name, value", [("share_kv", True), ("cls", "TTTConv")])
def test_settings_that_are_not_understood(tmp_path, name, value):
    settings = {**TTT, name: value}
    recorded(tmp_path / "case.safetensors", settings, official.ttt_layer, official.ttt_shapes(settings), 4)
    assert check_file(tmp_path / "case.safetensors", "reference").not_understood is not None
