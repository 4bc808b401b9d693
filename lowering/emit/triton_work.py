"""What generated Triton does, in numbers that the cost model reads from a plan: each function's products, instructions,
memory and registers, and which functions a kernel calls."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nestloop.lowering import ops
from nestloop.lowering.emit.triton import TritonFunction
from nestloop.lowering.emit.triton_chains import spreads, worth_while
from nestloop.lowering.emit.triton_repeats import LOOPS
from nestloop.lowering.ops.strided import ZERO, Extent, product
from nestloop.lowering.runtime.triton_plan import Launch
from nestloop.lowering.schedule.phases import is_blocked, sums_over
from nestloop.lowering.schedule.repeats import Kept, Repeat, every
from nestloop.lowering.schedule.roofline import EXACT, FLOPS_EACH, PIVOT, TRIANGLE
from nestloop.lowering.schedule.spread import Spread
from nestloop.lowering.schedule.values import Value

_NARROW_TERMS = 64  # multiply-adds for each thread and instruction of a narrow product: 16 x 8 x 16 for 32 threads


def work(
    functions: Mapping[str, TritonFunction],
    costs: Mapping[str, dict[str, Any]],
    shapes: Mapping[str, Sequence[int]],
    texts: Mapping[str, str],
    called: Callable[[str], Sequence[TritonFunction]],
    alive: Callable[[str], int],
) -> dict[str, Any]:
    """The numbers of a module, as JSON takes them.

    Args:
        functions: all of them.
        costs: what each costs (`of_function`).
        shapes: sizes of one token's row, or of a weight's tile, by name.
        texts: every kernel's source, by its name.
        called: the functions that a kernel may call.
        alive: elements alive at once in a kernel.

    Returns:
        "functions": name -> `of_function`; "elements": name -> of a row or a weight; "kernels": name -> "calls", names
        of functions, "reads" and "writes", names of tensors, "handed", of what kernels leave for one another, "alive",
        "own", of what is handed that which no function reads or writes for it.
    """
    updates = [f for name, f in functions.items() if name.endswith("update_vjp")]
    again = any(name.startswith("gradient_") for f in updates for name in f.inputs)  # backward sums the gradient too
    kernels = {}
    for kernel, text in texts.items():
        names = [f.name for f in called(kernel) if f.results and (kernel != "forward" or f.name != "advance")]
        if kernel == "backward" and not again:
            names = [name for name in names if not name.endswith("gradient")]
        reads, writes, handed = (
            sorted(set(re.findall(rf"(\w+){end} \+", text))) for end in ("_p", "_made", "(?<=_handed)")
        )
        kernels[kernel] = {
            **{"calls": names, "reads": reads, "writes": writes, "handed": handed, "alive": alive(kernel)},
            "own": sorted(set(re.findall(r"tl\.(?:load|store)\((\w+_handed) \+", text))),
        }
    return {
        "functions": dict(costs),
        "elements": {name: math.prod(shape) for name, shape in shapes.items()},
        "kernels": kernels,
    }


def described(costs: Mapping[str, dict[str, Any]], launches: Sequence[Launch]) -> list[str]:
    """Lines for a module's header: how its kernels are launched, and what one call of each function costs.

    Args:
        costs: by function (`of_function`).
    """
    lines = ["Kernels, in order:"]
    for one in launches:
        turns = ", once a step" if one.each_step else ""
        room = f"{4 * one.scratch:,} bytes of memory" if one.scratch else "no memory"
        room += f" and {4 * one.states:,} for each chunk between kept states" if one.states else ""
        strips = f" and {one.strips} strips of each" if one.strips > 1 else ""
        lines.append(f"    {one.kernel}: over {one.over}{strips}{turns}, {one.warps} warps and {room} a program")
    lines.append("Functions, for one tile of n tokens (in float32):")
    for name, found in costs.items():
        low, exact = (sum(found[which].values()) / 1e6 for which in ("products", "exact"))
        work = f"{low:.1f} MFLOP in products, padding included" + (f", {exact:.1f} more in exact ones" if exact else "")
        tile = f"n <= {found['tokens']}" + (f", one of {found['blocks']} blocks" if found["blocks"] > 1 else "")
        around = f" ({4 * found['around']:,} more for all of them)" if found["around"] else ""
        lines.append(
            f"    {name}: {tile}: {work}; {found['instructions'] / 1e6:.2f} M other instructions; "
            f"{4 * found['moved']:,} bytes read and written{around}; {found['alive']:,} numbers alive at once"
        )
    return lines


def of_function(function: TritonFunction) -> dict[str, Any]:
    """The numbers of one call on a tile.

    Returns:
        "tokens": of the tile. "flops": of its products, as arithmetic in n. "products": `Spread` of a product (as
        text) -> FLOPs of the tiles that it takes, padding included. "exact": the same of those that low precision is
        not for. "instructions": of all threads. "moved": elements read from memory and written to it. "blocks": calls
        that one tile takes, "around": elements read and written for all tiles and blocks together. "depth": products,
        reductions and solved rows that wait for one another. "alive": elements alive at once. "largest": the largest
        tile.
    """
    flops = ZERO
    products: Counter[str] = Counter()
    exact: Counter[str] = Counter()
    instructions, spread = 0, spreads(function)
    depth: dict[Value, int] = {}
    for value in function.values:
        depth[value] = _depth(function, value, depth)
        if value.kind in LOOPS:
            continue
        space = _elements(function, value.space) * _turns(function, value)
        if value.kind == "product":
            a, b = value.factors
            flops = flops + product([*value.shape, a.shape[-1]]) * (2 * function.times.get(value, 1))
            terms = space * function.padded(a.shape[-1])
            if not function.is_dot(value):
                instructions += 2 * terms
                continue
            tile = spread[value]
            rounded = sum(_elements(function, view.shape) for view in (a, b))  # or through shared memory
            instructions += rounded * _turns(function, value)
            if function.is_low(value):
                products[str(tile)] += 2 * terms
            else:  # a factor of whole numbers has half of the terms
                exact[str(tile)] += terms if function.whole_factor(value) else 2 * terms
            instructions += terms // _NARROW_TERMS if tile.is_narrow else 0
        elif value.kind == "system":
            rows = function.padded(value.reads[0].shape[-1])
            if not ops.row(value.node.target).cpp.triangular:
                instructions += rows * PIVOT
            elif function.shares_inverse(value) in (None, value):
                instructions += TRIANGLE * rows
            instructions += 5 * space
        elif value.kind != "join":
            instructions += space * (1 if value.copies else max(1, ops.row(value.node.target).work))
    moved = _moved(function)
    return {
        "tokens": function.longest,
        "flops": str(flops),
        "products": dict(products),
        "exact": dict(exact),
        "instructions": instructions + moved,
        "moved": moved,
        "blocks": function.block.count if function.outside and function.block is not None else 1,
        "around": _moved_around(function),
        "depth": max(depth.values(), default=0),
        "alive": function.alive,
        "largest": function.largest,
    }


def fewest_warps(warps: int, functions: Sequence[TritonFunction]) -> int:
    """As many warps for a kernel that calls functions, or fewer, where these are as good (`worth_while`)."""
    products: Counter[Spread] = Counter()
    for function in functions:
        work, spread = of_function(function), spreads(function)
        if any(value.kind == "system" and value not in spread for value in function.values):
            return warps  # a pivot at a time, which all threads share
        products.update({tile: 0 for tile in spread.values()})
        for text, flops in work["products"].items():
            products[Spread.parse(text)] += flops
        for text, flops in work["exact"].items():
            products[Spread.parse(text)] += EXACT * flops
    return worth_while(warps, products, max((function.alive for function in functions), default=1))


def is_of_products(function: TritonFunction) -> bool:
    """Whether a function does little but products that low precision is for."""
    work = of_function(function)
    return sum(work["products"].values()) > FLOPS_EACH * work["instructions"]


def _elements(function: TritonFunction, shape: Sequence[Extent]) -> int:
    """Of a tile in registers."""
    return math.prod(function.padded(size) for size in shape if not size.is_one)


def _turns(function: TritonFunction, value: Value) -> int:
    """How many times a value is computed: in turns of a loop, or for blocks of a long axis."""
    if function.block is None or function.block.is_strip or function.outside:
        return function.times.get(value, 1)
    size = function.block.size
    return function.block.count if is_blocked(value, size) or sums_over(value, size) else 1


def _depth(function: TritonFunction, value: Value, depth: Mapping[Value, int]) -> int:
    """Products, reductions and solved rows that wait for one another, up to a value; `depth`: of those before it."""
    before = max((depth.get(operand.base, 0) for operand in value.reads), default=0)
    if isinstance(value, Repeat):
        turn: dict[Value, int] = {}
        for one in value.body:
            turn[one] = _depth(function, one, turn)
        return before + max(turn.values(), default=0) * value.times
    return before if value.kind in LOOPS else before + _waits(function, value)


def _waits(function: TritonFunction, value: Value) -> int:
    """Steps of a value in which threads wait for one another."""
    if value.kind == "system":
        rows = function.padded(value.reads[0].shape[-1])
        return 2 * rows.bit_length() if ops.row(value.node.target).cpp.triangular else rows
    return int(value.kind != "element")


def _moved(function: TritonFunction) -> int:
    """Elements that a call reads and writes, unless it is the last: rows of tensors, and its scratch memory."""
    rows = {name: row for name, row in function.rows.items() if not row.last}
    there: set[Value] = set()
    total = 0
    for phase in function.phases:
        for part in (phase.once, phase.blocks):
            # A block of what has the axis is read in every walk; the rest stays in registers.
            seen: set[Value] = set()
            for value in every(part):
                turns = function.times.get(value, 1)
                left = isinstance(value, Kept) or value in function.left_at
                total += _size(function, value) * turns if left else 0
                if value.written and value.result in rows:
                    total += _size(function, value) * (2 if rows[value.result].added else 1)
                total += _size(function, value) * turns if value in function.place else 0
                for base in {view.base for view in value.reads} - seen - there:
                    if base in function.handed or (base.kind == "input" and base.name in rows):
                        walked = function.block is not None and is_blocked(base, function.block.size)
                        (seen if walked else there).add(base)
                        total += 0 if base in part else _size(function, base)
                total += sum(_size(function, value) * turns for view in value.reads if view.base in function.at_once)
        if phase.blocks:  # rows are read again behind a walk
            there = {base for base in there if base.kind != "input"}
    return total


def _moved_around(function: TritonFunction) -> int:
    """Elements that are read and written for a walk over all blocks, where its caller walks them: weights, and sums."""
    if not function.outside or function.block is None:
        return 0
    weights = function.in_registers(function.block.size.constant)
    given = sum(_whole(function, function.given[name]) for name in weights)
    sums = sum(_whole(function, value) for value in function.values if value.result in function.returned)
    return given + sums * (1 if function.name.endswith("gradient") else 2)


def _whole(function: TritonFunction, value: Value) -> int:
    return math.prod(extent.at(function.longest) for extent in value.shape)


def _size(function: TritonFunction, value: Value) -> int:
    """The same of what a call has of it."""
    block = function.block if function.outside else None
    sizes = (block.length if block is not None and n == block.size else n.at(function.longest) for n in value.shape)
    strip = function.strip
    return math.prod(sizes) // (strip.count if strip is not None and is_blocked(value, strip.size) else 1)
