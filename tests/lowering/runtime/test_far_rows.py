"""Kernels find rows that lie more than 2^31 elements apart: views of huge tensors, of which sparse files are made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import nestloop as nl
from nestloop import zoo
from tests.drawn import draw
from tests.lowering.comparison import Inputs, run

pytest.importorskip("triton")

N, APART = 140, 2**24


def far(view: Tensor, file: Path) -> Tensor:
    """The same view [B, H, N, *], its tokens so far apart."""
    _, H, N, *rest = view.shape
    each = view[0, 0, 0].numel()
    try:
        memory = torch.from_file(str(file), shared=True, size=N * APART, dtype=view.dtype)
    except RuntimeError as refusal:
        pytest.skip(f"no sparse file so long: {refusal}")
    made = memory.as_strided(view.shape, (H * each, each, APART, *torch.empty(rest).stride()))
    return made.copy_(view).requires_grad_()


@pytest.mark.slow
@pytest.mark.parametrize("loop", [zoo.TTTLinear, zoo.GatedDeltaNet, zoo.MTTTLinear], ids=lambda loop: loop.__name__)
def test_rows_that_lie_far_apart(loop: type[nl.Loop], tmp_path: Path):
    assert N * APART > 2**31
    views, weights = draw(loop.spec, N)
    near = {name: view.detach().float().requires_grad_() for name, view in views.items()}
    weights = {name: weight.detach().float().requires_grad_() for name, weight in weights.items()}
    apart = {name: far(view.detach(), tmp_path / name) for name, view in near.items()}
    found, wanted = (run(nl.compile(loop, backend="triton"), Inputs(v, weights, None, None)) for v in (apart, near))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
