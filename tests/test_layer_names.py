"""Views and weights called as methods and attributes of PyTorch's containers are: layers have them as any others."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import nestloop as nl
from nestloop.errors import InputError

B, N, D, H, d = 2, 10, 8, 2, 4


class Plain(nl.Loop):
    """Names that PyTorch's containers do not have."""

    class learner(nl.Learner):
        a, b = nl.fast("d", "d"), nl.fast("d", init="zeros")

        def forward(self, x):
            return x @ self.a + self.b

    common = nl.project(rank=2)
    read, k, k_ = nl.view("d"), nl.view("d", of=common), nl.view("d", make=[nl.conv(2)])
    v, rate, s, r = nl.view("d"), nl.gate(), nl.slow("d"), nl.slow("d")
    optimizer, schedule = nl.SGD(lr=rate), nl.Causal(4)

    def loss(self, f, t):
        return (f(t.k * self.s + t.k_) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.read) * self.r


class Taken(nl.Loop):
    """`Plain`, with names that they have."""

    class learner(nl.Learner):
        update, reset_parameters = nl.fast("d", "d"), nl.fast("d", init="zeros")

        def forward(self, x):
            return x @ self.update + self.reset_parameters

    values = nl.project(rank=2)
    queries, keys, keys_ = nl.view("d"), nl.view("d", of=values), nl.view("d", make=[nl.conv(2)])
    type, items, pop, training = nl.view("d"), nl.gate(), nl.slow("d"), nl.slow("d")
    optimizer, schedule = nl.SGD(lr=items), nl.Causal(4)

    def loss(self, f, t):
        return (f(t.keys * self.pop + t.keys_) - t.type).square().sum(-1)

    def readout(self, f, t):
        return f(t.queries) * self.training


PLACES = {
    **{"fast.update_": "fast.a", "fast.reset_parameters_": "fast.b", "slow.pop_": "slow.s", "slow.training_": "slow.r"},
    **{"views.queries": "views.read", "views.keys__": "views.k_", "views.type_": "views.v"},
    **{"views.items_": "views.rate", "shared.values_": "shared.common", "out": "out"},
}  # keys is made by the shared map alone


def in_plain(name: str) -> str:
    """What `Plain` calls a parameter of `Taken`."""
    place = next(place for place in PLACES if name == place or name.startswith(f"{place}."))
    return PLACES[place] + name[len(place) :]


@pytest.fixture
def pair() -> tuple[nl.Layer, nl.Layer]:
    """Layers of both, with the same values."""
    torch.manual_seed(0)
    plain, taken = (nl.Layer(loop, D, H, dtype=torch.float64, backend="torch") for loop in (Plain, Taken))
    values = {name: torch.randn_like(value) / 2 for name, value in taken.state_dict().items()}
    taken.load_state_dict(values)
    plain.load_state_dict({in_plain(name): value for name, value in values.items()})
    return plain, taken


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(B, N, D, dtype=torch.float64)


def test_values_and_gradients(pair: tuple[nl.Layer, nl.Layer], x: Tensor) -> None:
    plain, taken = pair
    outputs = [layer(x) for layer in pair]
    assert torch.equal(*outputs)
    for z in outputs:
        z.sin().sum().backward()
    others = dict(plain.named_parameters())
    for name, parameter in taken.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
        assert torch.equal(parameter.grad, others[in_plain(name)].grad), name  # type: ignore[arg-type]
    with torch.no_grad():
        first, state = taken(x[:, :3], return_state=True)
        torch.testing.assert_close(torch.cat([first, taken(x[:, 3:], state=state)], 1), outputs[1].detach())


def test_attributes_lead_to_what_the_names_are_of(pair: tuple[nl.Layer, nl.Layer]) -> None:
    _, taken = pair
    found = dict(taken.eval().train().named_parameters())
    assert {*found} == {*taken.state_dict()}
    for name, parameter in found.items():
        assert taken.get_parameter(name) is parameter
    assert taken.fast.reset_parameters is not taken.fast["reset_parameters_"]


def test_copies_and_calls_with_other_parameters(pair: tuple[nl.Layer, nl.Layer], x: Tensor) -> None:
    plain, taken = pair
    z = plain(x)
    for copied in (copy.deepcopy(taken), pickle.loads(pickle.dumps(taken))):
        assert torch.equal(copied(x), z)
    doubled = {name: 2 * value for name, value in taken.state_dict().items()}
    others = {in_plain(name): value for name, value in doubled.items()}
    called, of_plain = (torch.func.functional_call(*given, (x,)) for given in ((taken, doubled), (plain, others)))
    assert torch.equal(called, of_plain) and not torch.equal(called, z)
    taken.reset_parameters()
    assert (taken.slow["pop_"] == 1).all() and (taken.fast["reset_parameters_"] == 0).all()


def test_a_parametrization(pair: tuple[nl.Layer, nl.Layer], x: Tensor) -> None:
    class Doubled(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return 2 * value

    plain, taken = pair
    z = plain(x)
    for layer, place, leaf in ((plain, "fast", "a"), (taken, "fast", "update_")):
        parametrize.register_parametrization(layer.get_submodule(place), leaf, Doubled())
    for layer, place in ((plain, "views.v"), (taken, "views.type_")):
        parametrize.register_parametrization(layer.get_submodule(place), "weight", Doubled())
    assert torch.equal(taken(x), plain(x)) and not torch.equal(taken(x), z)


def test_one_graph(pair: tuple[nl.Layer, nl.Layer], x: Tensor) -> None:
    plain, taken = pair
    z = plain(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(taken, fullgraph=True, backend="aot_eager")(x), z)
    program = torch.export.export(taken, (x,))
    assert {*program.state_dict} == {*taken.state_dict()}
    torch.testing.assert_close(program.module()(x), z)


def test_what_stands_in_a_place_is_called_by_it(x: Tensor) -> None:
    layer = nl.Layer(Taken, D, H, backend="reference", dtype=torch.float64)
    layer.views["items_"] = nn.Linear(D, D + 1, dtype=torch.float64)
    with pytest.raises(InputError) as caught:
        layer(x)
    assert caught.value.what == "What stands in views.items_ does not make the gate 'items'."
