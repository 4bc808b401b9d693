"""A kernel estimator as PyTorch's own attention: to all keys, or, in blocks of queries, to the last ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop, sdpa_flop

from nestloop.lang.binding import grouped_heads
from nestloop.lang.loop import LoopSpec
from nestloop.lang.state import State, check_position
from nestloop.lowering.runtime.batches import compute_dtype, output_dtype

_BLOCK = 64  # queries at a time, at least


def attention(spec: LoopSpec, scale: float | None, heads: int) -> Callable[..., tuple[Tensor, State, None]]:
    """The loop as a function of views, weights, state and order, differentiable as it is."""

    def every_head(name: str, view: Tensor) -> Tensor:
        if getattr(spec.inputs[name], "shared", False):
            return view.unsqueeze(1).expand(-1, heads, -1, -1)
        return grouped_heads(spec, name, view)

    def run(
        views: Mapping[str, Tensor], weights: Mapping[str, Tensor], state: Mapping[str, Any] | None, order: Any
    ) -> tuple[Tensor, State, None]:
        given = {name: every_head(name, views[name]) for name in ("q", "k", "v")}
        dtype = output_dtype([*given.values()], [*given.values()])
        q, k, v = (view.to(dtype) for view in given.values())
        if not spec.slides:
            return F.scaled_dot_product_attention(q, k, v, scale=scale), {}, None
        window, position = spec.schedule.window, 0 if state is None else check_position(spec, state)
        tails = None
        if state is not None and window > 1:
            tails = (state["k.tail"].to(dtype), state["v.tail"].to(dtype))
        z = _to_the_last(window, q, k, v, tails, position, scale)
        end: State = {"position": position + q.shape[2]}
        if window > 1:
            kept = compute_dtype([*views.values(), *weights.values(), *([] if tails is None else [state["k.tail"]])])
            for at, (name, view) in enumerate((("k", k), ("v", v))):
                last = view if tails is None else torch.cat([tails[at], view], 2)
                last = last[:, :, max(0, last.shape[2] - window + 1) :].to(kept)
                end[f"{name}.tail"] = F.pad(last, (0, 0, window - 1 - last.shape[2], 0)).clone()
        return z, end, None

    return run


def _to_the_last(
    window: int, q: Tensor, k: Tensor, v: Tensor, tails: tuple[Tensor, Tensor] | None, position: int, scale: Any
) -> Tensor:
    """Attention [B, H, N, dv] of each query to the last `window` keys, its own among them.

    The first block of queries, which may see the `window` - 1 tokens before the call, and then all others at once,
    which see no more than their own block and the one before.
    """
    tokens, halo = q.shape[2], 0 if tails is None else window - 1
    if tails is not None:
        k, v = torch.cat([tails[0], k], 2), torch.cat([tails[1], v], 2)
    block = max(window, _BLOCK)
    first = min(block, tokens)
    query, key = (torch.arange(n, device=q.device) for n in (first, halo + first))
    place = key[None] - halo  # from the call's first token
    seen = (place <= query[:, None]) & (place > query[:, None] - window) & (place >= -position)
    whole = tails is None and window >= first  # each sees all before it
    made = F.scaled_dot_product_attention(
        q[:, :, :first],
        k[:, :, : halo + first],
        v[:, :, : halo + first],
        attn_mask=None if whole else seen,
        is_causal=whole,
        scale=scale,
    )
    if tokens <= block:
        return made
    count = -(-(tokens - block) // block)
    more = (0, 0, 0, block + count * block - tokens)  # rows that no token's query sees, and their own

    def near(rows: Tensor) -> Tensor:
        """The keys of each block [B, H * count, block + window - 1, *]."""
        rows = F.pad(rows[:, :, halo + block - window + 1 :], more)
        return rows.unfold(2, block + window - 1, block).transpose(-1, -2).flatten(1, 2)

    own = F.pad(q[:, :, block:], more).unflatten(2, (count, block)).flatten(1, 2)
    query, key = (torch.arange(n, device=q.device) for n in (block, block + window - 1))
    seen = (key[None] >= query[:, None]) & (key[None] < query[:, None] + window)
    rest = F.scaled_dot_product_attention(own, near(k), near(v), attn_mask=seen, scale=scale)
    rest = rest.unflatten(1, (-1, count)).flatten(2, 3)[:, :, : tokens - block]
    return torch.cat([made, rest], 2)


def _count_on_cpu() -> None:
    """FLOPs of PyTorch's CPU attention, which its own counter takes for free."""
    packet = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if packet not in flop_registry:
        register_flop_formula(packet)(lambda q, k, v, *_, out_shape=None, **__: sdpa_flop(q, k, v))
    packet = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    if packet not in flop_registry:
        register_flop_formula(packet)(lambda d, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop(d, q, k, v))


_count_on_cpu()
