"""What may stand in a class body: fast and slow weights, views, gates, dims.

Every declaration knows the line it was written on, the name it was given and the class that owns it. Its
identity is the declaration itself, never its name, so two loops may both call something `eta`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from nestloop.errors import DimExpressionError, ViewError, shown
from nestloop.lang import init as initialisers
from nestloop.lang.declaration import Declaration, caller, is_count
from nestloop.lang.dims import parse
from nestloop.lang.maps import Project, all_maps, check_plain


class Weight(Declaration):
    """A fast or a slow weight."""

    @property
    def maps(self) -> bool:
        """Whether more than two axes are several maps [*, in, out], and not a kernel, whose window is of numbers."""
        return len(self.dims) > 2 and bool(self.dims[-1].names)


class Fast(Weight):
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


class Slow(Weight):
    """A slow weight: the inner loop reads it, only the outer loop changes it. See `slow`."""

    kind = "slow weight"

    def __init__(self, dims, init: str | None, shared: bool, learned: bool) -> None:
        super().__init__(dims)
        default = "xavier_uniform" if len(dims) > 1 else "ones"
        self.init = initialisers.check(default if init is None else init, len(dims), self.where)
        self.shared, self.learned = shared, learned


class OfTokens(Declaration):
    """What there is one of for each token: a body reads it from its tokens, not from itself."""

    def __get__(self, body: Any, cls: type | None = None) -> Any:
        if body is None:
            return self
        raise AttributeError(self.name)  # `Body.__getattr__` says why


class View(OfTokens):
    """What the inner loop sees of each token. See `view`."""

    kind = "view"

    def __init__(
        self, dims, shared: bool, bias: bool, gain: float, group: int, micro: bool, of: Any, make: Any
    ) -> None:
        super().__init__(dims)
        self.maps = all_maps(of, Project(bias, gain, None), make, self.kind, self.where)
        self.shared, self.bias, self.gain, self.group, self.micro = shared, bias, gain, group, micro
        if not is_count(group) or (group > 1 and shared):
            raise ViewError(
                "The heads of a view do not group.",
                where=self.where,
                given=f"group={shown(group)}" + (", shared=True" if shared else ""),
                need="how many neighbouring heads see one view: a whole number, 1 or more; 1 for a shared view",
                fix="write group=2, or shared=True for one view of all heads",
            )


class Gate(OfTokens):
    """One number (or one per channel) for each token and head, made from the token. See `gate`."""

    kind = "gate"
    shared, group = False, 1

    def __init__(
        self,
        activation: Callable[[torch.Tensor], torch.Tensor],
        bias: bool,
        dims,
        micro: bool,
        rank: int | None,
        of: Any,
        make: Any,
        scale: str | float,
        pooled: bool,
    ) -> None:
        super().__init__((dims,) if isinstance(dims, (str, int)) else dims)
        if not callable(activation):
            text = f"dims=({activation!r},)" if isinstance(activation, (str, int)) else "torch.sigmoid"
            raise ViewError(
                "The activation of a gate is not a function.",
                where=self.where,
                given=shown(activation),
                need="a function of tensors, as torch.sigmoid is, or none given",
                fix=f"write nl.gate({text})",
            )
        check_plain(activation, "The activation of a gate", self.where)
        self.activation, self.bias, self.micro, self.pooled = activation, bias, micro, pooled
        self.scale = scale if isinstance(scale, float) else parse(scale, self.where)
        self.maps = all_maps(of, Project(bias, 1.0, rank), make, self.kind, self.where)


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
            else "zeros", unless given. Of more than two, (4, "d", "d") are four maps, (8, 1, 3, 3) a kernel.
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
        init: "xavier_uniform" for two axes or more, else "ones", unless given; of more than two as for `fast`.
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
    of: Any = (),
    make: Any = (),
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
        of: what a layer projects: maps of x before the projection (`nestloop.lang.maps`), one or a list. A map that is
            assigned to a name in the loop's body is the same one for all who name it: a norm (`store = nl.rms_norm()`),
            or the projection itself (`qk = nl.project()`), which takes the place of the view's own.
        make: what a layer does after the projection, in order: `nl.conv`, `nl.rope`, norms, `nl.affine`, and
            elementwise functions (`F.silu`).

    Raises:
        DimExpressionError, ViewError: at the line of the declaration.
    """
    return View(dims, shared, bias, gain, group, micro, of, make)


def gate(
    activation: Callable[[torch.Tensor], torch.Tensor] = torch.sigmoid,
    bias: bool = True,
    dims: str | int | tuple[str | int, ...] = (),
    micro: bool = False,
    rank: int | None = None,
    of: Any = (),
    make: Any = (),
    scale: str | float = 1.0,
    pooled: bool = False,
) -> Any:
    """Declare a gate [B, H, N, *dims]: numbers per token and head, for the optimizer's rates, decays and momenta.

    A layer makes it as `scale * activation(x @ w_h + c_h)`; a functional op takes it ready made, among the views.

    Args:
        activation: a function of [B, N, H, features], for an axis of a head's own numbers last, that keeps the shape.
        dims: for one number per channel: the dims of the fast weight's axes that it runs along, "d" or ("dk", "dv")
            say. Of two axes of one name the first is meant; in a fast weight [dk, dv] they can be told apart.
        micro: one gate for each micro-step of a token, [B, H, N, m, *dims].
        rank: of the projection, as a product of two.
        of, make: maps before and after the projection, as for a view. `of=nl.per_position()` makes a gate from the
            token's place alone.
        scale: a number, or text in the dims.
        pooled: made from the mean token of each chunk, the same for all its tokens: for a decay, momentum or scale of
            a schedule that steps once a chunk (`nl.Chunked`). The maps before the projection see each token.

    Raises:
        DimExpressionError, ViewError: at the line of the declaration.
    """
    return Gate(activation, bias, dims, micro, rank, of, make, scale, pooled)


def dim(default: int | None = None) -> Any:
    """Declare a dim that no view defines, with the size it has unless told otherwise.

    Raises:
        DimExpressionError: a default that is no size.
    """
    if default is not None and not is_count(default):
        raise DimExpressionError(
            "The default of a dim is not a size.",
            where=caller(),
            given=shown(default),
            need="a whole number, 1 or more",
            fix="write " + (f"{default!r} itself wherever it is used" if isinstance(default, str) else "nl.dim(64)"),
        )
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
