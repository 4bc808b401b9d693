"""Layers and models that start again: `reset_parameters`, above all where they were made without memory."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import nestloop as nl
from nestloop import zoo
from nestloop.models.vit import ViT
from tests.test_layer_modules import Beside, Maps


class Drawn(zoo.TTTLinear):
    """Its slow weights are drawn too."""

    a = nl.slow("d", "d", init="trunc_normal(0.3)")
    shared = nl.slow("d", init="uniform(2)", shared=True)

    def readout(self, f, t):
        return super().readout(f, t) @ self.a + self.shared


LOOPS = [Maps, (Maps, Beside), Drawn, zoo.MTTTMLP, zoo.Titans, zoo.ViT3]
TWINS = [lambda layer: layer, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]


def layer_of(loop, width=16, **arguments):
    return nl.Layer(loop, width, 2, backend="reference", **arguments)


def vit(mixer="mttt_mlp", width=16):
    return ViT(mixer, width, 2, 2, num_classes=width, image_size=8, patch_size=2)


def without_memory(make, *arguments, **settings):
    """The layer or model made on the device meta, with memory that holds nothing to go by."""
    with torch.device("meta"):
        module = make(*arguments, **settings)
    module.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    return module


def assert_same(found, expected):
    values = dict(expected.named_parameters())
    assert len(values) == len(list(found.parameters()))
    for name, parameter in found.named_parameters():
        value = values[name.replace("._checkpoint_wrapped_module", "")]
        assert parameter.dtype == value.dtype and torch.equal(parameter, value), name
        assert parameter.requires_grad == value.requires_grad, name


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("loop", LOOPS, ids=str)
def test_a_layer_that_starts_again_is_as_a_new_one(loop, dtype):
    layer = without_memory(layer_of, loop, dtype=dtype)
    torch.manual_seed(0)
    expected = layer_of(loop, dtype=dtype)
    torch.manual_seed(0)
    layer.reset_parameters()
    assert_same(layer, expected)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_that_starts_again_is_as_a_new_one(wrapped):
    model = without_memory(vit)
    if wrapped:
        for name, block in model.blocks.named_children():
            model.blocks.set_submodule(name, checkpoint_wrapper(block))
    torch.manual_seed(0)
    expected = vit()
    torch.manual_seed(0)
    model.reset_parameters()
    assert_same(model, expected)
    assert torch.equal(model.positions, expected.positions)


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("make", [*(lambda loop=loop: layer_of(loop, 128) for loop in LOOPS), lambda: vit(width=128)])
def test_modules_that_start_again_one_by_one(make, twin):
    """Each parameter spreads as it did, or has its value: not as `nn.Linear`'s own `reset_parameters` has it."""
    torch.manual_seed(0)
    expected, module = make(), twin(without_memory(make))
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    for (name, found), value in zip(module.named_parameters(), expected.parameters(), strict=True):
        assert torch.isfinite(found).all(), name
        spread = value.std().item() if value.numel() > 1 else 0.0
        if spread == 0:
            assert torch.equal(found, value), name
        elif value.numel() >= 200:
            assert found.std().item() == pytest.approx(spread, rel=0.25), name


def test_what_others_put_in_a_layer_keeps_its_values():
    layer = layer_of(Maps)
    layer.views["k"] = nn.Linear(16, 16)
    kept = layer.views["k"].weight.detach().clone()
    layer.reset_parameters()
    assert torch.equal(layer.views["k"].weight, kept)


def test_a_layer_without_memory_stays_so():
    with torch.device("meta"):
        layer = layer_of(Maps)
    layer.reset_parameters()
    assert all(parameter.is_meta for parameter in layer.parameters())


def test_a_dropped_layer_is_freed_at_once():
    gc.collect()
    layer = layer_of(zoo.MTTTMLP)
    weight = weakref.ref(next(iter(layer.fast.values())))
    gc.disable()
    try:
        del layer
        assert weight() is None
    finally:
        gc.enable()
