"""One recorded case: the tensors of a file and the hyper-parameters in its metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

Quantities = dict[str, Tensor]  # what nestloop computed, under the names of the file: out, grad.param.x, ...


class NotUnderstood(Exception):
    """The file asks for something that no family here can run; the text says what."""


@dataclass(frozen=True)
class Case:
    """The tensors and the decoded metadata of one file."""

    name: str
    settings: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, path: Path) -> Case:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
            return cls(path.stem, {key: _decode(text) for key, text in (file.metadata() or {}).items()}, tensors)

    def inputs(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name starts with `prefix.`, without it."""
        return {name[len(prefix) + 1 :]: t for name, t in self.tensors.items() if name.startswith(f"{prefix}.")}

    def understood(self, *known: str) -> None:
        """Raise `NotUnderstood` for a setting that is none of `known` and says more than where the file is from."""
        about = {"B", "N", "cls", "commit", "file", "note", "repo", "torch"}
        for name in sorted(set(self.settings) - about - set(known)):
            if not name.startswith("err_"):
                raise NotUnderstood(f"{name} = {self.settings[name]!r}")

    def setting(self, name: str, *known: Any) -> Any:
        """A setting that must be there, and one of `known` where they are given."""
        if name not in self.settings:
            raise NotUnderstood(f"no {name!r} in its metadata")
        return one_of(name, self.settings[name], *known)


def one_of(name: str, value: Any, *known: Any) -> Any:
    """`value`, if it is one of `known` or none are given."""
    if known and value not in known:
        raise NotUnderstood(f"{name} = {value!r}, where {', '.join(map(repr, known))} are known")
    return value


def _decode(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:  # plain text: a class name, a commit
        return text


@dataclass(frozen=True)
class Run:
    """How a case is to be run."""

    dtype: torch.dtype
    backend: str


@dataclass(frozen=True)
class Family:
    """One kind of file.

    matches: does this family run that file?
    run: the declarations that fit the file's settings, each with everything it computed.
    not_compared: recorded quantities that are no output, inner loss or gradient.
    exact: how far float64 may be off, where the official code itself is not exact to 1e-10.
    amplifies: how many times as far from float64 as the official float32 run ours may be.
    read: the file's tensors as they are to be compared.
    """

    name: str
    matches: Callable[[Case], bool]
    run: Callable[[Case, Run], Iterator[tuple[str, Quantities]]]
    not_compared: frozenset[str] = field(default_factory=frozenset)
    exact: Callable[[Case], float] = lambda case: 1e-10
    amplifies: Callable[[Case], float] = lambda case: 2.0
    read: Callable[[Case], Case] = lambda case: case
