"""A value from which nothing flows back, as one op: what `x.detach()` in a body means, inside and outside alike.

PyTorch's own leaves no trace in a graph, and what is differentiated once more would know nothing of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("nestloop", "FRAGMENT")
_LIBRARY.define("detached(Tensor x) -> Tensor")


def _batched(info: Any, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, int | None]:
    return OP(x), in_dims[0]


_LIBRARY.impl("detached", torch.clone, "CompositeExplicitAutograd")
torch.library.register_vmap("nestloop::detached", _batched, lib=_LIBRARY)

OP = torch.ops.nestloop.detached.default


def detached(x: Tensor) -> Tensor:
    """`x.detach()`, which a graph keeps."""
    return OP(x.detach())
