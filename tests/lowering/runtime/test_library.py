"""Generated ops as PyTorch sees them: opcheck, compile, torch.func, autocast, precision, copies, memory, FLOPs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import nestloop as nl
from nestloop import zoo
from nestloop.lowering.runtime.library import NestedLoopOp
from tests.lowering.comparison import random_inputs
from tests.lowering.runtime.calls import Calls

WIDTH, HEADS, SEQUENCES, TOKENS = 16, 2, 3, 9
DIFFERENTIABLE = {
    "MTTTLinear": zoo.MTTTLinear,
    "MTTTMLP": zoo.MTTTMLP,
    "MTTTMLP4": zoo.MTTTMLP4,
    "MTTTMLPSGD4": zoo.MTTTMLPSGD4,
    "LinearAttentionElu": zoo.LinearAttentionElu,
    "ViT3": zoo.ViT3,
}
over_loops = pytest.mark.parametrize("loop", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE.keys())


def layer(loop: Any, **settings: Any) -> nl.Layer:
    torch.manual_seed(0)
    made = nl.Layer(loop, WIDTH, HEADS, **settings).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def tokens(*lead: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(lead or (SEQUENCES, TOKENS)), WIDTH, generator=generator, dtype=dtype)


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()


def backward_arguments(op: NestedLoopOp, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    made = op.forward_op.call(*given)
    made = made if isinstance(made, tuple) else (made,)
    states = [t for t, n in zip(made, op.signature.results, strict=True) if n in op.signature.saved]
    cotangents = [torch.randn_like(t) for t, n in zip(made, op.signature.results, strict=True) if n in op.cotangents]
    ordered = op.signature.ordered
    return (*given[: len(given) - ordered], *states, *cotangents, *given[len(given) - ordered :])


@over_loops
@pytest.mark.parametrize("losses", [False, True])
def test_opcheck(loop: Any, losses: bool, calls: Calls):
    layer(loop)(tokens(), return_losses=losses)
    for op, given in calls:
        plain = tuple(t.detach().clone() for t in given)
        assert set(opcheck(op.forward_op.overload, plain).values()) == {"SUCCESS"}
        assert set(opcheck(op.backward_op.overload, backward_arguments(op, plain)).values()) == {"SUCCESS"}


@over_loops
def test_two_calls_are_equal_bit_for_bit(loop: Any):
    model = layer(loop)
    results = []
    for _ in range(2):
        x = tokens().requires_grad_()
        out = model(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()], allow_unused=True)])
    for a, b in zip(*results, strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("loop", [zoo.MTTTLinear, zoo.MTTTMLPSGD4, zoo.ViT3], ids=["MTTTLinear", "SGD4", "ViT3"])
def test_torch_func_sees_an_ordinary_layer(loop: Any):
    model, x = layer(loop).double(), tokens(dtype=torch.float64)
    params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, (x,)).square().sum()

    model(x).square().sum().backward()
    found = torch.func.grad(loss)(params, x)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and relative(found[name], parameter.grad) < 1e-12, name

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x[:, None])
    for name, value in per_sample.items():
        assert value.shape == (SEQUENCES, *params[name].shape)
        assert relative(value.sum(0), found[name]) < 1e-11, name
        assert relative(value[1], torch.func.grad(loss)(params, x[1:2])[name]) < 1e-11, name

    scales = torch.tensor([1.0, 1.3, 0.7], dtype=torch.float64)
    stacked = {n: torch.stack([v * s for s in scales]) for n, v in params.items()}
    ensemble = torch.func.vmap(lambda p: torch.func.functional_call(model, p, (x,)))(stacked)
    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(stacked, x)
    for index in range(len(scales)):
        one = {n: v[index] for n, v in stacked.items()}
        assert relative(ensemble[index], torch.func.functional_call(model, one, (x,))) < 1e-12
        alone = torch.func.grad(loss)(one, x)
        assert max(relative(gradients[n][index], alone[n]) for n in alone) < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize("loop", [zoo.MTTTMLP, zoo.MTTTMLPSGD4], ids=["MTTTMLP", "SGD4"])
def test_torch_compile_takes_it_whole(loop: Any):
    model, x = layer(loop), tokens()
    compiled = torch.compile(lambda x: model(x, return_losses=True), fullgraph=True, backend="aot_eager")
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    (out, losses), (plain, plain_losses) = compiled(a), model(b, return_losses=True)
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(losses, plain_losses)
    (out.square().sum() + losses.sum()).backward()
    (plain.square().sum() + plain_losses.sum()).backward()
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.slow
def test_a_copied_layer_compiles_with_inductor():
    model, x = layer(zoo.MTTTMLP), tokens()
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for made in copies:
        torch.testing.assert_close(made(x), model(x), rtol=0, atol=0)
    compiled = torch.compile(copies[1], fullgraph=True)
    y = x.clone().requires_grad_()
    out = compiled(y)
    torch.testing.assert_close(out, model(x), rtol=1e-5, atol=1e-5)
    out.sum().backward()
    z = x.clone().requires_grad_()
    model(z).sum().backward()
    torch.testing.assert_close(y.grad, z.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_loop_is_lowered_while_jit_traces():
    """Sizes are tensors there."""
    own: Any = type("Traced", (zoo.MTTTMLP,), {"k": nl.view("d", gain=3.0)})
    model, x = layer(own), tokens()
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


def test_training_draws_a_fresh_order_inside_a_compiled_graph():
    model, x = layer(zoo.MTTTMLPSGD4).train(), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    torch.testing.assert_close(model(x), first)


@over_loops
def test_autocast_keeps_fast_weights_and_sums_in_float32(loop: Any, calls: Calls):
    model, x = layer(loop), tokens()
    exact = model(x)
    y = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(y)
    assert out.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: each product's operands are off by 2^-9 at most, and a loop is a few products deep.
    assert relative(out.float(), exact) < 40 * 2**-9
    op, given = calls[-1]
    made = dict(zip(op.signature.results, op(*given), strict=True))
    assert given[0].dtype == torch.bfloat16
    assert all(made[n].dtype == torch.float32 for n in op.signature.results[1:])
    out.float().square().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    assert y.grad is not None and y.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_views(dtype: torch.dtype):
    op = nl.compile(zoo.MTTTMLPSGD4)
    inputs = random_inputs(zoo.MTTTMLPSGD4.spec, {"d": 8, "D": 16, "H": 2}, tokens=TOKENS, dtype=torch.float32)
    low = {n: t.detach().to(dtype).requires_grad_() for n, t in inputs.views.items()}
    z, end, losses = op(low, inputs.weights, order=inputs.order, return_losses=True)
    exact, exact_end, _ = op(
        {n: t.float() for n, t in low.items()}, inputs.weights, order=inputs.order, return_losses=True
    )
    assert z.dtype == dtype and losses.dtype == torch.float32
    assert all(t.dtype == torch.float32 for t in end.values())
    roundoff = torch.finfo(dtype).eps
    assert relative(z.float(), exact) < 20 * roundoff
    assert all(relative(end[n], exact_end[n]) < 20 * roundoff for n in end)
    gradients = torch.autograd.grad(z.float().sum(), [*low.values(), *inputs.weights.values()], allow_unused=True)
    given = [*low.values(), *inputs.weights.values()]
    assert all(g is None or g.dtype == t.dtype for g, t in zip(gradients, given, strict=True))


@pytest.mark.parametrize("loop", [zoo.MTTTLinear, zoo.MTTTMLPSGD4, zoo.GatedBranch])
def test_gradcheck(loop: Any):
    torch.manual_seed(0)
    spec = loop.spec
    inputs = random_inputs(spec, {"d": 2, "D": 4, "H": 2}, sequences=2, tokens=4)
    leaves = inputs.leaves()
    op = nl.compile(loop)

    def of(*given: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(leaves, given, strict=True))
        z, end, losses = op(
            {n: values[n] for n in inputs.views}, {n: values[n] for n in inputs.weights}, None, inputs.order, True
        )
        return z, *end.values(), losses

    assert torch.autograd.gradcheck(of, tuple(leaves.values()), fast_mode=True)


class Passed(zoo.MTTTLinear):
    """A read-out that hands its view through."""

    def readout(self, f, t):
        return t.q


def test_results_have_memory_of_their_own(calls: Calls):
    """Also of a view that lies as z does."""
    inputs = random_inputs(Passed.spec, {"d": 4, "D": 8, "H": 2})
    inputs.views["q"] = inputs.views["q"].transpose(1, 2).contiguous().transpose(1, 2)
    z, end = nl.compile(Passed, backend="torch")(inputs.views, inputs.weights)
    torch.testing.assert_close(z, inputs.views["q"], rtol=0, atol=0)
    ((op, given),) = calls
    made = op.forward_op.call(*[t.detach() for t in given])
    storages = [t.untyped_storage().data_ptr() for t in (*made, *given)]
    assert len({s for s, t in zip(storages, (*made, *given), strict=True) if t.numel()}) == sum(
        1 for t in (*made, *given) if t.numel()
    )
    del end
    gradient = torch.autograd.grad(z.sum(), inputs.views["q"])[0]
    torch.testing.assert_close(gradient, torch.ones_like(gradient), rtol=0, atol=0)


@pytest.mark.parametrize("steps", [1, 4])
def test_forward_keeps_its_inputs_and_one_state_per_step(steps: int):
    class Steps(zoo.MTTTMLP):
        schedule = nl.FullBatch(steps)

    inputs = random_inputs(Steps.spec, {"d": 4, "D": 8, "H": 2}, tokens=32)
    op = nl.compile(Steps)
    op(inputs.views, inputs.weights)  # lowered here: torch.func, which traces it, refuses the hooks below
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        z, end = op(inputs.views, inputs.weights)
    given = sum(t.untyped_storage().nbytes() for t in inputs.leaves().values())
    state = sum(t.nbytes for t in end.values())
    form = inputs.weights["w1"].shape[0] * torch.float64.itemsize  # which of the two forms it took, for each head
    assert sum(kept.values()) == given + steps * state + form
    assert z.requires_grad


@pytest.mark.parametrize("tokens_count", [1, 7])
def test_flops_are_those_counted_by_hand(tokens_count: int):
    d, width, heads, sequences = 8, 16, 2, 3
    inputs = random_inputs(
        zoo.MTTTMLP.spec, {"d": d, "D": width, "H": heads}, sequences=sequences, heads=heads, tokens=tokens_count
    )
    op = nl.compile(zoo.MTTTMLP)
    op(inputs.views, inputs.weights)
    with FlopCounterMode(display=False) as counter:
        op(inputs.views, inputs.weights)
    # Multiply-adds per token: the learner on k (8 d^2: two products d x 4d) and its decoder (d D); the gradient in the
    # decoder's input (d D) and in the hidden layer (4 d^2), the gradients of both weights (8 d^2); the learner on q.
    by_hand = 2 * (8 * d * d + d * width + d * width + 4 * d * d + 8 * d * d + 8 * d * d)
    assert counter.get_total_flops() == by_hand * tokens_count * heads * sequences


@pytest.mark.parametrize("name", ["TTTLinear", "MTTTMLP"])
def test_flops_of_a_first_call_are_those_of_the_next(name: str):
    """An op that is made while somebody counts is counted too."""
    own: Any = type("Fresh", (getattr(zoo, name),), {"k": nl.view("d", gain=2.0)})
    model, x, found = nl.Layer(own, 24, 2, backend="torch").double(), torch.randn(2, 7, 24, dtype=torch.float64), []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 2 * 14 * 24 * 24


def test_a_whole_layer_counts_its_projections_too():
    model = layer(zoo.SelfAttention)
    with FlopCounterMode(display=False) as counter:
        model(tokens())
    projections = 2 * SEQUENCES * TOKENS * WIDTH * WIDTH * 4
    attention = 2 * 2 * SEQUENCES * TOKENS * TOKENS * WIDTH
    assert counter.get_total_flops() == projections + attention
