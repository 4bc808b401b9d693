"""Which assembler makes machine code for Hopper: never one that is known to get wgmma wrong."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nestloop import zoo
from nestloop.lowering import pipeline
from nestloop.lowering.runtime import assembler, offline
from nestloop.lowering.runtime.launching import versions

triton = pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """What one test finds is not what the next one does."""
    assembler.hopper_assembler.cache_clear()
    yield
    assembler.hopper_assembler.cache_clear()
    assembler.warn_of_no_wgmma.cache_clear()


def ptxas(folder: Path, version: str) -> str:
    """A file that answers as this version of ptxas does."""
    path = folder / f"ptxas-{version}"
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
    path.chmod(0o755)
    return str(path)


def only(monkeypatch: pytest.MonkeyPatch, own: str, *others: str) -> None:
    monkeypatch.setenv("TRITON_PTXAS_PATH", own)
    monkeypatch.setattr(assembler, "_candidates", lambda: iter(others))


def test_tritons_own_is_taken_where_it_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own = ptxas(tmp_path, "13.3")
    only(monkeypatch, own, ptxas(tmp_path, "13.9"))
    assert assembler.hopper_assembler() == assembler.Assembler(own, (13, 3), own=True)
    with assembler.assembling(assembler.HOPPER) as chosen:
        assert chosen is not None and chosen.options == {} and "DISABLE_MMA_V3" not in os.environ


def test_the_first_that_is_right_is_taken_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own, old, new = (ptxas(tmp_path, version) for version in ("12.8", "13.1", "13.4"))
    only(monkeypatch, own, str(tmp_path / "absent"), old, new, ptxas(tmp_path, "13.5"))
    assert assembler.hopper_assembler(13) == assembler.Assembler(new, (13, 4))
    with assembler.assembling(assembler.HOPPER, 13) as chosen:
        assert chosen is not None and chosen.options == {"ptx_version": 94} and str(chosen) == "ptxas 13.4"
        assert triton.knobs.nvidia.ptxas.path == new
    assert triton.knobs.nvidia.ptxas.path == own


def test_code_that_the_driver_does_not_load_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    only(monkeypatch, ptxas(tmp_path, "12.8"), ptxas(tmp_path, "13.4"))
    assert assembler.hopper_assembler(12) == assembler.Assembler(None, (12, 8))


def test_without_one_kernels_do_without_wgmma_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    only(monkeypatch, ptxas(tmp_path, "12.8"), ptxas(tmp_path, "13.1"))
    with assembler.assembling(assembler.HOPPER) as chosen:
        assert chosen is not None and os.environ["DISABLE_MMA_V3"] == "1" and chosen.options == {}
        with pytest.warns(RuntimeWarning) as said:
            assembler.warn_of_no_wgmma(chosen)
            assembler.warn_of_no_wgmma(chosen)
    assert [str(one.message) for one in said] == [
        "Triton assembles for Hopper with ptxas 12.8, which gets wgmma wrong, so generated Triton does without: right, "
        "but slower. With ptxas 13.3 or newer it uses wgmma: pip install 'nestloop[hopper]', or let TRITON_PTXAS_PATH "
        "name one."
    ]
    assert "DISABLE_MMA_V3" not in os.environ


@pytest.mark.parametrize("versions", [("12.8", "13.1"), ("12.8", "13.4")], ids=["without", "another"])
def test_threads_that_come_and_go(versions: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """While one of two is still there, what it needs is; afterwards nothing is left of it."""
    only(monkeypatch, *[ptxas(tmp_path, version) for version in versions])

    def settings() -> tuple[str | None, str]:
        return os.environ.get("DISABLE_MMA_V3"), triton.knobs.nvidia.ptxas.path

    before, seen = settings(), []
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first() -> None:
        with assembler.assembling(assembler.HOPPER):
            first_in.set()
            second_in.wait(20)
        first_out.set()

    def second() -> None:
        first_in.wait(20)
        with assembler.assembling(assembler.HOPPER):
            seen.append(settings())
            second_in.set()
            first_out.wait(20)
            seen.append(settings())

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen[0] == seen[1] != before and settings() == before


def test_other_devices_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    only(monkeypatch, ptxas(tmp_path, "12.8"))
    for major in (0, 8, 10):
        with assembler.assembling(major) as chosen:
            assert chosen is None and "DISABLE_MMA_V3" not in os.environ


@pytest.mark.slow
@pytest.mark.parametrize("found", [True, False])
def test_what_is_compiled_has_wgmma_only_from_one_that_gets_it_right(
    found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sizes = {"dk": 64, "dv": 64, "H": 2}
    lowered = pipeline.stream_stages(
        zoo.CausalLinearAttention.spec, sizes, None, losses=False, part="scan", triton=True
    )
    assert lowered.triton is not None
    if not found:  # in the process that compiles, too: it finds the package by its metadata
        empty = tmp_path / "nvidia_cuda_nvcc-13.4.dist-info"
        empty.mkdir()
        (empty / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-cuda-nvcc\nVersion: 13.4\n")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", os.getcwd())]))
        for place in ("CUDA_HOME", "CUDA_PATH", "TRITON_PTXAS_PATH"):
            monkeypatch.delenv(place, raising=False)
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
    made = offline.compiled(lowered.triton, "forward_outputs")
    version = tuple(map(int, made.assembler.split(",")[0].split()[1].split(".")))
    assert ("wgmma.mma_async" in made.text["ptx"]) == (version >= assembler.RIGHT) == ("without" not in made.assembler)
    assert found or version < assembler.RIGHT
    assert made.assembler in made.summary


def test_the_driver_says_which_cuda_it_is_of(monkeypatch: pytest.MonkeyPatch):
    class Driver:
        def __init__(self, name: str) -> None:
            assert name == "libcuda.so.1"

        def cuDriverGetVersion(self, place: Any) -> int:
            place._obj.value = 12_080
            return 0

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert versions.__wrapped__(torch.device("cuda", 3)) == (9, 12)
