"""Which of two forms a call takes, where the weights decide (`rewrites.gram`): known on the device, then on the host.

The device computes it; kernels read it there, and the host has it later, in memory that the device writes to. So no
call of kernels waits for it. Where the host must know, it waits for this alone, not for what was queued behind it.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

_UNKNOWN = -1.0


class Decision:
    """One call's decision.

    Args:
        first: whether it takes the first form, one element, on the device.
        heads: of the call.
        dtype: the compute dtype.

    Attributes:
        chosen: int32 [2], on the device: 1 and 0, or 0 and 1.
        kept: [H, 1] on the host: 1 or 0, once it is known.
    """

    def __init__(self, first: Tensor, heads: int, dtype: torch.dtype) -> None:
        self.chosen = torch.stack((first, ~first)).to(torch.int32)
        if first.device.type == "cpu":
            self.kept = torch.empty(heads, 1, dtype=dtype).copy_(first)
        elif torch.cuda.is_current_stream_capturing():
            self.kept = torch.full((heads, 1), _UNKNOWN, dtype=dtype)  # each replay of the graph decides anew
        else:
            self.kept = torch.full((heads, 1), _UNKNOWN, dtype=dtype, pin_memory=True)
            self.kept.copy_(first.expand(heads, 1).to(dtype, memory_format=torch.contiguous_format), non_blocking=True)


def known(kept: Tensor, device: torch.device) -> bool | None:
    """What a call on a device has decided; None where the host cannot know: while a CUDA graph is captured, or of a
    copy that was made before the device had written."""
    if device.type == "cpu":
        return _read(kept)
    if torch.cuda.is_current_stream_capturing():
        return None
    stream = torch.cuda.current_stream(device)
    while (found := _read(kept)) is None and not stream.query():
        time.sleep(1e-5)
    return _read(kept) if found is None else found


def _read(kept: Tensor) -> bool | None:
    values = {value for row in kept.tolist() for value in row}  # without an op of PyTorch
    return None if _UNKNOWN in values else values == {1.0}
