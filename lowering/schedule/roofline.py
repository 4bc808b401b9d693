"""What a plan is expected to take on a GPU: its work as expressions in B, H and N, and what of it a device is bound by.

A kernel takes as long as the slowest of what it needs at once: products of tiles, the issue of instructions, the shared
cache, memory, and the steps of a program that wait for one another. Everything here is a model. Its constants are
either vendors' figures (`devices`) or, below, shares of them; none was fitted to a run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy

from nestloop.lowering.runtime.tiles import spacing_within
from nestloop.lowering.runtime.triton_plan import ranges_of
from nestloop.lowering.schedule.devices import Device
from nestloop.lowering.schedule.spread import Spread, copies, has_wide

B, H, N = (sympy.Symbol(name, integer=True, positive=True) for name in "BHN")
_ZERO = sympy.Integer(0)

# Shares of the vendors' figures that good kernels reach.
PRODUCTS = 0.7
ATTENTION = 0.5  # of products, softmax attention by PyTorch's fused kernels
ISSUE = 0.7
MEMORY = 0.9
CACHE = 32  # bytes of the shared cache a multiprocessor and cycle, about half of what is on paper
NARROW = (
    0.62  # of that again, products of fewer than 64 rows, which Hopper's and Blackwell's wide instructions leave out
)
EXACT = 6  # products in bfloat16 that one of float32 factors takes, each of which is three terms
L1 = 128  # the same of a multiprocessor's own cache, which spilled registers go through, as far as it holds them
LATENCY = 100  # cycles of a product or a reduction that the next one waits for
FIRST = 600  # cycles until a tile has come from memory

# Registers of a thread, as NVIDIA's assembler gave them to kernels of five zoo loops (sm_90, 4 and 8 warps): what tiles
# take, and about 127 for addresses, masks and what products shuffle. What is over is written about twice, and read
# again; a factor of three is in that.
OTHER_REGISTERS = 127
TILE_REGISTERS = 112  # so many for tiles leave a thread of 255 few spills, or none
# The same of 4 warps in scans whose chunks run at once, compiled for sm_90: without a spill where all products have 64
# rows; and in backward kernels, the factors of products packed in pairs, but for those that spill with 8 warps too.
# Twice as many threads take 1.2 to 2 times the instructions. The first is so of scans in one kernel, too, whatever
# their products are, that walk no blocks (TTT-Linear, the generalized delta rule, Longhorn's diagonal form: 1.45 to 1.7
# times).
WIDE_REGISTERS = 136
PACKED_REGISTERS = 176
# With factors counted so, all other kernels of 4 warps: forward without a spill, backward (WIDE_REGISTERS) with a few
# bytes at most. Twice as many threads take 1.1 to 2 times the instructions there, too.
FORWARD_REGISTERS = 128
# And where there is little but products of 64 rows, so many FLOPs of them for each other instruction: a few bytes are
# spilled, by 8 warps too, which take twice the instructions.
SHARED_REGISTERS = 242
FLOPS_EACH = 20
SPILLED = 8  # bytes written for each register over

# Instructions of all threads, counted in compiled code.
TRIANGLE = 28 * 128  # of a solved triangle for each of its rows: of 16 to 64 rows
PIVOT = 550 * 128  # of a general system, for each pivot: of 64 rows

PROGRAMS = 32  # of a multiprocessor, at most
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class Spacing(sympy.Function):
    """Chunks from one kept state to the next, `spacing_within(chunks, budget, state)`, once these are numbers."""

    @classmethod
    def eval(cls, count: Any, budget: Any, state: Any) -> Any:
        """The number, where all are."""
        if all(number.is_Integer for number in (count, budget, state)):
            return sympy.Integer(spacing_within(int(count), int(budget), int(state)))
        return None


class Ranges(sympy.Function):
    """Ranges of tokens that have a program each, `ranges_of(items, tokens, rows, programs)`, once these are numbers."""

    @classmethod
    def eval(cls, items: Any, tokens: Any, rows: Any, programs: Any) -> Any:
        """The number, where all are."""
        if all(number.is_Integer for number in (items, tokens, rows, programs)):
            return sympy.Integer(ranges_of(int(items), int(tokens), int(rows), int(programs)))
        return None


@dataclass(frozen=True)
class Work:
    """What one kernel of a plan does, or all that PyTorch runs of it, as expressions in B, H and N.

    Attributes:
        flops: of its products, at the sizes that values have.
        traffic: bytes of memory that it must read and write: inputs, results, kept states; of PyTorch, every value.
        launches: of kernels.
        is_fused: whether that is softmax attention, which computes while it reads.
        programs: of a kernel; 0 of generated PyTorch, and so are the fields after.
        outside: FLOPs of products that PyTorch takes before or after the kernel.
        products: FLOPs of a program's tiles, padding included, by how warps share the tiles of a product.
        exact: the same of those that low precision is not for.
        instructions: of all threads of a program.
        moved: bytes that a program reads and writes through the shared cache.
        calls: that a program makes of functions, with the elements of tiles alive at once in each, which may spill.
        depth: products, reductions and solved rows of a program that wait for one another.
        scratch: bytes of memory that a program works in.
    """

    flops: Any
    traffic: Any
    launches: Any
    is_fused: bool = False
    programs: Any = _ZERO
    outside: Any = _ZERO
    products: Mapping[Spread, Any] = field(default_factory=dict)
    exact: Mapping[Spread, Any] = field(default_factory=dict)
    instructions: Any = _ZERO
    moved: Any = _ZERO
    calls: tuple[tuple[int, Any], ...] = ()
    depth: Any = _ZERO
    scratch: Any = _ZERO

    @property
    def alive(self) -> int:
        """Elements of a program's tiles alive at once, at most."""
        return max((alive for alive, _ in self.calls), default=0)


