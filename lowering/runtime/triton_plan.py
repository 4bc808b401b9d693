"""What is kept of generated Triton; nothing here imports Triton."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from nestloop.lowering.runtime.batches import ranges_within

AHEAD = "num_stages=2"  # of a loop: what products take in a turn is read while the one before computes
MOST_WARPS = 8  # that a multiprocessor runs at once, each thread with all registers that it may have
WORTH = 4  # tiles, of the tallest, that a range has at least: with fewer, launches take what ranges save
# Where `ranges_of` gives more than one, as texts say it of chunks.
FEW = f"at most half as many heads and sequences as multiprocessors, and more than {2 * WORTH - 1} chunks"


def ranges_of(items: int, tokens: int, rows: int, programs: int) -> int:
    """Ranges of a step's tokens that have a program each; 1 where one program walks all steps.

    Args:
        items: heads times sequences.
        tokens: of the longest step.
        rows: of a tile, at most.
        programs: that the device runs at once, each on a multiprocessor of its own.
    """
    return ranges_within(items, -(-tokens // rows) // WORTH, programs)


def programs_of(launch: Launch, items: int, multiprocessors: int, cache: int) -> int:
    """Programs of a launch that walk heads and sequences, or parts of them: one for each, or as many as run at once,
    twice, where the memory that all work in is more than the cache that multiprocessors share.

    Args:
        items: how many there are to walk.
        multiprocessors, cache: of the device: how many, and bytes.
    """
    if not launch.walks or 4 * items * launch.scratch <= cache:
        return items
    return min(items, multiprocessors * 2 * max(1, MOST_WARPS // launch.warps))


@dataclass(frozen=True)
class Tiling:
    """What may be chosen of a loop's Triton; what is not given, the compiler chooses.

    Attributes:
        rows: tokens of a chunk, where any number is legal, or of every tile of a loop of batches.
        warps: warps of a program of every kernel, forward and backward.
        levels: of a scan: 1, all of a head and sequence in one program; 2, only its state.
    """

    rows: int | None = None
    warps: tuple[int, int] | None = None
    levels: int | None = None


UNTUNED = Tiling()


@dataclass(frozen=True)
class Launch:
    """A kernel, run after those before it in its direction.

    Attributes:
        kernel: its name, which begins with "forward" or "backward".
        over: what has a program of its own, of every head and sequence: "sequences" (all of it), "heads" (the same of
            what sequences share), "chunks" (each chunk), "groups" (the chunks from one state that is kept for backward
            to the next), "ranges" (of tokens).
        warps: of a program.
        scratch: elements of memory that a program works in.
        states: elements more for each chunk from one state that is kept to the next.
        each_step: whether it runs once for every step of a loop of batches, in turn with its neighbours that do.
        strips: programs that share each of these, with a block of an axis of the state each.
        walks: whether a program takes one of those that it is over after the other, where there are fewer programs.
    """

    kernel: str
    over: str
    warps: int
    scratch: int
    states: int = 0
    each_step: bool = False
    strips: int = 1
    walks: bool = False


@dataclass(frozen=True)
class Handed:
    """Memory in which a kernel leaves what one after it reads.

    Attributes:
        name: of the kernels' argument, which ends with "_handed".
        over: what has elements of its own, of every head and sequence: as of a `Launch`, or "boundaries" (before each
            chunk, and after the last), or "tokens"; or "programs", which is each that runs.
        elements: of each.
        low: whether it holds factors of products alone, and so the dtype that they are rounded to.
    """

    name: str
    over: str
    elements: int
    low: bool = False


@dataclass(frozen=True)
class InRanges:
    """How a loop of batches runs where its tokens are shared out in ranges: fields as of a `TritonPlan`."""

    forward_launches: tuple[Launch, ...]
    backward_launches: tuple[Launch, ...]
    forward_handed: tuple[Handed, ...]
    backward_handed: tuple[Handed, ...]


@dataclass(frozen=True)
class TritonPlan:
    """Generated Triton and how it is called.

    Attributes:
        text: the module, with all `kernels`.
        forward, backward: names of the tensors that all kernels of a direction take, in order.
        gradients: names of the inputs that `backward` gives a cotangent of, in order; the others' are zero.
        rounded: those of them that are tokens' and whole when they are written, to which nothing is added: they are
            written in their tokens' dtype.
        rows: tokens of a chunk of a scan, or of a tile; of one piece, the most that it takes.
        state: elements of the state between two chunks.
        wide: names of the tensors whose rows are a multiple of 16 elements long.
        forward_launches, backward_launches: the kernels, in order.
        forward_handed, backward_handed: what they leave for one another.
        ranges: of a loop of batches, what it runs in place of them where heads and sequences are few.
        decided: of a loop of batches, whether it is one of two forms: kernels of "forward" do nothing where `chosen`
            is 0.
        sums: of a loop of batches, what sequences share -> where its cotangent begins among those of a program, which
            are `apart` elements in all.
        computed: what kernels call inputs that they take in the compute dtype.
        common: of a loop of batches, names of what all steps share, which the PyTorch module makes.
        tiles: sizes of what a kernel makes for a head, where those are its own.
        work: what its kernels do, for the cost model (`emit.triton_work.work`).
        prepare: of a loop of batches, what makes of slow weights alone what all steps share, and its backward; None
            where the PyTorch module does.
        decoders: the rows whose correlations decide between two forms; None where there is one, or PyTorch makes them.
        at_once: of a scan in one program a head and sequence, the same with only the state in order, for where these
            are few: with the same chunks, it keeps the same states for backward.
    """

    text: str
    forward: tuple[str, ...]
    backward: tuple[str, ...]
    gradients: tuple[str, ...]
    rounded: tuple[str, ...]
    rows: int
    state: int
    wide: tuple[str, ...]
    forward_launches: tuple[Launch, ...]
    backward_launches: tuple[Launch, ...]
    forward_handed: tuple[Handed, ...] = ()
    backward_handed: tuple[Handed, ...] = ()
    ranges: InRanges | None = None
    decided: bool = False
    sums: dict[str, int] = field(default_factory=dict)
    apart: int = 0
    computed: tuple[str, ...] = ()
    common: tuple[str, ...] = ()
    tiles: dict[str, tuple[int, ...]] = field(default_factory=dict)
    work: dict[str, Any] = field(default_factory=dict)
    prepare: TritonPlan | None = None
    decoders: TritonPlan | None = None
    at_once: TritonPlan | None = None

    def for_call(self, items: int, tokens: int, programs: int) -> TritonPlan:
        """What a call of a scan runs: `at_once` where `ranges_of` would share its tokens out in ranges.

        Args:
            items, tokens, programs: as of `ranges_of`.
        """
        few = self.at_once is not None and ranges_of(items, tokens, self.rows, programs) > 1
        return self.at_once if few and self.at_once is not None else self

    @property
    def forms(self) -> tuple[TritonPlan, ...]:
        """The plan, and `at_once` where there is one: a call runs either."""
        return (self,) if self.at_once is None else (self, self.at_once)

    def launches(self, direction: str) -> tuple[Launch, ...]:
        """The kernels of "forward" or "backward"."""
        return self.forward_launches if direction == "forward" else self.backward_launches

    def handed(self, direction: str) -> tuple[Handed, ...]:
        """What the kernels of "forward" or "backward" leave for one another."""
        return self.forward_handed if direction == "forward" else self.backward_handed

    def turns(self, direction: str, steps: int) -> Iterator[tuple[Launch, int]]:
        """The kernels of "forward" or "backward" with the step that each runs in, of so many."""
        if not any(launch.each_step for launch in self.launches(direction)):
            yield from ((launch, 0) for launch in self.launches(direction))
            return
        order = range(steps) if direction == "forward" else range(steps - 1, -1, -1)
        for each_step, group in groupby(self.launches(direction), lambda launch: launch.each_step):
            kernels = list(group)
            yield from ((launch, step) for step in (order if each_step else (0,)) for launch in kernels)

    def in_ranges(self) -> TritonPlan:
        """The plan with its tokens shared out in ranges."""
        assert self.ranges is not None
        return replace(self, **{one.name: getattr(self.ranges, one.name) for one in fields(self.ranges)}, ranges=None)

    @property
    def modules(self) -> tuple[TritonPlan, ...]:
        """Every module of which a call runs kernels: what is made of slow weights alone, first, and its own."""
        return (*[one for one in (self.decoders, self.prepare) if one is not None], *self.forms)

    @property
    def all_launches(self) -> tuple[Launch, ...]:
        """Of every kernel, those over ranges last."""
        others = () if self.ranges is None else self.in_ranges().all_launches
        return (*self.forward_launches, *self.backward_launches, *others)

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names of all kernels, in order."""
        return tuple(launch.kernel for launch in self.all_launches)

    def with_warps(self, warps: Sequence[int]) -> TritonPlan:
        """The same with so many warps a program, forward and backward."""
        made: Any = {"ranges": None if self.ranges is None else replace(self.ranges, **_warped(self.ranges, warps))}
        made["at_once"] = None if self.at_once is None else self.at_once.with_warps(warps)
        return replace(self, **_warped(self, warps), **made)

    @property
    def low(self) -> list[str]:
        """The kernels' arguments that are in the dtype of the tokens, views aside."""
        handed = [*self.forward_handed, *self.backward_handed]
        handed += [] if self.ranges is None else [*self.ranges.forward_handed, *self.ranges.backward_handed]
        made = [f"{n}_made" for n in ("z", *self.rounded)]
        return ["d_z_p", *[f"{n}_p" for n in self.rounded], *made, *[one.name for one in handed if one.low]]

    @cached_property
    def _warps(self) -> dict[str, int]:
        """Of each kernel; every launch asks."""
        return {one.kernel: one.warps for one in self.all_launches}

    def text_for(self, nvidia: bool) -> str:
        """The module as a vendor's compiler takes it: AMD's fails on some loops over blocks and tokens that read ahead
        ("unrealized_conversion_cast", in Triton 3.7), so there none of these does."""
        return self.text if nvidia else re.sub(rf"(for (?:block|first) in .*?), {AHEAD}", r"\1", self.text)

    def options(self, kernel: str, nvidia: bool = True) -> dict[str, Any]:
        """How a kernel is compiled.

        A bound on registers is given to NVIDIA's assembler because without one it may, for large kernels, take 32.
        """
        warps = self._warps[kernel]
        bound = {"maxnreg": min(255, 65_536 // (32 * warps))} if nvidia else {}
        return {"num_warps": warps, "num_stages": 1, **bound}


def _warped(plan: TritonPlan | InRanges, warps: Sequence[int]) -> dict[str, Any]:
    """The launches of a plan with so many warps, by the names of its fields."""
    pairs = zip(("forward_launches", "backward_launches"), warps, strict=True)
    return {name: tuple(replace(launch, warps=count) for launch in getattr(plan, name)) for name, count in pairs}
