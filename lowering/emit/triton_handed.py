"""What the kernels of a scan whose chunks run at once leave for one another in memory.

What a walk leaves is as exact as what it carries, but for parts that others take as factors of products alone: those
are rounded as the products would round them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nestloop.lowering.emit.triton_prepare import WALKS, TritonPrepare
from nestloop.lowering.runtime.triton_plan import Handed

_PREFIX = {"states": "", "cotangents": "d_"}  # of what is walked, in registers


class TritonHanded(TritonPrepare):
    """States, their cotangents and what is prepared of walks, from one kernel to the next.

    Attributes:
        low: of each of these, what is rounded.
    """

    slots_over = "chunks"  # what has a state of its own in memory

    def choose_low(self) -> None:
        """Choose what is rounded, once all functions are known."""
        self.low = {handed: self._factors(handed) for handed in [*_PREFIX, *WALKS.values()]}

    def _factors(self, handed: str) -> list[str]:
        """What of it functions take from memory as factors of products alone."""
        names = {n: f"d_{n}_new" if handed == "cotangents" else n for n in self._parts_of(handed)}
        functions = self.functions.values()
        return [n for n, read in names.items() if all(f.is_factor(read) for f in functions if read in f.rows)]

    def _parts_of(self, handed: str) -> Sequence[str]:
        """What kernels leave for one another: parts of the state or of its cotangent, or what is prepared of a walk."""
        walk = next((walk for walk, memory in WALKS.items() if memory == handed), None)
        if walk is None:
            return self.walked
        return self.prepared[walk].handed if walk in self.prepared else []

    def _slots(self, handed: str, names: Sequence[str], index: str = "index") -> dict[str, str]:
        low = self.low.get(handed, [])
        exact = super()._slots(handed, [n for n in names if n not in low], index)
        return exact | super()._slots(f"{handed}_low", [n for n in names if n in low], index)

    def _handed_on(self, handed: str) -> list[Handed]:
        """The memory in which kernels leave what others read of it."""
        low, over = self.low[handed], "chunks" if handed in WALKS.values() else self.slots_over
        parts = {f"{handed}_handed": [n for n in self._parts_of(handed) if n not in low], f"{handed}_low_handed": low}
        return [Handed(name, over, self.room_for(names), low=names is low) for name, names in parts.items() if names]

    def _left_in_memory(self, name: str) -> list[str]:
        """What the last chunk leaves, of which a piece writes its part itself."""
        return []

    def _take(self, handed: str, places: Mapping[str, str], index: str) -> list[str]:
        """Lines with which a walk begins: the state, or its cotangent, from places.

        Args:
            handed: "states" or "cotangents".
            index: the chunk that it lies at, where it lies in memory.
        """
        return [self.load(f"{_PREFIX[handed]}{n}", place) for n, place in places.items()]

    def _give(self, handed: str, places: Mapping[str, str], index: str) -> list[str]:
        """Lines that write it to places."""
        return [self.store(n, place, f"{_PREFIX[handed]}{n}") for n, place in places.items()]

    def _last(self, handed: str, places: Mapping[str, str], index: str) -> list[str]:
        """The same, behind the walk."""
        return self._give(handed, places, index)

    def _hand(self, handed: str, index: str = "index") -> list[str]:
        """Lines that leave it, as it is at a chunk, for other kernels."""
        return self._give(handed, self._slots(handed, self.walked, index), index)
