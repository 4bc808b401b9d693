"""Loops whose bodies are written in the ways of PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import nestloop as nl


class Linear(nl.Learner):
    w = nl.fast("d", "d")

    def forward(self, x):
        return x @ self.w


class MLP(nl.Learner):
    w1, w2 = nl.fast("d", "2*d"), nl.fast("2*d", "d")

    def forward(self, x):
        return torch.tanh(x @ self.w1) @ self.w2


class Recall(nl.Loop):
    learner: type[nl.Learner] = MLP
    schedule: Any = nl.Causal(4)
    optimizer = nl.SGD(lr=0.2)
    k, q, v = nl.view("d"), nl.view("d"), nl.view("d")

    def loss(self, f, t):
        return (f(t.k) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)


class Self(Recall):
    """Regression to what the learner itself says, gated by a coefficient that is not learned here."""

    c, s = nl.slow(), nl.slow("d", "d")

    def loss(self, f, t):
        y = f(t.k)
        gate = torch.sigmoid(y.detach()) * self.c.detach()
        return ((y - t.v) * gate).square().sum(-1) + (y * (t.k.detach() @ self.s.detach())).sum(-1)

    def readout(self, f, t):
        y = f(t.q)
        return y * y.detach() + t.q.detach()


class SelfOnline(Self):
    schedule = nl.Online()


class SelfInBatches(Self):
    schedule = nl.FullBatch(steps=2)


class Delta(Recall):
    """The delta rule, with the error held by hand."""

    learner, schedule = Linear, nl.Online()

    def loss(self, f, t):
        return -(f(t.k) * (t.v - t.k @ f.w.detach())).sum(-1)


class Shallow(Recall):
    """The inner loop learns nothing through the hidden features that the last layer reads."""

    class learner(MLP):
        def forward(self, x):
            h = torch.tanh(x @ self.w1)
            return h.detach() @ self.w2 + h.sum(-1, keepdim=True)

    schedule = nl.Shuffled(batches=2)

    def loss(self, f, t):
        return (f(t.k) - t.v).square().mean(-1)


class Nothing(Self):
    """Nothing flows back from what is read, and of the loss only to the learner."""

    schedule = nl.FullBatch(steps=2)

    def loss(self, f, t):
        return ((f(t.k) - t.v) * self.c).square().sum(-1).detach() + (f(t.k) * t.v.detach()).sum(-1)

    def readout(self, f, t):
        return t.q.detach() @ self.s.detach() + f(t.q).detach()


class Masked(Recall):
    """Masks of slow weights alone, and constants where a tensor stands."""

    mask = nl.slow("d")

    def loss(self, f, t):
        seen = torch.where(self.mask > 0, t.k, torch.zeros_like(t.k))
        return (F.softplus(f(seen)) - t.v).square().mean(-1)


class Mixture(Recall):
    """Several memories, and a router: a contraction whose sizes are read where the weights are one per token."""

    m = nl.dim(3)
    r = nl.view("m")

    class learner(nl.Learner):
        w = nl.fast("m", "d", "d")

        def forward(self, x):
            return torch.einsum("nk,mkv->nmv", x, self.w)

    def loss(self, f, t):
        return (torch.softmax(t.r, -1)[..., None] * (f(t.k) - t.v[:, None]).square()).sum((-1, -2))

    def readout(self, f, t):
        return (torch.softmax(t.r, -1)[..., None] * f(t.q)).sum(1)


class Rotated(Recall):
    """Halves of the features, joined again: joins and slices under the weights of every token."""

    class learner(nl.Learner):
        angle, w = nl.fast("d//2"), nl.fast("d", "d")

        def forward(self, x):
            a, b = x.chunk(2, -1)
            c, s = torch.cos(self.angle), torch.sin(self.angle)
            turned = torch.cat([a * c - b * s, a * s + b * c], -1) @ self.w
            return F.glu(torch.cat([turned, turned[:, :1], x[:, 1:]], -1), -1)


class Normed(Recall):
    """Norms whose weights are learned inside."""

    class learner(nl.Learner):
        w, g, b, r = nl.fast("d", "d"), nl.fast("d", init="ones"), nl.fast("d"), nl.fast("d", init="ones")

        def forward(self, x):
            return F.rms_norm(x + F.layer_norm(x @ self.w, (self.d,), self.g, self.b), (self.d,), self.r)


class Reconstruct(Recall):
    """A loss between the heads' own values and the whole token."""

    schedule = nl.FullBatch(steps=2)
    x, g = nl.view("D", shared=True), nl.slow("d", "D")

    def loss(self, f, t):
        y = f(t.k) @ self.g
        losses = F.mse_loss(y, t.x, reduction="none") + F.huber_loss(t.x, y, reduction="none", delta=0.4)
        return (losses + F.smooth_l1_loss(y, t.x, reduction="none", beta=0.3)).mean(-1)


class Counted(Recall):
    """The number of rows as a Python number, where any would do."""

    class learner(nl.Learner):
        w = nl.fast("d", "d")

        def forward(self, x):
            halves = x.reshape(len(x), 2, -1)
            return halves.softmax(-1).reshape(int(x.shape[0]), -1) @ self.w


class CountedOnline(Counted):
    schedule = nl.Online()


class CountedInChunks(Counted):
    schedule = nl.Chunked(4)


class CountedInBatches(Counted):
    schedule = nl.Shuffled(batches=2)


class CountedAtOnce(Counted):
    schedule = nl.FullBatch(steps=2)


class CountedWeights(Mixture):
    """Where the weights of every token are built."""

    def loss(self, f, t):
        return Mixture.loss(self, f, t).reshape(len(t.k))


