"""flash-linear-attention's naive functions, written out as recurrences in plain PyTorch, to record more cases.

Every function takes its arguments by name, heads first ([B, H, T, *]), and gives its outputs by name. Nothing of
nestloop is used; gradients of the fast weights are written out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Named = dict[str, Tensor]
Settings = dict[str, Any]


def outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


def row(x: Tensor, state: Tensor) -> Tensor:
    """x S, one row a head."""
    return (x[..., None, :] @ state)[..., 0, :]


def start(a: Named, name: str = "S0") -> Tensor:
    k, v = a["k"], a["v"]
    return a[name] if name in a else k.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1])


def scale(a: Named, settings: Settings) -> float:
    given = settings.get("scale")
    return a["q"].shape[-1] ** -0.5 if given is None else given


def scan(a: Named, settings: Settings, step: Callable[[Tensor, Named], Tensor]) -> Named:
    """S <- step(S, the token's arguments), o = q S * scale."""
    state, outputs = start(a), []
    for index in range(a["q"].shape[2]):
        token = {name: t[:, :, index] for name, t in a.items() if name != "S0"}
        state = step(state, token)
        outputs.append(row(token["q"], state) * scale(a, settings))
    return {"o": torch.stack(outputs, 2), "S": state}


def kept(g: Tensor, state: Tensor) -> Tensor:
    """The state after a log decay per head, or per key channel."""
    return (g[..., None, None] if g.ndim == 2 else g[..., None]).exp() * state


def linear(a: Named, s: Settings) -> Named:
    return scan(a, s, lambda state, t: state + outer(t["k"], t["v"]))


def decayed(a: Named, s: Settings, name: str = "g") -> Named:
    return scan(a, s, lambda state, t: kept(t[name], state) + outer(t["k"], t["v"]))


def retention(a: Named, s: Settings) -> Named:
    gamma = 1 - 2.0 ** (-5 - torch.arange(a["q"].shape[1], dtype=a["q"].dtype))
    return scan(a, s, lambda state, t: gamma[:, None, None] * state + outer(t["k"], t["v"]))


def delta(a: Named, s: Settings) -> Named:
    """The delta rule at the decayed state; a rate per head or per value channel, fewer key heads than value heads."""
    group = a["v"].shape[1] // a["k"].shape[1]
    a = {**a, **{name: a[name].repeat_interleave(group, 1) for name in ("q", "k")}}

    def step(state: Tensor, t: Named) -> Tensor:
        state = kept(t["g"], state) if "g" in t else state
        beta = t["beta"][..., None] if t["beta"].ndim == 2 else t["beta"]
        return state + outer(t["k"], beta * (t["v"] - row(t["k"], state)))

    return scan(a, s, step)


def product(a: Named, s: Settings) -> Named:
    """Several delta steps a token, which decays once; the scale is ignored."""
    tokens = a["q"].shape[2]
    count = a["k"].shape[2] // tokens
    split = {name: a[name].unflatten(2, (tokens, count)) for name in ("k", "v", "beta")}

    def step(state: Tensor, t: Named) -> Tensor:
        state = kept(t["g"], state) if "g" in t else state
        for j in range(count):
            k, v, beta = t["k"][:, :, j], t["v"][:, :, j], t["beta"][:, :, j]
            state = state + outer(k, beta[..., None] * (v - row(k, state)))
        return state

    return scan({**a, **split}, {"scale": 1.0}, step)


def comba(a: Named, s: Settings, before: bool) -> Named:
    def step(state: Tensor, t: Named) -> Tensor:
        after = kept(t["g"], state)
        error = t["v"] - row(t["p"], after if before else state)
        return after + outer(t["k"], t["beta"][..., None] * error)

    return scan(a, s, step)


def gdn2(a: Named, s: Settings) -> Named:
    if "beta" in a:
        return delta(a, s)

    def step(state: Tensor, t: Named) -> Tensor:
        state = kept(t["g"], state)
        return state + outer(t["k"], t["w"] * t["v"] - row(t["b"] * t["k"], state))

    return scan(a, s, step)


def preconditioned(a: Named, s: Settings) -> Named:
    group = a["v"].shape[1] // a["k"].shape[1]
    history = a.get("A0", a["k"].new_zeros(a["k"].shape[0], a["k"].shape[1], a["k"].shape[-1]))
    k, written = F.normalize(a["k"], dim=-1), []
    for index in range(k.shape[2]):
        square = a["beta_atk"][:, :, index, None] * k[:, :, index].square()
        history = a["g_atk"][:, :, index, None].exp() * history + square
        r = (history + 1e-6).log() + 0.2
        written.append(k[:, :, index] * 1.5 ** (-r / (1 + r.abs())))
    shared = {"q": F.normalize(a["q"], dim=-1), "k": k, "written": torch.stack(written, 2)}
    rest: Named = {name: t for name, t in a.items() if name in ("v", "g", "beta", "S0")}

    def step(state: Tensor, t: Named) -> Tensor:
        state = kept(t["g"], state)
        return state + outer(t["written"], t["beta"][..., None] * (t["v"] - row(t["k"], state)))

    wide = {name: t.repeat_interleave(group, 1) for name, t in shared.items()}
    return {**scan(rest | wide, s, step), "A": history}


def low_rank(a: Named, s: Settings) -> Named:
    def step(state: Tensor, t: Named) -> Tensor:
        after = kept(t["gk"], state) if "gk" in t else state
        return after + outer(t["k"], t["v"]) + outer(t["beta"], row(t["alpha"], state))

    return scan(a, s, step)


def mesa(a: Named, s: Settings, steps: int = 0) -> Named:
    """Mesa, solved exactly, or by `steps` of conjugate gradients from zero."""
    lamb, outputs = a["lamb"], []
    kv = start(a, "h_kv_init")
    kk = a["h_kk_init"] if "h_kk_init" in a else kv.new_zeros(*kv.shape[:2], kv.shape[2], kv.shape[2])
    for index in range(a["q"].shape[2]):
        q, k, v, g, beta = (a[name][:, :, index] for name in ("q", "k", "v", "g", "beta"))
        kk = kept(g, kk) + outer(beta[..., None] * k, k)
        kv = kept(g, kv) + outer(beta[..., None] * k, v)
        if not steps:
            outputs.append(row(torch.linalg.solve(kk + torch.diag_embed(lamb), q), kv))
            continue
        x, r, p = torch.zeros_like(q), q, q
        for _ in range(steps):
            image = row(p, kk) + lamb * p
            old = (r * r).sum(-1, keepdim=True)
            rate = old / ((p * image).sum(-1, keepdim=True) + 1e-5)
            x, r = x + rate * p, r - rate * image
            p = r + (r * r).sum(-1, keepdim=True) / (old + 1e-5) * p
        outputs.append(row(x, kv))
    return {"o": torch.stack(outputs, 2), "h_kk": kk, "h_kv": kv}


def norm_gradient(y: Tensor, target: Tensor, w: Tensor, b: Tensor, eps: float, right: bool) -> tuple[Tensor, Tensor]:
    """LN(y), and the gradient of |LN(y) - target|^2 / 2 by y: right, or as fla's titans has it."""
    d = y.shape[-1]
    std = (y.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    unit = (y - y.mean(-1, keepdim=True)) / std
    r = w * (w * unit + b - target)
    mixed = r.sum(-1, keepdim=True) + unit * (r * unit).sum(-1, keepdim=True)
    return w * unit + b, (d * r - mixed) / (std * d) if right else d * r - mixed / (std * d)


def whole_chunks(a: Named, size: int, gates: tuple[str, ...]) -> Named:
    """Zeros up to a whole chunk; the last of them has the gates of the last token."""
    more = -a["q"].shape[2] % size
    made = dict(a)
    for name in ("q", "k", "v", *gates):
        zeros = torch.zeros_like(a[name][:, :, :1]).repeat_interleave(more, 2)
        if more and name in gates:
            zeros = torch.cat([zeros[:, :, 1:], a[name][:, :, -1:]], 2)
        made[name] = torch.cat([a[name], zeros], 2)
    return made


def ttt(a: Named, s: Settings) -> Named:
    size, eps, tokens = s.get("mini_batch_size", 16), s.get("eps", 1e-6), a["q"].shape[2]
    w, b = (a[name][:, None, :] for name in ("w", "b"))
    h, hb = start(a), a.get("hb0", a["v"].new_zeros(*a["v"].shape[:2], 1, a["v"].shape[-1]))
    a, outputs = whole_chunks(a, size, ("eta",)), []
    for first in range(0, a["q"].shape[2], size):
        q, k, v, eta = (a[name][:, :, first : first + size] for name in ("q", "k", "v", "eta"))
        _, gradient = norm_gradient(k @ h + hb, v - k, w, b, eps, right=True)
        for i in range(size):
            wi = h - eta[:, :, i, :, None] * (k[:, :, : i + 1].mT @ gradient[:, :, : i + 1])
            bi = hb - eta[:, :, i, :, None] * gradient[:, :, : i + 1].sum(2, keepdim=True)
            y = q[:, :, i : i + 1] * scale(a, s) @ wi + bi
            outputs.append(y + norm_gradient(y, y, w, b, eps, right=True)[0])
        h, hb = wi, bi
    return {"o": torch.cat(outputs, 2)[:, :, :tokens], "S": h, "hb": hb}


def titans(a: Named, s: Settings) -> Named:
    size, eps, tokens = s.get("chunk_size", 16), s.get("eps", 1e-6), a["q"].shape[2]
    w, b = (a[name][:, None, :] for name in ("w", "b"))
    memory = start(a)
    momentum, anchor, outputs = torch.zeros_like(memory), memory, []
    a = whole_chunks(a, size, ("theta", "alpha", "eta"))
    for i in range(a["q"].shape[2]):
        q, k, v, theta, alpha, eta = (a[n][:, :, i : i + 1] for n in ("q", "k", "v", "theta", "alpha", "eta"))
        anchor = memory if i % size == 0 else anchor
        _, gradient = norm_gradient(k @ anchor, v - k, w, b, eps, right=False)
        momentum = eta * momentum - 2 * theta * (k.mT @ gradient)
        memory = (1 - alpha) * memory + momentum
        y = q @ memory
        outputs.append(y + norm_gradient(y, y, w, b, eps, right=True)[0])
    return {"o": torch.cat(outputs, 2)[:, :, :tokens], "S": memory}
