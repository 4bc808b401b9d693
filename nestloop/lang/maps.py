"""Maps: what a layer does to its input on the way to a view or a gate, and to a read-out on the way out.

    k = nl.view("d", of=nl.rms_norm(), make=[nl.conv(4), F.silu, nl.l2_norm()])

A map takes [B, N, G, f] to the same with other features: sequences, tokens, groups (heads; 1 before the projection)
and features. Plain functions are elementwise maps. A map that is assigned to a name in a class body is one map, with
one set of parameters, wherever it is used: views that share a projection name it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from nestloop.errors import Location, ViewError, shown
from nestloop.lang.declaration import Declaration, is_count
from nestloop.products import apply

Shape = tuple[list[int], str, bool]  # sizes, initialiser, whether the first axis is the heads


@dataclass(frozen=True)
class Place:
    """Where a map stands: the layer's width D, the schedule's chunk, and the groups and features that it returns."""

    width: int
    chunk: int
    groups: int
    features: int


class Call:
    """One call of a layer, as its maps see it.

    No dataclass: FSDP gives a module copies of those, and what maps keep would be lost with the copy.

    Attributes:
        input: the layer's input x [B, N, D].
        position: tokens of the sequence before x.
        chunk: tokens per chunk of the loop's schedule, 1 where it has none.
        carried: what maps kept of the tokens before, by key; `kept` what they keep of these.
        grid: rows and columns of the token grid; none where the loop declares none.
        run: (maps, x, where) -> x after these maps of a gate that is declared there; all are shared or have no
            parameters.
        memo: what is made of x once, for all who ask for it.
    """

    def __init__(
        self,
        input: Tensor,
        position: int,
        chunk: int,
        grid: tuple[int, ...],
        carried: Mapping[str, Tensor],
        kept: dict[str, Tensor],
        run: Callable[[Sequence[Any], Tensor, Location], Tensor],
        memo: dict[tuple[Any, ...], Any],
    ) -> None:
        self.input, self.position, self.chunk, self.grid = input, position, chunk, grid
        self.carried, self.kept, self.run, self.memo, self.key = carried, kept, run, memo, ""

    def apart(self) -> Call:
        """The same for what is not the token, of which `memo` has nothing."""
        return Call(self.input, self.position, self.chunk, self.grid, self.carried, self.kept, self.run, {})

    def positions(self, tokens: int, device: torch.device, period: int | None = None) -> Tensor:
        """The places of so many tokens in the sequence, or in their period: int64 [N]."""
        places = torch.arange(self.position, self.position + tokens, device=device)
        return places if period is None else places % period


class Map(Declaration):
    """One map. The module of its parameters is called `label` below the view that it belongs to."""

    kind = "map"
    label: ClassVar[str] = "map"
    source: ClassVar[bool] = False  # whether it turns the token into groups of features
    linear: ClassVar[bool] = False  # whether its module is a linear map of the token, which needs nothing but x
    whole: ClassVar[bool] = False  # whether it sees all tokens of a sequence at once
    on_grid: bool = False  # whether it sees their token grid

    @property
    def shared(self) -> bool:
        """Whether it is one map for all who name it: it is assigned in a class body."""
        return self.name != "?"

    def takes(self, features: int) -> int:
        """Features that go in, for so many that come out."""
        return features

    def parameters(self, place: Place) -> dict[str, Shape]:
        """The parameters of its module by name."""
        return {}

    def __call__(self, x: Tensor, own: Any, call: Call) -> Tensor:
        """x after the map. own: the module of its parameters; None where it has none."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"nl.{self.label}()"


def refused(what: str, where: Any, given: str, need: str, fix: str) -> ViewError:
    return ViewError(what, where=where, given=given, need=need, fix=fix)


class Project(Map):
    """A projection, made by `project`."""

    label, source, linear = "project", True, True

    def __init__(self, bias: bool, gain: float, rank: int | None) -> None:
        super().__init__()
        self.bias, self.gain, self.rank = bias, gain, rank
        if rank is not None and not is_count(rank):
            raise refused(
                "The rank of a projection is not a number of features.",
                self.where,
                f"rank={shown(rank)}",
                "a whole number, 1 or more",
                "write nl.project(rank=16)",
            )

    def parameters(self, place: Place) -> dict[str, Shape]:
        rows, inner = place.groups * place.features, self.rank or place.width
        last = "" if self.rank is None else "up."
        made: dict[str, Shape] = {f"{last}weight": ([rows, inner], f"normal({self.gain / math.sqrt(inner)})", False)}
        if self.rank is not None:
            made = {"down.weight": ([inner, place.width], f"normal({1 / math.sqrt(place.width)})", False), **made}
        if self.bias:
            made[f"{last}bias"] = ([rows], "zeros", False)
        return made

    def __call__(self, x: Tensor, own: Any, call: Call) -> Tensor:
        return apply(own, x.flatten(2))[:, :, None]


