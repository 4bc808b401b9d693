"""What a command line names: a declared loop in a file or a module, sizes, names, seconds."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nestloop.errors import Location, NestloopError


class UsageError(Exception):
    """A command line that names nothing that exists, or that cannot be read."""


def load_target(target: str) -> Any:
    """The object that FILE.py:Name or package.module:Name names.

    A file is run as Python would run it, with its own folder first on the import path, under its own stem as
    the module's name. Raises `UsageError` where nothing of that name exists, and `NestloopError` where the file cannot
    be run; whether it is a loop is for the compiler to judge.
    """
    place, separator, name = target.rpartition(":")
    if not separator or not place or not name:
        raise UsageError(f"{target!r} names no loop; write FILE.py:Name or package.module:Name")
    module = _run_file(Path(place)) if place.endswith(".py") else _import(place)
    if not hasattr(module, name):
        declared = [n for n, value in vars(module).items() if isinstance(value, type) and hasattr(value, "spec")]
        known = "it declares " + ", ".join(declared) if declared else "it declares no loop"
        raise UsageError(f"{place} has no {name!r}; {known}")
    return getattr(module, name)


def _run_file(file: Path) -> Any:
    if not file.is_file():
        raise UsageError(f"there is no file {str(file)!r} in {os.getcwd()}")
    sys.path.insert(0, str(file.resolve().parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None  # a path that ends in .py always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # bodies are traced and pickled by the module they live in
    with _running(str(file)):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _running(target: str) -> Iterator[None]:
    """While a user's own file runs: whatever it raises is an error of that file, told with its line."""
    try:
        yield
    except NestloopError:
        raise
    except Exception as error:
        frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError) and error.filename is not None:
            frames.append((error.filename, error.lineno))
        theirs = [frame for frame in frames if not frame[0].startswith(("<frozen", __file__))]
        raise NestloopError(
            f"{target} cannot be run: {type(error).__name__}.",
            where=Location(theirs[-1][0], theirs[-1][1] or 1) if theirs else None,
            given=str(error) or type(error).__name__,
            need="a file that Python runs",
            fix="mend that line; --trace shows the traceback",
        ) from error


def _import(name: str) -> Any:
    sys.path.insert(0, os.getcwd())
    try:
        with _running(name):
            return importlib.import_module(name)
    except NestloopError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and f"{name}.".startswith(f"{missing.name}."):
            told = f"there is no module {name!r}; for a file write its path, as in loops.py:Name"
            raise UsageError(told) from None
        raise  # the module exists; something that it imports does not


def parse_budget(text: str) -> float:
    """Seconds. Raises `UsageError`."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(f"--budget cannot read '{text}'; write seconds, as in --budget 120")
    return seconds


def parse_names(text: str) -> list[str]:
    """'fp32,bf16' -> ["fp32", "bf16"]."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_shape(text: str) -> dict[str, int]:
    """'B=2,N=16' -> {'B': 2, 'N': 16}. Raises `UsageError` unless every entry is NAME=POSITIVE_INTEGER."""
    dims = {}
    for entry in filter(None, text.split(",")):
        name, _, size = entry.partition("=")
        if not name.strip().isidentifier() or not size.strip().isdecimal() or int(size) == 0:
            raise UsageError(f"--shape cannot read {entry!r}; write NAME=SIZE,... as in --shape B=2,H=2,N=16,d=16")
        dims[name.strip()] = int(size)
    return dims
