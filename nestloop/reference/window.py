"""Sliding windows of a kernel estimator, by brute force: every query weighs the last keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestloop.lang.loop import LoopSpec
from nestloop.reference.bodies import Tensors, fitted, kernel_weights


def one_window(
    spec: LoopSpec, dims: dict[str, Any], carry: Tensors, slow: Tensors, tokens: Tensors, position: int
) -> tuple[Tensor, Tensors]:
    """One head of one sequence: the fit at every query [N, *], and what is kept of the last keys.

    Query i, in place `position + i`, sees the keys of places `position + i - window + 1` to its own.
    """
    window, count = spec.schedule.window, len(tokens["q"])
    of_keys = {n: torch.cat([carry[f"{n}.tail"], tokens[n]]) if window > 1 else tokens[n] for n in spec.of_keys}
    dims = {**dims, "n": count}
    made = []
    for start in range(0, max(count, 1), max(window, 64)):  # so many queries a time: their keys are few
        stop = min(start + max(window, 64), count)
        query = torch.arange(start, stop, device=tokens["q"].device)[:, None]
        key = torch.arange(start - window + 1, stop, device=tokens["q"].device)[None]  # places from the first query's
        seen = (key <= query) & (key > query - window) & (key >= -position)
        queries = {n: rows[start:stop] for n, rows in tokens.items()}
        keys = {n: rows[start : stop + window - 1] for n, rows in of_keys.items()}
        weight = kernel_weights(spec, slow, dims, queries["q"], keys["k"])
        made.append(fitted(spec, slow, dims, torch.where(seen, weight, 0.0), queries, keys))
    kept = {} if window == 1 else {f"{n}.tail": rows[count:] for n, rows in of_keys.items()}
    return torch.cat(made), kept