class Whole(Recall):
    """Numbers that are cut to whole ones, which only PyTorch keeps apart from others."""

    learner = Linear

    def loss(self, f, t):
        steps = (3 * t.k).long()
        return ((f(t.k) - t.v) * (steps + torch.arange(3).sum())).square().sum(-1) + (t.v.int() // 2).sum(-1)

    def readout(self, f, t):
        return f(t.q) * (4 * t.q).to(torch.int32)


class Bits(Whole):
    """Bits of whole numbers, and numbers as truth values."""

    def readout(self, f, t):
        q, k = (8 * t.q).long(), (8 * t.k).long()
        signs = torch.logical_or(torch.logical_not(t.q.round()), t.k.round())
        return f(t.q) * ((q & k) + (q | ~k) - (q & (t.q > t.k))) + signs


class Zeros(Whole):
    """Zeros, each with its sign."""

    def readout(self, f, t):
        x = t.q.clamp(-0.4, 0.4)
        return f(t.q) * (x.round().reciprocal() > 0) + f(t.k) * (x.trunc().reciprocal() > 0)


class WholeAtOnce(Whole):
    schedule = nl.FullBatch(steps=2)


class Inverted(Recall):
    """Systems whose matrix is of weights alone, and whose right side is of tokens."""

    schedule = nl.Chunked(4, "apply-update")

    class learner(nl.Learner):
        w = nl.fast("d", "d")

        def forward(self, x):
            eye = torch.eye(self.d, dtype=x.dtype, device=x.device)
            return x @ torch.linalg.solve(3 * eye + self.w, eye)


class Flat(Recall):
    """A fast weight that is a matrix to the body, and a row to the optimizer."""

    class learner(nl.Learner):
        w = nl.fast("d*d")

        def forward(self, x):
            return x @ self.w.view(self.d, self.d)


class FlatAtOnce(Flat):
    schedule = nl.FullBatch(steps=2)


class Labelled(Recall):
    """A class for each token: a likelihood, beside a distance from one of several."""

    def loss(self, f, t):
        y, label = f(t.k), (2 * t.v[:, 0].abs()).long().clamp_max(self.d - 1)
        one = (label[:, None] == torch.arange(self.d)).to(y.dtype)
        return (
            F.cross_entropy(y, label, reduction="none") + (y - one).square().sum(-1) + y.gather(1, label[:, None])[:, 0]
        )


class LabelledAtOnce(Labelled):
    schedule = nl.FullBatch(steps=2)


class Lookup(Recall):
    """A memory of rows, each at a place that the key names."""

    class learner(nl.Learner):
        m = nl.dim(3)
        table = nl.fast("m", "d")

        def forward(self, x):
            places = (2 * x[:, 0].abs()).long().clamp_max(self.m - 1)
            return self.table[places] + F.embedding(places, self.table).sin()


class LookupOnline(Lookup):
    schedule = nl.Online()


class LookupAtOnce(Lookup):
    schedule = nl.FullBatch(steps=2)


class Regularised(Recall):
    """A part of each token's loss that is of the weights alone."""

    learner = Linear

    def loss(self, f, t):
        size = f.w.square().sum() + torch.linalg.vector_norm(f.w) + f.w.diagonal().abs().sum()
        return (f(t.k) - t.v).square().sum(-1) + 0.1 * size


class RegularisedAtOnce(Regularised):
    schedule = nl.FullBatch(steps=2)


class Tied(Recall):
    """A vector and a matrix of the learner's, held to one another."""

    class learner(nl.Learner):
        w, b = nl.fast("d", "d"), nl.fast("d")

        def forward(self, x):
            return x @ self.w + self.b

    def loss(self, f, t):
        return (f(t.k) - t.v).square().sum(-1) + 0.1 * (torch.outer(f.b, f.b) - f.w).square().sum()


class Slots(Recall):
    """Weights assigned by the held learner, which reads through a product of tokens with a slow weight."""

    class learner(nl.Learner):
        s, keys = nl.fast("d", "d"), nl.slow("d", "d")

        def forward(self, x):
            return x @ self.keys @ self.s.T

    def loss(self, f, t):
        return (f.held(t.k).softmax(-1)[..., None] * (f.s - t.v[:, None]).square()).sum((-2, -1))


class SlotsAtOnce(Slots):
    schedule = nl.FullBatch(steps=2)


class SlotsOfSquares(SlotsAtOnce):
    """What depends on slow weights alone, beside a held learner."""

    class learner(nl.Learner):
        s, keys = nl.fast("d", "d"), nl.slow("d", "d")

        def forward(self, x):
            return x @ (self.keys @ self.keys.T) @ self.s.T


class RegularisedInChunks(Regularised):
    schedule = nl.Chunked(4, "apply-update")


LOOPS = [
    Lookup,
    LookupOnline,
    LookupAtOnce,
    Labelled,
    LabelledAtOnce,
    Regularised,
    RegularisedAtOnce,
    RegularisedInChunks,
    Tied,
    Slots,
    SlotsAtOnce,
    SlotsOfSquares,
    Rotated,
    Normed,
    Reconstruct,
    Self,
    SelfOnline,
    SelfInBatches,
    Delta,
    Shallow,
    Nothing,
    Masked,
    Mixture,
    Whole,
    WholeAtOnce,
    Bits,
    Zeros,
    Inverted,
    Flat,
    FlatAtOnce,
]


COUNTING = [Counted, CountedOnline, CountedInChunks, CountedInBatches, CountedAtOnce, CountedWeights]
