"""Declared names that generated code has another use for: the compiler works under names of its own there.

A loop may well call a slow weight `weight` or a view `d_k`. Its bodies go on reading them by these names.
"""

from __future__ import annotations

import builtins
import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from keyword import iskeyword
from typing import Any

from nestloop.lang.loop import LoopSpec
from nestloop.lowering.runtime import tiles

# What generated code calls modules, pieces, what a piece takes and returns, and its own variables.
_WORDS = frozenset(
    """torch F aten math schedule forward backward prepare project gradient update readout final_loss fit common chunk
partial advance read learning_rate weight rate z loss losses loss_sum loss_after dtype device n i state
order inf nan NoneType pytree fx_pytree""".split()  # noqa: SIM905
)
_TAKEN = _WORDS | set(dir(builtins)) | set(vars(tiles))
# What it derives from a name (the cotangent d_w of w), or numbers (the value sum_1).
_DERIVED = re.compile(
    r"^_|^(c|d|y|first|gradient|between|end|hoisted|projected|gram)_|_(i|new|tile|vjp|once|all|\d+)$|_$|__", re.ASCII
)


# The same of generated Triton: modules, constants, the variables of its kernels, and arguments made of a name.
_TRITON_WORDS = frozenset(
    """tl triton tiles S PRODUCT H B N row again scratch memory head sequence item states cotangents now then d_now
d_then sums pulled first last turn back index own every groups chunks step start stop steps bounds weights rates
order_at chosen total after sum part parts program partial
ranges one many each more block strip low_pulled""".split()  # noqa: SIM905
)
_TRITON_DERIVED = re.compile(
    r"^i\d+$|^(in|now|then|state)_|_(p|h|b|n|at|made|handed)$"
    r"|^(c|d|first|gradient|between|end|in|now|then|state)$",  # the stride d_b of d is the cotangent of b
    re.ASCII,
)


def safe(spec: LoopSpec, triton: bool = False) -> LoopSpec:
    """The same loop with other names for what generated code (with `triton`, generated Triton too) could take for
    something else."""
    names = [*spec.fast, *spec.slow, *spec.inputs]
    unsafe = {n for n in names if _unsafe(n) or (triton and (n in _TRITON_WORDS or _TRITON_DERIVED.search(n)))}
    if not unsafe:
        return spec
    new: dict[str, str] = {}
    for name in names:
        candidate = f"its_{re.sub('_+', '_', _in_ascii(name)).strip('_')}_value" if name in unsafe else name
        while candidate in new.values() or (candidate != name and candidate in names):
            candidate += "_too"
        new[name] = candidate
    groups: dict[str, Any] = {}
    declared: dict[int, Any] = {}
    for group in ("fast", "slow", "views", "gates"):
        groups[group] = {new[name]: _called(value, new[name]) for name, value in getattr(spec, group).items()}
        declared |= {id(value): groups[group][new[name]] for name, value in getattr(spec, group).items()}

    def renamed(coefficient: Any) -> Any:
        if isinstance(coefficient, Mapping):
            return {new[name]: renamed(part) for name, part in coefficient.items()}
        if isinstance(coefficient, tuple):
            return tuple(map(renamed, coefficient))
        return declared.get(id(coefficient), coefficient)

    optimizer = spec.optimizer.with_each(renamed)
    return replace(spec, optimizer=optimizer, called={b: a for a, b in new.items()}, **groups)


def _unsafe(name: str) -> bool:
    return name in _TAKEN or _DERIVED.search(name) is not None or not name.isascii() or iskeyword(name)


def _in_ascii(name: str) -> str:
    """A name with the numbers of letters that compilers, and PyTorch's graphs, have no room for."""
    return "".join(letter if letter.isascii() else f"u{ord(letter):x}" for letter in name)


def _called(declaration: Any, name: str) -> Any:
    named = copy.copy(declaration)
    named.name = name
    return named


def inward(spec: LoopSpec, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Tensors, or a state, by the names of a loop that `safe` made."""
    if not spec.called:
        return given
    new = {old: name for name, old in spec.called.items()}
    return {_entry(key, new): value for key, value in given.items()}


def outward(spec: LoopSpec, made: Mapping[str, Any]) -> dict[str, Any]:
    """A state by the names of the declaration."""
    return {_entry(key, spec.called): value for key, value in made.items()} if spec.called else dict(made)


def _entry(key: str, names: Mapping[str, str]) -> str:
    """A key of a state, "w.momentum" say, under another name of w."""
    name, point, part = key.partition(".")
    return names.get(name, name) + point + part
