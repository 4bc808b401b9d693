"""Which of NVIDIA's assemblers makes the machine code of generated Triton.

wgmma, the matrix instruction of Hopper, reads its registers after it was issued. Before CUDA 13.3 ptxas may put other
values there in the meantime: kernels read shared memory out of bounds, or compute wrong numbers. Triton 3.6 and 3.7
bring ptxas 12.8 for Hopper. Where one is found that is new enough, it is taken in its place for these devices; else
Triton is told to leave wgmma alone: the matrix instruction of the devices before is right, and slower.
"""

from __future__ import annotations

import os
import shutil
import threading
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

RIGHT = (13, 3)  # CUDA's release notes of 13.3 name the fix
HOPPER = 9  # major compute capability
_NO_WGMMA = "DISABLE_MMA_V3"  # read by Triton's compiler, in whose caches' keys it is

_LOCK = threading.Lock()
_INSIDE: dict[str, tuple[int, Any]] = {}  # of each setting: how many threads need it, and what was there before


@dataclass(frozen=True)
class Assembler:
    """What assembles kernels for Hopper.

    Attributes:
        path: of a ptxas that gets wgmma right; None where there is none.
        version: of it, or of the one that Triton takes.
        own: whether Triton takes it by itself.
    """

    path: str | None
    version: tuple[int, int]
    own: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Of a launch: the version of PTX that it reads, which Triton's caches then tell apart."""
        if self.path is None or self.own:
            return {}
        from triton.backends.nvidia.compiler import ptx_get_version

        return {"ptx_version": ptx_get_version(".".join(map(str, self.version)))}

    def __str__(self) -> str:
        return f"ptxas {self.version[0]}.{self.version[1]}" + (", without wgmma" if self.path is None else "")


def _candidates() -> Iterator[str]:
    """Paths at which there may be a ptxas: Triton's for Blackwell, NVIDIA's package, a CUDA toolkit."""
    import triton

    yield triton.knobs.nvidia.ptxas_blackwell.path
    with suppress(metadata.PackageNotFoundError):
        yield str(metadata.distribution("nvidia-cuda-nvcc").locate_file("nvidia/cu13/bin/ptxas"))
    for home in filter(None, map(os.environ.get, ("CUDA_HOME", "CUDA_PATH"))):
        yield str(Path(home) / "bin" / "ptxas")
    if found := shutil.which("ptxas"):
        yield found


@cache
def hopper_assembler(driver: int | None = None) -> Assembler:
    """The assembler for Hopper: Triton's own (TRITON_PTXAS_PATH names another) where it is right, else another that is.

    Args:
        driver: the major version of CUDA that the device's driver is of, which loads no code of a newer one's; None
            where code is not run.
    """
    import triton
    from triton.knobs import NvidiaTool

    def version(tool: Any) -> tuple[int, int]:
        major, minor = map(int, tool.version.split("."))
        return major, minor

    own = triton.knobs.nvidia.ptxas
    if version(own) >= RIGHT:
        return Assembler(own.path, version(own), own=True)
    for path in _candidates():
        tool = NvidiaTool.from_path(path) if os.access(path, os.X_OK) else None
        if tool is not None and version(tool) >= RIGHT and (driver is None or version(tool)[0] <= driver):
            return Assembler(tool.path, version(tool))
    return Assembler(None, version(own))


@contextmanager
def assembling(major: int, driver: int | None = None) -> Iterator[Assembler | None]:
    """While Triton compiles or launches for a device of this major compute capability; gives what assembles for it,
    None where that is not Hopper, and whatever Triton takes is right."""
    if major != HOPPER:
        yield None
        return
    import triton

    chosen, nvidia = hopper_assembler(driver), triton.knobs.nvidia
    if chosen.own:
        yield chosen
        return
    where, name, value = (os.environ, _NO_WGMMA, "1") if chosen.path is None else (vars(nvidia), "ptxas", chosen.path)
    with _set(where, name, value):
        yield chosen


@contextmanager
def _set(where: MutableMapping[str, Any], name: str, value: Any) -> Iterator[None]:
    """A setting of the process: the last thread to leave puts back what the first one found."""
    with _LOCK:
        inside, before = _INSIDE.get(name, (0, where.get(name)))
        _INSIDE[name] = inside + 1, before
        where[name] = value
    try:
        yield
    finally:
        with _LOCK:
            inside, before = _INSIDE.pop(name)
            if inside > 1:
                _INSIDE[name] = inside - 1, before
            elif before is None:
                del where[name]
            else:
                where[name] = before


@cache
def warn_of_no_wgmma(assembler: Assembler) -> None:
    """Once, of what a device could do and does not."""
    if assembler.path is None:
        need = ".".join(map(str, RIGHT))
        warnings.warn(
            f"Triton assembles for Hopper with {str(assembler).split(',')[0]}, which gets wgmma wrong, so generated "
            f"Triton does without: right, but slower. With ptxas {need} or newer it uses wgmma: "
            f"pip install 'nestloop[hopper]', or let TRITON_PTXAS_PATH name one.",
            RuntimeWarning,
            stacklevel=2,
        )
