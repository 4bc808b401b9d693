"""What may stand in a class body: fast and slow weights, views, gates, dims.

Every declaration knows the line it was written on, the name it was given and the class that owns it. Its
identity is the declaration itself, never its name, so two loops may both call something `eta`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from nestloop.errors import Location, ViewError
from nestloop.lang import init as initialisers
from nestloop.lang.dims import DimExpr, parse

# Where a declaration, a compile or a layer is written; the zoo's declarations are lines like any user's.
_OWN_MODULES = ("nestloop.lang.", "nestloop.compiled", "nestloop.layer", "nestloop.inspection", "torch.nn.modules.")


def caller() -> Location:
    """The nearest line outside nestloop's own machinery: where the user wrote the declaration or the call."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_OWN_MODULES):
        frame = frame.f_back
    return Location(frame.f_code.co_filename, frame.f_lineno)


class Declaration:
    """One line of a learner's or loop's class body."""

    name: str = "?"
    kind: str = "declaration"

    def __init__(self, dims: tuple[str | int | DimExpr, ...] = ()) -> None:
        self.where = caller()
        self.dims: tuple[DimExpr, ...] = tuple(parse(d, self.where) for d in dims)

    def __set_name__(self, owner: type, name: str) -> None:
        if self.name == "?":  # a subclass that re-binds the same declaration does not rename it
            self.name = name

    def __repr__(self) -> str:
        return f"{self.kind} {self.name}[{', '.join(map(str, self.dims))}]"


class Fast(Declaration):
    """A fast weight: the inner loop changes it while it reads one sequence. See `fast`."""

    kind = "fast weight"

    def __init__(self, dims, init: str | None, learned: bool) -> None:
        super().__init__(dims)
        default = "xavier_uniform" if len(dims) > 1 else "zeros"
        self.init = initialisers.check(default if init is None else init, len(dims), self.where)
        self.learned = learned

    @property
    def frozen_zero(self) -> bool:
        """Whether every sequence starts from exactly zero, whatever the outer loop does."""
        return self.init == "zeros" and not self.learned


class Slow(Declaration):
    """A slow weight: the inner loop reads it, only the outer loop changes it. See `slow`."""

    kind = "slow weight"

    def __init__(self, dims, init: str | None, shared: bool, learned: bool) -> None:
        super().__init__(dims)
        default = "xavier_uniform" if len(dims) > 1 else "ones"
        self.init = initialisers.check(default if init is None else init, len(dims), self.where)
        self.shared, self.learned = shared, learned


class View(Declaration):
    """What the inner loop sees of each token. See `view`."""

    kind = "view"

    def __init__(self, dims, shared: bool, bias: bool, gain: float, group: int, micro: bool) -> None:
        super().__init__(dims)
        self.shared, self.bias, self.gain, self.group, self.micro = shared, bias, gain, group, micro
        if isinstance(group, bool) or not isinstance(group, int) or group < 1 or (group > 1 and shared):
            raise ViewError(
                "The heads of a view do not group.",
                where=self.where,
                given=f"group={group!r}" + (", shared=True" if shared else ""),
                need="how many neighbouring heads see one view: a whole number, 1 or more; 1 for a shared view",
                fix="write group=2, or shared=True for one view of all heads",
            )


class Gate(Declaration):
    """One number (or one per channel) for each token and head, made from the token. See `gate`."""

    kind = "gate"
    shared, group = False, 1

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor], bias: bool, dims, micro: bool) -> None:
        super().__init__(dims)
        self.activation, self.bias, self.micro = activation, bias, micro


class Dim(Declaration):
    """A dim that no view defines. See `dim` and `grid`."""

    kind = "dim"

    def __init__(self, default: int | None, on_grid: bool) -> None:
        super().__init__()
        self.default, self.on_grid = default, on_grid


def fast(*dims: str | int, init: str | None = None, learned: bool = True) -> Any:
    """Declare a fast weight of a learner, one per head: a tensor [H, *dims] of initial values.

    Args:
        dims: axis sizes, as dim expressions ("d", "4*d") or ints.
        init: initialiser of the initial value (`nestloop.lang.init`): "xavier_uniform" for two axes or more,
            else "zeros", unless given.
        learned: whether the outer loop learns the initial value. With `init="zeros", learned=False` every
            sequence starts from exact zero, which lets the compiler remove the work on it.

    Raises:
        DimExpressionError, UnknownInitError: at the line of the declaration.
    """
    return Fast(dims, init, learned)


def slow(*dims: str | int, init: str | None = None, shared: bool = False, learned: bool = True) -> Any:
    """Declare a slow weight, one per head [H, *dims], or one for all heads [*dims] with `shared=True`.

    Args:
        dims: axis sizes; none at all declares a scalar (a learned learning rate, say).
        init: "xavier_uniform" for two axes or more, else "ones", unless given.
        shared: one tensor for all heads.
        learned: whether the outer loop learns it; without, it keeps its initial value (a decay fixed per head, say).

    Raises:
        DimExpressionError, UnknownInitError: at the line of the declaration.
    """
    return Slow(dims, init, shared, learned)


def view(
    *dims: str | int,
    shared: bool = False,
    bias: bool = False,
    gain: float = 1.0,
    group: int = 1,
    micro: bool = False,
) -> Any:
    """Declare a view: [B, H, N, *dims], or [B, N, *dims] with `shared=True` (one for all heads).

    A functional op takes views as inputs. A layer makes each as a linear projection of its input x [B, N, D]:
    the weight is drawn from N(0, gain^2 / D), and there is a bias where `bias=True`. A shared view of dims ("D",)
    is x itself.

    Args:
        group: so many neighbouring heads see one view: [B, H / group, N, *dims] (grouped value heads: the keys and
            queries of fewer heads than there are values).
        micro: one view for each micro-step of a token, [B, H, N, m, *dims], under a schedule with `micro=m`. The loss
            sees those of one micro-step, [n, *dims]; the read-out does not see them.

    Raises:
        DimExpressionError, ViewError: at the line of the declaration.
    """
    return View(dims, shared, bias, gain, group, micro)


def gate(
    activation: Callable[[torch.Tensor], torch.Tensor] = torch.sigmoid,
    bias: bool = True,
    dims: tuple[str | int, ...] = (),
    micro: bool = False,
) -> Any:
    """Declare a gate [B, H, N, *dims]: numbers per token and head, for the optimizer's rates, decays and momenta.

    A layer makes it as `activation(x @ w_h + c_h)`; a functional op takes it ready made, among the views.

    Args:
        dims: for one number per channel: the dims of the fast weight's axes that it runs along, ("d",) say.
        micro: one gate for each micro-step of a token, [B, H, N, m, *dims].
    """
    return Gate(activation, bias, dims, micro)


def dim(default: int | None = None) -> Any:
    """Declare a dim that no view defines, with the size it has unless told otherwise."""
    return Dim(default, False)


def grid() -> Any:
    """Declare two dims h, w with N = h * w: the tokens are a grid, row by row.

    `h, w = nl.grid()`. Where a call gives neither, the grid is square.
    """
    return Dim(None, True), Dim(None, True)


D = TypeVar("D", bound=Declaration)


def collect(cls: type, kind: type[D]) -> dict[str, D]:
    """Declarations of one kind in a class and its bases, in order of declaration, overrides applied."""
    found: dict[str, D] = {}
    for base in reversed(cls.__mro__):
        for name, value in vars(base).items():
            if isinstance(value, kind):
                found[name] = value
            else:
                found.pop(name, None)
    return found
