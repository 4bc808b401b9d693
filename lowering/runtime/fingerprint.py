"""What a lowering depends on, as one digest: the declaration, the bodies with all they reach, the sizes, the versions.

A lowering is looked up under this digest before anything is traced. So it must change whenever the lowering could: it
covers the code of every body, the functions and constants it reaches, and nestloop's own files. What cannot be covered
(an object of unknown kind that a body reads) gives no digest, and the loop is traced each time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

from nestloop.lang.declare import Declaration
from nestloop.lang.dims import DimExpr
from nestloop.lang.loop import LoopSpec
from nestloop.lang.optim import SGD
from nestloop.lang.unread import EMPTY

_KNOWN = {"torch", "math", "nestloop", "builtins", "operator", "functools", "numpy", "einops", "typing", "collections"}
_LONGEST = 32  # items of what is looked through for whole numbers: more are a table
_OF_A_DATACLASS = ("<string>", dataclasses.__file__)  # where the methods come from that it has by its fields alone


class _Unknown(Exception):
    """A body reaches something whose content cannot be put in a digest."""


def fingerprint(spec: LoopSpec, *settings: Any) -> str | None:
    """The digest of one loop lowered with these settings, or None where it cannot be made."""
    digest = _Digest()
    try:
        digest.add(own_files(), torch.__version__, str(torch.get_default_dtype()), spec.name, repr(settings))
        digest.add_bodies(spec)
        digest.add(repr(spec.schedule), repr(spec.heads), repr(spec.parts), repr(spec.stacks), repr(spec.called))
    except (_Unknown, RecursionError):
        return None
    return digest.text()


def whole_numbers(spec: LoopSpec) -> set[int]:
    """The whole numbers that a loop's bodies reach, as far as these can be read."""
    reached = _WholeNumbers()
    with suppress(RecursionError):
        reached.add_bodies(spec)
    return reached.found


@cache
def own_files() -> str:
    """nestloop's own files that a lowering depends on, by name, size and time."""
    package = Path(__file__).resolve().parents[2]
    folders = [package / "lowering", package / "nestloop"]
    found = []
    for folder in folders if folders[1].exists() else [Path(__file__).parents[2]]:
        for path in sorted(folder.rglob("*.py")):
            status = os.stat(path)
            found.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
    return "\n".join(found)


