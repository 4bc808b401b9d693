"""Compile a declared loop into a functional op over views and weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestloop import reference
from nestloop.errors import MissingPartError, OrderError, ShapeMismatchError, UnknownBackendError, shown
from nestloop.lang import packed
from nestloop.lang.binding import Binding, Bindings, check_dims, token_axis
from nestloop.lang.declare import caller
from nestloop.lang.loop import Loop, LoopSpec, missing
from nestloop.lang.schedule import Program
from nestloop.lang.unread import abstract_names
from nestloop.lowering import lower, names
from nestloop.lowering.runtime.executable import OPS
from nestloop.lowering.runtime.recipe import Asked, Origin
from nestloop.lowering.runtime.refusals import indefinite_matrix, singular_system
from nestloop.lowering.runtime.streams import StreamOp, run_stream

HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ("auto", "reference", "torch", "cpp", "triton")


def spec_of(loop: Any) -> LoopSpec:
    """The validated declaration of a loop class. Raises `MissingPartError` for anything else."""
    is_loop = isinstance(loop, type) and issubclass(loop, Loop)
    if is_loop and (left := abstract_names(loop)):
        fix = f"define {left[0]} in a class that derives from {loop.__name__}, and give that"
        raise missing(loop, f"its {left[0]} is abstract", f"abstract methods {', '.join(left)}", fix)
    if is_loop and hasattr(loop, "spec"):
        return loop.spec
    if is_loop and loop is not Loop:
        raise missing(loop, "it has no learner", "no learner", "learner = MLP, the class itself")
    raise MissingPartError(
        "Only a declared loop can be compiled.",
        where=caller(),
        given=shown(loop),
        need="a subclass of nl.Loop with a learner (the class, not an instance)",
        fix="write class MTTT(nl.Loop): learner = MLP; ..., then nl.compile(MTTT) or nl.Layer(MTTT, ...)",
    )


class CompiledLoop:
    """A loop as a function of tensors: `z, state = op(views, weights)`. Made by `compile`.

    Differentiable once: z, state and losses with respect to views, weights and the state given;
    gradients go through the inner gradients (second order). To differentiate these again raises `DoubleBackwardError`,
    but with `backend="reference"`. Safe under `torch.compile(fullgraph=True)`,
    `torch.func.grad` and `vmap`, autocast, pickle and deepcopy.
    """

    def __init__(self, loop: type[Loop], backend: str = "auto", inductor: bool = False, **dims: int) -> None:
        self.loop, self.spec = loop, spec_of(loop)
        self.renamed = names.safe(self.spec, triton=backend in ("auto", "triton"))
        for spec in (self.spec, self.renamed):  # found now: Python 3.11 takes a lock, which PyTorch 2.11 does not trace
            _ = spec.inputs, spec.weights, spec.entries, spec.dim_names, spec.default_dims, spec.sees_grid
        if backend not in BACKENDS:
            raise UnknownBackendError(
                "There is no such backend.",
                where=caller(),
                given=shown(backend),
                need=", ".join(repr(b) for b in BACKENDS),
                fix='write backend="auto"',
            )
        check_dims(self.spec, dims)
        self.requested, self.inductor, self.dims = backend, inductor, dims
        self._names: dict[Any, str] = {}
        self._bind = Bindings(self.spec)

    @property
    def backend(self) -> str:
        """The backend that is tried first, on a CPU: "auto" is C++, unless inductor compiles the generated PyTorch. The
        sizes of a call may still say that generated PyTorch is faster."""
        if self.requested != "auto":
            return self.requested
        return "torch" if self.inductor else "cpp"

    @property
    def ran(self) -> list[str]:
        """What the last call of each op took, where that is not said before: "the Gram form" or "the wide form", or
        generated PyTorch in the place of kernels that a device has no room for."""
        names = self._names.values()
        called = [OPS[name] for name in names if name in OPS]
        called += [lower.STREAM_OPS[name].op for name in names if name in lower.STREAM_OPS]
        return sorted({op.ran for op in called if op.ran})

    def __reduce__(self):
        return (_remake, (self.loop, self.requested, self.inductor, self.dims))

    def __repr__(self) -> str:
        return f"nl.compile({self.spec.name}, backend={self.requested!r}, inductor={self.inductor})"

    def __call__(
        self,
        views: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        state: Mapping[str, Tensor] | None = None,
        order: Tensor | None = None,
        return_losses: bool = False,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        **dims: int,
    ) -> Any:
        """Run the inner loop on a batch of sequences.

        Args:
            views: name -> [B, H, N, *dims]; shared views [B, N, *dims]; gates [B, H, N]. float64, float32,
                bfloat16 or float16; any strides.
            weights: name -> initial fast and slow weights [H, *dims]; shared slow ones [*dims]. Fast weights
                frozen at zero are not passed.
            state: fast weights to start from, name -> [B, H, *dims], as returned by an earlier call.
            order: int64 [H, N] or [B, H, N], for a shuffled schedule.
            return_losses: also return the inner losses.
            cu_seqlens: [S + 1] whole numbers, for S sequences packed one after another in views [1, H, N, *dims]:
                sequence i is tokens cu_seqlens[i] to cu_seqlens[i + 1], run as if it were alone. State is then a list,
                one for each; losses of a batch schedule are [S, H, steps + 1], NaN for steps that a sequence of few
                tokens does not take.
            dims: sizes that no tensor gives (`nl.dim`, `nl.grid`).

        Returns:
            z [B, H, N, *] in the views' dtype, and the fast weights at the end, name -> [B, H, *dims], float32 (float64
            if anything given is). With `return_losses=True` also losses [B, H, steps + 1]: the mean over tokens, before
            each step on its batch, and after the last on all tokens (None for a kernel estimator).

        Raises:
            InputError, OrderError, UnresolvedDimError: the tensors do not fit the declaration.
            SingularSystemError: a body solves a linear system that has no solution with these numbers.
            IndefiniteMatrixError: a body takes the Cholesky factor of a matrix that has none.
        """
        if cu_seqlens is None:
            z, end, losses = self.run(views, weights, state, order, return_losses, dims)
        else:
            z, end, losses = self._packed(views, weights, state, return_losses, cu_seqlens, dims)
        return (z, end, losses) if return_losses else (z, end)

    def _packed(
        self,
        views: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        states: Any,
        return_losses: bool,
        cu_seqlens: Tensor | Sequence[int],
        dims: Mapping[str, int],
    ) -> tuple[Tensor, Any, Tensor | None]:
        """`run` on packed sequences."""
        if self.spec.schedule.needs_order:
            raise OrderError(
                f"{self.spec.name} is Shuffled: its sequences cannot be packed.",
                where=caller(),
                given="cu_seqlens",
                need="an order of each sequence's own tokens",
                fix="run each sequence alone, with its order",
            )
        self._bind(views, weights, None, None, {**self.dims, **dims})  # of all tokens together
        axis = {name: token_axis(view) for name, view in self.spec.inputs.items()}
        first = next(iter(self.spec.inputs))
        bounds = packed.bounds_of(cu_seqlens, views[first].shape[0], views[first].shape[axis[first]])

        def run(some: packed.Bounds, state: Any) -> tuple[Tensor, Tensor | None, Any]:
            cut = {n: torch.cat([t.narrow(axis[n], a, b - a) for a, b in some]) for n, t in views.items()}
            z, end, losses = self.run(cut, weights, state, None, return_losses, dims)
            return z, losses, end

        made = packed.each(bounds, states, run)
        losses = [own for _, own, _ in made if own is not None]
        if losses and not self.spec.streams:  # a short sequence takes fewer steps
            most = max(own.shape[-1] for own in losses)
            losses = [F.pad(own, (0, most - own.shape[-1]), value=torch.nan) for own in losses]
        joined = torch.cat(losses, 2 if self.spec.streams else 0) if losses else None
        return torch.cat([z for z, _, _ in made], 2), [end for _, _, end in made], joined

    def run(
        self,
        views: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        state: Mapping[str, Tensor] | None,
        order: Tensor | None,
        return_losses: bool,
        dims: Mapping[str, int],
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """`__call__` with every argument given, and always three results."""
        binding = self._bind(views, weights, state, order, {**self.dims, **dims})
        walks = self.backend == "reference" or binding.tokens == 0  # no tokens, no step
        if self.spec.slides and not walks:
            name = self._lowered(False, False, 0, _sizes(binding), False)
            if name:
                return lower.EXECUTABLES[name](views, weights, state, order)
            walks = True  # a window of keys has no steps, and the reference computes no more than any plan
        if walks:
            start = None if state is None else dict(state)
            try:
                z, end, losses = reference.run(
                    self.spec, binding, dict(views), dict(weights), start, order, return_losses
                )
            except torch.linalg.LinAlgError as error:
                from nestloop.lowering.watched import line_in_traceback  # all of tracing, which a call may do without

                met = {"cholesky": indefinite_matrix, "matrix is singular": singular_system}
                refusal = next((made for word, made in met.items() if word in str(error)), None)
                if refusal is None:  # factors of what is not finite, say
                    raise
                raise refusal(Origin.of(self.spec), line_in_traceback(self.spec, error)) from None
            return z if binding.tokens else z + _nothing_of(views, weights).to(z.dtype), end, losses
        views, weights = names.inward(self.renamed, views), names.inward(self.renamed, weights)
        state = None if state is None else names.inward(self.renamed, state)
        if self.spec.streams:
            z, end, losses = self._run_stream(binding, views, weights, state, return_losses)
        else:
            z, end, losses = self._run_batch(binding, views, weights, state, order, return_losses)
        return z, names.outward(self.renamed, end), losses

    def _run_batch(
        self,
        binding: Binding,
        views: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        state: Mapping[str, Tensor] | None,
        order: Tensor | None,
        return_losses: bool,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        carried = state is not None
        sizes = _sizes(binding)
        # One lowering serves every length but 1, where sizes broadcast, and loops that hold for one length only.
        double = reference.compute_dtype({**views, **weights, **(state or {})}) == torch.float64
        gpu = not double and self._may_be_triton(views)
        name = ""
        if not self.spec.sees_grid and binding.tokens != 1:
            name = self._lowered(return_losses, carried, 0, sizes, double, gpu=gpu)
        if not name:
            name = self._lowered(return_losses, carried, index(binding.tokens), sizes, double, gpu=gpu)
        return lower.EXECUTABLES[name](views, weights, state, order)

    def _run_stream(
        self,
        binding: Binding,
        views: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        state: Mapping[str, Any] | None,
        return_losses: bool,
    ) -> tuple[Tensor, dict[str, Any], Tensor | None]:
        sizes = _sizes(binding)
        tensors = {n: t for n, t in {**views, **weights, **(state or {})}.items() if isinstance(t, Tensor)}
        dtype = reference.compute_dtype(tensors)
        losses = return_losses and not isinstance(self.spec.schedule, Program)
        double = dtype == torch.float64
        gpu = not double and self._may_be_triton(views)

        def op(part: str, tokens: int) -> StreamOp:
            rows = getattr(self.spec.schedule, "micro", 1) * (self.spec.optimizer.window or 1)
            alone = tokens == 1 and rows == 1
            name = "" if alone else self._lowered(losses, False, 0, sizes, double, part, gpu)
            if not name:
                name = self._lowered(losses, False, index(tokens), sizes, double, part, gpu)
            return lower.STREAM_OPS[name]

        start = None if state is None else dict(state)
        return run_stream(self.renamed, binding, op, views, weights, start, return_losses, dtype)

    def _may_be_triton(self, views: Mapping[str, Tensor]) -> bool:
        """Whether "auto" may be Triton: on NVIDIA's GPUs, where it has been measured."""
        if self.requested != "auto" or self.inductor or not HAS_TRITON:
            return False
        return _on_a_gpu(next(iter(views.values())))

    def _lowered(
        self,
        losses: bool,
        carried: bool,
        tokens: int,
        sizes: tuple[tuple[str, int], ...],
        double: bool,
        part: str = "",
        gpu: bool = False,
    ) -> str:
        """The name of the executable for these sizes, lowered the first time it is asked for (also while Dynamo traces
        a call, for which a name is a constant)."""
        key = (losses, carried, tokens, sizes, double, part, gpu)
        if key not in self._names:
            try:
                asked = Asked(self.requested, self.inductor, double, gpu)
                name = lower.lower(self.renamed, dict(sizes), tokens or None, losses, carried, asked, part)
            except ShapeMismatchError:
                if tokens:
                    raise
                name = ""  # it may hold for the length of the call
            self._names[key] = name
        return self._names[key]

    # What torch.compiler.assume_constant_result sets, without importing all of Dynamo (a second) with nestloop.
    _lowered._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def prepare(self, heads: int) -> tuple[int, ...]:
        """Check the bodies for the known sizes, lower them where no call needs to be seen first, and give the shape of
        one token's output.

        Raises the `CompileError` of whatever is wrong in a body.
        """
        sizes = {**self.spec.default_dims, **self.dims, "H": heads}
        if self.backend == "reference" or self.spec.slides:
            return reference.token_output(self.spec, sizes)
        if self.spec.streams:
            part = "read" if isinstance(self.spec.schedule, Program) else "scan"
            return lower.plan_for(self.renamed, sizes, None, False, False, part=part).output
        tokens = 0
        if self.spec.grid is not None and self.spec.sees_grid:
            rows, columns = self.spec.grid
            if rows not in sizes or columns not in sizes:  # no call has shown the grid: a small one shows the output
                trial = {**sizes, rows: sizes.get(rows, 4), columns: sizes.get(columns, 4)}
                return lower.plan_for(self.renamed, trial, trial[rows] * trial[columns], False, False).output
            tokens = sizes[rows] * sizes[columns]
        try:
            output = lower.plan_for(self.renamed, sizes, tokens or None, False, False).output
        except ShapeMismatchError:
            some = None if tokens else lower.output_for_some(self.renamed, sizes)
            if some is None:
                raise
            return some
        self._lowered(False, False, tokens, tuple(sorted(sizes.items())), torch.get_default_dtype() == torch.float64)
        return output