class PerPosition(Map):
    """A table over positions, made by `per_position`."""

    label, source = "per_position", True

    def __init__(self, period: int | str, offset: Callable[[Tensor], Tensor] | None, learned: bool) -> None:
        super().__init__()
        self.period, self.offset = read_period(period, "nl.per_position", self.where), offset
        self.learned = learned
        if offset is None and not learned:
            raise refused(
                "A number for each position is neither learned nor given.",
                self.where,
                "learned=False, no offset",
                "one of them",
                "write nl.per_position(offset=lambda i: 1 / (i + 1), learned=False)",
            )

    def parameters(self, place: Place) -> dict[str, Shape]:
        return {"table": ([self._tokens(place.chunk)], "zeros", False)} if self.learned else {}

    def _tokens(self, chunk: int) -> int:
        return chunk if self.period == "chunk" else int(self.period or 1)

    def __call__(self, x: Tensor, own: Any, call: Call) -> Tensor:
        count = self._tokens(call.chunk)
        table = own.table if self.learned else torch.zeros(count, device=x.device, dtype=x.dtype)
        if self.offset is not None:
            table = table + self.offset(torch.arange(count, device=x.device).to(table.dtype))
        made = table[call.positions(x.shape[1], x.device, count)]  # [N]
        return made[None, :, None, None].expand(x.shape[0], -1, -1, -1)


def depthwise(place: Place, bias: bool, *window: int) -> dict[str, Shape]:
    """The parameters of a convolution of each feature alone, as PyTorch's have them and start."""
    channels, init = place.groups * place.features, f"uniform({1 / math.sqrt(math.prod(window))})"
    weight: dict[str, Shape] = {"weight": ([channels, 1, *window], init, False)}
    return {**weight, "bias": ([channels], init, False)} if bias else weight


def read_period(period: Any, name: str, where: Any) -> int | str | None:
    if period is None or period == "chunk" or is_count(period):
        return period
    raise refused(
        f"The period of {name} is not a number of tokens.",
        where,
        f"period={shown(period)}",
        'a whole number, 1 or more, or "chunk" for the schedule\'s',
        f"write {name}(period=16)",
    )


class Gated(Map):
    """A gate on what passes, made by `gated`."""

    label, linear = "gated", True

    def __init__(
        self,
        activation: Callable[[Tensor], Tensor],
        bias: bool,
        per_head: bool,
        rank: int | None,
        of: Any,
    ) -> None:
        super().__init__()
        check_plain(activation, "The activation of nl.gated", self.where)
        self.activation, self.per_head = activation, per_head
        self.projection = Project(bias, 1.0, rank)
        self.of = check_maps(of, "gate on a read-out", self.where)
        own = [m for m in self.of if isinstance(m, Map) and not m.shared]
        if own:
            raise refused(
                "What a gate on a read-out sees of the token is made by shared maps.",
                self.where,
                f"of={own[0]!r}",
                "maps assigned to a name in the class body",
                "write norm = nl.rms_norm() in the loop's body and of=norm",
            )

    def parameters(self, place: Place) -> dict[str, Shape]:
        features = 1 if self.per_head else place.features
        return self.projection.parameters(replace(place, features=features))

    def __call__(self, x: Tensor, own: Any, call: Call) -> Tensor:
        made = self.projection(call.run(self.of, call.input[:, :, None], self.where), own, call)
        made = made.reshape(*x.shape[:3], 1 if self.per_head else x.shape[-1])
        return x * applied(self.activation, made, "activation of nl.gated", self.where)


def check_maps(maps: Any, what: str, where: Any) -> tuple[Any, ...]:
    """The maps as given, one or a list. Raises `ViewError`."""
    given = tuple(maps) if isinstance(maps, (list, tuple)) else (maps,)
    if not all(callable(m) and not isinstance(m, type) for m in given):
        raise refused(
            f"The maps of a {what} are not maps.",
            where,
            shown(maps),
            "nl.conv, nl.rope, a norm, ..., or an elementwise function, one or a list of them",
            "write make=[nl.conv(4), F.silu]",
        )
    for one in given:
        check_plain(one, f"A map of a {what}", where)
    return given


def check_plain(one: Any, what: str, where: Any) -> None:
    """Raise `ViewError` for a function that takes more than x, and for a module of PyTorch's that is more than a
    function: no layer would register it."""
    if isinstance(one, Map):
        return
    _check_arguments(one.forward if isinstance(one, nn.Module) else one, what, where)
    if not isinstance(one, nn.Module):
        return
    random = [part for part in one.modules() if isinstance(part, (_DropoutNd, nn.RReLU))]
    if random:
        raise refused(
            f"{what} draws random numbers.",
            where,
            type(random[0]).__name__,
            "a function that gives the same each time: whole sequences and their pieces are to agree",
            "leave it out, and put nn.Dropout before or after the layer",
        )
    held = [name for name, _ in (*one.named_parameters(), *one.named_buffers())]
    if held:
        raise refused(
            f"{what} is a module with tensors of its own, which the layer would neither train nor move.",
            where,
            f"{type(one).__name__} with {', '.join(held)}",
            "a map of nestloop's, whose parameters are the layer's, or a function without any",
            "write nl.project(), nl.conv(4), nl.rms_norm(), nl.layer_norm() or nl.affine()",
        )


