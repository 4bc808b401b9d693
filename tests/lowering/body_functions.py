"""PyTorch's functions as people write them in views, learners, losses and read-outs; those that no op stands for."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[[Tensor, Tensor], Tensor]


def even(x: Tensor) -> Tensor:
    """Rows of an even number of features."""
    return x if x.shape[-1] % 2 == 0 else torch.cat([x, x[:, :1]], -1)


def fitted(x: Tensor, width: int) -> Tensor:
    """Rows of so many features, from rows of any."""
    return x if x.shape[-1] == width else x.repeat(1, -(-width // x.shape[-1]))[:, :width]


def labels(x: Tensor, count: int) -> Tensor:
    """A whole number for each row, of so many."""
    return (2 * x[:, 0].abs()).long().clamp_max(count - 1)


def _assigned(x: Tensor, y: Tensor) -> Tensor:
    made = x.clone()
    made[:, 0] = y[:, 0]
    made[:, 1:] *= 0.5
    return made


def _ones(x: Tensor) -> Tensor:
    """One per feature, whatever the tokens."""
    return torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)


def _scattered(x: Tensor, y: Tensor) -> Tensor:
    a, b = even(x).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * b, a - b], -1).flatten(1)


def _rope(x: Tensor, y: Tensor) -> Tensor:
    a, b = even(x).chunk(2, -1)
    angle = torch.arange(a.shape[-1], dtype=x.dtype, device=x.device) + 1
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


# Of rows x and y, [n, c] each, whatever n and c: rows [n, any].
POINTWISE: dict[str, Function] = {
    "abs": lambda x, y: x.abs(),
    "acos": lambda x, y: torch.acos(0.9 * torch.tanh(x)),
    "addcdiv": lambda x, y: torch.addcdiv(x, y, 1 + x.square(), value=0.3),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.3),
    "asinh": lambda x, y: torch.asinh(x),
    "atan2": lambda x, y: torch.atan2(x, 1 + y.abs()),
    "celu": lambda x, y: F.celu(x, 0.5),
    "clamp": lambda x, y: x.clamp(-0.5, 0.8),
    "clamp by tensors": lambda x, y: torch.clamp(x, -y.abs() - 0.1, y.abs() + 0.1),
    "clip": lambda x, y: torch.clip(x, max=0.4) + y.clamp_min(-0.2),
    "copysign": lambda x, y: torch.copysign(x, y) + torch.copysign(y, -0.0),
    "cosh": lambda x, y: 0.3 * torch.cosh(x.tanh()),
    "dist": lambda x, y: (x - y).pow(2),
    "div": lambda x, y: x / (y.square() + 0.5),
    "erf": lambda x, y: torch.erf(x) * y,
    "exp": lambda x, y: torch.exp(-x.abs()) - torch.exp2(-y.square()),
    "expm1": lambda x, y: torch.expm1(x.tanh()),
    "float power": lambda x, y: (x.abs() + 0.3) ** 1.5,
    "fmod": lambda x, y: torch.fmod(x, 0.7) + x % 0.6,
    "frac": lambda x, y: x.frac(),
    "gelu": lambda x, y: F.gelu(x),
    "gelu tanh": lambda x, y: F.gelu(x, approximate="tanh"),
    "hardshrink": lambda x, y: F.hardshrink(x, 0.2),
    "hardswish": lambda x, y: F.hardswish(3 * x),
    "hardtanh": lambda x, y: F.hardtanh(x),
    "hypot": lambda x, y: torch.hypot(x, y + 2),
    "leaky relu": lambda x, y: F.leaky_relu(x, 0.2),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "lerp by a tensor": lambda x, y: torch.lerp(x, y, torch.sigmoid(x)),
    "log": lambda x, y: (x.square() + 0.1).log() * 0.3,
    "log1p": lambda x, y: torch.log1p(x.abs()),
    "log sigmoid": lambda x, y: F.logsigmoid(x),
    "logaddexp": lambda x, y: torch.logaddexp(x, y),
    "logit": lambda x, y: torch.logit(torch.sigmoid(x), eps=1e-4),
    "masked fill": lambda x, y: x.masked_fill(y > 0.3, 0.2),
    "maximum": lambda x, y: torch.maximum(x, y) - torch.minimum(x, 0.3 * y),
    "mish": lambda x, y: F.mish(x),
    "nan to num": lambda x, y: x.nan_to_num(),
    "neg": lambda x, y: -x + 0.5,
    "pow": lambda x, y: x.pow(3) * 0.3,
    "pow of a tensor": lambda x, y: torch.pow(x.square() + 0.5, y.tanh()),
    "reciprocal": lambda x, y: (1 + x.square()).reciprocal(),
    "relu squared": lambda x, y: F.relu(x).square(),
    "relu6": lambda x, y: F.relu6(3 * x),
    "rsqrt": lambda x, y: x * torch.rsqrt(y.square() + 0.3),
    "rsub": lambda x, y: torch.rsub(x, 1.0),
    "selu": lambda x, y: F.selu(x),
    "sgn": lambda x, y: x.sgn() * y,
    "sigmoid": lambda x, y: x.sigmoid(),
    "sign": lambda x, y: torch.sign(x) * x.abs().sqrt().clamp_min(0.1),
    "silu": lambda x, y: F.silu(x) * y,
    "sinc": lambda x, y: torch.sinc(x),
    "sinh": lambda x, y: 0.3 * torch.sinh(x.tanh()) + torch.sin(y) * x.cos(),
    "softplus": lambda x, y: F.softplus(x, beta=2.0, threshold=5.0),
    "softshrink": lambda x, y: F.softshrink(x, 0.2),
    "softsign": lambda x, y: F.softsign(x),
    "sqrt": lambda x, y: torch.sqrt(x.square() + 0.2),
    "tan": lambda x, y: torch.tan(0.5 * x.tanh()) + torch.atan(y),
    "tanhshrink": lambda x, y: F.tanhshrink(x),
    "threshold": lambda x, y: F.threshold(x, 0.1, 0.05),
    "true divide": lambda x, y: torch.true_divide(x, 3),
    "trunc": lambda x, y: x - 0.2 * torch.trunc(4 * x) + 0.1 * (3 * y).round(),
    "where": lambda x, y: torch.where(x > y, x, 0.5 * y),
    "where of a number": lambda x, y: torch.where((x > 0) & (y < 1), x, 0.0),
    "xlogy": lambda x, y: torch.xlogy(x.square(), y.square() + 0.1),
    "detach": lambda x, y: x * y.detach().sigmoid(),
}
NORMS: dict[str, Function] = {
    "cosine": lambda x, y: x * F.cosine_similarity(x, y + 0.1, dim=-1, eps=1e-3)[:, None],
    "instance norm": lambda x, y: F.instance_norm(torch.stack([x, y], 1).repeat(1, 1, 2), eps=1e-2).flatten(1),
    "group norm": lambda x, y: F.group_norm(torch.cat([x, y], -1).repeat(1, 2), 2, eps=1e-2),
    "layer norm": lambda x, y: F.layer_norm(x, x.shape[-1:], eps=1e-2),
    "layer norm of two axes": lambda x, y: F.layer_norm(torch.stack([x, y], 1), (2, x.shape[-1]), eps=1e-2).flatten(1),
    "layer norm with weights": lambda x, y: F.layer_norm(x, x.shape[-1:], _ones(x), eps=1e-2),
    "log softmax": lambda x, y: x.log_softmax(-1),
    "logsumexp": lambda x, y: x - x.logsumexp(-1, keepdim=True),
    "normalize": lambda x, y: F.normalize(x + 0.3, dim=-1, eps=1e-3),
    "normalize p": lambda x, y: F.normalize(x + 0.3, p=1.0, dim=-1),
    "rms norm": lambda x, y: F.rms_norm(x, x.shape[-1:], eps=1e-2),
    "softmax": lambda x, y: x.softmax(-1),
    "softmax of parts": lambda x, y: even(x).unflatten(-1, (2, -1)).softmax(1).flatten(1),
    "softmin": lambda x, y: F.softmin(x, -1),
    "std": lambda x, y: x / (x.std(-1, keepdim=True, correction=0) + 0.5),
    "vector norm": lambda x, y: x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 0.5),
    "smallest": lambda x, y: x + 1e6 * torch.finfo(x.dtype).eps * y.to(x.dtype),
    "by dtype": lambda x, y: x * (1.5 if y.dtype == torch.float64 else -1.5),
    "whole": lambda x, y: x * (3 * y).long() + (2 * x).int() % 3 + (9 * y).int() // 2,
    "whole quotients": lambda x, y: (
        x * torch.div(x, 0.3, rounding_mode="floor") + torch.div(y, x.abs() + 0.7, rounding_mode="trunc")
    ),
    "var": lambda x, y: (x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 0.1),
    "var mean": lambda x, y: x * torch.var_mean(y, -1, correction=0, keepdim=True)[0] + x.mean(-1, keepdim=True),
}
REDUCTIONS: dict[str, Function] = {
    "argmax": lambda x, y: x * (1 + y.argmax(-1, keepdim=True)) + y.argmin(-1)[:, None],
    "all": lambda x, y: x * (y > -0.5).all(-1, keepdim=True),
    "amax": lambda x, y: x - x.amax(-1, keepdim=True),
    "aminmax": lambda x, y: torch.stack(torch.aminmax(x, dim=-1), -1),
    "any": lambda x, y: x * (y > 0).any(-1)[:, None],
    "count nonzero": lambda x, y: x * (y > 0).count_nonzero(-1)[:, None],
    "cumsum": lambda x, y: x.cumsum(-1) * 0.5,
    "diff": lambda x, y: torch.diff(torch.cat([x, y], -1), dim=-1),
    "max": lambda x, y: torch.stack([x.max(-1).values, y.min(-1).values], -1),
    "mean": lambda x, y: x * y.mean(-1, keepdim=True),
    "mean of parts": lambda x, y: even(x).reshape(x.shape[0], -1, 2).mean(1),
    "mean of parts of len": lambda x, y: even(x).reshape(len(x), -1, 2).mean(-1),
    "nansum": lambda x, y: x - x.nansum(-1, keepdim=True),
    "norm": lambda x, y: (x + 0.3).norm(dim=-1, keepdim=True),
    "norm p": lambda x, y: x * torch.linalg.norm(y + 0.3, 3, -1, keepdim=True),
    "prod": lambda x, y: x.tanh().prod(-1)[:, None] + y,
    "quantile": lambda x, y: x.quantile(0.3, -1, keepdim=True) + y,
    "running largest": lambda x, y: x.cummax(-1)[0] * y.cummin(-1)[1] + y.cummin(-1)[0],
    "running product": lambda x, y: x.tanh().cumprod(-1) + y,
    "running logsumexp": lambda x, y: x.tanh().logcumsumexp(-1) * y,
    "median": lambda x, y: x - torch.cat([x, y], -1).median(-1, keepdim=True).values,
    "kth value": lambda x, y: x * torch.kthvalue(y, 1 + y.shape[-1] // 2, -1).values[:, None],
    "sort": lambda x, y: x.sort(-1).values * y,
    "sort downwards": lambda x, y: x * torch.argsort(y, -1, descending=True),
    "topk": lambda x, y: torch.cat([x.topk(1, -1).values, x * y.topk(min(2, y.shape[-1]), -1).indices[:, -1:]], -1),
    "smallest k": lambda x, y: torch.topk(x, max(1, x.shape[-1] - 1), -1, largest=False).values,
    "sum": lambda x, y: x.sum(-1)[:, None] * y,
    "sum of both": lambda x, y: torch.einsum("nc,nc->n", x, y).unsqueeze(1) + x,
}
PRODUCTS: dict[str, Function] = {
    "addbmm": lambda x, y: torch.baddbmm(x[:, :, None], x[:, :, None], y[:, None, :1], beta=0.3).flatten(1),
    "addmm": lambda x, y: torch.addmm(x, y, _ones(x).diag(), alpha=0.5, beta=0.7),
    "attention": lambda x, y: F.scaled_dot_product_attention(
        *(even(t).unflatten(-1, (2, -1)) for t in (x, y, x - y))
    ).flatten(1),
    "bilinear": lambda x, y: F.bilinear(x, y, torch.full((2, x.shape[-1], y.shape[-1]), 0.2, dtype=x.dtype)),
    "cdist": lambda x, y: torch.cdist(x + 0.1, torch.eye(x.shape[-1], dtype=x.dtype)) * y,
    "bmm": lambda x, y: torch.bmm(x[:, None, :], y[:, :, None] * x[:, None, :]).squeeze(1),
    "cross": lambda x, y: torch.linalg.cross(fitted(x, 3), fitted(y, 3)),
    "dot of rows": lambda x, y: (x * y).sum(-1, keepdim=True).expand(-1, x.shape[-1]),
    "einsum outer": lambda x, y: torch.einsum("ni,nj->nij", x, y).mean(1),
    "einsum quadratic": lambda x, y: torch.einsum("ni,nj,ni->nj", x, y, x),
    "einsum trace": lambda x, y: torch.einsum("nii->ni", x[:, :, None] * y[:, None, :]),
    "gram": lambda x, y: (x @ torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).tril()) * y,
    "inner": lambda x, y: torch.inner(x, _ones(y))[:, None] * y,
    "kron": lambda x, y: (x[:, :, None] * y[:, None, :2]).flatten(1),
    "linear": lambda x, y: F.linear(x, torch.ones(2, x.shape[-1], dtype=x.dtype, device=x.device).triu()),
    "matmul of rows": lambda x, y: (x[:, None] @ (y[:, :, None] * 0.5)).flatten(1) * x,
    "matrix of a row": lambda x, y: (even(x).view(x.shape[0], 2, -1).mT @ even(y).reshape(y.shape[0], 2, -1)).flatten(
        1
    ),
    "mv": lambda x, y: torch.mv(x, _ones(y))[:, None] + y,
    "outer": lambda x, y: x * torch.outer(y[:, 0], _ones(x)),
    "tensordot": lambda x, y: torch.tensordot(x, _ones(x).diag(), 1) * y,
    "vecdot": lambda x, y: torch.linalg.vecdot(x, y)[:, None] * x,
}
MOVEMENTS: dict[str, Function] = {
    "broadcast": lambda x, y: x[:, :1].broadcast_to(x.shape) * y,
    "cat": lambda x, y: torch.cat((x, y), dim=-1),
    "chunk": lambda x, y: even(x).chunk(2, dim=-1)[0] * even(y).chunk(2, -1)[1],
    "concat of a number": lambda x, y: torch.hstack([x, torch.ones_like(y[:, :1])]),
    "conv1d of channels": lambda x, y: F.conv1d(
        torch.stack([x, y], 1), torch.ones(2, 1, 2, dtype=x.dtype) * 0.4, groups=2, padding=1
    ).flatten(1),
    "conv1d": lambda x, y: F.conv1d(x[:, None], torch.tensor([[[0.2, -0.5, 0.4]]], dtype=x.dtype), padding=1)[:, 0],
    "diagonal": lambda x, y: torch.diagonal(x[:, :, None] * y[:, None, :], dim1=1, dim2=2),
    "diag embed": lambda x, y: torch.diag_embed(x).sum(1) * y,
    "expand": lambda x, y: x[:, None].expand(-1, 2, -1).reshape(x.shape[0], -1),
    "flip": lambda x, y: x.flip(-1) * y,
    "fliplr": lambda x, y: torch.fliplr(x),
    "gather": lambda x, y: x.gather(-1, labels(y, x.shape[-1])[:, None].expand(-1, 2)) * y[:, :1],
    "index select": lambda x, y: x.index_select(-1, torch.arange(x.shape[-1] - 1, -1, -1, device=x.device)) * y,
    "index": lambda x, y: x[:, torch.arange(x.shape[-1], device=x.device).flip(0)] * y,
    "assigned": _assigned,
    "put somewhere": lambda x, y: torch.zeros_like(x).scatter(-1, y.argsort(-1)[:, :2], x.topk(min(2, x.shape[-1]))[0]),
    "put in one place": lambda x, y: y.scatter(-1, labels(y, 2)[:, None] % y.shape[-1], x[:, :1]).scatter(
        1, labels(x, 1)[:, None], 0.3
    ),
    "added somewhere": lambda x, y: x.scatter_add(-1, labels(y, x.shape[-1])[:, None].expand(-1, 2), fitted(y, 2)),
    "added at places": lambda x, y: x.index_add(1, torch.arange(2) // 2, fitted(y, 2), alpha=0.5),
    "copied to places": lambda x, y: x.index_copy(1, torch.arange(1), y[:, :1]).index_fill(1, torch.arange(1), 0.5),
    "buckets": lambda x, y: x * torch.bucketize(y, torch.tensor([-0.5, 0.1, 0.7])),
    "sorted into": lambda x, y: x * torch.searchsorted(y.sort(-1)[0].contiguous(), x.contiguous(), right=True),
    "avg pool": lambda x, y: F.avg_pool1d(fitted(x, 4)[:, None], 2)[:, 0],
    "avg pool of a grid": lambda x, y: F.avg_pool2d(
        fitted(x, 6).view(-1, 1, 2, 3), 2, 1, padding=1, count_include_pad=False
    ).flatten(1),
    "max pool": lambda x, y: F.max_pool2d(fitted(x, 6).view(-1, 1, 2, 3).relu(), 2, 1, padding=1).flatten(1),
    "where the largest lie": lambda x, y: (
        fitted(x, 2) * F.max_pool2d(fitted(y, 4).view(-1, 1, 2, 2), 2, return_indices=True)[1].flatten(1)
    ),
    "pool to a size": lambda x, y: F.adaptive_avg_pool1d(fitted(x, 4).view(-1, 1, 4), 2).flatten(1),
    "pad around": lambda x, y: F.pad(x[:, None], (1, 1), mode="circular").flatten(1),
    "one of each row": lambda x, y: x * y[torch.arange(len(y)), labels(x, y.shape[-1])][:, None],
    "part of each row": lambda x, y: torch.stack([x, y], 1)[torch.arange(x.shape[0]), labels(y, 2)],
    "a mask as a list": lambda x, y: fitted(x, 3)[:, [True, False, True]] * y[:, :1],
    "places as a list": lambda x, y: x[:, [0, -1]] + torch.stack([x, y, x], 1)[:, [2, 1]].sum(1)[..., [-1]],
    "taken along": lambda x, y: torch.take_along_dim(x, y.argsort(-1), -1) * y,
    "one hot": lambda x, y: F.one_hot(labels(y, 3), 3) * x[:, :1],
    "numbers as lists": lambda x, y: (
        x[:, :1] * torch.tensor([0.1, 0.2]) + y[:, :1] * x.new_tensor([[0.3, -1]]) + torch.as_tensor([1, 0])
    ),
    "unfold": lambda x, y: fitted(x, 3).unfold(-1, 2, 1).mean(-1),
    "one of several": lambda x, y: x * (labels(y, 3)[:, None] == torch.arange(x.shape[-1], device=x.device)),
    "interleave": lambda x, y: x.repeat_interleave(2, dim=-1),
    "meshed": lambda x, y: (x.unsqueeze(-1) - y.unsqueeze(-2)).abs().mean(-1),
    "movedim": lambda x, y: torch.stack([x, y]).movedim(0, -1).flatten(1),
    "narrow": lambda x, y: x.narrow(-1, 0, 1) + y,
    "new zeros": lambda x, y: torch.cat([x, x.new_zeros(x.shape[0], 1), y.new_full((x.shape[0], 1), 0.5)], 1),
    "pad": lambda x, y: F.pad(x, (1, 1), value=0.3)[:, :-1],
    "pad a shift": lambda x, y: F.pad(x, (1, 0))[:, :-1] + y,
    "permute": lambda x, y: torch.stack([x, y], -1).permute(0, 2, 1).flatten(1),
    "repeat": lambda x, y: x.repeat(1, 2),
    "reshape": lambda x, y: even(x).reshape(x.shape[0], 2, -1).transpose(1, 2).reshape(x.shape[0], -1),
    "roll": lambda x, y: torch.roll(x, 1, -1) - y,
    "roll of several": lambda x, y: even(x).unflatten(-1, (2, -1)).roll((1, 1), (1, 2)).flatten(1),
    "rope": _rope,
    "rot90": lambda x, y: torch.rot90(torch.stack([x, y], 1), 1, (1, 2)).flatten(1),
    "scattered": _scattered,
    "select": lambda x, y: x.select(-1, -1)[:, None] * y,
    "split": lambda x, y: torch.cat(torch.split(torch.cat([x, y], -1), [1, 2 * x.shape[-1] - 1], dim=-1)[::-1], -1),
    "squeeze": lambda x, y: x.unsqueeze(1).squeeze(1) * y[..., None].squeeze(-1),
    "stack": lambda x, y: torch.stack((x, y), dim=1).sum(1),
    "steps": lambda x, y: x[:, ::2],
    "swapaxes": lambda x, y: torch.stack([x, y], 1).swapaxes(1, 2).reshape(x.shape[0], -1),
    "tensor split": lambda x, y: x.tensor_split(2, -1)[0] if x.shape[-1] > 1 else x,
    "tile": lambda x, y: x.tile((1, 2)),
    "tril": lambda x, y: torch.tril(x[:, :, None] * y[:, None, :]).sum(-1),
    "triu": lambda x, y: (x[:, :, None] + y[:, None, :]).triu(1).mean(1),
    "unbind": lambda x, y: torch.stack([x, y], 1).unbind(1)[1],
    "unflatten": lambda x, y: even(x).unflatten(-1, (-1, 2)).prod(-1),
    "glu": lambda x, y: F.glu(even(x), -1),
    "swiglu": lambda x, y: F.silu(even(x).chunk(2, -1)[0]) * even(x).chunk(2, -1)[1],
    "like": lambda x, y: x * torch.full_like(y, 0.5) + torch.ones_like(x),
}
KINDS = (POINTWISE, NORMS, REDUCTIONS, PRODUCTS, MOVEMENTS)
FUNCTIONS: dict[str, Function] = {name: function for kind in KINDS for name, function in kind.items()}

# Of a prediction and a target, [n, c] each: one number per token, [n].
LOSSES: dict[str, Function] = {
    "dot": lambda y, v: -(y * v).sum(-1),
    "squares": lambda y, v: 0.5 * (y - v).pow(2).sum(-1),
    "mse": lambda y, v: F.mse_loss(y, v, reduction="none").mean(-1),
    "l1": lambda y, v: F.l1_loss(y, v, reduction="none").sum(-1),
    "smooth l1": lambda y, v: F.smooth_l1_loss(y, v, reduction="none", beta=0.3).sum(dim=1),
    "huber": lambda y, v: F.huber_loss(y, v, reduction="none", delta=0.4).mean(1),
    "cross entropy": lambda y, v: F.cross_entropy(y, v.softmax(-1), reduction="none"),
    "cross entropy of labels": lambda y, v: F.cross_entropy(y, labels(v, y.shape[-1]), reduction="none"),
    "likelihood of labels": lambda y, v: F.nll_loss(y.log_softmax(-1), labels(v, y.shape[-1]), reduction="none"),
    "smoothed cross entropy": lambda y, v: F.cross_entropy(y, v.softmax(-1), reduction="none", label_smoothing=0.1),
    "binary cross entropy": lambda y, v: F.binary_cross_entropy(
        y.sigmoid().clamp(0.01, 0.99), v.sigmoid(), reduction="none"
    ).sum(-1),
    "logits": lambda y, v: F.binary_cross_entropy_with_logits(y, v.sigmoid(), reduction="none").sum(-1),
    "divergence": lambda y, v: F.kl_div(y.log_softmax(-1), v.softmax(-1), reduction="none").sum(-1),
    "log divergence": lambda y, v: F.kl_div(
        y.log_softmax(-1), v.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1),
    "poisson": lambda y, v: F.poisson_nll_loss(y.tanh(), v.abs(), reduction="none").mean(-1),
    "cosine": lambda y, v: 1 - F.cosine_similarity(y, v + 0.2, dim=-1, eps=1e-3),
    "lp": lambda y, v: ((y - v).abs() + 1e-3).pow(3).sum(-1) / 3,
    "log cosh": lambda y, v: torch.log(torch.cosh(y - v)).sum(-1),
    "hinge": lambda y, v: F.relu(1 - y * v.sign()).sum(-1),
    "soft margin": lambda y, v: F.soft_margin_loss(y, v.sign().detach(), reduction="none").mean(-1),
    "margin": lambda y, v: F.margin_ranking_loss(y, v, torch.ones_like(y), margin=0.2, reduction="none").sum(-1),
    "triplet": lambda y, v: F.triplet_margin_loss(y, v, v.flip(-1) + 0.3, reduction="none"),
    "gaussian": lambda y, v: F.gaussian_nll_loss(y, v, torch.full_like(y, 0.7), reduction="none").mean(-1),
    "learned gaussian": lambda y, v: F.gaussian_nll_loss(
        v, y.tanh(), y.square() + 0.2, full=True, eps=0.3, reduction="none"
    ).mean(-1),
    "norm of the error": lambda y, v: torch.linalg.vector_norm(y - v + 0.01, dim=-1),
    "pairwise": lambda y, v: F.pairwise_distance(y, v),
    "cosine embedding": lambda y, v: F.cosine_embedding_loss(y, v, v[:, 0].sign().detach(), 0.1, reduction="none"),
    "embedding hinge": lambda y, v: F.hinge_embedding_loss(y, v.sign().detach(), reduction="none").sum(-1),
    "two heads": lambda y, v: F.mse_loss(y, v, reduction="none").mean(-1) - 0.3 * torch.linalg.vecdot(y, v),
    "entropy": lambda y, v: -(y.softmax(-1) * y.log_softmax(-1)).sum(-1) - (y * v).sum(-1),
}

# Of rows x and y: what no op stands for.
REFUSED: dict[str, Function] = {
    "rrelu": lambda x, y: F.rrelu(x),
    "bessel": lambda x, y: torch.special.i0(x),
    "a mask": lambda x, y: torch.where(y > 0, x, x[y > 0].mean()),
    "two places at once": lambda x, y: x[labels(y, 1)[:, None], labels(x, 1)],
    "a window over the edge": lambda x, y: F.avg_pool1d(fitted(x, 3)[:, None], 2, ceil_mode=True)[:, 0],
}
