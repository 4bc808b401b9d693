"""Generated C++ under another compiler and for another processor: clang without OpenMP, and AArch64.

clang comes with the PyPI package `ziglang`, headers of every target included. What it builds for AArch64 is not run.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nestloop as nl
from nestloop import zoo
from nestloop.lang.loop import LoopSpec
from nestloop.lowering import pipeline
from nestloop.lowering.runtime.compiler import FLAGS, HEADER
from nestloop.lowering.runtime.native import NativePlan
from nestloop.targets import trial_sizes

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="no ziglang")
OURS = ("-march=native", "-fopenmp", "-shared")  # of FLAGS, what is for this machine and its libraries


def native(spec: LoopSpec) -> NativePlan:
    sizes = {n: s for n, s in trial_sizes(spec, {"d": 20}).items() if n not in ("B", "N", "n")}
    if spec.streams:
        made = pipeline.stream_stages(spec, sizes, None, losses=False, part="scan").native
    else:
        made = pipeline.stages(spec, sizes, None, losses=False, carried=False).native
    assert made is not None
    return made


ARM, X86 = ["-target", "aarch64-linux-gnu"], ["-target", "x86_64-linux-gnu", "-mcpu=x86_64_v4"]
# The dual form, the solved one (a triangular system), any linear system, and a loop of batches.
UNITS = [
    (zoo.TTTLinear, "float", ARM),
    (zoo.DeltaNet, "float", ARM),
    (zoo.Mesa, "double", ARM),
    (zoo.MTTTMLP, "float", ARM),
    (zoo.MTTTMLP, "float", X86),
]


@pytest.mark.slow
@pytest.mark.parametrize(("loop", "scalar", "target"), UNITS, ids=[f"{u[0].__name__}-{u[2][1]}" for u in UNITS])
def test_clang_builds_it(loop: type[nl.Loop], scalar: str, target: list[str], tmp_path: Path):
    unit = tmp_path / "unit.cpp"
    unit.write_text(native(loop.spec).text)
    flags = [flag for flag in FLAGS if flag not in OURS]
    strict = ["-Wall", "-Werror", "-Wno-unused-function", "-Wno-unused-variable", "-Wno-unknown-pragmas"]
    command = [sys.executable, "-m", "ziglang", "c++", *target, *flags, *strict, f"-DSCALAR={scalar}", "-c"]
    done = subprocess.run(
        [*command, f"-I{HEADER.parent}", str(unit), "-o", "unit.o"],
        cwd=tmp_path,
        env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(tmp_path), "ZIG_LOCAL_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    machine = int.from_bytes((tmp_path / "unit.o").read_bytes()[18:20], "little")  # of the ELF header
    assert machine == (183 if target is ARM else 62)
