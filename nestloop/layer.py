"""A loop as an `nn.Module`: it makes the views from x, runs the op, projects the output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nestloop.compiled import CompiledLoop, spec_of
from nestloop.errors import InputError
from nestloop.lang import init
from nestloop.lang.declare import Gate, Slow, View, caller
from nestloop.lang.loop import Loop, LoopSpec


class Branch(nn.Module):
    """One loop of a layer, without the output projection: x [B, N, D] -> [B, N, H * dz].

    Submodules and parameters: `views.NAME` a linear map per projected view and gate (rows are head-major),
    `fast.NAME` [H, *dims] initial fast weights, `slow.NAME` [H, *dims], or [*dims] when shared.
    """

    def __init__(self, loop: type[Loop], sizes: dict[str, int], backend: str, inductor: bool) -> None:
        super().__init__()
        spec = spec_of(loop)
        self.heads = spec.heads or sizes["H"]
        self.sizes = {**spec.default_dims, **sizes, "H": self.heads}
        self.op = CompiledLoop(loop, backend, inductor, **{n: s for n, s in self.sizes.items() if n in spec.dim_names})
        self.features = math.prod(self.op.prepare(self.heads))
        projected = {name: view for name, view in self.spec.inputs.items() if not _is_token(view)}
        self.views = nn.ModuleDict({name: self._projection(view) for name, view in projected.items()})
        self.fast, self.slow = nn.ParameterDict(), nn.ParameterDict()
        for name, weight in self.spec.weights.items():
            shared = isinstance(weight, Slow) and weight.shared
            shape = [expr.size(self.sizes, weight.where) for expr in weight.dims]
            value = init.fill(torch.empty(shape if shared else [self.heads, *shape]), weight.init, not shared)
            learned = isinstance(weight, Slow) or weight.learned
            (self.fast if name in self.spec.fast else self.slow)[name] = nn.Parameter(value, learned)

    @property
    def spec(self) -> LoopSpec:
        """The loop's declaration."""
        return self.op.spec

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "op" in state:  # a copy, or an unpickled layer, is lowered again now, not in the middle of a traced call
            self.op.prepare(self.heads)

    def _projection(self, view: View | Gate) -> nn.Linear:
        width = self.sizes["D"]
        shared, gain = (view.shared, view.gain) if isinstance(view, View) else (False, 1.0)
        features = math.prod(expr.size(self.sizes, view.where) for expr in view.dims)
        linear = nn.Linear(width, features if shared else self.heads * features, bias=view.bias)
        nn.init.normal_(linear.weight, std=gain / math.sqrt(width))
        if view.bias:
            nn.init.zeros_(linear.bias)
        return linear

    def make_views(self, x: Tensor) -> dict[str, Tensor]:
        """Every view and gate from x [B, N, D]: [B, H, N, *dims], shared ones [B, N, *dims]."""
        made = {}
        for name, view in self.spec.inputs.items():
            if _is_token(view):
                made[name] = x
                continue
            flat = self.views[name](x)  # [B, N, (H *) features]
            dims = [expr.size(self.sizes, view.where) for expr in view.dims]
            if isinstance(view, View) and view.shared:
                made[name] = flat.reshape(*flat.shape[:2], *dims)
                continue
            per_head = flat.reshape(*flat.shape[:2], self.heads, *dims).transpose(1, 2)  # [B, H, N, *dims]
            made[name] = view.activation(per_head) if isinstance(view, Gate) else per_head
        return made

    def order(self, tokens: int, device: torch.device) -> Tensor | None:
        """The order of a shuffled loop [H, N]: fresh from torch's generator in training, fixed in evaluation."""
        if not self.spec.schedule.needs_order or self.spec.is_kernel_estimator:
            return None
        if self.training:
            return torch.rand(self.heads, tokens, device=device).argsort(-1)
        # Evaluation wants one order, the same on every device and in every process: fractional parts of a quadratic in
        # the position, whose coefficient is irrational, are spread evenly and repeat no batch between heads.
        position = torch.arange(1, tokens + 1, device=device, dtype=torch.float64)
        head = torch.arange(1, self.heads + 1, device=device, dtype=torch.float64)[:, None]
        return torch.frac(position * (position + 7 * head) * ((math.sqrt(5) - 1) / 2)).argsort(-1)

    def mix(
        self, x: Tensor, order: Tensor | None, return_losses: bool, dims: dict[str, int]
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, N, D] -> [B, N, H * dz], and the inner losses [B, H, steps + 1] where asked for."""
        if order is None:
            order = self.order(x.shape[1], x.device)
        weights = {**dict(self.fast.items()), **dict(self.slow.items())}
        own = {name: size for name, size in dims.items() if name in self.spec.dim_names}
        z, _, losses = self.op.run(self.make_views(x), weights, None, order, return_losses, own)
        return z.transpose(1, 2).flatten(2), losses


class Layer(Branch):
    """A token mixer that learns while it reads: x [B, N, D] -> [B, N, D], in the place of attention.

    Args:
        loop: a declared loop, or several, whose outputs are concatenated before one projection. The parameters of
            one loop are the layer's own (`fast.w1`); those of several are in `branches`.
        width: D, features per token.
        heads: H. The dim `d` is width / heads unless given.
        backend, inductor: as in `nl.compile`.
        bias: whether the output projection has a bias.
        dims: sizes of the loop's other dims.

    Raises:
        MissingPartError: `loop` is no declared loop.
        InputError: width or heads below 1; width not divisible by heads and no `d` given; a size of an unknown dim.
        UnresolvedDimError: a dim of the loop without a size.
        CompileError: a body that cannot be compiled for these sizes.
    """

    def __init__(
        self,
        loop: type[Loop] | Sequence[type[Loop]],
        width: int,
        heads: int,
        *,
        backend: str = "auto",
        inductor: bool = False,
        bias: bool = True,
        **dims: int,
    ) -> None:
        for name, size in (("width", width), ("heads", heads)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise InputError(
                    f"The {name} of a layer is not a positive whole number.",
                    where=caller(),
                    given=f"{name}={size!r}",
                    need="1 or more",
                    fix="write nl.Layer(..., width=384, heads=6)",
                )
        loops = list(loop) if isinstance(loop, Sequence) and loop else [loop]
        self._check_dims([spec_of(part) for part in loops], dims)
        if "d" not in dims and width % heads:
            raise InputError(
                "The width does not divide into heads.",
                where=caller(),
                given=f"width={width}, heads={heads}",
                need="a width that is a multiple of heads, or the size of d",
                fix=f"write nl.Layer(..., width={max(width // heads, 1) * heads}, heads={heads}), or pass d=...",
            )
        sizes = {"d": width // heads, **dims, "D": width, "H": heads}
        if isinstance(loop, Sequence):
            nn.Module.__init__(self)
            self.branches = nn.ModuleList(Branch(part, sizes, backend, inductor) for part in loop)
        else:
            super().__init__(loop, sizes, backend, inductor)
        self.width = width
        self.out = nn.Linear(sum(part.heads * part.features for part in self.parts), width, bias=bias)
        nn.init.xavier_uniform_(self.out.weight)
        if bias:
            nn.init.zeros_(self.out.bias)

    @staticmethod
    def _check_dims(specs: Sequence[LoopSpec], dims: dict[str, int]) -> None:
        known = {"d", "D"}.union(*(spec.dim_names for spec in specs))
        for name in dims:
            if name not in known:
                raise InputError(
                    f"No loop of the layer has a dim '{name}'.",
                    where=caller(),
                    given=f"{name}={dims[name]!r}",
                    need=f"one of {', '.join(sorted(known - {'D'}))}",
                    fix=f"remove it, or declare {name} = nl.dim() in a loop",
                )

    @property
    def parts(self) -> Sequence[Branch]:
        """The branches: of one loop, the layer itself."""
        return list(self.branches) if "branches" in self._modules else [self]  # type: ignore[arg-type]

    def forward(
        self, x: Tensor, order: Tensor | None = None, return_losses: bool = False, **dims: int
    ) -> Tensor | tuple[Tensor, Any]:
        """Mix the tokens.

        Args:
            x: [B, N, D].
            order: int64 [H, N] or [B, H, N] for a shuffled loop; None draws one (training) or takes the fixed one.
            return_losses: also return the inner losses [B, H, steps + 1] (a list of them for several loops, None
                for a kernel estimator).
            dims: sizes of this call (`h=14, w=14` for a token grid).

        Raises:
            InputError: x is not [B, N, D] of a floating type; a size of an unknown dim.
            OrderError, UnresolvedDimError: the order or the sizes do not fit the loop.
        """
        if x.ndim != 3 or x.shape[-1] != self.width:
            raise InputError(
                "The layer's input is not [B, N, D].",
                where=caller(),
                given=f"[{', '.join(map(str, x.shape))}]",
                need=f"[sequences, tokens, {self.width}]",
                fix="pass x with three axes, the last one the layer's width",
            )
        if not x.dtype.is_floating_point:
            raise InputError(
                "The layer's input is not of a floating type.",
                where=caller(),
                given=str(x.dtype),
                need="float64, float32, bfloat16 or float16",
                fix="pass x.float()",
            )
        if dims:
            self._check_dims([part.spec for part in self.parts], dims)
        mixed = [part.mix(x, order, return_losses, dims) for part in self.parts]
        out = self.out(torch.cat([z for z, _ in mixed], -1) if len(mixed) > 1 else mixed[0][0])
        if not return_losses:
            return out
        return out, mixed[0][1] if len(mixed) == 1 else [losses for _, losses in mixed]


def _is_token(view: View | Gate) -> bool:
    """Whether a view is the layer's input itself, which needs no projection."""
    return isinstance(view, View) and view.shared and [str(d) for d in view.dims] == ["D"]
