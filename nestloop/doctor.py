"""`nestloop doctor`: what is installed, against what was tested, and the command that mends it."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.text import Text

from nestloop.errors import NestloopError

PIP = f"{sys.executable} -m pip install"
Version = tuple[int, int]


@dataclass(frozen=True)
class Tested:
    """The releases of a distribution that were tested, and the exact one to install in place of another."""

    oldest: Version
    newest: Version
    pin: str
    needed_for: str | None = None  # None: nestloop does not run without it

    def __str__(self) -> str:
        first, last = (".".join(map(str, version)) for version in (self.oldest, self.newest))
        return f"tested with {first}" + ("" if first == last else f" to {last}")


TESTED = {
    "torch": Tested((2, 11), (2, 13), "2.13.0"),
    "numpy": Tested((2, 4), (2, 5), "2.4.6"),
    "torchvision": Tested((0, 26), (0, 28), "0.28.0", needed_for="training on images"),
    "timm": Tested((1, 0), (1, 0), "1.0.31", needed_for="timm.create_model and its augmentations"),
    "triton": Tested((3, 6), (3, 7), "3.7.1", needed_for="backend='triton', and torch.compile on a GPU"),
}
PYTHON = Tested((3, 11), (3, 12), "3.12")

STYLES = {"ok": "green", "note": "yellow", "broken": "red"}


@dataclass(frozen=True)
class Check:
    """One line of the report.

    `level`: "ok", as tested; "note", runs, but untested or lacking something optional; "broken", cannot run.
    """

    name: str
    level: str
    found: str
    fix: str | None = None

    def line(self) -> Text:
        text = Text.assemble((f"{self.level:<7}", STYLES[self.level]), f"{self.name:<12} {self.found}")
        return text.append(f"; fix: {self.fix}") if self.fix else text


def main(as_json: bool, console: Console) -> int:
    """Print one line per check; return 1 where anything is broken, else 0."""
    checks = list(run())
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        for check in checks:
            console.print(check.line(), soft_wrap=True)
    return int(any(check.level == "broken" for check in checks))


def run() -> Iterator[Check]:
    """Every check, in the order a fresh machine needs them."""
    yield check_python((sys.version_info.major, sys.version_info.minor))
    for name in TESTED:
        yield check_distribution(name, installed(name))
    yield check_pair(installed("torch"), installed("torchvision"))
    yield check_gpu()
    yield check_compiler()
    yield check_cache()


def installed(name: str) -> str | None:
    """The version of an installed distribution, read from its metadata: a broken package cannot spoil it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> Version:
    """'2.13.0+cpu' -> (2, 13)."""
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def check_python(version: Version) -> Check:
    found = f"{platform.python_version()} ({PYTHON})"
    if version < PYTHON.oldest:
        return Check("python", "broken", found, "rm -r .venv && make PYTHON=python3.11 install")
    return Check("python", "ok" if version <= PYTHON.newest else "note", found)


def check_distribution(name: str, version: str | None) -> Check:
    """Compare an installed version (None: absent) with the tested range, and import the package."""
    tested = TESTED[name]
    fix = f"{PIP} {name}=={tested.pin}"
    if version is None:
        if tested.needed_for is None:
            return Check(name, "broken", f"not installed ({tested})", fix)
        if name == "triton" and not cuda_build():
            return Check(name, "ok", "not installed; only CUDA builds of torch use it")
        return Check(name, "note", f"not installed; needed for {tested.needed_for}", fix)
    if release(version) < tested.oldest:
        level = "broken" if tested.needed_for is None else "note"
        return Check(name, level, f"{version}, too old ({tested})", fix)
    try:
        _import(name)
    except Exception as error:  # whatever a broken build raises, the line must be printed
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        return Check(
            name,
            "broken",
            f"{version}, does not import ({reason})",
            f"{PIP} --force-reinstall {name}=={tested.pin}",
        )
    if release(version) > tested.newest:
        return Check(name, "note", f"{version}, newer than tested ({tested})", fix)
    return Check(name, "ok", f"{version} ({tested})")


