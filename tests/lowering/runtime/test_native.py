"""Generated C++: equal to the reference at any size and layout, whatever the threads; and what happens without it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop import zoo
from nestloop.errors import NoPlanError
from nestloop.lowering.runtime import choice, compiler
from nestloop.lowering.runtime.native import ranges_of
from tests.lowering.comparison import Inputs, assert_equal, differences, random_inputs, run


class Two(nl.Learner):
    """Two layers from a to e."""

    w1, b1, w2 = nl.fast("a", "2*a"), nl.fast("2*a"), nl.fast("2*a", "e")

    def forward(self, x):
        return F.gelu(x @ self.w1 + self.b1, approximate="tanh") @ self.w2


class Recall(nl.Loop):
    """Keys and values of different widths, a rate per token, two shuffled batches."""

    learner, schedule = Two, nl.Shuffled(2)
    k, q, v = nl.view("a"), nl.view("a"), nl.view("e")
    eta = nl.gate()
    optimizer = nl.SGD(lr=eta)

    def loss(self, f, t):
        return 0.5 * (f(t.k) - t.v).square().mean(-1)

    def readout(self, f, t):
        return F.layer_norm(f(t.q), (self.e,))


class Causally(nl.Loop):
    """Keys and values of different widths, a rate, a decay and a momentum per token, chunks of 16."""

    learner, schedule = Two, nl.Causal(16)
    k, q, v = nl.view("a"), nl.view("a"), nl.view("e")
    eta, keep, mu = nl.gate(), nl.gate(), nl.gate()
    optimizer = nl.SGD(lr=eta, decay=keep, momentum=mu)

    def loss(self, f, t):
        return 0.5 * (f(t.k) - t.v).square().mean(-1)

    def readout(self, f, t):
        return F.layer_norm(f(t.q), (self.e,))


def inputs_of(loop: type[nl.Loop], a: int, e: int, tokens: int, sequences: int = 2) -> Inputs:
    """Inputs of either, with rates and keys small enough for a long sequence."""
    scale = {"eta": 0.3, "mu": 0.5, "k": 1 / max(1, a / 16) ** 0.5}
    return random_inputs(loop.spec, {"a": a, "e": e, "H": 2}, sequences=sequences, tokens=tokens, scale=scale)


over_both = pytest.mark.parametrize("loop", [Recall, Causally])


def single(inputs: Inputs) -> Inputs:
    """The same numbers in float32."""

    def low(tensors: dict[str, torch.Tensor] | None) -> Any:
        return tensors and {n: t.detach().float().requires_grad_() for n, t in tensors.items()}

    return Inputs(low(inputs.views), low(inputs.weights), low(inputs.state), inputs.order, inputs.dims)


def doubled(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in values.items()}


SIZES = [(1, 1), (5, 16), (16, 5), (48, 100), (100, 48)]


@pytest.mark.parametrize(("a", "e"), SIZES, ids=[f"{a} to {e}" for a, e in SIZES])
@pytest.mark.parametrize("tokens", [1, 196])
def test_float32_is_the_reference_in_float64_to_rounding(a: int, e: int, tokens: int):
    inputs = random_inputs(Recall.spec, {"a": a, "e": e, "H": 2}, tokens=tokens, scale={"eta": 0.5})
    wanted = run(nl.compile(Recall, backend="reference"), inputs)
    errors = differences(doubled(run(nl.compile(Recall, backend="cpp"), single(inputs))), doubled(wanted))
    # A LayerNorm of one feature is zero whatever comes in: what is left of its gradients is rounding alone.
    assert_equal({n: x for n, x in errors.items() if e > 1 or "gradient" not in n}, 5e-6 if e > 1 else 1e-4)


@pytest.mark.parametrize("loop", [Recall, zoo.MTTTMLPSGD4, zoo.GatedBranch, zoo.DepthwiseBranch])
def test_any_number_of_threads_gives_the_same_bits(loop: Any):
    dims: dict[str, Any] = {"h": 4, "w": 5} if loop is zoo.DepthwiseBranch else {}
    # D is too narrow here for the Gram form, whose large products are PyTorch's and may depend on its threads.
    sizes = {"a": 6, "e": 4, "d": 6, "D": 8, "H": 1 if loop is zoo.DepthwiseBranch else 3, **dims}
    inputs = random_inputs(loop.spec, sizes, sequences=3, heads=sizes["H"], tokens=20, **dims)
    op, before, found = nl.compile(loop, backend="cpp"), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(run(op, single(inputs)))
    finally:
        torch.set_num_threads(before)
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found[1:]), name


class Rated(Recall):
    """A learned rate, whose derivative is the gradient itself; two steps of all tokens."""

    schedule = nl.FullBatch(steps=2)  # type: ignore[assignment]
    rate_of_all = nl.slow()
    optimizer = nl.SGD(lr=rate_of_all)


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("loop", [Recall, Rated])
def test_tokens_of_few_sequences_are_shared_out_in_ranges(loop: Any, carried: bool):
    # 250 tokens are three tiles, and 2 sequences of one head too few for 16 cores.
    assert ranges_of(2, 3) == 3 and ranges_of(16, 3) == 1 and ranges_of(3, 100) == 6
    inputs = random_inputs(
        loop.spec,
        {"a": 6, "e": 4, "H": 1},
        heads=1,
        tokens=250,
        carried=carried,
        scale={"eta": 0.5, "rate_of_all": 0.2},
    )
    op, before, found = nl.compile(loop, backend="cpp"), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(run(op, inputs))
    finally:
        torch.set_num_threads(before)
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found[1:]), name
    assert_equal(differences(found[0], run(nl.compile(loop, backend="reference"), inputs)), 1e-10)


def test_autocast_changes_no_type_that_the_library_reads():
    torch.manual_seed(0)
    layer = nl.Layer(zoo.MTTTMLP, 32, 4, backend="cpp")  # the Gram form: large products of x come from PyTorch
    x = torch.randn(2, 20, 32, requires_grad=True)

    def run_under(enabled: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = layer(x).float()
            return [y, *torch.autograd.grad(y.square().sum(), [x, layer.slow["g"], layer.fast["w1"]])]

    for low, exact in zip(run_under(True), run_under(False), strict=True):
        # bfloat16 keeps 8 bits: operands are off by 2^-9 at most, and a loop is a few products deep.
        assert (low - exact).norm() < 40 * 2**-9 * exact.norm()


@over_both
def test_views_are_read_where_they_lie(loop: type[nl.Loop]):
    inputs = inputs_of(loop, 6, 4, 19)
    op = nl.compile(loop, backend="cpp")
    plain = run(op, inputs)
    for name in ("k", "q", "v", "eta"):
        view = inputs.views[name].detach()
        projected = view.transpose(1, 2).contiguous().transpose(1, 2)  # as a layer's projection gives it
        spread = torch.zeros(*view.shape, 2, dtype=view.dtype)[..., 0].copy_(view)  # every second number
        for layout in (projected, spread):
            assert not layout.is_contiguous()
            inputs.views[name] = layout.requires_grad_()
            assert_equal(differences(run(op, inputs), plain), 0.0)


@over_both
@pytest.mark.parametrize(("sequences", "tokens"), [(0, 5), (2, 0)])
def test_nothing_to_read(loop: type[nl.Loop], sequences: int, tokens: int):
    inputs = inputs_of(loop, 6, 4, tokens, sequences)
    z, end = nl.compile(loop, backend="cpp")(inputs.views, inputs.weights, order=inputs.order)
    assert z.shape == (sequences, 2, tokens, 4)
    gradients = torch.autograd.grad(end["w1"].sum() + z.sum(), list(inputs.leaves().values()), allow_unused=True)
    assert all(g is None or bool(g.isfinite().all()) for g in gradients)
    for sequence in end["w1"]:
        torch.testing.assert_close(sequence, inputs.weights["w1"], rtol=0, atol=0)


class Plain(nl.Learner):
    """Names that mean something in C++, and in the generated code."""

    new, b = nl.fast("a", "a"), nl.fast("a")

    def forward(self, x):
        return torch.tanh(x @ self.new + self.b)


class Names(nl.Loop):
    """The same for views and slow weights."""

    learner = Plain
    i, n_, double = nl.view("a"), nl.view("a"), nl.view("a")
    step, rows = nl.slow("a"), nl.slow("a", shared=True)

    def loss(self, f, t):
        return ((f(t.i) - t.double * self.step) * self.rows).square().sum(-1)

    def readout(self, f, t):
        return f(t.n_)


class PlainStream(nl.Learner):
    """The same for what generated code of streams calls its own."""

    new, chunks = nl.fast("a", "a"), nl.fast("a")

    def forward(self, x):
        return torch.tanh(x @ self.new + self.chunks)


class StreamNames(nl.Loop):
    """The same for their views, gates and slow weights."""

    learner, schedule = PlainStream, nl.Chunked(3, "apply-update")
    i, own, double = nl.view("a"), nl.view("a"), nl.view("a")
    every, states = nl.slow("a"), nl.slow("a", shared=True)
    index = nl.gate()
    optimizer = nl.SGD(lr=0.1, momentum=index)

    def loss(self, f, t):
        return ((f(t.i) - t.double * self.every) * self.states).square().sum(-1)

    def readout(self, f, t):
        return f(t.own)


@pytest.mark.parametrize("loop", [Names, StreamNames])
def test_any_name_will_do(loop: type[nl.Loop]):
    inputs = random_inputs(loop.spec, {"a": 4, "H": 2}, tokens=7)
    assert_equal(differences(*[run(nl.compile(loop, backend=b), inputs) for b in ("cpp", "reference")]), 1e-11)


def test_a_loop_without_a_plan_is_refused_where_it_was_asked_for():
    inputs = random_inputs(zoo.SelfAttention.spec, {"d": 4, "H": 2})
    with pytest.raises(NoPlanError) as caught:
        nl.compile(zoo.SelfAttention, backend="cpp")(inputs.views, inputs.weights)
    where = zoo.SelfAttention.spec.where
    assert str(caught.value) == (
        "SelfAttention has no C++ plan for these sizes.\n"
        f"  at:    {where}   {where.text}\n"
        "  given: a kernel estimator has no steps to walk\n"
        "  need:  ops with a C++ spelling in lowering/ops, and a C++ compiler\n"
        '  fix:   write backend="auto": generated PyTorch runs where there is no C++'
    )


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh cache, and no compiler."""
    monkeypatch.setenv("NESTLOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "g++-99")
    monkeypatch.setattr(choice, "_FAILED", {})
    monkeypatch.setattr(choice, "_ANNOUNCED", [])


def test_without_a_compiler_pytorch_runs_and_says_so_once(nowhere: None):
    class Elsewhere(Recall):
        schedule = nl.Shuffled(3)

    inputs = random_inputs(Elsewhere.spec, {"a": 3, "e": 4, "H": 2}, tokens=7)
    wanted = run(nl.compile(Elsewhere, backend="torch"), inputs)
    with pytest.warns(UserWarning, match="C\\+\\+") as caught:
        found = run(nl.compile(Elsewhere), inputs)
        run(nl.compile(zoo.MTTTLinear), random_inputs(zoo.MTTTLinear.spec, {"d": 3, "D": 6, "H": 2}))
    assert [str(w.message) for w in caught if w.category is UserWarning] == [
        "nestloop runs generated PyTorch instead of C++, which is slower: CXX names g++-99, which does not run. "
        "Install g++ or clang++, or name one with CXX; backend='torch' says that this is intended."
    ]
    assert_equal(differences(found, wanted), 0.0)
    assert "(backend 'torch': no C++ here: CXX names g++-99, which does not run)" in nl.explain(Elsewhere)


def test_what_was_asked_for_by_name_is_refused_where_pytorch_has_run(nowhere: None):
    class There(Recall):
        schedule = nl.Shuffled(2)

    inputs = random_inputs(There.spec, {"a": 3, "e": 4, "H": 2}, tokens=7)
    run(nl.compile(There, backend="torch"), inputs)
    with pytest.raises(NoPlanError, match="CXX names g"):
        run(nl.compile(There, backend="cpp"), inputs)


def test_a_compiler_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NESTLOOP_CACHE", str(tmp_path / "cache"))
    with pytest.raises(compiler.BuildError, match=r"error: .*nonsense"):
        compiler.build("broken", "nonsense", "float")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".cpp"]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="another kind of processor")
