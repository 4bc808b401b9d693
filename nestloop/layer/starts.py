"""How parameters start: when their module is made, and again whenever `reset_parameters` is called.

That is what fills a model which was made on the device "meta" and given memory by `to_empty`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}  # what PyTorch puts around modules


class Starts:
    """The `reset_parameters` of a module: an attribute, so that a linear map stays an `nn.Linear`, a type that others
    look for.

    It holds the dict in which the module has its parameters, not the module: copies have their own, and what is dropped
    is freed at once.
    """

    def __init__(self, module: nn.Module, fills: dict[str, Callable[[Tensor], Any]]) -> None:
        self.parameters, self.fills = module._parameters, fills

    def __call__(self) -> None:
        """Fill the parameters as they were when the module was made."""
        for name, fill in self.fills.items():
            parameter = self.parameters.get(name)
            if parameter is not None:
                value = torch.empty(parameter.shape, device=parameter.device)  # of the dtype that layers are made in
                with torch.no_grad():
                    fill(value)
                _put(parameter, value)


def begin(module: nn.Module, fills: dict[str, Callable[[Tensor], Any]]) -> None:
    """Fill parameters of a module in place, now and as its `reset_parameters`.

    Args:
        fills: by the parameter's name; functions that a pickle can name.
    """
    starts = Starts(module, fills)
    module.reset_parameters = starts  # type: ignore[assignment]
    starts()


def begin_again(module: nn.Module, make: Callable[[], nn.Module]) -> None:
    """Give a module's parameters the values of a new one, which is made where they are.

    Modules that others have put inside, and parameters that they have put another in the place of, keep what they hold.
    """
    own = {_unwrapped(name): parameter for name, parameter in module.named_parameters()}
    device = next((parameter.device for parameter in own.values() if not parameter.is_meta), None)
    if device is None:
        return
    with torch.device(device):
        made = make()
    for name, value in made.named_parameters():
        if name in own and own[name].shape == value.shape:
            _put(own[name], value)


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


@torch.no_grad()
def _put(parameter: Tensor, value: Tensor) -> None:
    """Copy a value into a parameter, of which each process may have its own shard (FSDP)."""
    if hasattr(parameter, "placements"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.detach(), parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
    parameter.copy_(value)
