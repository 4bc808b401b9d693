"""Minimal cuts: which of two sides each thing goes to, where what is torn apart costs least."""

from __future__ import annotations

from collections import deque


class Flow:
    """A network, of which a minimal cut is found along shortest augmenting paths."""

    def __init__(self) -> None:
        self.left: dict[object, dict[object, int]] = {}

    def add(self, start: object, end: object, capacity: int) -> None:
        """An edge, or more of one that is there."""
        edges = self.left.setdefault(start, {})
        edges[end] = edges.get(end, 0) + capacity
        self.left.setdefault(end, {}).setdefault(start, 0)

    def cut(self, source: object, sink: object) -> set[object]:
        """The smaller of the two sides that a minimal cut leaves around the sink."""
        while (path := self._path(source, sink)) is not None:
            least = min(self.left[a][b] for a, b in path)
            for a, b in path:
                self.left[a][b] -= least
                self.left[b][a] += least
        side, waiting = {sink}, [sink]
        while waiting:
            end = waiting.pop()
            for start in self.left[end]:
                if start not in side and self.left[start][end]:
                    side.add(start)
                    waiting.append(start)
        return side

    def _path(self, source: object, sink: object) -> list[tuple[object, object]] | None:
        before: dict[object, object] = {source: source}
        queue = deque([source])
        while queue and sink not in before:
            start = queue.popleft()
            for end, left in self.left.get(start, {}).items():
                if left and end not in before:
                    before[end] = start
                    queue.append(end)
        if sink not in before:
            return None
        path, end = [], sink
        while end != source:
            path.append((before[end], end))
            end = before[end]
        return path