@dataclass(frozen=True)
class Facts:
    """What compiling a kernel showed, in place of what is expected.

    Attributes:
        registers: of a thread.
        spilled: bytes that a thread's registers spill, written and read.
        shared: bytes of shared memory of a program.
    """

    registers: int
    spilled: int
    shared: int


@dataclass(frozen=True)
class Estimate:
    """What one direction of a plan is expected to take on a device.

    Attributes:
        flops, traffic: FLOPs of its products and bytes of memory.
        seconds: the largest of `parts`; of several kernels, their sum.
        parts: what it is bound by -> seconds, of all kernels.
        registers, spilled, shared: of a thread, bytes of a thread, bytes of a program (None where not known); of
            several kernels, the most.
        programs, resident, waves: of the call, or the slowest kernel's; that a multiprocessor holds at once; turns
            that takes.
    """

    flops: int
    traffic: int
    seconds: float
    parts: Mapping[str, float]
    registers: int = 0
    spilled: int = 0
    shared: int | None = None
    programs: int = 0
    resident: int = 0
    waves: int = 0

    @property
    def bound(self) -> str:
        """What it waits for."""
        return max(self.parts, key=lambda part: self.parts[part])

    @property
    def intensity(self) -> float:
        """FLOPs a byte of memory."""
        return self.flops / max(1, self.traffic)


def product_rate(device: Device, dtype: str) -> float:
    """FLOP a second of products of tiles: float32 ones take three of tf32, which is what PyTorch's default asks for."""
    return PRODUCTS * (device.tf32 / 3 if dtype == "fp32" else device.bf16)


