"""The dtype of numbers that have none of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Numbers without a dtype of their own (`torch.eye(d)`, `torch.arange(d) / d`) have this one in here, whatever
    PyTorch's default.

    That is the process's, not a thread's: where it is this one already nothing is set, and so nothing put back that
    another thread has set meanwhile.
    """
    before = torch.get_default_dtype()
    if before is dtype:
        yield
        return
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        if torch.get_default_dtype() is dtype:
            torch.set_default_dtype(before)
