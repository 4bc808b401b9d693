"""The layer: one loop or several on x, and the output projection."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nestloop.compiled import spec_of
from nestloop.errors import InputError, OrderError, StateError, shown
from nestloop.lang import packed
from nestloop.lang.declaration import is_whole
from nestloop.lang.declare import caller
from nestloop.lang.loop import Loop, LoopSpec
from nestloop.lang.schedule import sees_later
from nestloop.lang.state import check_tokens
from nestloop.layer.branch import Branch, Passing
from nestloop.layer.misfits import misfit
from nestloop.layer.starts import begin, begin_again
from nestloop.products import apply

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_OF_ATTENTION = {"query", "key", "value", "key_padding_mask", "need_weights", "average_attn_weights"}  # of PyTorch's


class Layer(Branch):
    """A token mixer that learns while it reads: x [B, N, D] -> [B, N, D], in the place of attention.

    Args:
        loop: a declared loop, or several, whose outputs are concatenated before one projection. The parameters of
            one loop are the layer's own (`fast.w1`); those of several are in `branches`.
        width: D, features per token.
        heads: H. The dim `d` is width / heads unless given, and other dims of views and gates that the loop has no
            `nl.dim` for are as large as `d`.
        backend, inductor: as in `nl.compile`.
        bias: whether the output projection has a bias; None for what the loop declares (`output = [...]`), or True.
        device, dtype: of the parameters, as of PyTorch's modules; fast weights and sums are in float32 at least.
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
        bias: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **dims: int,
    ) -> None:
        for name, size in (("width", width), ("heads", heads)):
            if not is_whole(size):
                raise InputError(
                    f"The {name} of a layer is not a positive whole number.",
                    where=caller(),
                    given=f"{name}={shown(size)}",
                    need="1 or more",
                    fix="write nl.Layer(..., width=384, heads=6)",
                )
        if dtype is not None and dtype not in _FLOATING:
            raise InputError(
                "The dtype of a layer is not a floating type.",
                where=caller(),
                given=f"dtype={shown(dtype)}",
                need="torch.float64, torch.float32, torch.bfloat16 or torch.float16",
                fix="write nl.Layer(..., dtype=torch.bfloat16)",
            )
        width, heads = int(width), int(heads)
        arguments: dict[str, Any] = {"loop": loop, "width": width, "heads": heads, "bias": bias, **dims}
        several = isinstance(loop, Sequence) and not isinstance(loop, str)
        loops: list[Any] = list(loop) if several and loop else [loop]  # type: ignore[arg-type]
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
        if several:
            nn.Module.__init__(self)
            self.branches = nn.ModuleList(Branch(part, sizes, backend, inductor) for part in loops)
        else:
            super().__init__(loops[0], sizes, backend, inductor)
        self.width, self._arguments = width, arguments
        declared = [part.spec.output for part in self.parts]
        total = sum(part.out_features for part in self.parts)
        projected = any(output is None for output in declared) or any(part.projection for part in self.parts)
        if projected:
            if bias is None:
                own = [part.projection for part in self.parts if part.projection is not None]
                bias = own[0].bias if own else True
            self.out: Any = nn.Linear(total, width, bias=bias)
            begin(self.out, {"weight": nn.init.xavier_uniform_, "bias": nn.init.zeros_})
        elif total == width:
            self.out = nn.Identity()
        else:
            raise InputError(
                "The layer has no output projection, but its loop's output is not as wide as its input.",
                where=caller(),
                given=f"{total} features, width={width}",
                need=f"{width} features",
                fix="write output = [..., nl.project()] in the loop",
            )
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Give every parameter of the layer's own a start like that of a new layer: after `torch.manual_seed`, the same
        values.

        That fills a layer which was made on the device "meta" and given memory by `layer.to_empty(device=...)`. Its
        modules have each their own, for what calls those of all modules (FSDP's deferred initialisation).
        """
        begin_again(self, partial(Layer, backend="reference", **self._arguments))

    @staticmethod
    def _check_dims(specs: Sequence[LoopSpec], dims: dict[str, int]) -> None:
        beside = [spec.beside.spec for spec in specs if spec.beside is not None]
        known = {"d"}.union(*(spec.dim_names for spec in [*specs, *beside])) - {"D", "H"}
        for name in dims:
            if name in _OF_ATTENTION:
                raise InputError(
                    f"A nested loop takes no {name}, which attention does.",
                    where=caller(),
                    given=f"{name}={shown(dims[name])}",
                    need="x [B, N, D]",
                    fix="leave padding out: pack the sequences, with cu_seqlens"
                    if name == "key_padding_mask"
                    else "leave it out",
                )
            if name in ("D", "H"):
                raise InputError(
                    f"The size of the dim '{name}' is the layer's own.",
                    where=caller(),
                    given=f"{name}={dims[name]!r}",
                    need="the " + ("width" if name == "D" else "heads") + " that the layer is made with",
                    fix=f"leave {name} out",
                )
            if name not in known:
                raise InputError(
                    f"No loop of the layer has a dim '{name}'.",
                    where=caller(),
                    given=f"{name}={shown(dims[name])}",
                    need=f"one of {', '.join(sorted(known))}",
                    fix=f"remove it, or declare {name} = nl.dim() in a loop",
                )

    @property
    def parts(self) -> Sequence[Branch]:
        """The branches: of one loop, the layer itself."""
        return list(self.branches) if "branches" in self._modules else [self]  # type: ignore[arg-type]

    def forward(
        self,
        x: Tensor,
        order: Tensor | None = None,
        return_losses: bool = False,
        state: Any = None,
        return_state: bool = False,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        attn_mask: None = None,
        is_causal: bool = False,
        **dims: int,
    ) -> Any:
        """Mix the tokens.

        Args:
            x: [B, N, D].
            order: int64 [H, N] or [B, H, N] for a shuffled loop; None draws one (training) or takes the fixed one.
            return_losses: also return the inner losses [B, H, steps + 1], of a stream [B, H, N] (a list of them for
                several loops, None for a kernel estimator).
            state: what an earlier call returned for the tokens before x, to go on from.
            return_state: also return the state after x: a dict that `torch.save` keeps (a list for several loops).
            cu_seqlens: [S + 1] whole numbers, for S sequences packed one after another in x [1, N, D]: sequence i is
                tokens cu_seqlens[i] to cu_seqlens[i + 1], run as if it were alone. State is then a list, one for each,
                and losses are those of each, in a list.
            attn_mask, is_causal: what timm's blocks hand to attention. No mask; what a token sees, its loop's schedule
                says, which must be a causal one where that is asked for.
            dims: sizes of this call (`h=14, w=14` for a token grid).

        Returns:
            y [B, N, D]; with `return_losses` or `return_state` a tuple of it, the losses and the state, in this order.

        Raises:
            InputError: x is not [B, N, D] of a floating type; a mask; a size of an unknown dim.
            StateError: a state of another layer, or one that cannot be gone on from.
            OrderError, UnresolvedDimError: the order or the sizes do not fit the loop.
        """
        self._check_input(x, order)
        if attn_mask is not None or is_causal:
            self._check_mask(attn_mask)
        if cu_seqlens is not None:
            return self._packed(x, order, return_losses, state, return_state, cu_seqlens, dims)
        if dims:
            self._check_dims([part.spec for part in self.parts], dims)
        passing = Passing(order, return_losses, dims)
        states = self._states(state, return_state)
        if torch.compiler.is_compiling():
            y, mixed = self._mixed(x, passing, states)
        else:
            try:
                y, mixed = self._mixed(x, passing, states)
            except (RuntimeError, InputError) as error:
                if (told := misfit(self, x, states, error)) is None:
                    raise
                raise told from error
        several = "branches" in self._modules
        losses, after = [loss for _, loss, _ in mixed], [end for _, _, end in mixed]
        wanted: list[Any] = [losses if len(mixed) > 1 else losses[0]] if return_losses else []
        wanted += [after if several else after[0]] if return_state else []
        return (y, *wanted) if wanted else y

    def _mixed(self, x: Tensor, passing: Passing, states: list[Any]) -> tuple[Tensor, list[Any]]:
        """y, and what each branch gives."""
        if "branches" in self._modules:
            mixed = [part(x, passing, before) for part, before in zip(self.parts, states, strict=True)]
        else:
            mixed = [self.mix(x, passing, states[0])]
        return apply(self.out, torch.cat([z for z, _, _ in mixed], -1) if len(mixed) > 1 else mixed[0][0]), mixed

    def _packed(
        self,
        x: Tensor,
        order: Tensor | None,
        return_losses: bool,
        states: Any,
        return_state: bool,
        cu_seqlens: Tensor | Sequence[int],
        dims: dict[str, int],
    ) -> Any:
        """`forward` on packed sequences."""
        if order is not None:
            raise OrderError(
                "One order does not fit packed sequences.",
                where=caller(),
                given="order and cu_seqlens",
                need="one of them",
                fix="leave order out: the layer draws one for each length",
            )
        bounds = packed.bounds_of(cu_seqlens, x.shape[0], x.shape[1])

        def run(some: packed.Bounds, state: Any) -> tuple[Tensor, Any, Any]:
            rows = torch.cat([x[:, start:stop] for start, stop in some])
            made = self(rows, None, return_losses, state, return_state, **dims)
            y, *rest = made if isinstance(made, tuple) else (made,)
            return y, None, rest

        made = packed.each(bounds, states, run)
        wanted = [[rest[i] for _, _, rest in made] for i in range(return_losses + return_state)]
        y = torch.cat([row for row, _, _ in made], 1)
        return (y, *wanted) if wanted else y

    def _check_input(self, x: Tensor, order: Any) -> None:
        if not isinstance(x, Tensor):
            raise InputError(
                "The layer's input is not a tensor.",
                where=caller(),
                given=shown(x),
                need=f"a tensor [sequences, tokens, {self.width}]",
                fix="pass torch.as_tensor(x)" if hasattr(x, "shape") else "pass a tensor",
            )
        if x.is_nested:
            raise InputError(
                "The layer's input is a nested tensor.",
                where=caller(),
                given=f"{x.layout}, {x.ndim} axes",
                need=f"[sequences, tokens, {self.width}], all sequences of one length",
                fix="pass x.values()[None] with cu_seqlens=x.offsets()",
            )
        if x.layout is not torch.strided:
            raise InputError(
                "The layer's input is not dense.",
                where=caller(),
                given=str(x.layout),
                need="torch.strided",
                fix="pass x.to_dense()",
            )
        if x.ndim != 3 or x.shape[-1] != self.width:
            raise InputError(
                "The layer's input is not [B, N, D].",
                where=caller(),
                given=f"[{', '.join(map(str, x.shape))}]",
                need=f"[sequences, tokens, {self.width}]",
                fix="pass x with three axes, the last one the layer's width",
            )
        if isinstance(order, Tensor) and order.ndim == 3 and order.dtype.is_floating_point:
            raise InputError(
                "A layer takes its input once: keys and values are views of it.",
                where=caller(),
                given=f"{order.dtype} [{', '.join(map(str, order.shape))}] beside x",
                need="x [B, N, D]",
                fix="write layer(x)",
            )
        if x.dtype not in _FLOATING:
            raise InputError(
                "The layer's input is not of a floating type.",
                where=caller(),
                given=str(x.dtype),
                need="float64, float32, bfloat16 or float16",
                fix="pass x.float()",
            )
        plain = (view.weight.dtype for part in self.parts for view in part.views.values() if type(view) is nn.Linear)
        other = next((dtype for dtype in plain if dtype != x.dtype), None)
        if other is not None and not torch.is_autocast_enabled(x.device.type):
            raise InputError(
                "The layer's input is not of the dtype of its parameters.",
                where=caller(),
                given=str(x.dtype),
                need=str(other),
                fix=f"pass x.to({other}), or make the layer with dtype={x.dtype}",
            )

    def _check_mask(self, mask: Any) -> None:
        if mask is not None:
            raise InputError(
                "A nested loop takes no mask of attention.",
                where=caller(),
                given=f"attn_mask={shown(mask)}",
                need="None",
                fix="leave it out: what a token sees, the loop's schedule says",
            )
        later = next((part.spec for part in self.parts if sees_later(part.spec.schedule)), None)
        if later is not None:
            raise InputError(
                f"{later.name} is not causal: its tokens see later ones.",
                where=caller(),
                given=f"is_causal=True, schedule {type(later.schedule).__name__}",
                need="a loop whose tokens see those before them alone",
                fix="declare schedule = nl.Causal(16) in the loop",
            )

    def _states(self, state: Any, wanted: bool) -> list[Any]:
        """The state of each branch, None at the start of a sequence."""
        if state is None and not wanted:
            return [None] * len(self.parts)
        for part in self.parts:
            for spec in (part.spec, *([part.spec.beside.spec] if part.spec.beside else [])):
                if spec.is_kernel_estimator and not spec.streams:
                    raise StateError(
                        f"{spec.name} sees all tokens of a sequence at once and has no state.",
                        where=spec.where,
                        given="return_state=True" if state is None else "a state",
                        need="a loop with fast weights, or a window of keys",
                        fix="write schedule = nl.Sliding(128) in the loop, or pass whole sequences",
                    )
        states = state if "branches" in self._modules else [state]
        if state is None:
            return [None] * len(self.parts)
        if (
            not isinstance(states, (list, tuple))
            or len(states) != len(self.parts)
            or not all(_is_state(one, part.spec) for one, part in zip(states, self.parts, strict=True))
        ):
            raise StateError(
                "The state is not one of this layer.",
                where=caller(),
                given=f"a {type(state).__name__}"
                + (f" with {', '.join(map(str, state))}" if isinstance(state, dict) else ""),
                need="what the layer returned with return_state=True",
                fix="y, state = layer(x, return_state=True), then layer(more, state=state)",
            )
        for one, part in zip(states, self.parts, strict=True):
            check_tokens(part.spec, one["position"])
        return list(states)


def _is_state(given: Any, spec: LoopSpec) -> bool:
    """Whether what is given has the parts of a branch's state."""
    if not isinstance(given, dict) or "position" not in given:
        return False
    own = all(isinstance(given.get(name), dict) for name in ("loop", "made"))
    return own and (spec.beside is None or _is_state(given.get("beside"), spec.beside.spec))
