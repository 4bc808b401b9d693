"""The tensors of a loop's op: what it takes, what it makes, and what it keeps for backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestloop.lang.kept import Kept
from nestloop.lowering.runtime.batches import LOW, compute_dtype, is_token, output_dtype, strides_beside

DECIDED = "first_form"  # which of two forms forward has taken, on the host
BETWEEN = "between_"  # of what is kept between steps: [steps, H, B, ...], where all else is [H, B, ...]
KEPT = (BETWEEN, "shared_", DECIDED)  # results for backward alone


def axis_of_heads(name: str) -> int:
    """Which axis of a tensor, by its name, is that of heads; the next is that of sequences."""
    return 1 if name.startswith(BETWEEN) else 0


def seen(tensors: Sequence[Tensor]) -> Any:
    """All of tensors that decides what an op makes, as a key: shapes, dtypes, where the first is. None where sizes are
    not known yet."""
    key = (tensors[0].device.type if tensors else "", *[(t.shape, t.dtype) for t in tensors])
    try:
        hash(key)
    except TypeError:
        return None
    return key


class Layout(NamedTuple):
    """Memory of forward's results, as an op's callers see it.

    Attributes:
        shapes, dtypes: of each.
        strides: of those whose heads lie side by side; None for contiguous.
    """

    shapes: tuple[tuple[Any, ...], ...]
    strides: tuple[tuple[Any, ...] | None, ...]
    dtypes: tuple[torch.dtype, ...]


@dataclass(frozen=True)
class Signature:
    """Tensors of an op, all [H, B, ...], an axis of size 1 being shared.

    Attributes:
        tokens, fast, slow: input names; tokens come first, [.., N, *].
        tiles: shape of one head's tile for every fast weight and for z ("z": without n).
        ends: names of all fast weights (z, then these, are the first results).
        losses: whether the inner losses [H, B, steps + 1] are a result.
        steps: sequence length -> number of steps.
        ordered: whether the op takes an order.
        states: whether fast weights are results (not for a kernel estimator).
        heads: H.
        shared: what all steps share, one head's tile of each, of what has a row for each token that row. `forward`
            makes it, and it is kept for `backward`.
        low: which of `shared` is kept in the low precision of products.
        decides: whether a call's weights decide between two forms. Then that is kept too, and `shared` is of the first.
    """

    tokens: tuple[str, ...]
    fast: tuple[str, ...]
    slow: tuple[str, ...]
    tiles: dict[str, tuple[int, ...]]
    ends: tuple[str, ...]
    losses: bool
    steps: Callable[[int], int]
    ordered: bool
    heads: int
    shared: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    decides: bool = False
    low: tuple[str, ...] = ()

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        return (*self.tokens, *self.fast, *self.slow)

    @cached_property
    def results(self) -> tuple[str, ...]:
        losses = ("losses",) if self.losses else ()
        return ("z", *[f"end_{n}" for n in self.ends], *losses, *self.between, *self.kept_shared)

    @cached_property
    def kept_shared(self) -> tuple[str, ...]:
        """Results that hold what all steps share, and [H, 1], on the host, whether that is of the first form."""
        return (*[f"shared_{n}" for n in self.shared], *([DECIDED] if self.decides else []))

    @cached_property
    def between(self) -> tuple[str, ...]:
        return tuple(f"between_{n}" for n in self.ends)

    @cached_property
    def cotangents(self) -> tuple[str, ...]:
        """The results that backward is given a cotangent of."""
        return tuple(r for r in self.results if not r.startswith(KEPT))

    @cached_property
    def saved(self) -> tuple[str, ...]:
        """The results that backward reads."""
        return tuple(r for r in self.results if r.startswith(("end_", *KEPT)))

    def shapes(self, inputs: Sequence[Tensor]) -> list[list[Any]]:
        """Shapes of forward's results."""
        heads = max(t.shape[0] for t in inputs) if inputs else self.heads
        sequences, length = inputs[0].shape[1:3]  # the first is a view, whose sequences are never shared
        steps = self.steps(length)
        ends = [[heads, sequences, *self.tiles[n]] for n in self.ends]
        losses = [[heads, sequences, steps + 1]] if self.losses else []
        between = [[max(steps - 1, 0), *end] for end in ends]
        shared = []
        for name in [n.removeprefix("shared_") for n in self.kept_shared]:
            lead = (sequences, length) if is_token(name) else (1,)
            shared.append([heads, *lead, *self.shared.get(name, ())])
        return [[heads, sequences, length, *self.tiles["z"]], *ends, *losses, *between, *shared]

    @cached_property
    def beside(self) -> frozenset[str]:
        """Results with a row for each token, whose heads lie side by side in memory."""
        return frozenset(["z", *[f"shared_{n}" for n in self.shared if is_token(n)]])

    def dtypes(self, inputs: Sequence[Tensor]) -> list[torch.dtype]:
        """Of forward's results: z is in the views' dtype, products that backward reads are in that which they are
        rounded to, all else in the compute dtype."""
        z, computed = output_dtype(inputs[: len(self.tokens)], inputs), compute_dtype(inputs)
        first = inputs[0].dtype if inputs else computed
        low = first if first in LOW and computed is torch.float32 else computed
        dtypes = {"z": z, **{f"shared_{n}": low for n in self.low}}
        return [dtypes.get(name, computed) for name in self.results]

    def layout(self, inputs: Sequence[Tensor]) -> Layout:
        """How forward's results lie in memory."""
        return self._layouts.of(seen(inputs), lambda: self._layout(inputs))

    def _layout(self, inputs: Sequence[Tensor]) -> Layout:
        shapes = tuple(map(tuple, self.shapes(inputs)))
        strides = [strides_beside(s) if n in self.beside else None for n, s in zip(self.results, shapes, strict=True)]
        return Layout(shapes, tuple(strides), tuple(self.dtypes(inputs)))

    @cached_property
    def _layouts(self) -> Kept[Layout]:
        return Kept()

    def empty(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Memory for forward's results, as an op's callers see it."""

        device = inputs[0].device

        def memory(name: str, shape: Sequence[int], strides: Sequence[int] | None, dtype: torch.dtype) -> Tensor:
            if strides is not None:
                return inputs[0].new_empty_strided(shape, strides, dtype=dtype)
            return torch.empty(shape, dtype=dtype, device="cpu" if name == DECIDED else device)

        return list(map(memory, self.results, *self.layout(inputs)))
