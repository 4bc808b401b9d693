"""The private cache of generated sources: content-addressed, atomic, safe with many processes at once."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import secrets
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from nestloop.errors import NestloopError


def cache_dir() -> Path:
    """The folder of what nestloop keeps between runs, made if absent, open to its owner alone (0700).

    `NESTLOOP_CACHE` names it; else it is `nestloop` in `XDG_CACHE_HOME` or `~/.cache`. A folder of yours that is open
    to others is closed to them.

    Raises:
        NestloopError: the folder belongs to somebody else, cannot be closed, or was open long enough for somebody else
            to leave a file in it. What is imported from it runs as you.
        OSError: it cannot be made.
    """
    named = os.environ.get("NESTLOOP_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(named) if named else Path(home) / "nestloop"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):  # elsewhere a home folder is private by its access list
        _make_private(folder)
    return folder


def _make_private(folder: Path) -> None:
    status = folder.stat()
    mine = status.st_uid == os.getuid()
    if mine and not status.st_mode & 0o077:
        return
    foreign = mine and any(file.lstat().st_uid != status.st_uid for file in folder.iterdir())
    if mine and not foreign:
        folder.chmod(0o700)  # ignored where the file system knows no modes
        if not folder.stat().st_mode & 0o077:
            return
    raise NestloopError(
        "The cache of generated sources is not private.",
        given=f"{folder} with owner {status.st_uid} and mode {status.st_mode & 0o777:o}"
        + (", and files of another owner in it" if foreign else ""),
        need="a folder that only you can open, with files that are all yours: they are imported",
        fix="name another folder with NESTLOOP_CACHE",
    )


def digest(text: str) -> str:
    """The content address of a source."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def put(path: Path, text: str) -> None:
    """Write a file whole or not at all; another process never sees half of it."""
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "x", encoding="utf-8") as file:  # open to whom the user's files are
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write(name: str, text: str) -> Path:
    """Put a source in the cache under its content's address; a file that is not its content is written again."""
    path = cache_dir() / f"{name}_{digest(text)}.py"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        put(path, text)
    return path


def load(path: Path) -> ModuleType:
    """Import a cached source from its file, so that tracebacks and debuggers show it."""
    name = f"nestloop_generated.{path.stem}"
    with one_thread():
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module


_LOCK = threading.RLock()


@contextmanager
def one_thread() -> Iterator[None]:
    """While what all threads of a process share is looked up or made: modules, ops. Nothing is traced in here."""
    with _LOCK:
        yield


def _after_fork() -> None:
    global _LOCK
    _LOCK = threading.RLock()  # whoever held it stays in the parent


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
