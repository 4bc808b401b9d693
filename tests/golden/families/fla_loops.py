"""Loops that flash-linear-attention's naive functions compute and no paper has: as coded, defects included."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import nestloop as nl
from nestloop import zoo
from tests.golden.case import Case

Tensors = dict[str, Tensor]
CHUNK = ("mini_batch_size", "mini-batch", "mini_batch", "chunk_size", "chunk")


def count(case: Case, names: Sequence[str], default: int) -> int:
    """A number among the file's settings, or in its note; else the function's default."""
    for name in names:
        noted = re.search(rf"{name}\D{{0,3}}(\d+)", str(case.settings.get("note", "")), re.IGNORECASE)
        if name in case.settings or noted:
            return int(case.settings[name] if name in case.settings else noted[1])  # type: ignore[index]
    return default


class DecayedComba(zoo.Comba):
    """naive_recurrent_comba: the error is that of the decayed state."""

    optimizer = nl.SGD(lr=zoo.Comba.beta, log_decay=zoo.Comba.g, decay_order="before")


class UnscaledGatedDeltaNet(zoo.GatedDeltaNet):
    """naive_recurrent_gated_delta_product with one step a token: it has no scale."""

    def readout(self, f, t):
        return f(t.q)


def mesa_net(steps: int) -> Any:
    """MesaNet with another number of conjugate gradient steps."""

    class MesaNet(zoo.Mesa):
        def readout(self, f, t):
            return f(nl.conjugate_gradient(lambda x: x @ f.kk + self.lamb * x, t.q, steps, eps=1e-5))

    return MesaNet


class Biased(nl.Learner):
    """x W + b, from zero."""

    w = nl.fast("d", "d", init="zeros", learned=False)
    b = nl.fast("d", init="zeros", learned=False)

    def forward(self, x):
        return x @ self.w + self.b


class Unbiased(nl.Learner):
    """x W, from zero."""

    w = nl.fast("d", "d", init="zeros", learned=False)

    def forward(self, x):
        return x @ self.w


def ttt(case: Case, views: Tensors) -> Any:
    """chunk_ttt_linear_ref: the rate is the query's, W_i = W_0 - eta_i sum_{j <= i} G_j; o = y + LN(y)."""
    eps = float(case.settings.get("eps", 1e-6))

    class TTT(nl.Loop):
        learner, schedule = Biased, nl.Causal(count(case, CHUNK, 16))
        k, q, v = nl.view("d"), nl.view("d"), nl.view("d")
        eta, scale, shift = nl.gate(), nl.slow("d"), nl.slow("d")
        optimizer = nl.SGD(lr=1.0, scale=eta)

        def loss(self, f, t):
            y = F.layer_norm(f(t.k), (self.d,), self.scale, self.shift, eps=eps)
            return 0.5 * (y - (t.v - t.k)).square().sum(-1)

        def readout(self, f, t):
            y = f(t.q * self.d**-0.5)
            return y + F.layer_norm(y, (self.d,), self.scale, self.shift, eps=eps)

    return TTT


def titans(case: Case, views: Tensors) -> Any:
    """chunk_titans_linear_ref, whose LayerNorm gradient divides two of its three terms by std d, and not the first."""
    eps = float(case.settings.get("eps", 1e-6))

    class Titans(nl.Loop):
        learner, schedule = Unbiased, nl.Causal(count(case, CHUNK, 16))
        k, q, v = nl.view("d"), nl.view("d"), nl.view("d")
        theta, alpha, eta = nl.gate(), nl.gate(), nl.gate()
        scale, shift = nl.slow("d"), nl.slow("d")
        optimizer = nl.SGD(lr=theta, momentum=eta, decay=alpha)

        def loss(self, f, t):
            y = f.held(t.k)
            std = (y.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
            unit = (y - y.mean(-1, keepdim=True)) / std
            r = self.scale * (self.scale * unit + self.shift - (t.v - t.k))
            mixed = r.sum(-1, keepdim=True) + unit * (r * unit).sum(-1, keepdim=True)
            return 2 * (f(t.k) * (self.d * r - mixed / (std * self.d))).sum(-1)

        def readout(self, f, t):
            y = f(t.q)
            return y + F.layer_norm(y, (self.d,), self.scale, self.shift, eps=eps)

    return Titans


def padded(*gates: str) -> Callable[[Case, Tensors], Tensors]:
    """Whole chunks, as the functions make them: zeros, the last of them with the gates of the last token.

    The gates leave as [B, H, T]; alpha, the share that is forgotten, leaves as the one that is kept.
    """

    def pad(case: Case, views: Tensors) -> Tensors:
        views = {n: v.reshape(*v.shape[:3], 1) if n in gates else v for n, v in views.items()}
        more = -views["q"].shape[2] % count(case, CHUNK, 16)
        found = {name: F.pad(view, (0, 0, 0, more)) for name, view in views.items()}
        for name in gates if more else ():
            last = views[name][:, :, -1:]
            found[name] = torch.cat([found[name][:, :, :-1], last], 2)
        found |= {name: found[name].squeeze(-1) for name in gates}
        return {**found, "alpha": 1 - found["alpha"]} if "alpha" in found else found

    return pad
