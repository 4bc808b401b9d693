"""One loop of a layer: views from x, the op on them, the read-out's own maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nestloop.compiled import CompiledLoop, spec_of
from nestloop.errors import InputError, Location, ShapeMismatchError, StateError
from nestloop.lang import init
from nestloop.lang.binding import check_groups, grid_sizes
from nestloop.lang.declare import Fast, Gate, Slow, View
from nestloop.lang.dims import DimExpr
from nestloop.lang.loop import Loop, LoopSpec
from nestloop.lang.maps import Call, Place, Project, applied, is_source
from nestloop.lang.schedule import sees_later
from nestloop.layer.functions import check_activation, check_function
from nestloop.layer.making import Making, Pooled, Route, Shared, free_label, places, through
from nestloop.layer.starts import begin
from nestloop.products import apply

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

    Submodules and parameters: `views.NAME` what makes a view or gate (before its activation, but for a pooled gate), an
    `nn.Linear` or, where there are other maps, these by their labels and `project` (rows are head-major); a module in
    its place is given x [B, N, D]. `shared.NAME` the maps that several views name, `fast.NAME` [H, *dims] initial fast
    weights, `slow.NAME` [H, *dims], or [*dims] when shared, `output` the read-out's maps, `beside` the branch beside
    this one. A name that PyTorch's dicts have themselves is followed by an underscore there (`views.keys_`).

    Attributes:
        labels: for each view, gate and weight that has one, NAME with that underscore, if any.
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
        of_views = [name for view in spec.inputs.values() for expr in view.dims for name in expr.names]
        for name in of_views:  # in their order, which generated text has
            if name not in spec.dims:
                defaults.setdefault(name, sizes["d"])
        fixed = spec.heads.size(defaults, spec.where) if isinstance(spec.heads, DimExpr) else spec.heads
        self.heads = fixed or sizes["H"]
        self.sizes = {**defaults, "H": self.heads}
        self.op = CompiledLoop(loop, backend, inductor, **{n: s for n, s in self.sizes.items() if n in spec.dim_names})
        self.features = math.prod(self.op.prepare(self.heads))
        owned = Shared() if shared is None else shared
        self._place = Place(self.sizes["D"], getattr(spec.schedule, "period", 1), 1, self.sizes["D"])
        projected = {name: view for name, view in self.spec.inputs.items() if not _is_token(view)}
        self._maps_see_grid = any(m.on_grid for m in self.spec.maps)
        self.labels: dict[str, str] = {}
        self.views = nn.ModuleDict()
        for name, view in projected.items():
            label = self.labels[name] = free_label(self.views, name)
            self.views[label] = self._made(view, owned)
        self.fast = self._weights({name: w for name, w in self.spec.weights.items() if name in self.spec.fast})
        self.slow = self._weights(self.spec.slow)
        if self._output:
            out = replace(self._place, groups=self.heads, features=self.features)
            self.output = Making(self._output, out, out, owned)
        if spec.beside is not None:
            own = {n: s for n, s in sizes.items() if n in (*spec.beside.spec.dim_names, "H", "D", "d")}
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
        many = max(self.heads // view.group, 1) * view.group
        check_groups(view, self.heads, view.group, f"write nl.Layer(..., heads={many})")
        heads = 1 if view.shared else self.heads // view.group
        return heads * (getattr(self.spec.schedule, "micro", 1) if view.micro else 1)

    def _dims(self, view: View | Gate) -> list[int]:
        """The sizes of a view's axes, of one head."""
        return [expr.size(self.sizes, view.where) for expr in view.dims]

    def _place_of(self, view: View | Gate) -> Place:
        """What the last map of a view leaves to."""
        return replace(self._place, groups=self._groups(view), features=math.prod(self._dims(view)))

    def _made(self, view: View | Gate, shared: Shared) -> nn.Module:
        place = self._place_of(view)
        if not _is_plain(view):
            kind = Pooled if isinstance(view, Gate) and view.pooled else Making
            return kind(view.maps, place, self._place, shared)
        linear = nn.Linear(self.sizes["D"], place.groups * place.features, bias=view.bias)
        std = view.maps[0].gain / math.sqrt(self.sizes["D"])
        begin(linear, {"weight": partial(nn.init.normal_, std=std), "bias": nn.init.zeros_})
        return linear

    def _weights(self, declared: Mapping[str, Fast | Slow]) -> nn.ParameterDict:
        """The parameters of fast or slow weights: [H, *dims], or [*dims] where heads share them."""
        made, fills = nn.ParameterDict(), dict[str, Callable[[Tensor], Any]]()
        for name, weight in declared.items():
            common = isinstance(weight, Slow) and weight.shared
            shape = [expr.size(self.sizes, weight.where) for expr in weight.dims]
            learned = isinstance(weight, Slow) or weight.learned
            label = self.labels[name] = free_label(made, name, ["reset_parameters"])
            made[label] = nn.Parameter(torch.empty(shape if common else [self.heads, *shape]), learned)
            fills[label] = partial(init.fill, init=weight.init, per_head=not common, maps=weight.maps)
        begin(made, fills)
        return made

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
        return self._make(self._call(x, 0, {}, {}), self._shared)

    def _call(self, x: Tensor, position: int, carried: dict[str, Tensor], dims: Mapping[str, int]) -> Call:
        def run(maps: Any, x: Tensor, where: Location) -> Tensor:
            return Route("", maps, self._shared, call, "nl.gated", where).walk(x, None)

        call = Call(x, position, self._place.chunk, self._grid(x, dims), carried, {}, run, {})
        return call

    def _grid(self, x: Tensor, dims: Mapping[str, int]) -> tuple[int, ...]:
        """Rows and columns of the token grid that maps see; none where they see none."""
        return grid_sizes(self.spec, {**self.sizes, **dims}, x.shape[1]) if self._maps_see_grid else ()

    @property
    def _shared(self) -> Shared:
        return self.shared if "shared" in self._modules else _NOTHING

    def _make(self, call: Call, shared: Shared) -> dict[str, Tensor]:
        made = {}
        for name, view in self.spec.inputs.items():
            if _is_token(view):
                made[name] = call.input
                continue
            label = self.labels[name]
            if _is_plain(view):
                flat = apply(self.views[label], call.input)  # [B, N, G * f]
            else:
                activate = partial(self._activated, view) if isinstance(view, Gate) else None
                route = Route(name, view.maps, shared, call, f"the {view.kind} '{name}'", view.where, activate)
                flat = through(self.views[label], call.input, route, f"views.{label}")
            dims, groups = self._dims(view), self._groups(view)
            self._check_made(name, view, flat, groups * math.prod(dims), call.input)
            if isinstance(view, Gate) and not view.pooled:
                flat = self._activated(view, flat.unflatten(2, (groups, -1))).flatten(2)
            made[name] = self._split(view, flat, dims)
        return made

    def _check_made(self, name: str, view: View | Gate, flat: Tensor, features: int, x: Tensor) -> None:
        """Raise `InputError` for a module, put in the place of what made a view, that makes something else."""
        if flat.ndim != 3 or flat.shape[:2] != x.shape[:2] or flat.shape[2] != features:
            raise InputError(
                f"What stands in views.{self.labels[name]} does not make the {view.kind} '{name}'.",
                where=view.where,
                given=f"{list(x.shape)} -> {list(flat.shape)}",
                need=f"{[*x.shape[:2], features]}: all features of each token, those of its heads one after another",
                fix=f"put nn.Linear({x.shape[2]}, {features}) there, or a module that gives as many features",
            )

    def _split(self, view: View | Gate, flat: Tensor, dims: list[int]) -> Tensor:
        """[B, N, ...] with all features of a token, as the op takes them: [B, H, N, *dims]."""
        steps = [getattr(self.spec.schedule, "micro", 1)] if view.micro else []
        if view.shared:
            return flat.reshape(*flat.shape[:2], *steps, *dims)
        return flat.reshape(*flat.shape[:2], self.heads // view.group, *steps, *dims).transpose(1, 2)

    def _activated(self, gate: Gate, value: Tensor) -> Tensor:
        """A gate's activation and scale; value: [B, N, groups, features]."""
        value = applied(gate.activation, value, f"activation of the gate '{gate.name}'", gate.where)
        scale = gate.scale if isinstance(gate.scale, float) else float(gate.scale.evaluate(self.sizes, gate.where))
        return value if scale == 1.0 else value * scale

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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """`mix`, of a branch that is part of a layer."""
        return self.mix(*args, **kwargs)

    def mix(
        self, x: Tensor, passing: Passing, state: State | None, around: Call | None = None, shared: Shared | None = None
    ) -> tuple[Tensor, Tensor | None, State]:
        """x [B, N, D] -> [B, N, H * dz], the inner losses where asked for, and the state after x.

        around, shared: the call of the branch that this one is beside, and the modules of its named maps.
        """
        shared = self._shared if shared is None else shared
        carried: dict[str, Tensor] = {} if state is None else state["made"]
        if around is None:
            call = self._call(x, 0 if state is None else state["position"], carried, passing.dims)
        else:
            grid = self._grid(x, passing.dims)
            call = Call(x, around.position, self._place.chunk, grid, carried, {}, around.run, around.memo)
        order = passing.order
        if order is None:
            order = self.order(x.shape[1], x.device)
        fast = self.spec.fast
        weights = {n: (self.fast if n in fast else self.slow)[self.labels[n]] for n in self.spec.weights}
        own = {name: size for name, size in passing.dims.items() if name in self.spec.dim_names}
        start = None if state is None else state["loop"]
        z, loop, losses = self.op.run(self._make(call, shared), weights, start, order, passing.losses, own)
        z = z.transpose(1, 2).reshape(*x.shape[:2], self.out_features)  # [B, N, H * dz]
        if self._output:
            route = Route("output", self._output, shared, call.apart(), "the read-out", self.spec.where)
            z = through(self.output, z, route, "output")
        if state is not None and set(carried) != set(call.kept):
            raise StateError(
                f"The state is of a layer whose maps keep other rows than those of {self.spec.name}.",
                where=self.spec.where,
                given=", ".join(sorted(carried)) or "nothing of maps",
                need=", ".join(sorted(call.kept)) or "nothing of maps",
                fix="pass what this layer, or one of the same declaration, returned with return_state=True",
            )
        after: State = {"position": call.position + x.shape[1], "loop": loop, "made": call.kept}
        if self.spec.beside is not None:
            before = None if state is None else state["beside"]
            other, _, after["beside"] = self.beside(x, passing, before, call, shared)
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
