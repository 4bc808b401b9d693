"""The cache of generated sources: private, content-addressed, atomic, shared by many processes."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import nestloop as nl
from nestloop import NestloopError, zoo
from nestloop.lowering.runtime import cache

SOURCE = "def forward():\n    return 7\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    chosen = tmp_path / "cache"
    monkeypatch.setenv("NESTLOOP_CACHE", str(chosen))
    return chosen


def test_the_folder_is_its_owners_alone(folder: Path):
    previous = os.umask(0)
    try:
        assert cache.cache_dir() == folder
    finally:
        os.umask(previous)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o777])
def test_a_folder_open_to_others_is_closed(folder: Path, mode: int):
    folder.mkdir()
    folder.chmod(mode)
    path = cache.write("loop", SOURCE)
    folder.chmod(mode)
    assert cache.write("loop", SOURCE) == path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def refused(folder: Path, given: str) -> None:
    with pytest.raises(NestloopError) as caught:
        cache.write("loop", SOURCE)
    assert str(caught.value) == (
        "The cache of generated sources is not private.\n"
        f"  given: {folder} with {given}\n"
        "  need:  a folder that only you can open, with files that are all yours: they are imported\n"
        "  fix:   name another folder with NESTLOOP_CACHE"
    )


def test_the_folder_of_somebody_else_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    folder.mkdir(mode=0o755)
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    refused(folder, f"owner {owner} and mode 755")
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_closed_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    folder.mkdir(mode=0o755)
    monkeypatch.setattr(Path, "chmod", lambda *_: None)  # as a file system without modes does
    refused(folder, f"owner {os.getuid()} and mode 755")


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give files away")
def test_a_file_somebody_else_left_is_refused(folder: Path):
    folder.mkdir()
    folder.chmod(0o777)
    (folder / "left.py").touch()
    os.chown(folder / "left.py", 1234, -1)
    refused(folder, f"owner {os.getuid()} and mode 777, and files of another owner in it")


def test_the_home_cache_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NESTLOOP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_dir() == tmp_path / "nestloop"


def test_the_name_is_the_content(folder: Path):
    first, again, other = (cache.write("loop", text) for text in (SOURCE, SOURCE, SOURCE + "\n"))
    assert first == again != other
    assert first.name == f"loop_{cache.digest(SOURCE)}.py" and first.read_text() == SOURCE
    assert cache.load(first).forward() == 7
    assert cache.load(first) is cache.load(first)


# Texts of every emitter, of loops with functions of most kinds, on one line.
GENERATED = """
import hashlib
from nestloop import inspect, zoo
wide = {"dk": 64, "dv": 64}
texts = [inspect(loop, "triton", "sm_90", **wide) for loop in (zoo.DeltaNet, zoo.Comba)]
texts += [inspect(zoo.MTTTMLP, stage) for stage in ("emit", "cpp")] + [inspect(zoo.GatedDeltaNet, "cpp")]
print([hashlib.sha256(text.encode()).hexdigest() for text in texts])
"""


def test_what_is_generated_is_the_same_in_every_process(folder: Path):
    """No name and no order hangs on how a process hashes strings: caches are shared, and kept."""
    pytest.importorskip("triton")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", GENERATED],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    first, second = (process.communicate()[0] for process in running)
    assert first and first == second


def test_a_file_that_is_not_its_content_is_written_again(folder: Path):
    path = cache.write("spoilt", SOURCE)
    path.write_text(SOURCE[:10])
    assert cache.write("spoilt", SOURCE) == path
    assert path.read_text() == SOURCE
    assert cache.load(path).forward() == 7


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_write_that_is_interrupted_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            cache.write("interrupted", SOURCE)
    assert list(folder.iterdir()) == []
    assert cache.write("interrupted", SOURCE).read_text() == SOURCE


def test_a_process_killed_in_the_middle_leaves_no_module(folder: Path):
    code = (
        "import os, signal\nfrom nestloop.lowering.runtime import cache\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"cache.write('killed', {SOURCE!r})\n"
    )
    result = subprocess.run([sys.executable, "-c", code], env=os.environ, check=False)
    assert result.returncode == -9
    left = [p.name for p in folder.iterdir()]
    assert all(name.startswith(".") for name in left)  # a hidden remainder that nothing imports
    assert cache.load(cache.write("killed", SOURCE)).forward() == 7


def test_a_module_that_fails_is_not_remembered(folder: Path):
    path = cache.write("broken", "raise RuntimeError('broken')\n")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            cache.load(path)
    assert f"nestloop_generated.{path.stem}" not in sys.modules


@pytest.mark.slow
def test_eight_processes_lower_the_same_loop_at_once(folder: Path):
    code = (
        "import torch; torch.set_num_threads(1)\nimport nestloop as nl\nfrom nestloop import zoo\n"
        "torch.manual_seed(0)\nlayer = nl.Layer(zoo.MTTTLinear, 8, 2)\n"
        "print(layer(torch.ones(1, 3, 8)).sum().item())\n"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=os.environ, stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    results = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * 8
    assert len(set(results)) == 1 and results[0]
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    (source,) = folder.glob("*.py")
    assert source.stem.endswith(cache.digest(source.read_text()))


def test_threads_that_call_a_loop_at_once_lower_it_once():
    """Each op is registered with PyTorch under its name, which it takes once."""

    class Threaded(zoo.TTTLinear):
        """One that no other test calls."""

    class ThreadedBatches(zoo.MTTTLinear):
        """One that no other test calls."""

    for loop in (Threaded, ThreadedBatches):
        start = threading.Barrier(4)

        def run(loop: type[nl.Loop] = loop, start: threading.Barrier = start) -> tuple[int, ...]:
            start.wait()
            return tuple(nl.Layer(loop, 8, 2)(torch.ones(1, 5, 8)).shape)

        with ThreadPoolExecutor(4) as pool:
            assert [made.result() for made in [pool.submit(run) for _ in range(4)]] == [(1, 5, 8)] * 4
