"""The benchmark's peers compute one and the same layer. Nothing is timed here."""

import pytest
import torch

import nestloop as nl
from benchmarks import machine, peers
from nestloop import zoo

SIZES = {"batch": 2, "tokens": 9, "width": 16, "heads": 2}


def layer_and_input(dtype=torch.float64):
    torch.manual_seed(0)
    layer = nl.Layer(zoo.MTTTMLP, SIZES["width"], SIZES["heads"]).to(dtype)
    for parameter in layer.parameters():  # biases of zero and scales of one would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return layer, torch.randn(SIZES["batch"], SIZES["tokens"], SIZES["width"], dtype=dtype)


@pytest.mark.parametrize("peer", [peers.vmap_grad, peers.closed_form])
def test_peers_agree_with_nestloop(peer):
    layer, x = layer_and_input()
    parameters = dict(layer.named_parameters())
    inputs = [x.requires_grad_(), *parameters.values()]
    ours, theirs = layer(x), peer(parameters, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    cotangent = torch.randn_like(ours)
    got = torch.autograd.grad(ours, inputs, cotangent)
    want = torch.autograd.grad(theirs, inputs, cotangent)
    for name, ours, theirs in zip(["x", *parameters], got, want, strict=True):
        torch.testing.assert_close({name: ours}, {name: theirs}, rtol=1e-9, atol=1e-11)


def test_the_machine_is_described():
    facts = machine.facts()
    assert facts["processor"] and facts["cores"] >= 1 and facts["torch"] == torch.__version__
    assert machine.gemm_rate(size=64, repeats=1) > 0
    assert machine.kind("cpu") == machine.kind("cpu").lower()
    assert machine.generation() in machine.kind("cpu")
