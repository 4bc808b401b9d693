"""What calls have found, kept for calls like them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

MOST = 256
_T = TypeVar("_T")


class Kept(dict[Any, _T]):
    """Values by what they were found from; so few that calls of ever new sizes take no memory without end."""

    def __setitem__(self, key: Any, value: _T) -> None:
        if len(self) >= MOST:
            self.clear()
        super().__setitem__(key, value)

    def of(self, key: Any, find: Callable[[], _T]) -> _T:
        """The value of a key, none of which is None, found the first time; each time where the key is None."""
        if key is None:
            return find()
        found = self.get(key)
        if found is None:
            found = self[key] = find()
        return found
