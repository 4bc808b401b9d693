"""Builds of generated C++: what is asked of the compiler, what happens without one, and many processes at once."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import nestloop as nl
from nestloop import zoo
from nestloop.errors import NoPlanError
from nestloop.lowering.runtime import choice, compiler
from tests.lowering.comparison import assert_equal, differences, random_inputs, run
from tests.lowering.runtime.test_native import Causally, Recall, doubled, single


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

    for loop in (Recall, Causally):
        inputs = random_inputs(loop.spec, {"a": 21, "e": 34, "H": 2}, tokens=50, scale={"eta": 0.5})
        wanted = doubled(run(nl.compile(loop, backend="reference"), inputs))
        assert_equal(differences(doubled(run(nl.compile(loop, backend="cpp"), single(inputs))), wanted), 5e-6)


def test_flags_may_change_within_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A library of other flags rounds otherwise: which has been loaded before must not decide what a call gives."""
    monkeypatch.setenv("NESTLOOP_CACHE", str(tmp_path / "cache"))
    inputs = single(random_inputs(Recall.spec, {"a": 3, "e": 5, "H": 1}, tokens=7))
    executable = nl.compile(Recall, backend="cpp")

    def libraries() -> int:
        run(executable, inputs)
        return len(list((tmp_path / "cache").glob("*.so")))

    counted = []
    for flags in ("-O0", "-O0 -DELSEWHERE", "-O0"):
        monkeypatch.setenv("NESTLOOP_CXXFLAGS", flags)
        counted.append(libraries())
    assert counted == [1, 2, 2]
    monkeypatch.setenv("NESTLOOP_CXXFLAGS", "-fnonsense")
    with pytest.raises(NoPlanError) as caught:
        run(executable, inputs)
    text = str(caught.value)
    name, command = text.split(" ")[3], compiler.find().command
    cause = text.partition(" failed: ")[2].partition("\n")[0]
    assert "-fnonsense" in cause
    assert text == (
        f"The C++ of {name} is not built.\n"
        f"  given: {command} failed: {cause}\n"
        "  need:  a C++ compiler, and flags that it knows\n"
        '  fix:   give CXX and NESTLOOP_CXXFLAGS such values, or none; or write backend="torch"'
    )


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
