"""Tilings that `nestloop tune` has found, in a JSON file beside the declaration's own, to be committed with it.

An entry is of one loop, its sizes, one device and one version of Triton. What a loop's Triton is written with is part
of what its plan is kept under.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nestloop.errors import StaleTuningError, TunedFileError
from nestloop.lang.loop import LoopSpec
from nestloop.lang.unread import EMPTY
from nestloop.lowering.runtime import cache
from nestloop.lowering.runtime.triton_plan import UNTUNED, Tiling

FORMAT = 1
_AGAIN = "tune it again: nestloop tune FILE.py:{}, or delete its entry"


@dataclass(frozen=True)
class Entry:
    """What was found for one loop.

    Attributes:
        loop: its name.
        declared: `digest` of its declaration.
        dims: the sizes that the declaration names, and H.
        device: a row of `schedule.devices`.
        triton: the version of Triton.
        rows: tokens of a chunk or tile; None for the compiler's own choice.
        warps: of a program, forward and backward.
        how: "timed" or "compiled".
        seconds: that forward and backward took, or are expected to take.
        shape: the call that it was tuned at: B, N and the views' dtype.
        levels: of a scan, as of a `Tiling`; None for the compiler's own choice.
    """

    loop: str
    declared: str
    dims: dict[str, int]
    device: str
    triton: str
    rows: int | None
    warps: tuple[int, int]
    how: str
    seconds: tuple[float, float]
    shape: dict[str, Any]
    levels: int | None = None

    @property
    def tiling(self) -> Tiling:
        return Tiling(self.rows, self.warps, self.levels)


def triton_version() -> str:
    """That of the installed Triton; "" where there is none."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def path_beside(spec: LoopSpec) -> Path:
    """Where the tilings of a loop's file lie."""
    return Path(spec.where.file).with_suffix(".tuned.json")


def dims_of(spec: LoopSpec, sizes: Mapping[str, int]) -> dict[str, int]:
    """Those of the sizes that a tiling is for."""
    declared = {**spec.fast, **spec.slow, **spec.inputs}.values()
    named = {name for d in declared for expr in d.dims for name in expr.names} | {"H"}
    return {name: sizes[name] for name in sorted(named - {"N", "n"}) if name in sizes}


def digest(spec: LoopSpec) -> str:
    """Of the source of the loop and its learner, and of what they derive from, as it is written."""
    made = hashlib.sha256()
    for cls in dict.fromkeys([*spec.cls.__mro__, *spec.learner.__mro__]):
        if cls in EMPTY or cls.__module__.startswith("nestloop.lang."):
            continue
        try:
            made.update(inspect.getsource(cls).encode())
        except (OSError, TypeError):  # typed in, or made by a call: its name has to do
            made.update(cls.__qualname__.encode())
    return made.hexdigest()[:16]


def read(path: Path) -> list[Entry]:
    """The entries of a file.

    Raises:
        TunedFileError: it is not what `write` writes.
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["format"] != FORMAT:
            raise ValueError(f"format {kept['format']}")
        return [_entry(one) for one in kept["tuned"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise TunedFileError(
            "A file of tuned tilings cannot be read.",
            given=f"{path}: {reason}",
            need=f"what nestloop tune writes, format {FORMAT}",
            fix="delete the file, and tune its loops again",
        ) from None


def _entry(kept: Mapping[str, Any]) -> Entry:
    entry = Entry(**{**kept, "warps": tuple(kept["warps"]), "seconds": tuple(kept["seconds"])})
    whole = [*entry.warps, *[n for n in (entry.rows, entry.levels) if n is not None], *entry.dims.values()]
    if (
        len(entry.warps) != 2
        or any(type(number) is not int or number < 1 for number in whole)
        or (entry.levels or 1) > 2
    ):
        raise ValueError(f"rows {entry.rows}, warps {list(entry.warps)}, dims {entry.dims}")
    return entry


def write(path: Path, entry: Entry) -> None:
    """Put an entry in a file, whole or not at all, in place of one with the same loop, sizes, device and Triton.

    Raises:
        TunedFileError: there is such a file, and it cannot be read.
    """
    kept = read(path) if path.exists() else []
    left = [one for one in kept if _key(one) != _key(entry)]
    ordered = sorted([*left, entry], key=lambda one: (one.loop, one.device, sorted(one.dims.items()), one.triton))
    cache.put(path, json.dumps({"format": FORMAT, "tuned": [asdict(one) for one in ordered]}, indent=1) + "\n")
    path.chmod(0o644)


def _key(entry: Entry) -> tuple[Any, ...]:
    return entry.loop, entry.dims, entry.device, entry.triton


_TRIED: ContextVar[Tiling | None] = ContextVar("tiling", default=None)


@contextmanager
def trying(tiling: Tiling) -> Iterator[None]:
    """Within it loops are lowered with this tiling, whatever files say."""
    token = _TRIED.set(tiling)
    try:
        yield
    finally:
        _TRIED.reset(token)


def tiling_for(spec: LoopSpec, sizes: Mapping[str, int]) -> Tiling:
    """What was tuned for a loop of these sizes on the GPU that is there; where there is none, on the first in the file.

    Raises:
        TunedFileError: the file beside the declaration cannot be read.
        StaleTuningError: what it has for the loop was tuned for another declaration, or another Triton.
    """
    tried = _TRIED.get()
    if tried is not None:
        return tried
    path = path_beside(spec)
    if not path.is_file():
        return UNTUNED
    dims, here = dims_of(spec, sizes), _device()
    found = [e for e in read(path) if e.loop == spec.name and e.dims == dims and (not here or e.device in here)]
    fitting = [e for e in found if e.triton == triton_version()]
    if not found:
        return UNTUNED
    if not fitting:
        given = f"Triton {', '.join(e.triton for e in found)}"
        raise _stale(spec, "with another Triton", given, f"Triton {triton_version()}, which is installed")
    if fitting[0].declared != digest(spec):
        given = f"a declaration with digest {fitting[0].declared}"
        raise _stale(spec, "for another declaration", given, f"the one that is there, {digest(spec)}")
    return fitting[0].tiling


def _stale(spec: LoopSpec, how: str, given: str, need: str) -> StaleTuningError:
    """The refusal of a tiling that was tuned for what is no more."""
    return StaleTuningError(
        f"The tiling of {spec.name} was tuned {how}.",
        where=spec.where,
        given=f"{path_beside(spec)}: {given}",
        need=need,
        fix=_AGAIN.format(spec.name),
    )


def _device() -> str:
    """The GPU's name without spaces, as "nvidiah200"; "" where there is none."""
    return torch.cuda.get_device_name().lower().replace(" ", "") if torch.cuda.is_available() else ""
