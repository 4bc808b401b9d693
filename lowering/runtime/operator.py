"""An operator of PyTorch on a loop's tensors, of which there may be any number.

One of PyTorch's has 64 arguments at most. Where a loop's state is more tensors than that, they are one argument, a list
in the same order, and so are the results: what `torch.compile`, export, `vmap` and FLOP counters see is one operator
all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import _FlopCounterMode, flop_registry, register_flop_formula

from nestloop.lowering.runtime.batching import batching_rule

MOST_ARGUMENTS = 64  # of an operator of PyTorch, and results

_LIBRARY = torch.library.Library("nestloop", "FRAGMENT")


class Operator:
    """One operator, registered.

    Args:
        name: a valid identifier, unique per content.
        arguments: names of the tensors that it takes.
        results: how many it makes.
        kernel: what it runs, and `fake`, what that gives without data: tensors -> results.
        flops: shapes of the tensors -> FLOPs of its products.

    Attributes:
        overload: PyTorch's.
        call: tensors -> results, a tensor where there is one: `overload`, or what makes its list. Dynamo traces both.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        results: int,
        kernel: Callable[..., Sequence[Tensor]],
        fake: Callable[..., Sequence[Tensor]],
        flops: Callable[..., int],
    ) -> None:
        self.name, self.arguments = name, tuple(arguments)
        self._in_lists = max(len(arguments), results) > MOST_ARGUMENTS
        if self._in_lists:
            _LIBRARY.define(f"{name}(Tensor[] tensors) -> Tensor[]")
        else:
            made = f"({', '.join(['Tensor'] * results)})" if results > 1 else "Tensor"
            _LIBRARY.define(f"{name}({', '.join(f'Tensor {n}' for n in arguments)}) -> {made}")
        _LIBRARY.impl(name, self._taking(kernel), "CompositeExplicitAutograd")
        torch.library.register_fake(f"nestloop::{name}", self._taking(fake), lib=_LIBRARY)
        packet = getattr(torch.ops.nestloop, name)
        register_flop_formula(packet)(lambda *shapes, **_: flops(*(shapes[0] if self._in_lists else shapes)))
        for mode in _get_current_dispatch_mode_stack():  # a counter around this call has read the formulas before
            if isinstance(mode, _FlopCounterMode):
                mode.counter.flop_registry[packet] = flop_registry[packet]
        self.overload = packet.default
        self.call: Callable[..., Any] = _of_list(self.overload) if self._in_lists else self.overload

    def batched(self, heads: int, results: Sequence[str] | None) -> None:
        """Say what `vmap` makes of it: see `batching_rule`."""
        rule = batching_rule(self.call, self.arguments, heads, results)

        def of_lists(info: Any, in_dims: Any, tensors: Sequence[Tensor]) -> Any:
            made = _several(rule(info, in_dims[0], *tensors)[0])
            return made, [0] * len(made)

        torch.library.register_vmap(self.overload, of_lists if self._in_lists else rule)

    def differentiated(self, kernel: Callable[..., Any]) -> None:
        """Say what runs where gradients may be asked for."""
        _LIBRARY.impl(self.name, self._taking(kernel), "Autograd")

    def _taking(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the tensors, as the operator takes them and gives results."""
        if self._in_lists:
            return lambda tensors: _several(function(*tensors))

        def of_tensors(*tensors: Tensor) -> Any:
            made = _several(function(*tensors))
            return tuple(made) if len(made) > 1 else made[0]

        return of_tensors


def _of_list(overload: Any) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *tensors: tuple(overload(list(tensors)))


def _several(made: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [made] if isinstance(made, Tensor) else list(made)
