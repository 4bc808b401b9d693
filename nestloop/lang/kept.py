"""What calls have found, kept for calls like them."""

from __future__ import annotations

from typing import Any, TypeVar

MOST = 256
_T = TypeVar("_T")


class Kept(dict[Any, _T]):
    """Values by what they were found from; so few that calls of ever new sizes take no memory without end."""

    def __setitem__(self, key: Any, value: _T) -> None:
        if len(self) >= MOST:
            self.clear()
        super().__setitem__(key, value)