class _Digest:
    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.seen: dict[int, int] = {}  # which one it was, by what it is

    def text(self) -> str:
        return self.hash.hexdigest()[:24]

    def add(self, *texts: str) -> None:
        for text in texts:
            self.hash.update(text.encode() + b"\0")

    def is_seen(self, value: Any) -> bool:
        """Whether it is in the digest already; which one of these it is, then, is added."""
        found = id(value) in self.seen
        self.add(str(self.seen.setdefault(id(value), len(self.seen))))
        return found

    def add_bodies(self, spec: LoopSpec) -> None:
        """All that the bodies of a loop reach."""
        self.add_class(spec.cls)
        self.add_class(spec.learner)
        self.add_value(spec.optimizer)

    def add_class(self, cls: type) -> None:
        """A class of the user's: every base that is theirs, every function and declaration in it."""
        for base in cls.__mro__:
            if base.__module__.split(".")[0] == "builtins" or self.is_seen(base):
                continue
            self.add(base.__module__, base.__qualname__)
            if base.__module__.startswith("nestloop.lang") or base in EMPTY:
                continue
            for name, value in vars(base).items():
                if name.startswith("__") and not _is_written(value):
                    continue
                if name in ("fast", "slow", "dims", "spec", "declared_at", "_declared_at", "_abc_impl"):
                    continue
                self.add(name)
                self.add_value(value)

    def add_value(self, value: Any) -> None:
        """Anything a body can reach."""
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
            self.add(type(value).__name__, repr(value))
        elif isinstance(value, (tuple, list, set, frozenset)):
            self.add(type(value).__name__, str(len(value)))
            for item in value:
                self.add_value(item)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self.add_value(key)
                self.add_value(item)
        elif isinstance(value, Declaration):
            self.add(type(value).__name__, ", ".join(map(str, value.dims)), value.where.short)
            self.add_value({k: v for k, v in vars(value).items() if k not in ("activation", "where", "dims")})
        elif isinstance(value, DimExpr):
            self.add(str(value))
        elif isinstance(value, (staticmethod, classmethod)):
            self.add_value(value.__func__)
        elif isinstance(value, MethodType):
            self.add_value(value.__func__)
            self.add_value(value.__self__)
        elif isinstance(value, partial):
            self.add("partial")
            self.add_value((value.func, value.args, value.keywords))
        elif isinstance(value, ModuleType):
            self.add_known(value.__name__)
        elif isinstance(value, FunctionType):
            self.add_function(value)
        elif isinstance(value, type):
            if _root(value.__module__) in _KNOWN and not value.__module__.startswith("nestloop.zoo"):
                self.add(value.__module__, value.__qualname__)
            else:
                self.add_class(value)
        elif isinstance(value, BuiltinFunctionType):
            self.add(value.__module__ or "", value.__name__)
            self.add_value(value.__self__)
        elif _root(type(value).__module__) == "torch":
            self.add_of_torch(value)
        elif isinstance(value, SGD):
            self.add_class(type(value))
            self.add_value({name: part for name, part in vars(value).items() if name != "where"})
        elif type(value).__module__.startswith("nestloop."):
            self.add(type(value).__qualname__)
            self.add_value(vars(value))
        elif isinstance(value, property):
            self.add_value(value.fget)
        elif dataclasses.is_dataclass(value):  # the user's own: what it can do, and what its fields hold
            self.add_class(type(value))
            self.add_value({each.name: getattr(value, each.name) for each in dataclasses.fields(value)})
        else:
            self.refuse(repr(value))

    def add_of_torch(self, value: Any) -> None:
        """An object of PyTorch's: an operator, what describes a dtype or a layout, a module that holds no tensors."""
        self.add(type(value).__module__, type(value).__qualname__)
        if isinstance(value, torch.nn.Module):
            if value._parameters or value._buffers or value._forward_hooks or value._forward_pre_hooks:
                self.refuse(repr(value))
            self.add_value({k: v for k, v in vars(value).items() if not k.startswith("_")})
            self.add_value(value._modules)
        elif isinstance(value, (torch.finfo, torch.iinfo, torch.layout, torch.memory_format)):
            self.add(repr(value))
        elif isinstance(value, (OpOverload, OpOverloadPacket)):
            self.add(str(value))
        else:
            self.refuse(repr(type(value)))

    def refuse(self, what: str) -> None:
        """Something whose content is not known."""
        raise _Unknown(what)

    def add_known(self, name: str) -> None:
        if _root(name) not in _KNOWN:
            self.refuse(name)
        self.add(name)

    def add_function(self, function: FunctionType) -> None:
        if self.is_seen(function):
            return
        self.add(function.__qualname__)
        if _is_known(function):
            return
        self.add_code(function.__code__)
        for name in _names(function.__code__):
            if name in function.__globals__:
                self.add(name)
                self.add_value(function.__globals__[name])
        for cell in function.__closure__ or ():
            self.add_value(cell.cell_contents)
        self.add_value(function.__defaults__)
        self.add_value(function.__kwdefaults__)

    def add_code(self, code: CodeType) -> None:
        self.hash.update(code.co_code + code.co_linetable)
        self.add(Path(code.co_filename).name, str(code.co_firstlineno), repr(code.co_names), repr(code.co_varnames))
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self.add_code(constant)
            else:
                self.add_value(constant)


class _WholeNumbers(_Digest):
    """Goes the same way for the whole numbers on it, and past what is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def add_value(self, value: Any) -> None:
        if type(value) is int:
            self.found.add(value)
        if not (isinstance(value, (tuple, list, set, frozenset, Mapping)) and len(value) > _LONGEST):
            super().add_value(value)

    def refuse(self, what: str) -> None:
        pass


def _is_written(value: Any) -> bool:
    """Whether a special method, as `__call__`, is the user's own."""
    return isinstance(value, FunctionType) and value.__code__.co_filename not in _OF_A_DATACLASS


def _names(code: CodeType) -> list[str]:
    """Every name a function's code mentions, inner functions included."""
    found = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found += _names(constant)
    return list(dict.fromkeys(found))


def _root(module: str) -> str:
    return module.split(".")[0]


def _is_known(function: FunctionType) -> bool:
    """Whether a function is of a package whose version says what it does; not one of another's that has its name, as
    `functools.wraps` gives."""
    module = function.__module__ or ""
    if _root(module) not in _KNOWN or module.startswith("nestloop.zoo"):
        return False
    package = getattr(sys.modules.get(_root(module)), "__file__", None) or ""
    return function.__code__.co_filename.startswith(os.path.dirname(package) + os.sep)
