"""How a product's tile is spread over the warps of a program, and how often it is computed where there are too many.

Matrix units take tiles of 16 rows and 8 columns a warp, or of 64 rows four warps together. Triton lays products that
follow one another along one axis: the rows of the last one's tile where it has as many as columns, else its columns. A
warp beyond what that axis has is not idle: it computes what another does, and all that is computed of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nestloop.lowering.schedule.devices import Device

WIDE_ROWS = 64  # of Hopper's and Blackwell's wide instructions; 16 rows a warp
_ROWS, _COLUMNS = 16, 8  # of a warp's instruction

ROWS, COLUMNS, BOTH = "rows", "columns", "both"


@dataclass(frozen=True)
class Spread:
    """A product's tile, padding included, and the axis along which warps lie: BOTH where it is alone.

    Its text, which `parse` reads, is a key of what is counted of products.
    """

    rows: int
    columns: int
    along: str = BOTH

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns} {self.along}"

    @classmethod
    def parse(cls, text: str) -> Spread:
        tile, along = text.split()
        rows, columns = map(int, tile.split("x"))
        return cls(rows, columns, along)

    @property
    def is_narrow(self) -> bool:
        """Whether it has too few rows for wide instructions."""
        return self.rows < WIDE_ROWS

    def copies(self, warps: int, device: Device | None = None) -> float:
        """How often so many warps compute it on a device, which is Hopper where none is named."""
        if device is not None and not device.is_nvidia:
            return 1.0
        if not self.is_narrow and has_wide(device):
            return max(1.0, _ROWS * warps / self.rows)
        each = {ROWS: _ROWS / self.rows, COLUMNS: _COLUMNS / self.columns}
        return max(1.0, warps * each.get(self.along, _ROWS * _COLUMNS / (self.rows * self.columns)))


def has_wide(device: Device | None) -> bool:
    """Whether a device has wide instructions."""
    return device is None or device.arch in ("sm_90", "sm_100")


def along(rows: int, columns: int) -> str:
    """The axis of a chain whose last product has such a tile."""
    return ROWS if rows >= columns else COLUMNS


def copies(products: Mapping[Spread, Any], warps: int, device: Device | None = None) -> Any:
    """How often products are computed on the average, by their FLOPs; 1 where there are none."""
    total = sum(products.values())
    if total == 0:
        return 1
    return sum(flops * spread.copies(warps, device) for spread, flops in products.items()) / total
