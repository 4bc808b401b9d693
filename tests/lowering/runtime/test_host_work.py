"""What a call does beside its kernels: it waits for no device, copies no result, and runs few ops of PyTorch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import nestloop as nl
from nestloop import zoo
from nestloop.lowering.runtime import decision
from nestloop.lowering.runtime.launching import TritonCode
from nestloop.lowering.runtime.library import NestedLoopOp
from nestloop.lowering.runtime.triton_plan import TritonPlan
from tests.lowering.comparison import assert_equal, differences, random_inputs, run
from tests.lowering.runtime.test_native_streams import drawn
from tests.lowering.runtime.test_triton_batches import SIZES, Clipped
from tests.lowering.test_gram import EVEN, inputs_with

pytest.importorskip("triton")

# Ops for whose result, or for whose errors, the host waits where tensors are on a CUDA device.
WAITS = {
    *("_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select", "unique_dim", "_unique2"),
    *("linalg_cholesky", "cholesky", "linalg_inv", "linalg_solve", "_linalg_solve_ex", "linalg_eigh", "_linalg_eigh"),
    *("linalg_svd", "_linalg_svd", "linalg_qr", "_to_cpu"),
}
VIEWS = set(
    """view _unsafe_view reshape transpose t mT unsqueeze squeeze expand expand_as detach slice select alias as_strided
permute diagonal unflatten flatten split narrow movedim""".split()  # noqa: SIM905
)


class Watching(TorchDispatchMode):
    """Counts the ops that run, views and new memory aside, and refuses those that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        assert name not in WAITS, f"the host would wait for {name}"
        made = func(*args, **(kwargs or {}))
        moved = name == "to" and made is args[0]
        if name not in VIEWS and not name.startswith(("new_", "empty")) and not moved:
            self.counts[name] += 1
        return made


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watching]:
    """Ops inside the ops of nestloop and outside; kernels are not run."""
    mode, made = Watching(), NestedLoopOp.made

    def watched(self: NestedLoopOp, *given: Any) -> list[Tensor]:
        with mode:
            return made(self, *given)

    monkeypatch.setattr(NestedLoopOp, "made", watched)
    monkeypatch.setattr(TritonCode, "launch", lambda *given: None)
    yield mode


def counted(model: nl.Layer, x: Tensor, mode: Watching) -> tuple[int, int]:
    """Ops of a forward and a backward that is not the first."""
    found: list[int] = []
    for _ in range(2):
        found.clear()
        with torch.autocast("cpu", torch.bfloat16), mode:
            y = model(x)
        found.append(mode.counts.total())
        mode.counts.clear()
        with mode:
            torch.autograd.grad(y, [x, *model.parameters()], torch.ones_like(y), allow_unused=True)
        found.append(mode.counts.total())
        mode.counts.clear()
    return found[0], found[1]


def mttt_layer() -> tuple[nl.Layer, Tensor]:
    torch.manual_seed(0)
    return nl.Layer(zoo.MTTTMLP, 64, 2, d=16, backend="triton"), torch.randn(2, 24, 64, requires_grad=True)


def stream_layer() -> tuple[nl.Layer, Tensor]:
    torch.manual_seed(0)
    return nl.Layer(zoo.TTTLinear, 32, 2, backend="triton"), torch.randn(2, 32, 32, requires_grad=True)


# Of an MTTT layer, forward: 8 casts and 3 products of autocast, 8 ops for whether the Gram form is precise and 4 for
# who is told, 4 for the products of tokens and decoder. Backward: 20 of autocast's casts, products and the sums of what
# they made, 6 sums over sequences and heads, 9 of the products of tokens and decoder. What is made of the decoder
# alone, and its cotangents, is a kernel's. Of a stream all is the layer's own: projections, rotary positions, gates.
MOST = {mttt_layer: (28, 38), stream_layer: (57, 53)}


@pytest.mark.parametrize("made", MOST, ids=lambda made: made.__name__)
def test_a_call_takes_few_ops_and_waits_for_none(made: Any, watching: Watching):
    model, x = made()
    forward, backward = counted(model, x, watching)
    assert 0 < forward <= MOST[made][0] and 0 < backward <= MOST[made][1], (forward, backward)


def low(inputs: Any) -> dict[str, Tensor]:
    """Views in bfloat16, as a layer's projections leave them."""
    views = {n: t.detach().bfloat16() for n, t in inputs.views.items()}
    return {n: t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for n, t in views.items()}