def registers(device: Device, alive: int, warps: int) -> tuple[int, int]:
    """Of a thread, and bytes that it is expected to spill, where so many elements are alive in so many warps."""
    wanted = -(-alive // (device.warp * warps)) + OTHER_REGISTERS
    most = min(device.thread_registers, device.registers // (device.warp * warps))
    return min(wanted, most), SPILLED * max(0, wanted - most)


def resident(device: Device, warps: int, registers: int, shared: int | None) -> int:
    """Programs that a multiprocessor holds at once."""
    threads = device.warp * warps
    found = [PROGRAMS, device.threads // threads, device.registers // (threads * (-(-registers // 8) * 8))]
    found += [device.shared // shared] if shared else []
    return max(1, min(found))


def _taken(products: Mapping[Spread, Any], device: Device, warps: int) -> Any:
    """FLOPs that warps take, as wide instructions would."""
    narrow = NARROW if has_wide(device) else 1.0
    flops = (f * one.copies(warps, device) / (narrow if one.is_narrow else 1.0) for one, f in products.items())
    return sum(flops, _ZERO)


def on_device(
    work: Work, device: Device, dtype: str, warps: int, facts: Facts | None = None
) -> tuple[dict[str, Any], tuple[int, int, int | None], int]:
    """Seconds of a kernel by what it needs, as expressions; registers, spills and shared memory; programs resident.

    Args:
        dtype: of the views, one of DTYPES.
        warps: of a program.
        facts: of the compiled kernel, if it is.
    """
    bandwidth, launches = device.bandwidth * MEMORY, work.launches * device.launch
    if work.programs == 0:
        # one op after the other: the time of products and that of memory add up
        arithmetic, memory = work.flops / product_rate(device, dtype), work.traffic / bandwidth
        if work.is_fused:
            return (
                {"products": arithmetic * PRODUCTS / ATTENTION, "memory": memory, "launches": launches},
                (0, 0, None),
                0,
            )
        less = sympy.Min(arithmetic, memory)
        return {"products": arithmetic + less, "memory": memory + less, "launches": launches}, (0, 0, None), 0
    taken, spilled = registers(device, work.alive, warps)
    shared = None
    spills: list[tuple[float, Any]] = [(registers(device, alive, warps)[1], calls) for alive, calls in work.calls]
    if facts is not None:  # which function a kernel's spills are of is not known: as it is expected, or all alike
        spills = [(facts.spilled * (of / spilled if spilled else 1), calls) for of, calls in spills]
        taken, spilled, shared = facts.registers, facts.spilled, facts.shared
    held = resident(device, warps, taken, shared)
    busiest = sympy.ceiling(work.programs / device.multiprocessors)  # programs of one multiprocessor, in all
    per, clock = device.multiprocessors, device.clock
    low, exact = (_taken(of, device, warps) for of in (work.products, work.exact))
    seconds = low * per / product_rate(device, dtype) + exact * EXACT * per / product_rate(device, "bf16")
    # what a chain of products computes again, it does with all that is computed of them
    again = copies(work.products, warps, device)
    threads = device.warp * warps
    bytes_spilled = threads * sum((of * calls for of, calls in spills), _ZERO)  # and read again
    issued = work.instructions * again + bytes_spilled / 2  # an instruction moves a register's four bytes
    fits = spilled * threads * held <= device.shared - (shared or 0) * held
    moved = work.moved + 2 * bytes_spilled * sympy.Rational(CACHE if fits else L1, L1)
    waits = work.depth * LATENCY + FIRST * sum((calls for _, calls in work.calls), _ZERO)
    waves = sympy.ceiling(work.programs / (device.multiprocessors * held))
    # scratch of the programs that run, where the shared cache does not hold it
    inside = sympy.Min(work.programs, device.multiprocessors * held) * work.scratch
    outside = sympy.Piecewise((work.traffic, inside <= device.l2), (work.traffic + work.moved * work.programs, True))
    parts = {
        "products": busiest * seconds + work.outside / product_rate(device, dtype),
        "instruction issue": busiest * issued / (device.issue * clock * ISSUE),
        "cache": busiest * moved / (CACHE * clock),
        "memory": outside / bandwidth,
        "dependent steps": waves * waits / clock,
        "launches": launches,
    }
    return parts, (taken, spilled, shared), held


def estimate(
    works: Sequence[Work],
    device: Device,
    dtype: str,
    warps: int,
    shape: Mapping[str, int],
    facts: Sequence[Facts | None] | None = None,
) -> Estimate:
    """The same in numbers, at sizes of "B", "H" and "N", of kernels that run one after the other."""
    shown = facts or [None] * len(works)
    each = [_of_one(work, device, dtype, warps, shape, one) for work, one in zip(works, shown, strict=True)]
    slowest = max(each, key=lambda one: one.seconds)
    return Estimate(
        sum(one.flops for one in each),
        sum(one.traffic for one in each),
        sum(one.seconds for one in each),
        {part: sum(one.parts[part] for one in each) for part in slowest.parts},
        max(one.registers for one in each),
        max(one.spilled for one in each),
        max((one.shared for one in each if one.shared is not None), default=None),
        slowest.programs,
        slowest.resident,
        slowest.waves,
    )


def _of_one(
    work: Work, device: Device, dtype: str, warps: int, shape: Mapping[str, int], facts: Facts | None
) -> Estimate:
    at = {B: shape["B"], H: shape["H"], N: shape["N"]}
    parts, taken, held = on_device(work, device, dtype, warps, facts)
    numbers = {name: float(sympy.sympify(part).subs(at)) for name, part in parts.items()}
    programs = int(sympy.sympify(work.programs).subs(at))
    return Estimate(
        int(sympy.sympify(work.flops).subs(at)),
        int(sympy.sympify(work.traffic).subs(at)),
        max(numbers.values()),
        numbers,
        *taken,
        programs=programs,
        resident=held,
        waves=-(-programs // (held * device.multiprocessors)) if held else 0,
    )


def over_lengths(
    works: Sequence[Work], device: Device, dtype: str, warps: int, shape: Mapping[str, int]
) -> Callable[[int], float]:
    """N -> the seconds of `estimate`, for many of them."""
    kernels = []
    for work in works:
        parts, _, _ = on_device(work, device, dtype, warps)
        given = [sympy.sympify(part).subs({B: shape["B"], H: shape["H"]}) for part in parts.values()]
        kernels.append(sympy.lambdify(N, given, [{"Spacing": spacing_within, "Ranges": ranges_of}, "math"]))
    return lambda tokens: float(sum(max(each(tokens)) for each in kernels))


def least(works: Sequence[Work], device: Device, dtype: str, shape: Mapping[str, int]) -> float:
    """Seconds of the machine's roofline: the products at the vendor's rate, or the memory at its bandwidth."""
    return sum(_least(work, device, dtype, shape) for work in works)


def _least(work: Work, device: Device, dtype: str, shape: Mapping[str, int]) -> float:
    at = {B: shape["B"], H: shape["H"], N: shape["N"]}
    rate = device.tf32 if dtype == "fp32" else device.bf16
    flops, traffic = (float(sympy.sympify(e).subs(at)) for e in (work.flops, work.traffic))
    return max(flops / rate, traffic / device.bandwidth)
