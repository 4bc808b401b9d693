"""A loop may be lowered wherever its first call happens to stand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import nestloop as nl
from nestloop import zoo


def with_losses(layer: nl.Layer) -> Callable[[Tensor], Tensor]:
    """The layer as what gives its inner losses too: that is lowered at its first call, not when the layer is made."""
    return lambda x: layer(x, return_losses=True)[0]


def under(context: Callable) -> Callable:
    def call(layer: nl.Layer, x: Tensor) -> Tensor:
        with context():
            return with_losses(layer)(x)

    return call


FIRST_CALLS: dict[str, Callable[[nl.Layer, Tensor], Tensor]] = {
    "no_grad": under(torch.no_grad),
    "inference_mode": under(torch.inference_mode),
    "autocast": under(lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
    "counting FLOPs": under(lambda: FlopCounterMode(display=False)),
    "hooks on saved tensors": under(torch.autograd.graph.save_on_cpu),
    "recomputed": lambda layer, x: checkpoint(with_losses(layer), x, use_reentrant=False),
    "vmap": lambda layer, x: torch.func.vmap(with_losses(layer))(x[:, None])[:, 0],
    "grad": lambda layer, x: torch.func.grad_and_value(lambda x: with_losses(layer)(x).sum())(x)[1],
}


@pytest.mark.parametrize("where", FIRST_CALLS)
def test_the_first_call_lowers(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NESTLOOP_CACHE", str(tmp_path))

    class Fresh(zoo.MTTTLinear):
        schedule = nl.FullBatch(steps=2 + list(FIRST_CALLS).index(where))  # what no other test has lowered

    layer, x = nl.Layer(Fresh, 12, 2), torch.randn(2, 9, 12)
    before = set(tmp_path.iterdir())
    first = FIRST_CALLS[where](layer, x)
    assert set(tmp_path.iterdir()) > before, "it had been lowered before"
    plain = with_losses(layer)(x)
    tolerance = 3e-2 if where == "autocast" else 1e-5
    torch.testing.assert_close(first.float(), plain if first.ndim else plain.sum(), rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_lowers_too(root: Path, tmp_path: Path):
    script = """
import os
import nestloop as nl
from nestloop import zoo
nl.Layer(zoo.MTTTLinear, 8, 2)
if not (child := os.fork()):
    nl.Layer(zoo.LinearAttention, 8, 2)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    environment = {**os.environ, "NESTLOOP_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout == "7\n"
