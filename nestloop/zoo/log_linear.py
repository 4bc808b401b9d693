"""Log-linear attention: memories of older and older tokens, as many as the logarithm of how many there were."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import nestloop as nl

LEVELS = 12  # 2,048 tokens


class Levels(nl.Learner):
    """One linear memory a level, every sequence starting from zero."""

    w = nl.fast("L", "dk", "dv", init="zeros", learned=False)


class Carry(nl.Optimizer):
    """Counts in binary: what the lowest levels hold moves to the one that the bit set by this token stands for."""

    bit, g = nl.coefficient(), nl.coefficient()

    def update(self, w, g, s):
        level, to = torch.arange(w.shape[0])[:, None, None], s.bit.floor().clamp(max=w.shape[0] - 2) + 1
        moved = (w * (level <= to)).sum(0) * (level == to) + w * (level > to)
        return g + w - s.g.exp() * moved, {}


def lowest_bit(position):
    """The lowest bit of a position that is set; of zero the highest, which gathers all."""
    bits = (position[:, None].long() >> torch.arange(LEVELS - 1)) % 2
    return torch.cat([bits, torch.ones_like(bits[:, :1])], 1).argmax(1)


class LogLinearAttention(nl.Loop):
    """Log-linear attention, gated: o_t = sum_l lam_tl q_t S_l, where S_l sums exp(g) k^T v of bucket l of t's tokens.

    Bucket 0 is the token itself; bucket l > 0, where bit l - 1 of t is set, has the 2^(l - 1) tokens from t with that
    and all lower bits cleared on (Fenwick's tree). What is older than all of them stays in the last.
    """

    paper = "2506.04761"
    learner, schedule = Levels, nl.Chunked(1, "update-apply")
    L = nl.dim(LEVELS)
    q, k, v = nl.view("dk"), nl.view("dk"), nl.view("dv")
    g, lam = nl.gate(F.logsigmoid), nl.gate(F.softplus, dims="L")
    bit = nl.gate(torch.relu, of=nl.per_position(2 ** (LEVELS - 1), offset=lowest_bit, learned=False))
    optimizer = Carry(bit=bit, g=g)

    def loss(self, f, t):
        return -(t.k @ f.w[0] * t.v).sum(-1)

    def readout(self, f, t):
        return (t.lam[:, :, None] * torch.einsum("ni,lij->nlj", t.q, f.w)).sum(1)
