"""What is done to the modules of a layer counts: hooks, parametrizations, pruning, other modules in their place."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

import nestloop as nl
from nestloop.errors import InputError
from nestloop.zoo.lact import Window
from tests.refusals import refused

B, N, D, H = 2, 10, 8, 2
d = D // H


class Linear(nl.Learner):
    w = nl.fast("d", "d")

    def forward(self, x):
        return x @ self.w


class Beside(Window):
    schedule = nl.Sliding(3)
    a = nl.dim(2)


class Normed:
    norm = nl.rms_norm()


class Maps(nl.Loop):
    """Every map that has parameters, in every place where one may stand."""

    learner = Linear
    low, high = nl.project(rank=3), nl.project(bias=True)
    k = nl.view("d", of=[Normed.norm, high], make=[nl.conv(3), F.silu, nl.affine()])
    q = nl.view("d", of=low, make=[nl.layer_norm(), nl.conv(2), nl.conv(2, bias=False)])
    v, s = nl.view("d", bias=True), nl.view("d", of=high)
    r = nl.view("d", of=nl.project(bias=True, rank=2), make=[nl.rope()])
    eta = nl.gate(of=nl.per_position(4))
    kept = nl.gate(pooled=True, make=[nl.affine()])
    optimizer = nl.SGD(lr=eta, decay=kept)
    schedule = nl.Chunked(4, "apply-update")
    output = (nl.layer_norm(), nl.gated(per_head=True, bias=True), nl.gated(rank=2, of=Normed.norm), nl.project())
    beside = Beside

    def loss(self, f, t):
        return (f(t.k) - t.v - t.s).square().sum(-1)

    def readout(self, f, t):
        return f(t.q + t.r)


def made(loop: Any = Maps, backend: str = "reference") -> nl.Layer:
    torch.manual_seed(0)
    layer = nl.Layer(loop, D, H, backend=backend)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return layer


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(B, N, D)


NAMES = [name for name, _ in made().named_parameters() if not name.removeprefix("beside.").startswith(("fast", "slow"))]


def test_names() -> None:
    kinds = {"views.v.bias", "views.k.conv.weight", "views.k.affine.scale", "views.q.conv_3.weight"}
    kinds |= {"views.r.project.down.weight", "views.r.project.up.weight", "views.r.project.up.bias"}
    kinds |= {"views.eta.per_position.table", "views.kept.project.weight", "views.kept.affine.offset"}
    kinds |= {"shared.norm.weight", "shared.low.down.weight", "shared.low.up.weight", "shared.high.bias", "out.weight"}
    kinds |= {
        "output.layer_norm.bias",
        "output.gated.weight",
        "output.gated_2.down.weight",
        "beside.views.q.affine.scale",
    }
    assert kinds <= set(NAMES)
    assert not [name for name in NAMES if name.startswith("views.s")]


class Same(nn.Module):
    """A parametrization that changes nothing."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value * 1


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_may_be_pruned_or_parametrized(name: str, x: torch.Tensor) -> None:
    whole = made()
    expected = whole(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), whole.get_parameter(name))
    path, _, leaf = name.rpartition(".")

    pruned = made()
    prune.identity(pruned.get_submodule(path), leaf)
    parametrized = made()
    parametrize.register_parametrization(parametrized.get_submodule(path), leaf, Same())
    for layer, original in ((pruned, f"{name}_orig"), (parametrized, f"{path}.parametrizations.{leaf}.original")):
        y = layer(x)
        assert torch.equal(y, expected)
        y.square().sum().backward()
        found = layer.get_parameter(original).grad
        assert found is not None and gradient.any()
        torch.testing.assert_close(found, gradient)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_hooks_of_every_module_that_has_parameters(backend: str, x: torch.Tensor) -> None:
    layer, fired = made(backend=backend), list[str]()
    containers = (nn.ModuleDict, nn.ParameterDict)
    named = {n: m for n, m in layer.named_modules() if not isinstance(m, containers) and list(m.parameters())}
    for name, module in named.items():
        module.register_forward_hook(lambda *_, name=name: fired.append(name))
    layer(x)
    assert set(fired) == set(named) >= {"views.k", "views.kept", "output", "shared.low", "beside", "out"}
    assert [name for name in named if fired.count(name) > 1] == ["shared.high"]  # of the token, and of its norm


