"""Random tensors for a call of any declared loop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nestloop.lang import coefficient
from nestloop.lang.binding import lead, token_axis
from nestloop.lang.init import fill
from nestloop.lang.loop import LoopSpec


@dataclass
class Inputs:
    """Tensors for one call, all leaves that require gradients."""

    views: dict[str, Tensor]
    weights: dict[str, Tensor]
    state: dict[str, Any] | None
    order: Tensor | None
    dims: dict[str, Any] = field(default_factory=dict)

    def leaves(self) -> dict[str, Tensor]:
        """Everything a gradient is taken of, by name."""
        state = {f"state {name}": t for name, t in (self.state or {}).items() if isinstance(t, Tensor)}
        return {**self.views, **self.weights, **state}

    def tokens(self, spec: LoopSpec) -> int:
        """Tokens of a sequence."""
        first = next(iter(spec.inputs.values()))
        return self.views[first.name].shape[token_axis(first)]

    def map(self, change: Callable[[str, Tensor], Tensor], among: Collection[str] | None = None) -> Inputs:
        """The same call on changed values of its leaves, each by its name in `leaves`; `among`: of these alone."""

        def changed(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.detach()
            return (change(name, value) if among is None or name in among else value).requires_grad_()

        state = None if self.state is None else {n: changed(f"state {n}", t) for n, t in self.state.items()}
        views, weights = ({n: changed(n, t) for n, t in given.items()} for given in (self.views, self.weights))
        return Inputs(views, weights, state, self.order, dict(self.dims))

    def of_tokens(self, spec: LoopSpec, start: int, stop: int) -> dict[str, Tensor]:
        """The views of some of the tokens."""
        return {n: t.narrow(token_axis(spec.inputs[n]), start, stop - start) for n, t in self.views.items()}

    def of_sequence(self, row: int) -> Inputs:
        """The call on one of its sequences alone."""
        order = self.order[row : row + 1] if self.order is not None and self.order.ndim == 3 else self.order
        views = {name: view.detach()[row : row + 1].requires_grad_() for name, view in self.views.items()}
        return Inputs(views, self.weights, None, order, dict(self.dims))


def draw(spec: LoopSpec, sizes: Mapping[str, int]) -> Inputs:
    """Inputs of a loop, float64: views are normal, gates in (0, 1), log decays below 0, weights near initial ones.

    sizes: of every dim, B, H and N among them.
    """
    heads = spec.heads.size(sizes) if spec.heads is not None and not isinstance(spec.heads, int) else spec.heads
    axes = {"B": sizes["B"], "H": heads or sizes["H"], "N": sizes["N"]}
    logarithms = {id(part) for part in coefficient.parts(spec.optimizer.log_decay)}

    def shape(declared: Any) -> list[int]:
        return [expr.size(sizes) for expr in declared.dims]

    views = {}
    for name, view in spec.inputs.items():
        letters = [axes[a] // view.group if a == "H" else axes[a] for a in lead(view)]
        micro = [spec.schedule.micro] if view.micro else []
        noise = torch.randn(*letters, *micro, *shape(view), dtype=torch.float64)
        if view.kind == "gate":
            noise = -noise.square() - 0.05 if id(view) in logarithms else noise.sigmoid()
        views[name] = noise.requires_grad_()
    weights = {}
    for name, weight in spec.weights.items():
        alone = weight.kind == "slow weight" and weight.shared  # type: ignore[union-attr]
        value = torch.empty([*([] if alone else [axes["H"]]), *shape(weight)], dtype=torch.float64)
        value = fill(value, weight.init, not alone, weight.maps)
        weights[name] = (value + 0.1 * torch.rand_like(value) if weight.learned else value).requires_grad_()
    order = None
    if spec.schedule.needs_order and not spec.is_kernel_estimator:
        order = torch.rand(axes["H"], axes["N"]).argsort(-1)
    return Inputs(views, weights, None, order)