def cuda_build() -> bool:
    """Whether the torch installed here was built for CUDA; False where it does not import."""
    try:
        import torch
    except Exception:  # the line about torch says what is wrong with it
        return False
    return torch.version.cuda is not None


def _import(name: str) -> None:
    if name in ("torchvision", "timm"):
        importlib.import_module("nestloop.models.torchvision_ops").define_missing_schemas()
    importlib.import_module(name)


def check_pair(torch: str | None, torchvision: str | None) -> Check:
    """torchvision is built against one torch: 0.28 for 2.13, and so on, fifteen minors later."""
    if torch is None or torchvision is None:
        return Check("pair", "ok", "torch and torchvision are not both installed")
    found, wanted = release(torchvision), (0, release(torch)[1] + 15)
    text = f"torchvision {found[0]}.{found[1]} with torch {'.'.join(map(str, release(torch)))}"
    if found == wanted:
        return Check("pair", "ok", f"{text} belong together")
    pins = " ".join(f"{name}=={TESTED[name].pin}" for name in ("torch", "torchvision"))
    return Check("pair", "broken", f"{text}, which needs torchvision {wanted[0]}.{wanted[1]}", f"{PIP} {pins}")


def check_gpu() -> Check:
    try:
        import torch
    except Exception:
        return Check("gpu", "note", "unknown: torch does not import")
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        size = f"{facts.total_memory / 2**30:.0f} GiB, compute capability {facts.major}.{facts.minor}"
        return Check("gpu", "ok", f"{facts.name}, {size}, CUDA {torch.version.cuda}")
    if shutil.which("nvidia-smi") is None:
        return Check("gpu", "ok", "none; the CPU is used")
    if torch.version.cuda is None:
        fix = f"{PIP} --force-reinstall torch=={TESTED['torch'].pin} --index-url https://download.pytorch.org/whl/cu130"
        return Check("gpu", "note", "this machine has an NVIDIA driver, but torch is a CPU build", fix)
    return Check("gpu", "note", f"torch (CUDA {torch.version.cuda}) cannot use the NVIDIA driver", "nvidia-smi")


def check_compiler() -> Check:
    """The C++ backend needs a C++ compiler; torch.compile on a CPU needs Python's headers too."""
    use = "needed for backend='cpp', the fast one on a CPU"
    named = os.environ.get("CXX")
    compiler = next(filter(None, map(shutil.which, [named] if named else ["c++", "g++", "clang++"])), None)
    if compiler is None:
        missing = f"CXX={named} does not exist" if named else "none of c++, g++ and clang++"
        return Check("compiler", "note", f"{missing}; {use}", "sudo apt install g++")
    output = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    version = output.partition("\n")[0] or compiler
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        major, minor = sys.version_info[:2]
        return Check(
            "compiler",
            "note",
            f"{version}, but no Python.h, needed for inductor=True on a CPU",
            f"sudo apt install python{major}.{minor}-dev",
        )
    return Check("compiler", "ok", version)


def check_cache(folder: Callable[[], Path] | None = None) -> Check:
    """Generated code is imported from the cache, so nobody else may be able to open it."""
    try:
        path = (folder or importlib.import_module("nestloop.lowering.runtime.cache").cache_dir)()
    except ImportError as error:  # torch, most likely: its own line says what is wrong with it
        return Check("cache", "note", f"unknown: {error}")
    except NestloopError as error:
        return Check("cache", "broken", f"{error.given}; needs {error.need}", error.fix)
    except OSError as error:
        return Check("cache", "broken", str(error), 'export NESTLOOP_CACHE="$(mktemp -d)"')
    return Check("cache", "ok", f"{path} (mode {stat.S_IMODE(path.stat().st_mode):04o})")
