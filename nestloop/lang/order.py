"""Token orders of shuffled loops: whether one is needed, its shape, and that each row is a permutation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nestloop.errors import OrderError, shown
from nestloop.lang.loop import LoopSpec


def check_permutations(spec: LoopSpec, order: Tensor) -> None:
    """Raise `OrderError` for rows that do not name every token once; on a GPU nothing waits for that."""
    tokens = order.shape[-1]
    wrong = (order.sort(-1).values != torch.arange(tokens)).any(-1)
    if bool(wrong.any()):
        row = order.reshape(-1, tokens)[int(wrong.reshape(-1).to(torch.uint8).argmax())].tolist()
        first = ", ".join(map(str, row[:8])) + (", ..." if tokens > 8 else "")
        raise OrderError(
            f"An order of {spec.name} is no permutation of its tokens.",
            where=spec.where,
            given=f"[{first}]",
            need=f"each of 0 to {tokens - 1} once",
            fix="order = torch.rand(H, N).argsort(-1)",
        )


def check_order(spec: LoopSpec, order: Tensor | None, sizes: Mapping[str, int]) -> None:
    """Raise `OrderError` for an order that is missing, superfluous or of the wrong shape."""
    if not spec.schedule.needs_order or spec.is_kernel_estimator:
        if order is not None:
            raise OrderError(
                f"{spec.name} does not take an order: its schedule sees all tokens in every step.",
                where=spec.where,
                given=shown(order),
                need="no order",
                fix="leave order out, or declare schedule = nl.Shuffled(4)",
            )
        return
    wanted = ([sizes["H"], sizes["N"]], [sizes["B"], sizes["H"], sizes["N"]])
    if not isinstance(order, Tensor) or order.dtype != torch.int64 or list(order.shape) not in wanted:
        given = "no order" if order is None else shown(order)
        if isinstance(order, Tensor):
            given = f"{order.dtype} [{', '.join(map(str, order.shape))}]"
        raise OrderError(
            f"{spec.name} is Shuffled and needs the order of its tokens.",
            where=spec.where,
            given=given,
            need=f"int64 [H, N] = [{sizes['H']}, {sizes['N']}], or [B, H, N]: each row a permutation of the tokens",
            fix="order = torch.rand(H, N).argsort(-1)",
        )