@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64"])
def test_other_processors_get_the_same_numbers(march: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NESTLOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NESTLOOP_CXXFLAGS", f"-march={march}")

    class There(Recall):
        schedule = nl.Shuffled(5 if march == "x86-64" else 4)  # what no other test has built

    class Elsewhere(Causally):
        schedule = nl.Causal(19 if march == "x86-64" else 18)

    for loop in (There, Elsewhere):
        inputs = random_inputs(loop.spec, {"a": 21, "e": 34, "H": 2}, tokens=50, scale={"eta": 0.5})
        wanted = doubled(run(nl.compile(loop, backend="reference"), inputs))
        assert_equal(differences(doubled(run(nl.compile(loop, backend="cpp"), single(inputs))), wanted), 5e-6)


_SCRIPT = """
import torch; torch.set_num_threads(1)
import nestloop as nl
from nestloop import zoo
torch.manual_seed(0)
layer = nl.Layer(zoo.MTTTLinear, 20, 2, backend="cpp")
for tokens in (7, 250):
    x = torch.ones(1, tokens, 20, requires_grad=True)
    layer(x).sum().backward()
    print(x.grad.sum().item())
"""


# A dual form, a triangular system, a linear one, a window, and chunks of which the last is not complete.
_STREAMS = """
from nestloop.lowering.runtime import tiles
from tests.drawn import draw
tiles.spacing_within = lambda count, budget, state: 2
for loop in (zoo.TTTMLP, zoo.DeltaProduct, zoo.Mesa, zoo.OmegaNet, zoo.NeuralMemory):
    views, weights = draw(loop.spec, 37)
    z, state = nl.compile(loop, backend="cpp")(views, weights)
    z, _ = nl.compile(loop, backend="cpp")({n: t[:, :, :3] for n, t in views.items()}, weights, state)
    z.sum().backward()
"""


@pytest.mark.slow
def test_processes_build_the_same_loop_at_once(root: Path, tmp_path: Path):
    environment = {**os.environ, "NESTLOOP_CACHE": str(tmp_path / "cache")}
    started = [
        subprocess.Popen([sys.executable, "-c", _SCRIPT], cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    results = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert results[0] and results[0] == results[1]
    assert len(list((tmp_path / "cache").glob("*.so"))) == 1
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_no_memory_is_touched_that_is_not_its_own(root: Path, tmp_path: Path):
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):  # with the second the first sees exceptions, PyTorch's own too
        asked = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=False)
        found.append(asked.stdout.strip() if asked.returncode == 0 else "")
    if not all(map(os.path.isabs, found)):
        pytest.skip("no address sanitizer")
    environment = {
        **os.environ,
        "NESTLOOP_CACHE": str(tmp_path / "cache"),
        "NESTLOOP_CXXFLAGS": "-O0 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    command = [sys.executable, "-c", _SCRIPT + _STREAMS]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_damaged_library_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NESTLOOP_CACHE", str(tmp_path / "cache"))
    source = 'extern "C" int answer() { return 42; }\n'
    whole = compiler.build("answering", source, "float").read_bytes()
    for name, left in (
        ("cut", whole[: len(whole) // 2]),
        ("short", whole[:100]),
        ("empty", b""),
        ("other", b"nonsense"),
    ):
        path = compiler.build(name, source, "float")
        path.write_bytes(left)  # half of one would end the process where it is loaded
        assert compiler.loaded(name, source, "float").answer() == 42
