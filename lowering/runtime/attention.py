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
        tails = [] if state is None or window == 1 else [state["k.tail"], state["v.tail"]]
        if tails:
            k, v = (torch.cat([tail.to(dtype), rows], 2) for tail, rows in zip(tails, (k, v), strict=True))
        z = _to_the_last(window, q, k, v, position, scale)
        end: State = {"position": position + q.shape[2]}
        if window > 1:
            kept = compute_dtype([*views.values(), *weights.values(), *tails])
            for name, rows in (("k", k), ("v", v)):
                last = rows[:, :, max(0, rows.shape[2] - window + 1) :].to(kept)
                end[f"{name}.tail"] = F.pad(last, (0, 0, window - 1 - last.shape[2], 0))  # in memory of its own
        return z, end, None

    return run


def _to_the_last(window: int, q: Tensor, k: Tensor, v: Tensor, position: int, scale: Any) -> Tensor:
    """Attention [B, H, N, dv] of each query to the last `window` keys, its own among them; keys and values are those of
    N tokens, behind those of the `window` - 1 before them where a state has these.

    The first block of queries, which may see the `window` - 1 tokens before the call, and then all others, which see no
    more than their own block and the one before: one more is on its own, and several are as many heads.
    """
    tokens, block = q.shape[2], max(window, _BLOCK)
    first = tokens if tokens <= block else block  # a graph for either: no length is asked for twice
    before = k.shape[2] - tokens
    queries, keys, values = q[:, :, :first], k[:, :, : before + first], v[:, :, : before + first]
    if not before and window == block:  # each sees all before it
        made = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)
    else:
        made = _banded(window, queries, keys, values, position, scale)
    if tokens <= block:
        return made
    k, v = k[:, :, before:], v[:, :, before:]
    if tokens <= 2 * block:
        keys, values = (rows[:, :, block - window + 1 :] for rows in (k, v))
        return torch.cat([made, _banded(window, q[:, :, block:], keys, values, window, scale)], 2)
    count = -(-tokens // block)

    def blocks(rows: Tensor) -> Tensor:
        """All tokens [B, H, count, block, *], and rows that no token's query sees."""
        return F.pad(rows, (0, 0, 0, count * block - tokens)).unflatten(2, (count, block))

    def ahead(rows: Tensor) -> Tensor:
        """The keys of each block but the first [B, H * (count - 1), window - 1 + block, *]."""
        rows = blocks(rows)
        return torch.cat([rows[:, :, :-1, block - window + 1 :], rows[:, :, 1:]], 3).flatten(1, 2)

    rest = _banded(window, blocks(q)[:, :, 1:].flatten(1, 2), ahead(k), ahead(v), window, scale)
    rest = rest.unflatten(1, (-1, count - 1)).flatten(2, 3)[:, :, : tokens - block]
    return torch.cat([made, rest], 2)


def _banded(window: int, q: Tensor, k: Tensor, v: Tensor, position: int, scale: Any) -> Tensor:
    """Attention of each query to the last `window` keys, the last of which are of the queries' own tokens; no sequence
    reaches back further than `position` tokens before the first query."""
    query, key = (torch.arange(rows.shape[2], device=q.device) for rows in (q, k))
    place = key[None] - (k.shape[2] - q.shape[2])  # from the first query's
    seen = (place <= query[:, None]) & (place > query[:, None] - window) & (place >= -position)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)


def _count_on_cpu() -> None:
    """FLOPs of PyTorch's CPU attention, which its own counter takes for free."""
    packet = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if packet not in flop_registry:
        register_flop_formula(packet)(lambda q, k, v, *_, out_shape=None, **__: sdpa_flop(q, k, v))
    packet = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    if packet not in flop_registry:
        register_flop_formula(packet)(lambda d, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop(d, q, k, v))


_count_on_cpu()
