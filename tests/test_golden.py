"""The recorded files of the official implementations, and more settings, recorded from plain PyTorch."""

import functools
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nestloop import zoo
from tests.golden import record
from tests.golden.check import check_file
from tests.golden.official import ttt_shapes

TTT = {
    "heads": 2,
    "inner_encoder": "mlp_2",
    "inner_encoder_bias": True,
    "inner_encoder_init": "xavier_uniform",
    "decoder_LN": True,
    "inner_itr": 1,
    "inner_lr": [1.0],
    "SGD": False,
}
MODEL = {"width": 16, "depth": 2, "heads": 2, "mlp_dim": 32, "classes": 5, "patch": 2}


def run_driver(folder, *arguments):
    command = [sys.executable, "-m", "tests.golden", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@functools.cache
def reports(folder, pattern):
    return [check_file(path, "auto") for path in sorted((folder / "golden").glob(f"{pattern}.safetensors"))]


PATTERNS = ["mttt_*", "vittt_*", "fla_*", "tttlm_*", "lact_*", "titans_*"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_recorded_files(shared, pattern):
    found = reports(shared, pattern)
    assert found
    for report in found:
        assert not report.missed and not report.not_understood, report.line()


def test_the_catalogue_names_the_loops_that_files_check(shared):
    checked = {
        error.name.partition(":")[0]
        for pattern in PATTERNS
        for report in reports(shared, pattern)
        for error in report.errors[torch.float64]
    }
    branches = {loop.__name__: "ViT3" for loop in zoo.ViT3}
    for loop in zoo.loops():
        assert (loop in zoo.GOLDEN) == (branches.get(loop.__name__, loop.__name__) in checked), loop.__name__


def passes(path, backend="auto"):
    report = check_file(path, backend)
    assert report.not_understood is None, report.not_understood
    assert not report.missed, "\n".join(
        [report.line(), *(str(e) for errors in report.errors.values() for e in errors if e.missed)]
    )
    return report


@pytest.mark.parametrize(
    "changed",
    [
        *(
            {"inner_encoder": kind, "inner_encoder_bias": bias, "decoder_LN": norm}
            for kind, bias, norm in itertools.product(("mlp_1", "mlp_2"), (False, True), (False, True))
        ),
        {
            "inner_encoder": "mlp_1",
            "inner_encoder_bias": False,
            "decoder_LN": False,
            "inner_encoder_init": "zero",
        },
        {"inner_encoder": "mlp_1", "inner_encoder_init": "zero", "inner_itr": 2, "inner_lr": [1.0, 0.1]},
        {"inner_itr": 3, "inner_lr": [0.1, 1.0, 0.3]},
        {"inner_itr": 4, "inner_lr": [1.0, 0.7, 0.5, 0.1], "SGD": True},
        {"inner_itr": 1, "SGD": True},
        {"inner_encoder": "mlp_1", "inner_itr": 2, "inner_lr": [0.1, 0.2], "SGD": True, "heads": 4},
        {"heads": 1},
    ],
    ids=lambda changed: " ".join(f"{key}={value}" for key, value in changed.items()),
)
def test_ttt_layers_of_other_settings(tmp_path, changed):
    record.layer(tmp_path / "case.safetensors", "TTTLayer", {**TTT, **changed}, batch=2, tokens=12, width=16)
    passes(tmp_path / "case.safetensors")


def test_frozen_zero_weights_are_checked_beside_learned_ones(tmp_path):
    changed = {
        "inner_encoder": "mlp_1",
        "inner_encoder_bias": False,
        "decoder_LN": False,
        "inner_encoder_init": "zero",
    }
    record.layer(tmp_path / "case.safetensors", "TTTLayer", {**TTT, **changed}, batch=1, tokens=7, width=16)
    report = passes(tmp_path / "case.safetensors")
    names = {error.name for error in report.errors[torch.float64]}
    assert {"MTTTLinear:out", "Composed:out", "Composed:grad.param.inner_Dense_0.kernel"} <= names


@pytest.mark.parametrize("elu", [True, False])
@pytest.mark.parametrize("normalizer", ["constant", "adaptive"])
def test_linear_attention_of_every_kind(tmp_path, elu, normalizer):
    settings = {"heads": 4, "elu": elu, "normalizer": normalizer}
    record.layer(tmp_path / "case.safetensors", "LinearAttention", settings, batch=3, tokens=9, width=16)
    passes(tmp_path / "case.safetensors")


def test_self_attention_of_other_sizes(tmp_path):
    record.layer(tmp_path / "case.safetensors", "SelfAttention", {"heads": 3}, batch=1, tokens=11, width=24)
    passes(tmp_path / "case.safetensors")


@pytest.mark.parametrize(
    ("layer_type", "inner", "patch"),
    [
        ("self_attention", {}, 2),
        ("linear_attention", {"elu": False, "normalizer": "constant"}, 2),
        ("TTT", {**TTT, "train_init": True}, 1),
        ("TTT", {**TTT, "inner_itr": 2, "inner_lr": [1.0, 0.5], "SGD": True, "train_init": True}, 2),
    ],
)
def test_models_of_every_kind(tmp_path, layer_type, inner, patch):
    settings = {**MODEL, "layer_type": layer_type, "inner": inner, "patch": patch}
    record.model(tmp_path / "case.safetensors", settings, batch=2, rows=4 * patch, cols=2 * patch)
    passes(tmp_path / "case.safetensors")


@pytest.mark.parametrize(
    "settings",
    [
        {"dim": 16, "num_heads": 2, "h": 3, "w": 5, "qkv_bias": True, "inner_lr": 1.0},
        {"dim": 16, "num_heads": 4, "h": 4, "w": 4, "qkv_bias": False, "inner_lr": 0.3},
        {"dim": 8, "num_heads": 1, "h": 2, "w": 1, "qkv_bias": True, "inner_lr": 0.5},
    ],
)
def test_vit3_blocks_of_other_settings(tmp_path, settings):
    record.vittt(tmp_path / "case.safetensors", settings, batch=2)
    passes(tmp_path / "case.safetensors")


def change(path, changed_path, name, factor=1.0, settings=None):
    """A copy of a file with one tensor multiplied."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        metadata = {**file.metadata(), **(settings or {})}
    if name is not None:
        tensors[name] = tensors[name] * factor
    save_file(tensors, changed_path, metadata)


@pytest.mark.parametrize("name", ["f64.out", "f64.inner_losses", "f64.grad.x", "f64.grad.param.g_bias"])
def test_a_changed_value_is_a_miss(tmp_path, name):
    record.layer(tmp_path / "case.safetensors", "TTTLayer", TTT, batch=1, tokens=8, width=16)
    change(tmp_path / "case.safetensors", tmp_path / "changed.safetensors", name, 1 + 1e-9)
    report = check_file(tmp_path / "changed.safetensors", "reference")
    missed = [error.name for errors in report.errors.values() for error in errors if error.missed]
    assert missed == [f"MTTTMLP:{name.removeprefix('f64.')}"]


def test_the_driver_prints_a_line_a_file_and_exits_1_on_a_miss(tmp_path):
    record.layer(tmp_path / "good.safetensors", "TTTLayer", TTT, batch=1, tokens=8, width=16)
    run = run_driver(tmp_path, "--backend", "reference")
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("ok    good ")

    change(tmp_path / "good.safetensors", tmp_path / "changed.safetensors", "f64.grad.x", 1.001)
    foreign = {"cls": '"Other"'}
    change(tmp_path / "good.safetensors", tmp_path / "foreign.safetensors", None, settings=foreign)
    run = run_driver(tmp_path, "--backend", "reference")
    lines = run.stdout.splitlines()
    assert run.returncode == 1, run.stdout + run.stderr
    assert lines[0].startswith("MISS  changed ") and "float64 1.0e-03 MTTTMLP:grad.x" in lines[0]
    assert lines[1].startswith("ok    good ")
    assert lines[3:5] == ["not understood (1 files):", f"      {'foreign':<34} no family for these settings"]
    assert lines[-1].startswith("2 files checked with backend reference in ")
    assert lines[-1].endswith(", 1 missed")


def test_a_recorded_gradient_that_is_not_computed_is_a_miss(tmp_path):
    record.layer(tmp_path / "case.safetensors", "TTTLayer", TTT, batch=1, tokens=8, width=16)
    with safe_open(tmp_path / "case.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        metadata = file.metadata()
    tensors["f64.grad.param.another"] = torch.zeros(3, dtype=torch.float64)
    save_file(tensors, tmp_path / "more.safetensors", metadata)
    report = check_file(tmp_path / "more.safetensors", "reference")
    assert report.failure == "recorded, but not computed: grad.param.another"


def test_an_empty_folder_is_a_failure(tmp_path):
    run = run_driver(tmp_path)
    assert (run.returncode, run.stdout) == (1, f"no *.safetensors file in {tmp_path}\n")


PROSE = "rs = np.random.RandomState(7); in sorted order: kernels standard_normal(shape) * fan_in**-0.5, "
PROSE += "biases 0.1 * standard_normal, scales 1 + 0.1 * standard_normal, g_bias zero"


@pytest.mark.parametrize("form", ["prose", "entries"])
def test_parameters_are_drawn_again_from_their_recipe(tmp_path, form):
    shapes = ttt_shapes(TTT, 16)
    order = sorted(shapes, reverse=form == "entries")
    entries = {"seed": 7, "params": [{"name": name.replace(".", "/"), "std": 0.1} for name in order]}
    random, weights = np.random.RandomState(7), {}
    for name in order:
        if name.endswith("g_bias"):  # a constant takes nothing from the generator
            weights[name] = torch.zeros(shapes[name])
            continue
        scale = shapes[name][-2] ** -0.5 if name.endswith("kernel") else 0.1
        noise = random.standard_normal(shapes[name]) * scale + name.endswith("scale")
        weights[name] = torch.from_numpy(noise.astype(np.float32))
    path, settings = (
        tmp_path / "case.safetensors",
        {**TTT, "param_recipe": PROSE if form == "prose" else entries},
    )
    record.layer(path, "TTTLayer", settings, batch=1, tokens=8, width=16, weights=weights)
    summarise(path)
    passes(path)

    change(path, tmp_path / "changed.safetensors", "check.sum.psi.kernel", 1.01)
    reason = check_file(tmp_path / "changed.safetensors", "torch").not_understood
    assert reason is not None and reason.startswith("param_recipe does not give the recorded values: ")


def summarise(path):
    """Replace parameters by their sums and first values, and their gradients by norms and samples."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        metadata = file.metadata()
    kept = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.removeprefix("f64.").partition(".")
        prefix = "f64." if name.startswith("f64.") else ""
        if kind == "param":
            kept[f"check.sum.{rest}"] = torch.stack([tensor.double().sum(), tensor.double().abs().sum()])
            kept[f"check.head.{rest}"] = tensor.flatten()[:8].clone()
        elif kind == "grad" and rest.startswith("param."):
            kept[f"{prefix}gradnorm.{rest}"] = tensor.norm().reshape(1)
            kept[f"{prefix}gradsample.{rest}"] = tensor.flatten()[:: max(1, tensor.numel() // 2048)].clone()
        else:
            kept[name] = tensor
    save_file(kept, path, metadata)
