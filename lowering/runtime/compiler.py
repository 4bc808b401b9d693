"""The system's C++ compiler: found, asked for its version, and run on generated sources, which stay in the cache.

A built library is kept under what decides it: the source, the header, the flags, the compiler and the processor. It is
written under another name and then renamed, so that any number of processes may build the same one at once.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from nestloop.lowering.runtime import cache as kept

HEADER = Path(__file__).resolve().parents[1] / "emit" / "tiles.h"
FLAGS = (
    *("-std=c++17", "-march=native", "-shared", "-fPIC", "-fopenmp"),
    # As fast as -O3, which takes 1.6 times as long: products are written with vectors as it is.
    *("-O2", "-ftree-vectorize"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
)
GCC_FLAGS = ("-fvect-cost-model=dynamic",)  # as -O3's; clang knows no such choice
TIME_LIMIT = 300  # seconds, for a machine that is very busy: a unit takes 2 to 8


class BuildError(Exception):
    """There is no C++ compiler, or it fails; its text is the cause in one line."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that answered: its command and the first line of its version."""

    command: str
    version: str


@cache
def _ask(command: str) -> Compiler | None:
    path = shutil.which(command)
    if path is None:
        return None
    try:
        asked = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return Compiler(path, asked.stdout.splitlines()[0] if asked.stdout else "")


def find() -> Compiler:
    """The compiler `CXX` names, else the first there is of c++, g++ and clang++.

    Raises:
        BuildError: there is none.
    """
    named = asked()[0]
    for command in [named] if named else ["c++", "g++", "clang++"]:
        found = _ask(command)
        if found is not None:
            return found
    raise BuildError(f"CXX names {named}, which does not run" if named else "no c++, g++ or clang++ is on the path")


@cache
def processor() -> str:
    """What tells this machine's processor from others that share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features"))))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def asked() -> tuple[str, str]:
    """What the environment says of compilers: which (`CXX`), and flags to add (`NESTLOOP_CXXFLAGS`)."""
    return os.environ.get("CXX", ""), os.environ.get("NESTLOOP_CXXFLAGS", "")


def flags(scalar: str, compiler: Compiler) -> list[str]:
    """A compiler's flags for a compute type, "float" or "double". `NESTLOOP_CXXFLAGS` adds to them: the last of two
    that exclude each other counts (`-march=x86-64-v3`; `-fno-openmp`, for one thread, where its library is missing)."""
    wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
    gcc = () if "clang" in compiler.version else GCC_FLAGS
    return [*FLAGS, *gcc, *wide, f"-DSCALAR={scalar}", *asked()[1].split()]


def build(name: str, source: str, scalar: str) -> Path:
    """The library of a generated source, from the cache or built now.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    compiler = find()
    given = flags(scalar, compiler)
    facts = [source, HEADER.read_text(), *given, compiler.command, compiler.version, processor()]
    folder = kept.cache_dir()
    stem = f"{name}_{kept.digest(chr(0).join(facts))}"
    library = folder / f"{stem}.so"
    if library.exists():
        return library
    unit = folder / f"{stem}.cpp"
    kept.put(unit, source)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{stem}.", suffix=".so")
    os.close(handle)
    command = [compiler.command, *given, f"-I{HEADER.parent}", str(unit), "-o", temporary]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or [""]
            raise BuildError(f"{compiler.command} failed: {said[0].strip()}")
        with open(temporary, "rb") as made:
            os.fsync(made.fileno())
        os.replace(temporary, library)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{compiler.command} did not finish: {error}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    return library


def load(path: Path) -> ctypes.CDLL:
    """A built library.

    Raises:
        BuildError: the system cannot load it.
    """
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"a built library does not load: {error}") from error


def loaded(name: str, source: str, scalar: str) -> ctypes.CDLL:
    """The library of a generated source: built now where there is none, or where that in the cache is damaged.

    Raises:
        BuildError: there is no compiler, it fails, or the system cannot load what it makes.
    """
    path = build(name, source, scalar)
    try:
        if _is_whole(path):
            return load(path)
    except BuildError:
        pass
    path.unlink(missing_ok=True)
    return load(build(name, source, scalar))


def _is_whole(path: Path) -> bool:
    """Whether a library has all that its header (ELF, 64 bits) says it has: to load one that was cut short may end the
    process. Other kinds are for the system to judge."""
    with path.open("rb") as file:
        head = file.read(64)
    if head[:5] != b"\x7fELF\x02" or len(head) < 64:
        return True
    start, size, count = (
        int.from_bytes(head[at : at + width], "little" if head[5] == 1 else "big")
        for at, width in ((40, 8), (58, 2), (60, 2))
    )
    return path.stat().st_size >= start + size * count
