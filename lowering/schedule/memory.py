"""Where values live: slots of scratch memory, shared by values that are never needed at the same time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from nestloop.lowering.ops.strided import ZERO, Extent, product
from nestloop.lowering.schedule.nests import Unit
from nestloop.lowering.schedule.values import Value

_ALIGNED = 16  # elements: a cache line of float32


@dataclass
class Memory:
    """Scratch of one graph.

    Attributes:
        place: value -> the offset of its slot; values that live in registers, or in a result, have none.
        size: elements in all, linear in the rows of a tile.
    """

    place: dict[Value, Extent] = field(default_factory=dict)
    size: Extent = ZERO


def stored(unit: Unit) -> list[Value]:
    """The values of a unit that need memory of their own."""
    inside = set(unit.values)
    found = []
    for value in unit.values:
        if value.is_scalar or value.result is not None:
            continue
        if value.kind == "element":
            outside = any(user not in inside for user in value.users)
        else:
            outside = bool(value.users) or value.kind not in ("product", "fold")
        if outside:
            found.append(value)
    return found


def place(units: list[Unit], keep: bool = False) -> Memory:
    """Slots for all values of some units, in the order they run; with `keep` none is used twice."""
    memory = Memory()
    free: list[tuple[Extent, Extent]] = []
    last = {}
    for index, unit in enumerate(units):
        for value in unit.values:
            for operand in value.reads:
                last[operand.base] = index
    slots: dict[Value, tuple[Extent, Extent]] = {}
    read_as_scalar = _scalar_readers(units)
    for index, unit in enumerate(units):
        dying = [v for v in slots if last.get(v, index) == index and v not in read_as_scalar]
        reusable = [] if keep else [v for v in dying if unit.is_nest and _only_in_step(v, unit)]
        for value in stored(unit):
            size = _rounded(product(value.shape))
            slot = None
            same = next((v for v in reusable if slots[v][1] == size and value.kind == "element"), None)
            if same is not None and value.domain == same.domain:
                reusable.remove(same)
                dying.remove(same)
                slot = slots[same]
            elif not keep:
                slot = next((s for s in free if s[1] == size), None)
                if slot is not None:
                    free.remove(slot)
            if slot is None:
                slot = (memory.size, size)
                memory.size = memory.size + size
            slots[value] = slot
            memory.place[value] = slot[0]
        if not keep:
            for value in dying:
                free.append(slots[value])
                del slots[value]
            for value in [v for v in slots if v in unit.values and v not in last]:
                free.append(slots.pop(value))
            slots = {v: s for v, s in slots.items() if last.get(v, -1) > index or v in read_as_scalar}
    return memory


def _scalar_readers(units: list[Unit]) -> set[Value]:
    """Values that a scalar is computed from: it may be spelled anywhere later."""
    return {o.base for unit in units for v in unit.values if v.is_scalar for o in v.reads}


def _only_in_step(value: Value, unit: Unit) -> bool:
    """Whether a nest reads a value only at the element it is at."""
    reads = [(user, o) for user in unit.values for o in user.reads if o.base is value]
    return all(user.domain == value.domain and user.in_step(o) for user, o in reads) and value.kind != "input"


def _rounded(size: Extent) -> Extent:
    return replace(size, constant=-(-size.constant // _ALIGNED) * _ALIGNED)
