"""What an interpreted kernel may touch, and in which order: what a GPU would not say.

The interpreter runs a program as one thread, and programs one after the other. On a GPU the threads of a program run
apart from one barrier to the next, and programs in any order: what is read or written where another writes, with no
barrier between, is a number that changes from run to run.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FrameType

import numpy as np
from torch import Tensor


class Reach:
    """The memory that a kernel may touch: every element of the tensors that it is given, and nothing between them.

    Args:
        kernel: its name.
        tensors: by the names of its arguments, on the CPU, in any layout.
    """

    def __init__(self, kernel: str, tensors: dict[str, Tensor]) -> None:
        self.kernel, self.tensors = kernel, tensors
        first, last = zip(*map(_pieces, tensors.values()), strict=True) if tensors else ([], [])
        starts, ends = np.concatenate([[0], *first]), np.concatenate([[0], *last])
        order = np.argsort(starts, kind="stable")
        # Tensors may overlap: a piece ends where it or any before it ends the latest, and what begins there is apart.
        starts, ends = starts[order], np.maximum.accumulate(ends[order])
        apart = np.concatenate([[True], starts[1:] >= ends[:-1]])
        self.starts, self.ends = starts[apart], ends[np.concatenate([apart[1:], [True]])]

    def found(self, verb: str, addresses: np.ndarray, mask: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The addresses where the mask is set, and the piece in which each lies.

        Raises IndexError unless all elements there, of `size` bytes, lie in the tensors.
        """
        wanted = addresses[mask.astype(np.bool_)].astype(np.int64)  # a mask of one number comes as int32
        piece = np.searchsorted(self.starts, wanted, side="right") - 1
        beyond = wanted + size > self.ends[piece]
        if beyond.any():
            first = int(wanted[beyond][0])
            near = self.near(first)
            raise IndexError(
                f"{self.kernel} {verb} {beyond.sum()} of {beyond.size} elements that are in none of its tensors, "
                f"the first {first - self.tensors[near].data_ptr()} bytes from the start of {near}"
            )
        return wanted, piece

    def near(self, address: int) -> str:
        """The tensor that begins the nearest."""
        return min(self.tensors, key=lambda name: abs(address - self.tensors[name].data_ptr()))


def _pieces(tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Where the pieces of a tensor that lie densely start, in bytes, and where they end."""
    if not tensor.numel():
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    size, dense = tensor.element_size(), 1
    axes = sorted((stride, count) for stride, count in zip(tensor.stride(), tensor.shape, strict=True) if count > 1)
    starts = np.array([tensor.data_ptr()], np.int64)
    for stride, count in axes:
        if stride <= dense:
            dense = max(dense, stride * (count - 1) + dense)
        else:
            starts = (starts[:, None] + np.arange(count, dtype=np.int64) * stride * size).reshape(-1)
    return starts, starts + dense * size


@dataclass(frozen=True)
class Touch:
    """A statement that reads or writes.

    Attributes:
        verb: "reads" or "writes".
        line: of the generated file.
        text: that line.
    """

    verb: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line} {self.verb} (`{self.text}`)"


class Races:
    """Who touched each element last, to find where another thread or another program may come earlier or later.

    A statement that reads a tile and writes it back has no race with itself: a thread stores what it has loaded.
    Nothing else is taken for granted, the same tile in two statements neither: where it has fewer elements than a
    program has threads, several load each and the compiler chooses who stores it.

    Args:
        reach: the memory that the kernel may touch.
    """

    def __init__(self, reach: Reach) -> None:
        self.reach = reach
        self.grain = min((t.element_size() for t in reach.tensors.values()), default=1)  # bytes of the smallest element
        counts = -(-(reach.ends - reach.starts) // self.grain)
        self.before = np.cumsum(counts) - counts  # elements of the pieces before each
        self.wrote, self.read, self.first_read = (np.zeros(counts.sum(), np.int64) for _ in range(3))
        self.touches: list[Touch | None] = [None]  # 0: nobody
        self.program = self.waited = 1
        self.since: dict[int, np.ndarray] = {}  # the tile of each touch since threads have waited
        self.ahead: list[int] = []  # of loops that read ahead, where each began, and its turn
        self.turn: list[int] = []

    def begin(self) -> None:
        """Another program begins."""
        self.wait()
        self.program = self.waited

    def wait(self) -> None:
        """The program's threads wait for one another."""
        self.waited = len(self.touches)
        self.since.clear()

    def turns(self, numbers: Iterable[int]) -> Iterator[int]:
        """A loop's turns, where each may read before those ahead of it have written, whatever barriers they have."""
        self.ahead.append(len(self.touches))
        for number in numbers:
            self.turn.append(len(self.touches))
            yield number
            self.turn.pop()
        self.ahead.pop()

    def touch(self, verb: str, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        """Note what the statement that runs "reads" or "writes", elements of `size` bytes.

        Raises IndexError as of `Reach`, RuntimeError where a thread might come before another that touches the same.
        """
        wanted, piece = self.reach.found(verb, addresses, mask, size)
        if not wanted.size:
            return
        places = self.before[piece] + (wanted - self.reach.starts[piece]) // self.grain
        touch, number, where = Touch(verb, *_statement()), len(self.touches), int(wanted[0])
        if verb == "writes" and np.unique(places).size < places.size:
            raise self._refused(touch, "several elements to one place ", where)
        self._check(touch, where, places, self.wrote[places], self.wrote[places])
        if verb == "writes":
            self._check(touch, where, places, self.read[places], self.first_read[places])
            self.wrote[places] = number
        else:
            self._check_ahead(touch, where, self.wrote[places])
            self.read[places] = number
            self.first_read[places] = np.where(self.first_read[places] == 0, number, self.first_read[places])
        self.touches.append(touch)
        self.since[number] = places

    def _check(self, touch: Touch, where: int, places: np.ndarray, last: np.ndarray, first: np.ndarray) -> None:
        """Raise where something was touched since threads have waited (last), or by another program (first)."""
        for number in np.unique(last[last >= self.waited]):
            other = self.touches[number]
            assert other is not None
            back = other.verb == "reads" and other.line == touch.line and np.array_equal(self.since[number], places)
            if not back:
                raise self._refused(touch, "", where, f" what {other}, and no barrier is between")
        elsewhere = first[(first > 0) & (first < self.program)]
        if elsewhere.size:
            other = self.touches[elsewhere[0]]
            raise self._refused(touch, "", where, f" what {other} in another program, which may come later")

    def _check_ahead(self, touch: Touch, where: int, wrote: np.ndarray) -> None:
        """Raise where an earlier turn of a loop that reads ahead wrote something."""
        for begin, turn in zip(self.ahead, self.turn, strict=True):
            early = wrote[(wrote >= begin) & (wrote < turn)]
            if early.size:
                other = self.touches[early[0]]
                raise self._refused(touch, "", where, f" what {other} in a turn before, and turns read ahead")

    def _refused(self, touch: Touch, how: str, where: int, why: str = "") -> RuntimeError:
        """`where`: an address that is touched."""
        return RuntimeError(f"{self.reach.kernel}: {touch} {how}in {self.reach.near(where)}{why}")


def _statement() -> tuple[int, str]:
    """The line of the kernel that runs, and its text."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals["__name__"].startswith(("triton.", "nestloop.lowering.runtime.")):
        frame = frame.f_back
    if frame is None:
        return 0, ""
    return frame.f_lineno, linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
