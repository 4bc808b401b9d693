"""Loops: a learner, the loss it learns from, its optimizer, its schedule and its read-out, in one class body."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from nestloop.errors import Location, MissingPartError, UnknownNameError, shown
from nestloop.lang.declaration import check_signature, is_count
from nestloop.lang.declare import Dim, Fast, Gate, Slow, View, caller, collect
from nestloop.lang.dims import DimExpr, parse
from nestloop.lang.learner import Body, KernelEstimator, Learner
from nestloop.lang.legal import check_estimator, check_maps_of, check_optimizer
from nestloop.lang.maps import Gated, Map, check_output
from nestloop.lang.mentioned import mention
from nestloop.lang.names import check_dims, check_names
from nestloop.lang.optim import SGD
from nestloop.lang.parts import Parts, Stack, joined
from nestloop.lang.purity import check_body
from nestloop.lang.schedule import FullBatch, Schedule, Sliding, Stream
from nestloop.lang.state import Entry, entries
from nestloop.lang.unread import EMPTY, abstract_names, check_loop


@dataclass(frozen=True)
class LoopSpec:
    """A validated declaration: what the reference walks and the compiler lowers.

    Attributes:
        cls: the user's class, whose bodies are called.
        fast, slow, views, gates: declarations by name; `slow` holds the learner's own too.
        dims: dims that no view defines, with their defaults.
        heads: a fixed number of heads, or text in a layer's dims, where the loop declares them; None takes the layer's.
        output, beside: what a layer does after the read-out; see `Loop`.
        holds: whether a body reads `f.held`, the learner with its weights held constant.
        called: what bodies call a tensor, by its name here, where the compiler works under other names.
        parts: the fast weights that the compiler has taken apart, in order; `fast` has their parts.
        stacks: those of several axes that it works on as matrices, which `fast` has in their place.
        whole: the loop without these; None where it has none.
    """

    name: str
    cls: type[Loop]
    learner: type[Learner]
    optimizer: SGD
    schedule: Any  # a Schedule
    fast: dict[str, Fast]
    slow: dict[str, Slow]
    views: dict[str, View]
    gates: dict[str, Gate]
    dims: dict[str, Dim]
    heads: int | DimExpr | None
    output: tuple[Any, ...] | None
    beside: type[Loop] | None
    holds: bool
    where: Location
    called: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[Parts, ...] = ()
    stacks: tuple[Stack, ...] = ()
    whole: LoopSpec | None = field(default=None, repr=False)

    @property
    def declared(self) -> LoopSpec:
        """The loop with its fast weights as they are declared."""
        return self.whole or self

    @property
    def streams(self) -> bool:
        """Whether the loop reads out while it learns, and carries a state."""
        return isinstance(self.schedule, Stream)

    @property
    def is_kernel_estimator(self) -> bool:
        return issubclass(self.learner, KernelEstimator)

    @property
    def slides(self) -> bool:
        """Whether it is a kernel estimator on a window of keys, which is a stream that takes no steps."""
        return self.streams and self.is_kernel_estimator

    @cached_property
    def inputs(self) -> dict[str, View | Gate]:
        """Everything that comes per token: views, then gates."""
        return {**self.views, **self.gates}

    @cached_property
    def maps(self) -> dict[Map, str]:
        """Every map of a layer's with what it is of: "the view 'k'"."""
        found = [(m, f"the {one.kind} '{name}'") for name, one in self.inputs.items() for m in one.maps]
        found += [(m, "the read-out") for m in self.output or ()]
        found += [(m, of) for one, of in found if isinstance(one, Gated) for m in one.of]
        return {m: of for m, of in found if isinstance(m, Map)}

    @property
    def has_fit(self) -> bool:
        """Whether it is a kernel estimator that says itself what it fits, which is no constant."""
        return self.is_kernel_estimator and self.cls.fit is not Loop.fit

    @cached_property
    def of_keys(self) -> tuple[str, ...]:
        """What a kernel estimator sees of the keys' tokens: keys and values; with a fit of its own, all but queries."""
        return tuple(name for name in self.inputs if name != "q") if self.has_fit else ("k", "v")

    @cached_property
    def weights(self) -> dict[str, Fast | Slow]:
        """Everything that comes per head: fast weights (those frozen at zero aside), then slow ones."""
        return {**{name: w for name, w in self.fast.items() if not w.frozen_zero}, **self.slow}

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Every tensor of its state, fast weights first."""
        return entries(self)

    @cached_property
    def dim_names(self) -> set[str]:
        """Every dim with a size of its own: all but those of the call (sequences, heads, tokens)."""
        declared = [*self.views.values(), *self.fast.values(), *self.slow.values()]
        used = {name for d in declared for expr in d.dims for name in expr.names}
        return (used | set(self.dims) | {"D"}) - {"B", "H", "N", "n"}

    @cached_property
    def default_dims(self) -> dict[str, int]:
        """Sizes that the declaration itself gives."""
        return {name: dim.default for name, dim in self.dims.items() if dim.default is not None}

    @property
    def about(self) -> str:
        """The first line of its docstring."""
        return next(iter((self.cls.__doc__ or "").strip().splitlines()), "")

    @property
    def summary(self) -> str:
        """The same, in letters that mean themselves in any generated comment."""
        return (self.about or "an inner loop").replace("\\", "/").replace('"', "'")

    @property
    def grid(self) -> tuple[str, str] | None:
        """The two dims of the token grid, where the loop declares one."""
        names = [name for name, dim in self.dims.items() if dim.on_grid]
        return (names[0], names[1]) if names else None

    @cached_property
    def sees_grid(self) -> bool:
        """Whether bodies may see the token grid, and each has graphs of its own; maps alone may see it too."""
        return mention([self.cls, self.learner], {self.called.get(name, name) for name in self.grid or ()})

    def learner_with(self, values: dict[str, Any], dims: dict[str, int], held: dict[str, Any] | None = None) -> Learner:
        """The learner with its weights standing for `values`: the `f` that bodies call.

        held: what the fast weights of `f.held` stand for; by default the same values.
        """
        own = [*self.learner.fast, *self.learner.slow]
        named = self._as_called(values)
        bound = {**dims, **{name: named[name] for name in own}}
        if self.holds:
            bound["held"] = self.learner.bound({**bound, **self._as_called(held or {})})
        return self.learner.bound(bound)

    def body_with(self, values: dict[str, Any], dims: dict[str, int]) -> Loop:
        """The loop with its own slow weights standing for `values`: the `self` of `loss` and `readout`."""
        own = self._as_called({name: values[name] for name in self.slow})
        return self.cls.bound({**dims, **{name: value for name, value in own.items() if name not in self.learner.slow}})

    def tokens_with(self, values: dict[str, Any]) -> Tokens:
        """The tokens of a tile standing for `values`: the `t` of bodies."""
        return Tokens(self._as_called(values), self.where)

    def _as_called(self, values: dict[str, Any]) -> dict[str, Any]:
        return {self.called.get(name, name): value for name, value in joined(self.parts, values).items()}


class Tokens:
    """What a body sees of the tokens: every view and gate of its tile, by name (`t.k` is [n, d])."""

    def __init__(self, values: dict[str, Tensor], where: Location) -> None:
        self.__dict__.update(values)
        self.__dict__["_where"] = where

    def __getattr__(self, name: str) -> Tensor:
        known = ", ".join(n for n in self.__dict__ if n != "_where")
        if name.startswith("__"):  # Python's own protocols ask for these
            raise AttributeError(name)
        raise UnknownNameError(
            f"The loop declares no view '{name}'.",
            where=caller(),
            given=f"t.{name}",
            need=f"one of its views and gates: {known}",
            fix=f'declare {name} = nl.view("d")',
        )

    def __setattr__(self, name: str, value: Any) -> None:
        Body.__setattr__(self, name, value)  # type: ignore[arg-type]


class Loop(Body):
    """An inner loop, declared. See the README for a whole one, `nestloop.zoo` for many.

    Class attributes:
        learner: a `Learner` class.
        optimizer: `nl.SGD(...)`, `nl.Adam(...)`, or another `nl.Optimizer`.
        schedule: `nl.FullBatch(...)` (default), `nl.Shuffled(...)`, `nl.Causal(...)`, `nl.Online(...)`,
            `nl.Chunked(...)` or `nl.Program(...)`; `nl.Sliding(...)` for a kernel estimator.
        heads: a fixed number of heads, or text in a layer's dims ("D/a"); the layer's otherwise.
        output: maps of the read-out in a layer (norms, `nl.gated`), then `nl.project()`, the output projection, if
            there is one. None projects it, with a bias.
        beside: another loop on the same input, whose output is added to this one's before the output projection. Maps
            that both name are shared.
        paper: the arXiv id of where the loop is from, for listings.

    Bodies (plain PyTorch on one head's tile; `t.NAME` is a view [n, *dims], `self.NAME` a slow weight or a dim):
        loss(self, f, t) -> [n]: each token's loss. `f.held` is the learner with the same fast weights, which the inner
            gradient takes for constants (outer gradients flow through them).
        readout(self, f, t) -> [n, *]: the output, with the weights that the schedule reads each token with.
        Of a kernel estimator, instead: kernel(self, q, k) -> [n, m], and `fit` where that is not a mean of values.

    Raises (when the class is created):
        MissingPartError, UnknownDimError, DuplicateNameError, LearningRateError, CoefficientError, ViewError,
        IllegalScheduleError, SideEffectError, SignatureError, TransformError, UnreadDeclarationError: with the user's
            file and line, what was given, what is needed and the fix.
    """

    learner: type[Learner]
    optimizer: SGD = SGD(lr=1.0)
    schedule: Schedule = FullBatch(steps=1)
    heads: int | str | None = None
    output: Sequence[Any] | None = None
    beside: type[Loop] | None = None
    paper: str = ""
    spec: LoopSpec

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.declared_at = caller()
        for value in vars(cls).values():
            check_body(value)
        check_loop(cls)
        if "learner" in {name for base in cls.__mro__ for name in vars(base)} and not abstract_names(cls):
            cls.spec = _specify(cls)

    def loss(self, f: Learner, t: Any) -> Tensor:
        """Each token's loss [n]."""
        raise NotImplementedError

    def readout(self, f: Learner, t: Any) -> Tensor:
        """The output [n, *] of each token."""
        raise NotImplementedError

    def kernel(self, q: Tensor, k: Tensor) -> Tensor:
        """For a kernel estimator: how much each k counts at each q, [n, d] x [m, d] -> [n, m]."""
        raise NotImplementedError

    def fit(self, weight: Tensor, t: Any, s: Any) -> Tensor:
        """For a kernel estimator: the estimate [n, *] at each query, the locally constant one unless given.

        Args:
            weight: [n, m], how much each key counts at each query: the kernel, and 0 where a query does not see a key.
            t, s: the tokens of the queries, views [n, *], and those of the keys, views [m, *].
        """
        return weight @ s.v / weight.sum(-1, keepdim=True)


def _specify(cls: type[Loop]) -> LoopSpec:
    """Check a loop's class body. Everything that can be wrong without sizes is found here."""
    learner = cls.learner
    if not (isinstance(learner, type) and issubclass(learner, Learner)):
        raise missing(cls, "learner is not a Learner class", shown(learner), "learner = MLP, the class itself")
    if left := abstract_names(learner):
        fix = f"define {left[0]} in a learner that derives from {learner.__name__}"
        raise missing(cls, f"the {left[0]} of its learner is abstract", f"learner {learner.__name__}", fix)
    views, gates, slow = collect(cls, View), collect(cls, Gate), collect(cls, Slow)
    dims = {**collect(learner, Dim), **collect(cls, Dim)}
    estimator = issubclass(learner, KernelEstimator)
    _check_parts(cls, learner, views, estimator)
    check_names(cls, learner, [views, gates, slow, dims])
    spec = LoopSpec(
        name=cls.__name__,
        cls=cls,
        learner=learner,
        optimizer=cls.optimizer,
        schedule=cls.schedule,
        fast=dict(learner.fast),
        slow={**learner.slow, **slow},
        views=views,
        gates=gates,
        dims=dims,
        heads=parse(cls.heads, cls.declared_at) if isinstance(cls.heads, str) else cls.heads,
        output=None if cls.output is None else check_output(cls.output, cls.declared_at),
        beside=cls.beside,
        holds=not estimator and mention([cls], {"held"}),
        where=cls.declared_at,
    )
    check_dims(spec)
    fitting = {"kernel": ("q", "k"), "fit": ("weight", "t", "s")}
    bodies = fitting if estimator else {"loss": ("f", "t"), "readout": ("f", "t")}
    for body, arguments in bodies.items():
        check_signature(getattr(spec.cls, body), body, spec.name, arguments, spec.where)
    check_maps_of(spec)
    if estimator:
        check_estimator(spec)
    else:
        check_optimizer(spec)
    return spec


def user_files(spec: LoopSpec) -> set[str]:
    """The files in which the bodies of a loop are written."""
    files = set()
    for cls in (*spec.cls.__mro__, *spec.learner.__mro__):
        module = sys.modules.get(cls.__module__)
        inside = cls in EMPTY or cls.__module__.startswith(("nestloop.lang", "builtins", "torch"))
        for value in () if inside else vars(cls).values():
            code = getattr(value, "__code__", None)
            if code is not None:
                files.add(code.co_filename)
        if not inside and module is not None and getattr(module, "__file__", None):
            files.add(module.__file__)
    for function in spec.optimizer.functions.values():
        code = getattr(function, "__code__", None)
        if code is not None and not getattr(function, "__module__", "").startswith("nestloop.lang"):
            files.add(code.co_filename)
    return files


def missing(cls: type, what: str, given: str, fix: str) -> MissingPartError:
    """The error of a loop without one of its parts."""
    return MissingPartError(
        f"The loop {cls.__name__}: {what}.",
        where=cls.declared_at,  # type: ignore[attr-defined]
        given=given,
        need="a learner, views, a schedule, an optimizer, and the bodies they call for",
        fix=fix,
    )


def _check_parts(cls: type[Loop], learner: type[Learner], views: dict[str, View], estimator: bool) -> None:
    own = {name for base in cls.__mro__[: cls.__mro__.index(Loop)] for name in vars(base)}
    if cls.beside is not None and not (isinstance(cls.beside, type) and issubclass(cls.beside, Loop)):
        raise missing(cls, "what is beside it is not a loop", shown(cls.beside), "beside = Window, the class itself")
    if cls.heads is not None and not isinstance(cls.heads, str) and not is_count(cls.heads):
        raise missing(cls, "its heads are not a number of them", shown(cls.heads), 'heads = 4, or heads = "D/64"')
    if not views:
        raise missing(cls, "it has no view", "no nl.view", 'declare k = nl.view("d")')
    if estimator:
        needed, said = (("q", "k", "v"), "q, k and v") if cls.fit is Loop.fit else (("q", "k"), "q and k")
        absent = [name for name in needed if name not in views]
        if "kernel" not in own:
            raise missing(cls, "it has no kernel", "no method kernel", "add def kernel(self, q, k): return ...")
        if absent:
            raise missing(
                cls,
                f"its kernel estimator takes views {said}",
                f"views {', '.join(views)}",
                f'declare {absent[0]} = nl.view("d")',
            )
        return
    if not learner.fast:
        raise missing(
            cls, f"its learner {learner.__name__} has no fast weight", "no nl.fast", 'declare w = nl.fast("d", "d")'
        )
    for body in ("loss", "readout"):
        if body not in own:
            raise missing(cls, f"it has no {body}", f"no method {body}", f"add def {body}(self, f, t): return ...")
    if not isinstance(cls.schedule, Schedule) or isinstance(cls.schedule, Sliding):
        raise missing(cls, "its schedule is not one", shown(cls.schedule), "schedule = nl.FullBatch(steps=1)")
    if not isinstance(cls.optimizer, SGD):
        is_class = isinstance(cls.optimizer, type) and issubclass(cls.optimizer, SGD)
        rule = (cls.optimizer if is_class else SGD).written()
        raise missing(cls, "its optimizer is not one", shown(cls.optimizer), f"optimizer = {rule}(lr=1.0)")