def _check_arguments(function: Any, what: str, where: Any) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some that are written in C have none
        return
    try:
        signature.bind(None)
    except TypeError:
        name = getattr(function, "__name__", type(function).__name__)
        raise refused(
            f"{what} does not take x alone.",
            where,
            f"{name}({', '.join(signature.parameters)})",
            "a function of one tensor",
            "write a function that gives the rest, as lambda x: F.layer_norm(x, x.shape[-1:]) does",
        ) from None


def applied(function: Callable[[Tensor], Tensor], x: Tensor, what: str, where: Location) -> Tensor:
    """A plain function of x. Raises `ViewError` where Python or PyTorch refuses that."""
    if torch.compiler.is_compiling():
        return function(x)
    try:
        return function(x)
    except Exception as error:
        if type(error).__module__ != "builtins":  # too little memory, the end of a checkpoint's recomputation
            raise
        given, name = f"{x.dtype} [{', '.join(map(str, x.shape))}]", getattr(function, "__name__", "")
        other = (getattr(function, "__module__", "") == "math" or "numpy" in type(function).__module__) and name
        raise refused(
            f"The {what} fails on what it is given.",
            where,
            f"{given}. {type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            "a function of PyTorch's of one tensor, whatever its sizes and whether or not it requires gradients",
            f"write torch.{name}" if other and hasattr(torch, name) else "try it on a tensor of that shape and dtype",
        ) from error


def check_output(maps: Any, where: Any) -> tuple[Any, ...]:
    """The maps of a read-out, a projection at most at the end. Raises `ViewError`."""
    given = check_maps(maps, "read-out", where)
    if any(map(is_source, given[:-1])) or (given and isinstance(given[-1], PerPosition)):
        raise refused(
            "The output projection is not the last map of the read-out.",
            where,
            ", ".join(map(repr, given)),
            "norms and gates, then nl.project(), or no projection",
            "write output = [nl.rms_norm(), nl.project()]",
        )
    return given


def is_source(one: Any) -> bool:
    """Whether a map turns the token into groups of features."""
    return isinstance(one, Map) and one.source


def all_maps(of: Any, projection: Project, make: Any, what: str, where: Any) -> tuple[Any, ...]:
    """Every map from the token to a view, one source among them: its own projection, unless `of` has one."""
    before, after = check_maps(of, what, where), check_maps(make, what, where)
    sources = [m for m in before if is_source(m)]
    if len(sources) > 1 or any(map(is_source, after)):
        raise refused(
            f"The maps of a {what} project twice.",
            where,
            ", ".join(repr(m) for m in (*before, *after) if is_source(m)),
            "one projection or one table over positions, in of=",
            "leave one out; rank=16 makes one projection a product of two",
        )
    return (*before, *(() if sources else (projection,)), *after)


def project(bias: bool = False, gain: float = 1.0, rank: int | None = None) -> Project:
    """The projection of a token to all features of a view, those of its heads one after another.

    Args:
        bias: with a bias.
        gain: the weight is drawn from N(0, gain^2 / D).
        rank: as a product of two, through so many features.
    """
    return Project(bias, gain, rank)


def per_position(
    period: int | str = "chunk", offset: Callable[[Tensor], Tensor] | None = None, learned: bool = True
) -> PerPosition:
    """A learned number for each position of a period, instead of a projection of the token: table [period], zero at
    first, plus `offset` of the positions 0, 1, ... (TTT-LM's 1/(i + 1), arXiv 2407.04620).

    Args:
        period: tokens; "chunk" for the schedule's chunk.
        offset: a function of positions, fixed.
        learned: with a table; without, what `offset` makes of positions is all.

    Raises:
        ViewError: a period that is none, or neither a table nor an offset.
    """
    return PerPosition(period, offset, learned)


def gated(
    activation: Callable[[Tensor], Tensor] = torch.sigmoid,
    bias: bool = False,
    per_head: bool = False,
    rank: int | None = None,
    of: Any = (),
) -> Gated:
    """Times activation(x W) of the layer's input x, elementwise, or one number a head with `per_head=True`.

    Args:
        rank: W as a product of two.
        of: shared maps of x before W.
    """
    return Gated(activation, bias, per_head, rank, of)


def chunk_period(maps: Sequence[Any]) -> bool:
    """Whether a map asks for the schedule's chunk."""
    return any(getattr(m, "period", None) == "chunk" for m in maps)
