"""Numbers drawn from the generators beside torch's, by a body and by no other thread.

The generators are the process's. Where their states are as they were, nobody has drawn; where one has changed and
another thread lives, the body runs once more while it is listened to, which takes longer.
"""

from __future__ import annotations

import pickle
import random
import sys
import threading
from contextlib import ExitStack
from types import FrameType
from typing import Any

_OF_RANDOM = random.random.__self__  # type: ignore[attr-defined]  # whose methods the functions of `random` are


class Generators:
    """The generators beside torch's while a body runs, by what draws from them: which of them have been drawn from."""

    certain: bool  # whether that was the body

    def __init__(self) -> None:
        self.certain, self._states = _is_alone(), _states()

    def __enter__(self) -> Generators:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def drawn(self) -> list[str]:
        """Those that have been drawn from, by any thread."""
        self.certain &= _is_alone()
        return [name for name, state in _states().items() if self._states.get(name, state) != state]


class Heard(Generators):
    """What this thread alone draws.

    Python tells a thread's own profile function of calls. It is told of none of numpy's, but other threads wait for
    numpy's lock as long as this one holds it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.certain, self._heard, self._held, self._profiler = True, False, ExitStack(), sys.getprofile()

    def __enter__(self) -> Generators:
        lock = _lock_of_numpy()
        if lock is not None:
            self._held.enter_context(lock)
        self._states = {name: state for name, state in _states().items() if name != "random" and lock is not None}
        if self._profiler is None or callable(self._profiler):  # cProfile's could not be put back
            sys.setprofile(self._hear)
            self._held.callback(sys.setprofile, self._profiler)
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    @property
    def drawn(self) -> list[str]:
        now = _states()
        heard = ["random"] if self._heard else []
        return heard + [name for name, state in self._states.items() if now[name] != state]

    def _hear(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call":  # random() and getrandbits(), from which all others draw, and what sets the state
            own = getattr(function, "__self__", None) is _OF_RANDOM
            self._heard |= own and function.__name__ != "getstate"
        elif event == "call" and frame.f_code is random.Random.gauss.__code__:  # which keeps every second number
            self._heard |= frame.f_locals["self"] is _OF_RANDOM


def _lock_of_numpy() -> Any:
    """The lock that draws of numpy's functions wait for, if a thread that holds it may draw."""
    generator = getattr(sys.modules.get("numpy.random"), "get_bit_generator", None)
    lock = None if generator is None else generator().lock
    return lock if isinstance(lock, type(threading.RLock())) else None


def _states() -> dict[str, Any]:
    """The states, by what draws from them."""
    found: dict[str, Any] = {"random": random.getstate()}
    if "numpy.random" in sys.modules:
        found["numpy.random"] = pickle.dumps(sys.modules["numpy.random"].get_state(legacy=False))
    return found


def _is_alone() -> bool:
    """Whether no thread of Python's runs but this one, and the main one, which waits for it."""
    return {*threading.enumerate()} <= {threading.current_thread(), threading.main_thread()}