@pytest.mark.parametrize(
    ("loop", "several"),
    [(zoo.LinearAttention, False), (Clipped, True), (zoo.DeltaNet, False), (zoo.OmegaNet, True)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_tokens_go_out_as_they_came_in(loop: type[nl.Loop], several: bool, monkeypatch: pytest.MonkeyPatch):
    """Kernels write z and, where it is written once, every cotangent in the views' dtype and layout: it is not copied.
    What steps or windows add to is added up in the compute dtype. Rounding is to nearest, once."""
    streams, launch = loop.spec.streams, TritonCode.launch
    inputs = drawn(loop, 19) if streams else random_inputs(loop.spec, SIZES, tokens=19)
    written: dict[str, Tensor] = {}

    def twice(
        self: TritonCode,
        plan: TritonPlan,
        direction: str,
        lead: tuple[int, int],
        given: Mapping[str, Tensor],
        made: Mapping[str, Tensor],
        *more: Any,
    ) -> None:
        exact = {n: torch.empty_like(t, dtype=torch.float32) for n, t in made.items()}
        launch(self, plan, direction, lead, given, exact, *more)
        launch(self, plan, direction, lead, given, made, *more)
        for name, tensor in made.items():
            torch.testing.assert_close(tensor, exact[name].to(tensor.dtype), rtol=0, atol=0, equal_nan=True)
        written.update(made)

    monkeypatch.setattr(TritonCode, "launch", twice)
    views, weights = low(inputs), {n: w.detach().float() for n, w in inputs.weights.items()}
    z, _ = nl.compile(loop, backend="triton")(views, weights)
    assert z.dtype == torch.bfloat16 and z.data_ptr() == written["z"].data_ptr() and z.transpose(1, 2).is_contiguous()
    found = torch.autograd.grad(z.float().square().sum(), list(views.values()), allow_unused=True)
    for (name, view), cotangent in zip(views.items(), found, strict=True):
        assert cotangent is not None and cotangent.dtype == view.dtype
        in_place = cotangent.data_ptr() == written[name].data_ptr()
        if several and name == "k":
            assert written[name].dtype == torch.float32
        if not several:
            assert in_place and cotangent.stride() == view.stride(), name


@pytest.mark.parametrize("first", [True, False], ids=["the Gram form", "the wide form"])
def test_the_device_decides_between_two_forms(first: bool, monkeypatch: pytest.MonkeyPatch):
    """Both forms' kernels are launched; the one that is not chosen writes nothing."""
    launch = TritonCode.launch
    wrote: list[bool] = []

    def watched(
        self: TritonCode, plan: TritonPlan, direction: str, lead: Any, given: Any, made: Any, *more: Any
    ) -> None:
        decided = direction == "forward" and plan.decided
        for tensor in made.values():
            if decided and not wrote:
                tensor.fill_(3.25)
        before = {n: t.clone() for n, t in made.items()}
        launch(self, plan, direction, lead, given, made, *more)
        if decided:
            wrote.append(any(not torch.equal(before[n], t) for n, t in made.items()))

    monkeypatch.setattr(TritonCode, "launch", watched)
    inputs = inputs_with(EVEN if first else [3.0] * 4 + [0.0] * 12)
    op = nl.compile(zoo.MTTTMLP, backend="triton")
    assert_equal(differences(run(op, inputs), run(nl.compile(zoo.MTTTMLP, backend="reference"), inputs)), 1e-9)
    assert wrote == [first, not first] and op.ran == ["the Gram form" if first else "the wide form"]


class Late(list[list[float]]):
    """What the host reads of a decision before the device has written it, and then."""

    def tolist(self) -> list[list[float]]:
        return [self.pop(0)]


def test_a_decision_that_is_not_there_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    cuda, queue = torch.device("cuda", 0), SimpleNamespace(query=lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: queue)
    for value in (0.0, 1.0):
        late: Any = Late([[-1.0, -1.0], [-1.0, -1.0], [value, value]])
        assert decision.known(late, cuda) is bool(value) and not late
    queue.query = lambda: True  # all is done, and the copy was made too early
    early: Any = Late([[-1.0], [-1.0]])
    assert decision.known(early, cuda) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert decision.known(torch.ones(2, 1), cuda) is None