def _sizes(binding: Binding) -> tuple[tuple[str, int], ...]:
    """Every size of a call that code is generated for: all but those of sequences and tokens."""
    sizes = {**binding.dims, "H": binding.heads}
    return tuple((name, index(sizes[name])) for name in sorted(sizes))  # symbols of a graph become numbers here


def _nothing_of(*given: Mapping[str, Tensor]) -> Tensor:
    """Zero, which depends on every tensor: what no token reaches has a gradient of zeros, as DDP waits for."""
    return torch.stack([t.sum().float() for tensors in given for t in tensors.values()]).sum() * 0


def _on_a_gpu(view: Tensor) -> bool:
    return view.is_cuda and torch.version.hip is None


def _remake(loop: type[Loop], backend: str, inductor: bool, dims: dict[str, int]) -> CompiledLoop:
    return CompiledLoop(loop, backend, inductor, **dims)


def compile(loop: type[Loop], backend: str = "auto", inductor: bool = False, **dims: int) -> CompiledLoop:
    """Compile a declared loop into a functional op.

    Args:
        loop: a subclass of `nl.Loop`.
        backend: "reference" (brute force, the definition), "torch" (generated PyTorch), "cpp" (generated C++),
            "triton" (generated Triton; on a CPU it is interpreted, slowly), or "auto": cpp where the loop
            has a plan for it, a C++ compiler is there, and it is expected to be as fast at the sizes of the call
            (`lowering.runtime.work`); else torch. On one of NVIDIA's GPUs it is triton, where that is installed and the
            loop has a plan that does not take minutes to compile; else, and in float64, torch.
        inductor: compile the generated PyTorch with `torch.compile` (tens of seconds once, then faster).
        dims: sizes that no tensor gives.

    Raises:
        NoPlanError: "cpp" or "triton" was asked for and the loop has no such plan, when the sizes are known.
        UnknownBackendError, MissingPartError, InputError: here. A body that cannot be compiled raises its
            `CompileError` when the sizes are known: at the first call, or when a layer is made.
    """
    return CompiledLoop(loop, backend, inductor, **dims)
