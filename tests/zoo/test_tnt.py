"""TNT's local memory as the loops over shards and chunks of its paper, and what a layer gives it."""

from __future__ import annotations

import torch

import nestloop as nl
from nestloop import zoo
from tests.equality import equal, normal
from tests.zoo.forms import B, H, both, run

CHUNK, SHARD, N, d = 4, 12, 30, 3


class Short(zoo.TNTLocal):
    schedule = nl.Causal(CHUNK, reset=SHARD)


def begins_a_chunk() -> torch.Tensor:
    """0 at a chunk's first token, 1 at all others."""
    return (torch.arange(N) % CHUNK > 0).double().expand(B, H, N)


@both
def test_a_shard_starts_again_and_a_chunk_projects_its_queries_on_its_own_keys(backend):
    views = {"q": normal(B, H, N, d), "v": normal(B, H, N, d)}
    unit = normal(B, H, N, d)
    gates = {name: torch.rand(B, H, N, dtype=torch.float64).requires_grad_() for name in ("theta", "kept")}
    w0 = normal(H, d, d)
    keys = unit / unit.norm(dim=-1, keepdim=True)
    outputs = []
    for t in range(N):
        if t % SHARD == 0:
            w = w0.expand(B, H, d, d)
        if t % CHUNK == 0:
            anchor, projection = w, torch.zeros(B, H, d, d, dtype=torch.float64)
        k, v, q = keys[:, :, t, None], views["v"][:, :, t, None], views["q"][:, :, t, None]
        gradient = 2 * k.mT @ (k @ anchor - v)
        theta, kept = (gates[name][:, :, t, None, None] for name in ("theta", "kept"))
        w = kept * w - theta * gradient
        projection = projection + k.mT @ k
        outputs.append(q @ projection @ w)
    given = {**views, "k": keys, **gates, "later": begins_a_chunk()}
    leaves = [*views.values(), *gates.values(), unit, w0]
    equal(run(Short, given, {"w": w0}, backend=backend), torch.cat(outputs, 2), leaves, 1e-11)


def test_a_layer_knows_where_chunks_begin():
    layer = nl.Layer(Short, 6, 2)
    torch.manual_seed(0)
    x = torch.randn(B, N, 6)
    whole = layer(x)
    later = layer.make_views(x)["later"]
    torch.testing.assert_close(later, begins_a_chunk().float(), rtol=0, atol=0)
    first, state = layer(x[:, :9], return_state=True)  # inside a chunk
    torch.testing.assert_close(torch.cat([first, layer(x[:, 9:], state=state)], 1), whole, rtol=0, atol=2e-6)


def test_both_memories_see_the_same_views():
    names = [name for name, _ in nl.Layer(zoo.TNT, 8, 2).named_parameters()]
    assert [name for name in names if name.startswith("shared.")] == [f"shared.to_{one}.weight" for one in "qkv"]
    assert {"fast.w0", "fast.w1", "beside.fast.w"} <= set(names)
