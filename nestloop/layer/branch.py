"""One loop of a layer: views from x, the op on them, the read-out's own maps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nestloop.compiled import CompiledLoop, spec_of
from nestloop.errors import ShapeMismatchError
from nestloop.lang import init
from nestloop.lang.declare import Gate, Slow, View
from nestloop.lang.dims import DimExpr
from nestloop.lang.loop import Loop, LoopSpec
from nestloop.lang.maps import Call, Place, Project, is_source
from nestloop.lang.schedule import sees_later
from nestloop.layer.functions import check_activation, check_function
from nestloop.layer.making import Making, Shared, places, pool, walk
from nestloop.products import Linear

State = dict[str, Any]

_NOTHING = Shared()  # what a branch without shared maps has of them


@dataclass(frozen=True)
class Passing:
    """What one call gives to every branch.

    Attributes:
        order: of a shuffled loop.
        losses: whether they are wanted.
        dims: sizes of this call.
    """

    order: Tensor | None
    losses: bool
    dims: dict[str, int]


class Branch(nn.Module):
    """One loop of a layer, without the output projection: x [B, N, D] -> [B, N, H * dz].

    Submodules and parameters: `views.NAME` what makes a view or gate, a linear map and the parameters of its maps (rows
    are head-major), `shared.NAME` the maps that several views name, `fast.NAME` [H, *dims] initial fast weights,
    `slow.NAME` [H, *dims], or [*dims] when shared, `output` the read-out's maps, `beside` the branch beside this one.
    """

    def __init__(
        self,
        loop: type[Loop],
        sizes: dict[str, int],
        backend: str,
        inductor: bool,
        shared: Shared | None = None,
    ) -> None:
        super().__init__()
        spec = spec_of(loop)
        defaults = {**spec.default_dims, **sizes}
        fixed = spec.heads.size(defaults, spec.where) if isinstance(spec.heads, DimExpr) else spec.heads
        self.heads = fixed or sizes["H"]
        self.sizes = {**defaults, "H": self.heads}
        self.op = CompiledLoop(loop, backend, inductor, **{n: s for n, s in self.sizes.items() if n in spec.dim_names})
        self.features = math.prod(self.op.prepare(self.heads))
        owned = Shared() if shared is None else shared
        self._place = Place(self.sizes["D"], getattr(spec.schedule, "period", 1), 1, self.sizes["D"])
        projected = {name: view for name, view in self.spec.inputs.items() if not _is_token(view)}
        self.views = nn.ModuleDict({name: self._made(view, owned) for name, view in projected.items()})
        self.fast, self.slow = nn.ParameterDict(), nn.ParameterDict()
        for name, weight in self.spec.weights.items():
            common = isinstance(weight, Slow) and weight.shared
            shape = [expr.size(self.sizes, weight.where) for expr in weight.dims]
            value = init.fill(torch.empty(shape if common else [self.heads, *shape]), weight.init, not common)
            learned = isinstance(weight, Slow) or weight.learned
            (self.fast if name in self.spec.fast else self.slow)[name] = nn.Parameter(value, learned)
        if self._output:
            out = replace(self._place, groups=self.heads, features=self.features)
            self.output = Making(self._output, out, out, owned)
        if spec.beside is not None:
            own = {n: s for n, s in sizes.items() if n in (*spec.beside.spec.dim_names, "H", "D")}
            self.beside = Branch(spec.beside, own, backend, inductor, owned)
            if self.beside.out_features != self.out_features:
                raise ShapeMismatchError(
                    f"The outputs of {self.spec.name} and {spec.beside.__name__} beside it cannot be added.",
                    where=spec.where,
                    given=f"{self.heads} heads of {self.features}, and {self.beside.heads} of {self.beside.features}",
                    need="as many features from both",
                    fix="choose sizes that agree",
                )
        if shared is None and owned.declared:
            self.shared = owned
        self._check_functions()

    @property
    def spec(self) -> LoopSpec:
        """The loop's declaration."""
        return self.op.spec

    @property
    def out_features(self) -> int:
        """Features per token of the branch's output."""
        return self.heads * self.features

    @property
    def _output(self) -> tuple[Any, ...]:
        """The read-out's maps before the output projection."""
        return tuple(m for m in self.spec.output or () if not is_source(m))

    @property
    def projection(self) -> Project | None:
        """The output projection as declared; None for none."""
        return next((m for m in self.spec.output or () if is_source(m)), None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "op" in state:  # a copy, or an unpickled layer, is lowered again now, not in the middle of a traced call
            self.op.prepare(self.heads)

    def _groups(self, view: View | Gate) -> int:
        """How many rows of features a token has in a view: one a head, and one a micro-step."""
        heads = 1 if view.shared else self.heads // view.group
        return heads * (getattr(self.spec.schedule, "micro", 1) if view.micro else 1)

    def _place_of(self, view: View | Gate) -> Place:
        """What the last map of a view leaves to."""
        features = math.prod(expr.size(self.sizes, view.where) for expr in view.dims)
        return replace(self._place, groups=self._groups(view), features=features)

    def _made(self, view: View | Gate, shared: Shared) -> nn.Module:
        place = self._place_of(view)
        if not _is_plain(view):
            return Making(view.maps, place, self._place, shared)
        gain = view.maps[0].gain
        linear = Linear(self.sizes["D"], place.groups * place.features, bias=view.bias)
        nn.init.normal_(linear.weight, std=gain / math.sqrt(self.sizes["D"]))
        if view.bias:
            nn.init.zeros_(linear.bias)
        return linear

    def _check_functions(self) -> None:
        """Try the plain functions among the maps. Raises `ShapeMismatchError`, `TokenMixingError`."""
        alone = not sees_later(self.spec.schedule)
        for name, view in self.spec.inputs.items():
            place = self._place_of(view)
            for one, at in zip(view.maps, places(view.maps, place, self._place), strict=True):
                check_function(one, at, f"the {view.kind} '{name}'", view.where, alone)
            if isinstance(view, Gate):
                check_activation(view.activation, place, name, view.where, alone)
        out = replace(self._place, groups=self.heads, features=self.features)
        for one in self._output:
            check_function(one, out, "the read-out", self.spec.where, alone)

    def make_views(self, x: Tensor) -> dict[str, Tensor]:
        """Every view and gate from x [B, N, D]: [B, H, N, *dims], shared ones [B, N, *dims]."""
        return self._make(self._call(x, 0, {}, {}))

    def _call(self, x: Tensor, position: int, carried: dict[str, Tensor], kept: dict[str, Tensor]) -> Call:
        def run(maps: Any, x: Tensor) -> Tensor:
            return walk(maps, x, 1, None, self._shared, call, "")

        call = Call(x, position, self._place.chunk, carried, kept, run)
        return call

    @property
    def _shared(self) -> Shared:
        return self.shared if "shared" in self._modules else _NOTHING

    def _make(self, call: Call, shared: Shared | None = None) -> dict[str, Tensor]:
        shared = self._shared if shared is None else shared
        made = {}
        for name, view in self.spec.inputs.items():
            if _is_token(view):
                made[name] = call.input
                continue
            if isinstance(view, Gate) and view.pooled:
                flat = self._pooled(name, view, shared, call)
            elif _is_plain(view):
                flat = self.views[name](call.input)  # [B, N, (H *) features]
            else:
                x = call.input[:, :, None]
                flat = walk(view.maps, x, self._groups(view), self.views[name], shared, call, name)  # type: ignore[arg-type]
            if isinstance(view, Gate) and not view.pooled:
                flat = self._activated(view, flat)
            made[name] = self._split(view, flat)
        return made

    def _split(self, view: View | Gate, flat: Tensor) -> Tensor:
        """[B, N, ...] with all features of a token, as the op takes them: [B, H, N, *dims]."""
        dims = [expr.size(self.sizes, view.where) for expr in view.dims]
        steps = [getattr(self.spec.schedule, "micro", 1)] if view.micro else []
        if view.shared:
            return flat.reshape(*flat.shape[:2], *steps, *dims)
        return flat.reshape(*flat.shape[:2], self.heads // view.group, *steps, *dims).transpose(1, 2)

    def _activated(self, gate: Gate, flat: Tensor) -> Tensor:
        value = gate.activation(flat)
        scale = gate.scale if isinstance(gate.scale, float) else float(gate.scale.evaluate(self.sizes, gate.where))
        return value if scale == 1.0 else value * scale

    def _pooled(self, name: str, gate: Gate, shared: Shared, call: Call) -> Tensor:
        """A gate made from each chunk's mean token, the same for all its tokens [B, N, G, f].

        Inside a chunk, the mean of the tokens so far stands for it; each call makes up for what the one before gave, so
        that the gates of a chunk's tokens, however split, add up to so many times the gate of its mean.
        """
        at = next(i for i, m in enumerate(gate.maps) if is_source(m))
        making, size = self.views[name], call.chunk
        x = walk(gate.maps[:at], call.input[:, :, None], 1, making, shared, call, name)  # type: ignore[arg-type]
        means, lengths, left = pool(x, call.position, size, call.carried.get(f"{name}.sum"))
        rest = replace(call, memo={})
        made = walk(gate.maps[at:], means, self._groups(gate), making, shared, rest, name, at)  # type: ignore[arg-type]
        made = self._activated(gate, made)  # [B, M, G, f]
        after = (call.position + x.shape[1]) % size
        call.kept[f"{name}.sum"], call.kept[f"{name}.given"] = left, after * made[:, -1]
        seen = call.position % size
        if seen:
            given = call.carried[f"{name}.given"].to(made.dtype)[:, None]
            first = ((seen + lengths[0]) * made[:, :1] - given) / max(lengths[0], 1)
            made = torch.cat([first, made[:, 1:]], 1)
        counts = torch.tensor(lengths, device=made.device)
        return made.repeat_interleave(counts, 1, output_size=sum(lengths))

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

    def mix(self, x: Tensor, passing: Passing, state: State | None) -> tuple[Tensor, Tensor | None, State]:
        """x [B, N, D] -> [B, N, H * dz], the inner losses where asked for, and the state after x."""
        position = 0 if state is None else state["position"]
        kept: dict[str, Tensor] = {}
        call = self._call(x, position, {} if state is None else state["made"], kept)
        return self._run(call, passing, state, self._shared)

    def _run(
        self, call: Call, passing: Passing, state: State | None, shared: Shared
    ) -> tuple[Tensor, Tensor | None, State]:
        x, order = call.input, passing.order
        if order is None:
            order = self.order(x.shape[1], x.device)
        weights = {**dict(self.fast.items()), **dict(self.slow.items())}
        own = {name: size for name, size in passing.dims.items() if name in self.spec.dim_names}
        start = None if state is None else state["loop"]
        z, loop, losses = self.op.run(self._make(call, shared), weights, start, order, passing.losses, own)
        z = z.transpose(1, 2).reshape(*x.shape[:2], self.heads, self.features)  # [B, N, H, dz]
        if self._output:
            z = walk(self._output, z, self.heads, self.output, shared, replace(call, memo={}), "output")
        z = z.flatten(2)
        after: State = {"position": call.position + x.shape[1], "loop": loop, "made": call.kept}
        if self.spec.beside is not None:
            before = None if state is None else state["beside"]
            carried = {} if before is None else before["made"]
            beside = replace(call, carried=carried, kept={}, chunk=self.beside._place.chunk)
            other, _, after["beside"] = self.beside._run(beside, passing, before, shared)
            z = z + other
        return z, losses, after


def _is_token(view: View | Gate) -> bool:
    """Whether a view is the layer's input itself, which needs no projection."""
    return isinstance(view, View) and view.shared and [str(d) for d in view.dims] == ["D"] and _is_plain(view)


def _is_plain(view: View | Gate) -> bool:
    """Whether a view is a projection of the token and nothing else."""
    if len(view.maps) != 1 or (isinstance(view, Gate) and view.pooled):
        return False
    (only,) = view.maps
    return isinstance(only, Project) and not only.shared and only.rank is None
