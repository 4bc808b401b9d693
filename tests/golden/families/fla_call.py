"""A function of flash-linear-attention as a loop, and one call of it with a file's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import nestloop as nl
from nestloop.lang.init import fill
from tests.golden.case import Case, NotUnderstood, Quantities, Run
from tests.golden.families.layer import leaves, take_gradients

Tensors = dict[str, Tensor]
# The names under which a file may hold the state to start from and the one at the end.
START = ("S0", "initial_state", "h0", "M0")
END = ("S", "final_state", "ht", "h", "M")


@dataclass(frozen=True)
class Function:
    """A function of fla as a loop.

    loop: the declaration, or what makes it from the case and its views.
    views: the function's arguments, by name, as the loop's views and gates.
    weights: arguments that are slow weights [H, *].
    states: fast weight -> names of its value at the start and at the end.
    scaled: whether q may be scaled by something else than dk^-0.5.
    prepare: the views changed before they are passed, [B, H, T, *].
    """

    loop: Any
    views: Mapping[str, str]
    weights: Mapping[str, str] = field(default_factory=dict)
    states: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=lambda: {"w": (START, END)})
    head_first: bool = False
    scaled: bool = True
    prepare: Callable[[Case, Tensors], Tensors] = lambda case, views: views


class Call:
    """A file's tensors in the places of a function's arguments.

    views: by the loop's names, [B, H, T, *].
    given: every input of the file, a leaf.
    """

    def __init__(self, case: Case, how: Run, function: Function) -> None:
        self.case, self.how, self.function = case, how, function
        self.given = {name: leaves(tensor, how) for name, tensor in case.inputs("in").items()}
        noted = "head-first" in str(case.settings.get("note", "")).lower()
        self.head_first = bool(case.settings.get("head_first", noted or function.head_first))
        views = {view: self._heads(self.given[n]) for n, view in function.views.items() if n in self.given}
        self.views = self._rescaled(function.prepare(case, views))
        self.loop = function.loop(case, self.views)

    def _heads(self, tensor: Tensor) -> Tensor:
        """[B, T, H, *] <-> [B, H, T, *]."""
        return tensor if self.head_first else tensor.transpose(1, 2)

    def _rescaled(self, views: Tensors) -> Tensors:
        """q, so that the loop's dk^-0.5 makes it the scale of the file."""
        scale = self.case.settings.get("scale")
        if scale in (None, "None") or not self.function.scaled:
            return views
        return {**views, "q": views["q"] * (float(scale) * views["q"].shape[-1] ** 0.5)}

    def weights(self, loop: Any) -> Tensors:
        """Slow weights: those that are arguments, and those that are not learned, at their initial values."""
        v = self.views["v"]
        given = {slow: self.given[n].reshape(v.shape[1], -1) for n, slow in self.function.weights.items()}
        fixed = {name: slow for name, slow in loop.spec.slow.items() if not slow.learned}
        return given | {name: fill(v.new_empty(v.shape[1]), slow.init, True) for name, slow in fixed.items()}

    def _shapes(self, loop: Any) -> dict[str, list[int]]:
        """The state of every fast weight, [B, H, *]."""
        k, v = self.views["k"], self.views["v"]
        sizes = {"dk": k.shape[-1], "dv": v.shape[-1], "d": v.shape[-1]}
        return {n: [*v.shape[:2], *[e.size(sizes) for e in fast.dims]] for n, fast in loop.spec.fast.items()}

    def _places(self, loop: Any, moment: int, names: Iterable[str]) -> dict[str, str]:
        """Which of the file's tensors is which fast weight's state: by its name, else by its shape alone."""
        free, shapes, prefix = set(names), self._shapes(loop), "" if moment else "in."
        found = {w: n for w, known in self.function.states.items() for n in known[moment] if n in free}
        for weight, shape in shapes.items():
            left = [n for n in sorted(free - set(found.values())) if _alike(self.case.tensors[prefix + n], shape)]
            if weight not in found and len(left) == 1:
                found[weight] = left[0]
        return found

    def quantities(self, loop: Any) -> Quantities:
        """Outputs, states at the end, and the gradients of everything given."""
        case, shapes, heads = self.case, self._shapes(loop), self.views["v"].shape[1]
        placed = {*self.function.views, *self.function.weights}
        starts = self._places(loop, 0, set(self.given) - placed)
        unknown = sorted(set(self.given) - placed - set(starts.values()))
        if unknown:
            raise NotUnderstood(f"no place for the input {', '.join(unknown)} of {case.setting('func')}")
        given = {w: _for_heads(self.given[name], heads).reshape(shapes[w]) for w, name in starts.items()}
        state = self._state(loop, given) if given else None
        views = {name: self.views[name] for name in loop.spec.inputs}
        z, end = nl.compile(loop, backend=self.how.backend)(views, self.weights(loop), state)
        (output,) = [name for name in ("o", "out") if name in case.tensors] or ["o"]
        tokens = self._heads(case.tensors[output]).shape[2]
        found: Tensors = {output: self._heads(z[:, :, :tokens])}
        aside = ("in.", "cot.", "grad.", "f64.")
        others = {name for name in case.tensors if not name.startswith(aside)} - {output}
        for weight, name in self._places(loop, 1, others).items():
            recorded = case.tensors[name]
            group = heads // recorded.shape[1]  # heads that share a key head carry the same state
            found[name] = end[weight][:, ::group].reshape(recorded.shape)
        cotangents = case.inputs("cot")
        if set(cotangents) - set(found):
            raise NotUnderstood(f"no output {', '.join(sorted(set(cotangents) - set(found)))}")
        total = torch.stack([(found[name] * cot.to(self.how.dtype)).sum() for name, cot in cotangents.items()]).sum()
        return {**found, **take_gradients(total, self.given)}

    def _state(self, loop: Any, given: Tensors) -> dict[str, Any]:
        """A whole state at position 0 from the fast weights it starts with; those not given start at zero."""
        state: dict[str, Any] = {"position": 0}
        for name, shape in self._shapes(loop).items():
            zero = self.views["v"].new_zeros(shape)
            weight = given.get(name, zero)
            parts = {"anchor": weight, "update": zero, "momentum": zero}
            state |= {name: weight, **{f"{name}.{part}": value for part, value in parts.items()}}
        kept = {*loop.spec.entries, "position"}
        return {name: value for name, value in state.items() if name in kept}


def _alike(tensor: Tensor, shape: list[int]) -> bool:
    """Whether a tensor has the axes of a state, axes of one aside."""
    return [n for n in tensor.shape if n > 1] == [n for n in shape if n > 1]


def _for_heads(state: Tensor, heads: int) -> Tensor:
    """A state of the key heads, for each value head that shares one."""
    return state.repeat_interleave(heads // state.shape[1], 1)
