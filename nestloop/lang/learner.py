"""Learners: f(W; x), the model that an inner loop trains on one sequence."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any

from torch import Tensor

from nestloop.errors import (
    Location,
    MissingPartError,
    NothingReturnedError,
    SideEffectError,
    SignatureError,
    UnknownNameError,
)
from nestloop.lang.declaration import body_line
from nestloop.lang.declare import Dim, Fast, OfTokens, Slow, caller, collect
from nestloop.lang.purity import check_body
from nestloop.lang.unread import Made, check_learner


class Body(metaclass=Made):
    """Attribute access inside a traced body: weights and dims by name, writes refused."""

    declared_at: Location

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own protocols ask for these
            raise AttributeError(name)
        cls = type(self)
        if isinstance(getattr(cls, name, None), OfTokens):
            raise UnknownNameError(
                f"{cls.__name__} reads '{name}' from itself, but every token has its own.",
                where=caller(),
                given=f"self.{name}",
                need="views and gates from t, weights and dims from self",
                fix=f"write t.{name}",
            )
        learner = getattr(cls, "learner", None)  # of a loop
        if learner is not None and name in {*learner.fast, *learner.slow}:
            raise UnknownNameError(
                f"{cls.__name__} reads '{name}' from itself, but it is its learner's.",
                where=caller(),
                given=f"self.{name}",
                need="weights of the learner from f, the loop's own from self",
                fix=f"write f.{name}",
            )
        raise UnknownNameError(
            f"{cls.__name__} declares no '{name}'.",
            where=caller(),
            given=name,
            need=f"one of its weights and dims: {', '.join(sorted(self.__dict__))}",
            fix="use self.n, the tokens of one step: under this schedule a body is compiled for every length"
            if name == "N"
            else f'declare {name} = nl.fast("d", "d") in a learner, {name} = nl.slow("d") or {name} = nl.dim(64)',
        )

    @classmethod
    def bound(cls, values: dict[str, Any]) -> Any:
        """An instance whose declared names stand for `values`: what `self` is inside a body."""
        self = object.__new__(cls)
        self.__dict__.update(values)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        raise SideEffectError(
            f"A body of {type(self).__name__} stores into self.{name}.",
            where=caller(),
            given=f"self.{name} = ...",
            need="a body that only computes its result",
            fix=f"use a local name: {name} = ...",
        )


def _takes_tokens(learner: type[Learner]) -> bool:
    """Whether a learner's forward can be called on a tile, beside others perhaps."""
    forward = inspect.getattr_static(learner, "forward")
    if not isinstance(forward, FunctionType):  # nothing is known of what it takes
        return True
    try:
        inspect.signature(forward).bind_partial("self", "x")
    except TypeError:
        return False
    return True


class Learner(Body):
    """A learner, declared by its fast weights and a `forward` written for one [tokens, features] tile.

        class Linear(nl.Learner):
            w = nl.fast("d", "d")
            def forward(self, x):          # x [n, d]
                return x @ self.w          # [n, d]

    `forward` is plain PyTorch. Dims are at hand as ints (`self.d`). A learner may hold slow weights too
    (a normalisation's scale, say): the inner loop reads them and leaves them alone. Bodies that read its weights by
    name (`t.k @ f.w`) need no `forward`.

    Raises (when the class is created):
        SignatureError: a `forward` without an argument for tokens.
        UnreadDeclarationError: a view, gate, optimizer or schedule, which only a loop has.
        SideEffectError: `forward` prints, keeps state or writes to outer names.
    """

    fast: dict[str, Fast]
    slow: dict[str, Slow]
    dims: dict[str, Dim]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.declared_at = caller()
        check_learner(cls)
        cls.fast, cls.slow, cls.dims = collect(cls, Fast), collect(cls, Slow), collect(cls, Dim)
        for value in vars(cls).values():
            check_body(value)
        if cls.fast and not _takes_tokens(cls):
            raise SignatureError(
                f"The forward of {cls.__name__} takes no tokens.",
                where=body_line(inspect.unwrap(cls.forward), cls.declared_at),
                given=f"forward{inspect.signature(cls.forward)}",
                need="forward(self, x): a tile x [n, features]",
                fix="write def forward(self, x): return ...",
            )

    def forward(self, x: Tensor) -> Tensor:
        """f(W; x) for a tile x [n, features] -> [n, anything]."""
        raise MissingPartError(
            f"The learner {type(self).__name__} is called, and has no forward.",
            where=caller(),
            given=f"fast weights {', '.join(self.fast)}",
            need="f(W; x) as a method, or bodies that read fast weights alone",
            fix=f"add def forward(self, x): return ... to it, or write x @ f.{next(iter(self.fast), 'w')}",
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        made = self.forward(*args, **kwargs)
        if made is None:
            raise NothingReturnedError(
                f"The forward of {type(self).__name__} returns nothing.",
                where=body_line(inspect.unwrap(type(self).forward), self.declared_at),
                given="None",
                need="f(W; x), a tensor [n, *]",
                fix="return what it has computed",
            )
        return made


class KernelEstimator(Learner):
    """The Nadaraya-Watson estimator: the learner without parameters whose state is the tokens themselves.

    It fits, at every query q, the constant `argmin_m sum_i kernel(q, k_i) |v_i - m|^2`, whose solution is
    `sum_i kernel(q, k_i) v_i / sum_i kernel(q, k_i)`. A loop over it declares views q, k and v and

        def kernel(self, q, k):            # q [n, d], k [m, d] -> [n, m], positive
            return torch.exp(q @ k.T)

    and has no loss and no optimizer; `schedule = nl.Sliding(...)` leaves it the last keys. With the exponential of a
    scaled dot product it is softmax self-attention (arXiv 2310.13807 eqs. 12-13; 2407.04620 Theorem 2).

    What else is to be fitted a loop says itself: a line instead of a constant (`zoo.LocalLinearAttention`), say.

        def fit(self, weight, t, s):       # weight [n, m], tokens t of the queries and s of the keys -> [n, *]
            return weight @ s.v / weight.sum(-1, keepdim=True)
    """
