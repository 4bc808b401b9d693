"""What "auto" is where tensors lie on a GPU, as far as a machine without one can show it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import nestloop as nl
from nestloop import compiled, zoo
from nestloop.errors import SharedMemoryError
from nestloop.lang.names import BUILT_IN_DIMS
from nestloop.lowering import lower
from nestloop.lowering.runtime import choice, executable
from nestloop.lowering.runtime.launching import TritonCode
from nestloop.lowering.runtime.recipe import Asked
from tests.drawn import draw

pytest.importorskip("triton")


def ops_of(loop: Any, dtype: torch.dtype = torch.float32, **settings: Any) -> list[str]:
    """Names of what a call of a loop runs."""
    op = nl.compile(loop, **settings)
    views, weights = ({n: t.detach().to(dtype) for n, t in part.items()} for part in draw(loop.spec, 9))
    found, _ = op(views, weights)
    wanted, _ = nl.compile(loop, backend="torch")(views, weights)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    return list(op._names.values())


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_on_a_gpu", lambda view: True)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("loop", [zoo.MTTTLinear, zoo.CausalLinearAttention])
def test_it_is_triton(loop: Any):
    assert all("_triton_" in name for name in ops_of(loop))


@pytest.mark.usefixtures("on_a_gpu")
def test_it_is_pytorch_where_there_is_no_triton():
    assert not any("_triton_" in name or "_cpp_" in name for name in ops_of(zoo.LaCT))


@pytest.mark.usefixtures("on_a_gpu")
def test_it_is_pytorch_where_triton_takes_minutes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choice, "LONGEST_MODULE", 10)
    assert not any("_triton_" in name for name in ops_of(zoo.GLA))


def test_it_is_pytorch_where_registers_are_far_too_few():
    """Backward of Atlas with heads of 128 features wants more shared memory than any device has."""

    def op(backend: str) -> str:
        sizes = {"d": 128, "H": 2, "D": 256}
        return lower.lower(zoo.Atlas.spec, sizes, None, False, False, Asked(backend, gpu=True), "scan")

    assert "_triton_" in op("triton") and "_triton_" not in op("auto")


@pytest.mark.usefixtures("on_a_gpu")
def test_it_is_pytorch_in_float64_and_under_inductor():
    assert not any("_triton_" in name for name in ops_of(zoo.RetNet, torch.float64))
    op = nl.compile(zoo.RetNet, inductor=True)
    assert not op._may_be_triton({"q": torch.zeros(1)})


def test_on_a_cpu_it_is_not_triton():
    assert not any("_triton_" in name for name in ops_of(zoo.RetNet))


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Call it with "forward" or "backward", and kernels of that want more shared memory than there is."""

    def refuse(refused: str) -> None:
        launch = TritonCode.launch

        def launched(self: TritonCode, plan: Any, direction: str, *rest: Any) -> None:
            if direction == refused and self.walked:  # of a call, not of slow weights alone
                raise SharedMemoryError("The walk wants too much.", given="98,304 bytes", need="at most 65,536")
            launch(self, plan, direction, *rest)

        monkeypatch.setattr(TritonCode, "launch", launched)

    yield refuse
    for op in [*executable.OPS.values(), *[one.op for one in lower.STREAM_OPS.values()]]:
        op._instead.refused = None


def drawn_in_float32(loop: Any, tokens: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    views, weights = (
        {n: t.detach().float().requires_grad_() for n, t in part.items()} for part in draw(loop.spec, tokens)
    )
    return views, weights


def results(loop: Any, tokens: int, backend: str) -> tuple[Any, list[Tensor], list[Tensor]]:
    """An op, results of a call, and gradients of all that went in."""
    op = nl.compile(loop, backend=backend)
    views, weights = drawn_in_float32(loop, tokens)
    z, end = op(views, weights)
    made = [z, *[t for t in end.values() if isinstance(t, Tensor)]]
    given = [*views.values(), *weights.values()]
    cotangents = [torch.linspace(-1, 1, t.numel()).reshape(t.shape) for t in made]
    return op, made, list(torch.autograd.grad(made, given, cotangents, materialize_grads=True, allow_unused=True))


ANNOUNCED = (
    "nestloop runs generated PyTorch instead of Triton for {}, which is slower: The walk wants too much. It is given "
    "98,304 bytes; it needs at most 65,536. Smaller sizes may fit; backend='torch' says that this is intended, and "
    "does not run forward again in backward."
)
FALLING = [zoo.MTTTLinear, zoo.MTTTMLP, zoo.LinearAttentionElu, zoo.CausalLinearAttention, zoo.TTTLinear, zoo.GLA]


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("refused", ["forward", "backward"])
@pytest.mark.parametrize("loop", FALLING, ids=lambda loop: loop.__name__)
def test_it_becomes_pytorch_where_a_kernel_has_no_room(loop: Any, refused: str, no_room: Callable[[str], None]):
    no_room(refused)
    with pytest.warns(UserWarning, match="which is slower") as warned:
        op, made, gradients = results(loop, 21, "auto")
    assert {str(w.message) for w in warned if w.category is UserWarning} == {ANNOUNCED.format(loop.spec.name)}
    assert all("_auto_triton_" in name for name in op._names.values())
    assert op.ran == ["generated PyTorch, for there is no room: 98,304 bytes"]
    sizes = {"d": 4, "dk": 4, "dv": 4, "H": 2, "B": 2, "N": 21, "D": 4}
    explained = nl.explain(
        op, **{name: size for name, size in sizes.items() if name in {*BUILT_IN_DIMS, *loop.spec.dim_names}}
    )
    assert "  the last call: generated PyTorch, for there is no room: 98,304 bytes" in explained.splitlines()
    _, wanted, exact = results(loop, 21, "torch")
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients, exact, rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # announced once
        again = op(*drawn_in_float32(loop, 21))[0]
    torch.testing.assert_close(again, wanted[0], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("on_a_gpu")
def test_a_compiled_call_becomes_pytorch_too(no_room: Callable[[str], None]):
    """Its graph holds the shapes of what kernels keep."""
    no_room("backward")
    views, weights = drawn_in_float32(zoo.GLA, 21)
    op = nl.compile(zoo.GLA)
    compiled_op = torch.compile(lambda v, w: op(v, w)[0], backend="aot_eager", fullgraph=True)
    with pytest.warns(UserWarning, match="which is slower"):
        compiled_op(views, weights).sum().backward()
    found = [t.grad for t in (*views.values(), *weights.values())]
    z, _ = nl.compile(zoo.GLA, backend="torch")(views, weights)
    exact = torch.autograd.grad(z.sum(), [*views.values(), *weights.values()])
    torch.testing.assert_close(found, list(exact), rtol=1e-4, atol=1e-4)


def test_triton_by_name_is_refused_where_a_kernel_has_no_room(no_room: Callable[[str], None]):
    no_room("forward")
    with pytest.raises(SharedMemoryError, match="The walk wants too much"):
        results(zoo.GLA, 21, "triton")
