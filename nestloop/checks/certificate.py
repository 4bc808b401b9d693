"""What checks found, as rows, as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch

from nestloop.lang.loop import LoopSpec
from nestloop.targets import sizes_text

_HEAD = ("check", "backend", "dtype", "tokens", "error", "bound", "where it is largest")
_NUMBERS = (3, 4, 5)  # columns of it


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        check: the property that it is of.
        backend: the code that was checked.
        dtype: of the tensors given.
        tokens: of a sequence.
        error: the largest difference, relative to the largest element of its tensor; None where nothing was compared.
        bound: what it may be; infinity where a number will do.
        worst: the tensor that is off the most; where nothing was compared, why.
    """

    check: str
    backend: str
    dtype: str
    tokens: int
    error: float | None
    bound: float
    worst: str

    @property
    def holds(self) -> bool:
        """Whether the error is within its bound; a NaN is not."""
        return self.error is None or self.error <= self.bound


@dataclass(frozen=True)
class Certificate:
    """What `nl.check` found of one loop.

    Attributes:
        spec: its declaration.
        sizes: of the dims, N apart, which the rows have.
        device, seed: as they were given.
        rows: a comparison each.
    """

    spec: LoopSpec
    sizes: Mapping[str, int]
    device: str
    seed: int
    rows: Sequence[Row]

    @property
    def holds(self) -> bool:
        """Whether every row holds."""
        return all(row.holds for row in self.rows)

    @property
    def failed(self) -> list[Row]:
        """The rows that do not hold."""
        return [row for row in self.rows if not row.holds]

    def __str__(self) -> str:
        sizes = sizes_text(self.spec, self.sizes)
        lines = [f"{self.spec.name}  ({self.spec.where.short})", f"{sizes}; on {self.device}, seed {self.seed}"]
        cells = [_HEAD, *[_cells(list(alike)) for _, alike in groupby(self.rows, _kind)]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(_HEAD) - 1)]
        for row in cells:
            aligned = [row[i].rjust(w) if i in _NUMBERS else row[i].ljust(w) for i, w in enumerate(widths)]
            lines.append("  ".join([*aligned, row[-1]]).rstrip())
        compared = sum(row.error is not None for row in self.rows)
        failed = len(self.failed)
        said = f"all {compared} comparisons hold" if not failed else f"{failed} of {compared} comparisons do not hold"
        return "\n".join([*lines, said])

    def as_json(self) -> dict[str, Any]:
        """The same as JSON takes it. An error that is no number is null, and does not hold; so is a missing bound."""
        rows = [
            {**asdict(row), "error": _number(row.error), "bound": _number(row.bound)}
            | {"compared": row.error is not None, "holds": row.holds}
            for row in self.rows
        ]
        return {
            "loop": self.spec.name,
            "declared": self.spec.where.short,
            "dims": dict(self.sizes),
            "device": self.device,
            "seed": self.seed,
            "torch": str(torch.__version__),
            "holds": self.holds,
            "rows": rows,
        }


def _number(value: float | None) -> float | None:
    """What JSON has for it."""
    return value if value is not None and math.isfinite(value) else None


def _kind(row: Row) -> tuple[str, str, str, bool]:
    """What rows of several lengths have in common that are one line."""
    return row.check, row.backend, row.dtype, row.error is None


def _cells(rows: Sequence[Row]) -> tuple[str, ...]:
    """A line: of rows alike, the one that is the closest to its bound, or beyond it."""
    row = max(rows, key=_strain)
    tokens = ", ".join(str(n) for n in sorted({one.tokens for one in rows}) if n)
    error = "-" if row.error is None else f"{row.error:.1e}"
    bound = "-" if row.error is None else "finite" if math.isinf(row.bound) else f"{row.bound:.1e}"
    at = f" at {row.tokens} tokens" if len(rows) > 1 else ""
    where = "the same bits" if row.error == 0 else f"{row.worst}{at}"
    mark = "" if row.holds else "   <- does not hold"
    if row.error is not None and 1 <= row.bound < math.inf:
        mark += "   (tells nothing: the definition itself has no digit left)"
    return (row.check, row.backend, row.dtype, tokens, error, bound, f"{where}{mark}")


def _strain(row: Row) -> float:
    if row.error is None or row.error == row.bound:
        return 1.0
    return math.inf if math.isnan(row.error) or not row.bound else row.error / row.bound
