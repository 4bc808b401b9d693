"""The kernels of a loop of batches whose tokens are shared out in ranges, where heads and sequences are few.

A kernel over ranges runs a program for each range of tokens of a head and sequence, which sums up in memory of its own.
A kernel over heads and sequences adds these sums up, in the order of the ranges, and takes the step: no result depends
on who is first. The parts of a step are those of the one kernel that walks them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nestloop.lowering.emit.triton import TritonFunction
from nestloop.lowering.emit.triton_kernels import aligned, indented, zeros
from nestloop.lowering.emit.triton_steps import Share, TritonSteps
from nestloop.lowering.emit.triton_tiles import BARRIER
from nestloop.lowering.runtime.triton_plan import Handed, Launch

RANGE = Share("start", "stop", "(item * ranges + part)")
FIRST = Share("0", "0", "(item * ranges)")  # what a head and sequence adds to the sums of its first range


@dataclass(frozen=True)
class Kernel:
    """One of the kernels of a direction.

    Attributes:
        name: it begins with the direction.
        doc: a sentence on what it does.
        lines: writes its body.
        calls: ends of the names of the pieces' functions that it calls.
        over: what has a program of its own (`Launch`).
        each_step: whether it runs in every step (`Launch`).
    """

    name: str
    doc: str
    lines: Callable[[], list[str]]
    calls: tuple[str, ...] = ()
    over: str = "sequences"
    each_step: bool = False

    @property
    def which(self) -> str:
        return self.name.partition("_")[0]


class TritonRanges(TritonSteps):
    """Writes the kernels over ranges, and those between them, of one lowered loop."""

    @property
    def rows(self) -> int:
        """Tokens of the tallest tile: a range begins where such a tile does, whatever tiles a piece takes."""
        return max(f.longest for f in self.functions.values())

    def range_kernels(self, which: str) -> list[Kernel]:
        """Those of a direction, in their order."""
        return self._forward_kernels() if which == "forward" else self._backward_kernels()

    def write_kernel(self, kernel: Kernel) -> str:
        """The source of a kernel."""
        self.used = set()
        handed = ["items_handed", "sums_handed"]
        step = ["step"] if kernel.each_step else []
        given = [*self.arguments(kernel.which, handed), "ranges", *step]
        in_range = kernel.over == "ranges"
        lines = [*self._memory(kernel.which, in_range), *(self.order if in_range else []), *kernel.lines()]
        room, parts = str(self._works_in(kernel)), "ranges" if in_range else ""
        return self.frame(kernel.name, kernel.doc, given, room, lines, parts, step, self.chooses(kernel.which))

    def launch(self, kernel: Kernel) -> Launch:
        warps = self.warps_of(self.called(kernel))
        return Launch(kernel.name, kernel.over, warps, self._works_in(kernel), each_step=kernel.each_step)

    def called(self, kernel: Kernel) -> list[TritonFunction]:
        """The functions that a kernel may call."""
        return [f for f in self.functions.values() if kernel.calls and f.name.endswith(kernel.calls)]

    # ---- Memory ----------------------------------------------------------------------------------------------------

    def handed(self, which: str) -> tuple[Handed, ...]:
        """What the kernels of a direction leave for one another."""
        of_item = self.parts([], self.kept(which))[1]
        own = Handed("items_handed", "sequences", of_item), Handed("sums_handed", "ranges", self._apart)
        pulled = self.pulled_handed("sequences") if which == "backward" else ()
        return (*self.rows_handed(), *pulled, *own)

    @property
    def _apart(self) -> int:
        """Elements of a range's sums: of gradients, or of cotangents of the state, and behind them of a loss."""
        return aligned(self.state + self.losses)

    def _works_in(self, kernel: Kernel) -> int:
        """Elements that a program works in."""
        return aligned(self.working(self.called(kernel)))

    def _memory(self, which: str, in_range: bool) -> list[str]:
        """Lines that find what a head and sequence keeps, and the sums of its ranges or of one."""
        places, size = self.parts([], self.kept(which))
        found = {name: f"items_handed + item * {size} + {at}" for name, at in places.items()}
        if in_range:
            found["sums"] = f"sums_handed + (item * ranges + part) * {self._apart}"
        else:
            found["partial"] = f"sums_handed + item * ranges * {self._apart}"
        pulled = self.at_pulled("item") if which == "backward" else []
        return [*[f"{name} = {at}" for name, at in found.items()], *pulled]

    # ---- Sums of ranges --------------------------------------------------------------------------------------------

    def _narrowed(self) -> list[str]:
        """Lines that narrow tokens down to those of the range: tiles are shared out evenly."""

        def tile(index: str) -> str:
            return f"{self.rows} * ({index} * each + tl.minimum({index}, more)).to(tl.int32)"

        return [
            f"many = (stop - start + {self.rows - 1}) // {self.rows}",
            "each, more = many // ranges, many % ranges",
            f"stop = tl.minimum(stop, start + {tile('(part + 1)')})",
            f"start += {tile('part')}",
        ]

    @property
    def _in_registers(self) -> list[str]:
        """Fast weights whose gradient some function returns."""
        functions = [self.functions[f"{v}gradient"] for v in self.variants]
        return [n for n in self.fast if any(f"gradient_{n}" not in f.rows for f in functions)]

    def _range_gradient(self, states: Mapping[str, str]) -> list[str]:
        """Lines that sum a step's gradient and loss over a range, and leave them in its memory."""
        sums = self.held("sums")
        lines = [*self._narrowed(), *self.gradient(states)]
        lines += [self.store(f"gradient_{n}", sums[n], f"gradient_{n}") for n in self._in_registers]
        return [*lines, *self._range_loss("loss_sum")]

    def _range_loss(self, total: str) -> list[str]:
        return [f"tl.store(sums + {self.state}, {total})"] if self.losses else []

    def _total(self, places: Mapping[str, str], added: bool) -> list[str]:
        """Lines that add up what ranges have summed of each fast weight, in their order; `added`: to what is there."""
        parts, at = ("ranges", self._apart), self.held("partial")
        lines = [line for n in self.fast for line in self.fill(n, at[n], places[n], added=added, parts=parts)]
        return [*lines, BARRIER]

    def _total_gradient(self) -> list[str]:
        """The same of a step's gradient, which an update takes in registers where they hold it."""
        sums = self.held("sums")
        return [*self._total(sums, False), *[self.load(f"gradient_{n}", sums[n]) for n in self._in_registers]]

    def _total_loss(self, total: str, index: str, count: str) -> list[str]:
        """Lines that write a loss."""
        if not self.losses:
            return []
        return [
            f"{total} = {zeros([])}",
            "for one in tl.range(0, ranges):",
            f"    {total} += tl.load(partial + one * {self._apart} + {self.state})",
            self.loss(index, total, count),
        ]

    # ---- Forward ---------------------------------------------------------------------------------------------------

    def _forward_kernels(self) -> list[Kernel]:
        step = [*self.numbers, *self.turns("forward")]

        def gradient() -> list[str]:
            return [*step, *self._range_gradient(self.found("now"))]

        def update() -> list[str]:
            loss = self._total_loss("loss_sum", "step", "stop - start")
            return [*step, *loss, *self._total_gradient(), *self.update()]

        def read_out() -> list[str]:
            lines = ["start, stop = 0, N", *self._narrowed(), *self.turn("forward"), *self.read_out(RANGE)]
            return [*lines, *self._range_loss("loss_after")]

        def end() -> list[str]:
            return self._total_loss("loss_after", "steps", "N")

        summed, read = ("gradient",), ("readout", "final_loss")
        kernels = [
            Kernel("forward_start", "The state before the first step.", self.start),
            Kernel("forward_gradient", "What a step descends: a range's sum.", gradient, summed, "ranges", True),
            Kernel("forward_update", "A step, and the state after it.", update, ("update",), each_step=True),
            Kernel("forward_readout", "z of a range of tokens.", read_out, read, "ranges"),
        ]
        return [*kernels, *([Kernel("forward_end", "The loss after the last step.", end)] if self.losses else [])]

    # ---- Backward --------------------------------------------------------------------------------------------------

    def _backward_kernels(self) -> list[Kernel]:
        step = ["back = steps - 1 - step", *self.numbers, *self.turns("backward"), *self.recall()]

        def cleared() -> list[str]:
            return [*self.clear_all(self.fast, self.held("sums")), BARRIER]

        def read_out() -> list[str]:
            first = ["if part == 0:", *indented(self.given_cotangents())]
            lines = [*first, "start, stop = 0, N", *self._narrowed(), *self.clear_shared(RANGE), *cleared()]
            return [*lines, *self.pull_read_out(RANGE, self.held("sums"))]

        def recall() -> list[str]:
            return [*step, *self._total(self.found("d_now"), True)]

        def sums() -> list[str]:
            return [*step, *self._range_gradient(self.found("state"))]

        def update() -> list[str]:
            return [*([*step, *self._total_gradient()] if self.sums_again else recall()), *self.pull_update(FIRST)]

        def gradient() -> list[str]:
            return [*step, *self.d_loss, *self._narrowed(), *cleared(), *self.pull_gradient(RANGE, self.held("sums"))]

        def end() -> list[str]:
            return [*self.turn("backward"), *self._total(self.found("d_now"), True), *self.give_back()]

        doc = "Cotangents of a range of tokens, and of what it was read out with."
        read = ("readout_vjp", "final_loss_vjp")
        kernels = [Kernel("backward_readout", doc, read_out, read, "ranges")]
        if self.sums_again:
            doc = "The cotangent of the state after a step, and the state before it."
            kernels.append(Kernel("backward_recall", doc, recall, each_step=True))
            doc = "What a step descends: a range's sum, again."
            kernels.append(Kernel("backward_sums", doc, sums, ("gradient",), "ranges", True))
        doc = "From the cotangent of the state after a step to those of the state before and of the gradient."
        kernels.append(Kernel("backward_update", doc, update, ("update_vjp",), each_step=True))
        doc = "Cotangents of a range of a step's tokens, and of what its gradient was computed with."
        kernels.append(Kernel("backward_gradient", doc, gradient, ("gradient_vjp",), "ranges", True))
        return [*kernels, Kernel("backward_end", "Cotangents of the fast weights that forward took.", end)]
