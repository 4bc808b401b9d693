"""A plan: what the compiler decided about one loop, small enough to keep in the cache beside its source."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nestloop.lowering.runtime import cache
from nestloop.lowering.runtime.native import NativePlan
from nestloop.lowering.runtime.triton_plan import Handed, InRanges, Launch, TritonPlan


@dataclass(frozen=True)
class Plan:
    """How a lowered loop runs.

    Attributes:
        form: "loop" (generated steps and read-out), "fit" (a kernel estimator's generated fit), "attention" (PyTorch's
            own, with `scale`), or "stream" (a scan over chunks, or one piece of it).
        name: the loop's name, as an identifier.
        source: the generated module's text; empty for "attention".
        inputs: fast weights that `forward` takes (those frozen at zero may be absent).
        shared: what all steps share: one head's tile of each, of what has a row for each token that row.
        tiles: shape of each fast weight's tile.
        output: shape of one token's output.
        tokens: the one sequence length the plan is for, or None.
        pieces: names of the generated pieces, each with the FLOPs of its products, forward and backward, and for both
            the values written by its ops, and how many ops these are; all as arithmetic in n.
        reads_dtype: whether it holds for one compute dtype only.
        rows: tokens worked on at a time, so that their tiles stay in a CPU's cache.
        low: which of `shared` is left in the low precision of products, where tokens come in one.
        results: of a stream, names of what `forward` returns before what it keeps for backward.
        kept: of a scan, the carried tensors that it keeps.
        chunk: of a scan, tokens of a chunk in generated PyTorch; 0 for one piece.
        why: of a stream, the form it takes and why.
        native: its C++; None where it has none.
        not_native: why it has none.
        triton: its Triton; None where it has none, or where it was not asked for.
        not_triton: why it has none.
    """

    form: str
    name: str
    source: str
    inputs: tuple[str, ...]
    tiles: dict[str, tuple[int, ...]]
    output: tuple[int, ...]
    tokens: int | None
    pieces: dict[str, tuple[str, str, str, str]]
    rows: int
    reads_dtype: bool = False
    scale: float | None = None
    results: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    chunk: int = 0
    why: str = ""
    shared: dict[str, tuple[int, ...]] = field(default_factory=dict)
    low: tuple[str, ...] = ()
    native: NativePlan | None = None
    not_native: str = ""
    triton: TritonPlan | None = None
    not_triton: str = ""


def _path(fingerprint: str) -> Path:
    return cache.cache_dir() / f"{fingerprint}.json"


def read(fingerprint: str | None) -> Plan | None:
    """The plan kept under a fingerprint, if there is a whole one."""
    if fingerprint is None:
        return None
    try:
        return remade(json.loads(_path(fingerprint).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent, or written by another version: lowered again and written again


def remade(kept: dict[str, Any]) -> Plan:
    """A plan from its JSON.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    kept = dict(kept)
    tiles, shared = ({n: tuple(shape) for n, shape in kept.pop(k).items()} for k in ("tiles", "shared"))
    pieces = {name: tuple(flops) for name, flops in kept.pop("pieces").items()}
    native = _remade(NativePlan, kept.pop("native"))
    triton = _remade_triton(kept.pop("triton"))
    for name in ("inputs", "output", "results", "kept", "low"):
        kept[name] = tuple(kept[name])
    return Plan(**kept, tiles=tiles, shared=shared, pieces=pieces, native=native, triton=triton)


def _remade(kind: Any, kept: dict[str, Any] | None) -> Any:
    """Generated code and how it is called, from its JSON."""
    if kept is None:
        return None
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()})


def _remade_triton(kept: dict[str, Any] | None) -> TritonPlan | None:
    """The same of generated Triton, whose kernels are values of their own."""
    if kept is not None:
        for part in (kept, *([kept["ranges"]] if kept["ranges"] else [])):
            for direction in ("forward", "backward"):
                part[f"{direction}_launches"] = [Launch(**one) for one in part[f"{direction}_launches"]]
                part[f"{direction}_handed"] = [Handed(**one) for one in part[f"{direction}_handed"]]
        kept["ranges"] = _remade(InRanges, kept["ranges"])
        kept["tiles"] = {name: tuple(sizes) for name, sizes in kept["tiles"].items()}
        kept |= {name: _remade_triton(kept[name]) for name in ("prepare", "decoders", "at_once")}
    made: TritonPlan | None = _remade(TritonPlan, kept)
    return made


def keep(fingerprint: str | None, plan: Plan) -> None:
    """Put a plan in the cache."""
    if fingerprint is not None:
        cache.put(_path(fingerprint), json.dumps(asdict(plan)))