def test_hooks_of_branches(x: torch.Tensor) -> None:
    layer, fired = made((Maps, Beside)), list[str]()
    for name, module in layer.branches.named_children():
        module.register_forward_hook(lambda *_, name=name: fired.append(name))
    layer(x)
    assert fired == ["0", "1"]


def test_a_module_in_the_place_of_a_views_maps(x: torch.Tensor) -> None:
    layer = made()
    before = layer(x)
    layer.views["k"], layer.views["v"], layer.views["kept"] = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, H)
    views = layer.make_views(x)
    for name in "kv":
        assert torch.equal(views[name], layer.views[name](x).unflatten(-1, (H, d)).transpose(1, 2))
    assert torch.equal(views["kept"], layer.views["kept"](x).transpose(1, 2))  # its activation was its maps' last
    layer.views["eta"] = nn.Linear(D, H)
    assert torch.equal(layer.make_views(x)["eta"], torch.sigmoid(layer.views["eta"](x)).transpose(1, 2))
    assert not torch.allclose(layer(x), before)


def test_a_module_around_a_views_maps(x: torch.Tensor) -> None:
    class Around(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, *given: Any) -> Any:
            return self.inside(*given)

    layer = made()
    before, state = layer(x[:, :7], return_state=True)
    for name in ("k", "r", "kept"):
        layer.views[name] = Around(layer.views[name])
    layer.output = Around(layer.output)  # type: ignore[assignment]
    after, again = layer(x[:, :7], return_state=True)
    assert torch.equal(before, after) and set(state["made"]) == set(again["made"])


class Alone(nn.Module):
    """A module around another, which it gives x alone."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: torch.Tensor) -> Any:
        return self.inside(x)


@pytest.mark.parametrize("place", ["views.k", "output"])
def test_a_module_around_a_views_maps_that_hands_on_x_alone(place: str, x: torch.Tensor) -> None:
    layer = made()
    layer.set_submodule(place, Alone(layer.get_submodule(place)))

    def run() -> None:
        layer(x)  # HERE

    refused(
        run,
        InputError,
        f"What stands in {place} wraps what it is to make, and does not hand on all that it is given.",
        given="Alone.forward(x: 'torch.Tensor') -> 'Any'",
        need="forward(self, x, route), which calls what it wraps with both",
        fix="write def forward(self, *given): return self.inner(*given), or put a module there that has no other "
        "inside, which is given x alone",
    )


def test_a_module_that_does_not_make_a_view(x: torch.Tensor) -> None:
    layer = made()
    layer.views["q"] = nn.Linear(D, D + 1)
    with pytest.raises(InputError) as caught:
        layer(x)
    where = Maps.spec.views["q"].where
    assert str(caught.value) == (
        "What stands in views.q does not make the view 'q'.\n"
        f"  at:    {where}   {where.text}\n"
        "  given: [2, 10, 8] -> [2, 10, 9]\n"
        "  need:  [2, 10, 8]: all features of each token, those of its heads one after another\n"
        "  fix:   put nn.Linear(8, 8) there, or a module that gives as many features"
    )


def test_dynamic_quantization(x: torch.Tensor) -> None:
    layer = made().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
        y = quantized(x)
    names = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    assert {"views.v", "views.r.project.up", "shared.high", "output.gated_2.down", "out"} <= names
    assert all("quantized" in type(quantized.get_submodule(name)).__module__ for name in names)
    assert 0 < (y - layer(x)).norm() / layer(x).norm() < 0.1


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_copies_and_calls_with_other_parameters(backend: str, x: torch.Tensor) -> None:
    layer = made(backend=backend)
    expected = layer(x)
    loaded = nl.Layer(Maps, D, H, backend=backend)
    loaded.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(twin(x), expected)
    other = nl.Layer(Maps, D, H, backend=backend)
    assert torch.equal(torch.func.functional_call(other, dict(layer.state_dict()), (x,)), expected)


def test_sizes_are_shown() -> None:
    shown = repr(made().views["k"]), repr(made().views["r"])
    assert shown == (
        "Making(\n  (conv): Parameters(weight [8, 1, 3], bias [8])\n"
        "  (affine): Parameters(scale [2, 4], offset [2, 4])\n)",
        "Making(\n  (project): Sequential(\n    (down): Linear(in_features=8, out_features=2, bias=False)\n"
        "    (up): Linear(in_features=2, out_features=8, bias=True)\n  )\n)",
    )
