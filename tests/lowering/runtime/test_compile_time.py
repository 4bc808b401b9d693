"""How long lowering takes, cold and from the cache: printed, since a busy machine decides it (`pytest -s`)."""

from __future__ import annotations

import time

import pytest
import torch

import nestloop as nl
from nestloop import zoo

LOOPS = ["MTTTLinear", "MTTTMLP", "MTTTMLP4", "MTTTMLPSGD4", "LinearAttention", "LinearAttentionElu", "SelfAttention"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LOOPS, "ViT3"])
def test_a_zoo_loop_compiles(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NESTLOOP_CACHE", str(tmp_path / "cache"))
    x, outputs, spent = torch.randn(2, 16, 24), [], []
    state = None
    for _ in range(2):
        wall, cpu = time.perf_counter(), time.process_time()
        layer = nl.Layer(getattr(zoo, name), 24, 2).eval()
        state = state or layer.state_dict()
        layer.load_state_dict(state)
        outputs.append(layer(x))
        spent.append((time.perf_counter() - wall, time.process_time() - cpu))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    first, again = (f"{wall:.2f} s ({cpu:.2f} s of CPU)" for wall, cpu in spent)
    print(f"{name}: cold {first}, again {again}")
