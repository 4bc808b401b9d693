"""Log-linear attention, against its buckets written out."""

from __future__ import annotations

import torch

import nestloop as nl
from nestloop import zoo
from nestloop.zoo.log_linear import LEVELS, lowest_bit
from tests.equality import equal, gate, normal
from tests.zoo.forms import B, H, both, dk, dv, products, run

N = 21


def bucket(t: int, s: int, levels: int) -> int:
    """Of t's buckets, which has token s: those older than all lie in the last."""
    start = t
    for level in range(levels):
        if level == 0 and s == t:
            return 0
        if level and t >> (level - 1) & 1:
            start -= 1 << (level - 1)
            if start <= s:
                return level
    return levels - 1


def attention(views: dict[str, torch.Tensor], levels: int) -> torch.Tensor:
    """tril(q k^T * decays * lam of the bucket) v."""
    which = torch.tensor([[bucket(t, s, levels) if s <= t else 0 for s in range(N)] for t in range(N)])
    lam = views["lam"].gather(-1, which.expand(B, H, N, N))
    return (views["q"] @ views["k"].mT * products(views["g"]) * lam).tril() @ views["v"]


def drawn(levels: int) -> dict[str, torch.Tensor]:
    views = {"q": normal(B, H, N, dk), "k": normal(B, H, N, dk), "v": normal(B, H, N, dv)}
    return views | {"g": gate(B, H, N).detach().log().requires_grad_(), "lam": gate(B, H, N, levels)}


@both
def test_it_is_attention_weighed_by_bucket(backend):
    for levels in (5, 6, 3):  # 16 tokens, 32 and 4: the last holds what is older
        views = drawn(levels)
        bit = lowest_bit(torch.arange(N)).to(torch.float64).expand(B, H, N)
        loop = type("Levels", (zoo.LogLinearAttention,), {"L": nl.dim(levels)})
        z = run(loop, {**views, "bit": bit}, backend=backend)
        equal(z, attention(views, levels), list(views.values()), 1e-11)


def test_the_bits_of_positions():
    found = lowest_bit(torch.arange(2 ** (LEVELS - 1)))
    assert found[0] == LEVELS - 1
    assert all(int(found[t]) == (t & -t).bit_length() - 1 for t in range(1, len(found)))


def test_a_layer_counts_its_tokens_itself():
    torch.manual_seed(0)
    layer = nl.Layer(zoo.LogLinearAttention, 8, 2).double()
    x = torch.randn(1, N, 8, dtype=torch.float64)
    whole, (first, state) = layer(x), layer(x[:, :9], return_state=True)
    rest = layer(x[:, 9:], state=state)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=1e-12, atol=1e-12)
