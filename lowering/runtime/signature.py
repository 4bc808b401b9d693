"""The tensors of a loop's op: what it takes, what it makes, and what it keeps for backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nestloop.lowering.runtime.batches import compute_dtype, is_token, output_dtype, side_by_side

MOST_ARGUMENTS = 64  # of an operator of PyTorch
DECIDED = "first_form"  # which of two forms forward has taken, on the host
KEPT = ("between_", "shared_", DECIDED)  # results for backward alone


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
            makes it, and it is kept for `backward` where the op may have as many arguments.
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
        names = [f"shared_{n}" for n in self.shared] + ([DECIDED] if self.decides else [])
        others = 2 * len(self.ends) + len(self.between) + 2 + self.losses + self.ordered  # states, cotangents, z
        return tuple(names) if len(self.inputs) + len(names) + others <= MOST_ARGUMENTS else ()

    @cached_property
    def between(self) -> tuple[str, ...]:
        return tuple(f"between_{n}" for n in self.ends)

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
        """Of forward's results: z is in the views' dtype, all else in the compute dtype."""
        z, computed = output_dtype(inputs[: len(self.tokens)], inputs), compute_dtype(inputs)
        return [z if name == "z" else computed for name in self.results]

    def empty(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Memory for forward's results, as an op's callers see it."""

        def memory(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            if name in self.beside:
                return side_by_side(inputs[0], shape, dtype)
            return torch.empty(shape, dtype=dtype, device="cpu" if name == DECIDED else inputs[0].device)

        return list(map(memory, self.results, self.shapes(inputs), self.dtypes(inputs)))
