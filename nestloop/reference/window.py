"""Sliding windows of a kernel estimator, by brute force: every query weighs the last keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestloop.lang.loop import LoopSpec
from nestloop.reference.bodies import Tensors, kernel_weights


def one_window(
    spec: LoopSpec, dims: dict[str, Any], carry: Tensors, slow: Tensors, tokens: Tensors, position: int
) -> tuple[Tensor, Tensors]:
    """One head of one sequence: the locally constant fit at every query [N, *], and the last keys and values.

    Query i, in place `position + i`, sees the keys of places `position + i - window + 1` to its own.
    """
    window, count = spec.schedule.window, len(tokens["q"])
    keys, values = (torch.cat([carry[f"{n}.tail"], tokens[n]]) if window > 1 else tokens[n] for n in ("k", "v"))
    dims = {**dims, "n": count}
    fitted = []
    for start in range(0, max(count, 1), max(window, 64)):  # so many queries a time: their keys are few
        stop = min(start + max(window, 64), count)
        query = torch.arange(start, stop, device=keys.device)[:, None]
        key = torch.arange(start - window + 1, stop, device=keys.device)[None]  # places from the first query's
        seen = (key <= query) & (key > query - window) & (key >= -position)
        weight = kernel_weights(spec, slow, dims, tokens["q"][start:stop], keys[start : stop + window - 1])
        weight = torch.where(seen, weight, 0.0)
        fitted.append(weight @ values[start : stop + window - 1] / weight.sum(-1, keepdim=True))
    kept = {} if window == 1 else {"k.tail": keys[count:], "v.tail": values[count:]}
    return torch.cat(fitted), kept
