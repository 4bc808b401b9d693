"""What was found of loops, by the digest that it depends on: known to the process, and kept in the cache for others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nestloop.lowering.runtime import cache


class Answers:
    """Answers to one question.

    Attributes:
        kind: how the names of their files end.
        known: those that this process has asked for.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.known: dict[str, Any] = {}

    def get(self, key: str | None, ask: Callable[[], Any], holds: Callable[[Any], bool] = lambda found: True) -> Any:
        """The answer to a key, which JSON has and is not None; `ask` is called where there is none, or no key.

        holds: whether one of an earlier process is one still.
        """
        if key is None:
            return ask()
        if key not in self.known:
            found = self._kept(key)
            if found is None or not holds(found):
                found = ask()
                cache.put(self._path(key), json.dumps(found))
            self.known[key] = found
        return self.known[key]

    def _path(self, key: str) -> Path:
        return cache.cache_dir() / f"{key}.{self.kind}"

    def _kept(self, key: str) -> Any:
        try:
            return json.loads(self._path(key).read_text())
        except (OSError, ValueError):
            return None
