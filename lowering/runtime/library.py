"""A generated module as a registered, differentiable PyTorch op.

Each lowered loop is two `torch.library` ops, forward and backward, with fake kernels, batching rules and FLOP formulas,
joined by an `autograd.Function`: opcheck, `torch.compile(fullgraph=True)`, export, `torch.func` and autocast see an
ordinary op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nestloop.errors import NoPlanError
from nestloop.lowering.runtime.batches import LOW, autocast_dtype, compute_dtype
from nestloop.lowering.runtime.code import Code
from nestloop.lowering.runtime.decision import Decision, known
from nestloop.lowering.runtime.eager import in_one, transformed
from nestloop.lowering.runtime.groups import in_groups
from nestloop.lowering.runtime.instead import Instead
from nestloop.lowering.runtime.launching import TritonCode
from nestloop.lowering.runtime.once import has_graph, once
from nestloop.lowering.runtime.operator import Operator
from nestloop.lowering.runtime.recipe import Recipe
from nestloop.lowering.runtime.refusals import indefinite_matrix, singular_system
from nestloop.lowering.runtime.results import owned, strides_like, with_zeros
from nestloop.lowering.runtime.signature import DECIDED, KEPT, Signature
from nestloop.lowering.runtime.tiles import Indefinite, Singular, like_lead, or_zero
from nestloop.lowering.runtime.triton import TritonBatches, TritonStream
from nestloop.lowering.runtime.work import flops

REGISTERED: dict[str, NestedLoopOp] = {}  # by the names of their ops in PyTorch, forward and backward


GRAM, WIDE = "the Gram form", "the wide form"


class NestedLoopOp:
    """The op of one generated module.

    Args:
        name: a valid identifier, unique per content.
        code: what it runs.
        signature: its tensors.
        recipe: all that it is made of.
        wide: makes the code for weights that `code` is not precise with. The weights of a call decide, inside the op:
            to `torch.compile` and the like it is one op all the same.
        instead: makes the op of generated PyTorch, which runs where a device has no room for kernels; None where these
            were asked for by name.

    Attributes:
        names: of the tensors that forward and backward take, the order aside.
    """

    def __init__(
        self,
        name: str,
        code: Code,
        signature: Signature,
        recipe: Recipe,
        wide: Callable[[], Code] | None = None,
        instead: Callable[[], NestedLoopOp] | None = None,
    ) -> None:
        self.name, self.signature, self.code = name, signature, code
        self._took: tuple[Tensor, torch.device] | bool | None = None
        self.recipe, self.origin = recipe, recipe.origin
        self._make_wide, self._instead = wide, Instead(self, instead)
        self.cotangents = signature.cotangents
        self.names = {"forward": signature.inputs}
        self.names["backward"] = (*signature.inputs, *signature.saved, *[f"d_{c}" for c in self.cotangents])
        self._computes_outside = hasattr(code.module, "common") or hasattr(code.module, "conditioned")
        work, order = flops(self.origin, recipe.plan, recipe.heads), ["order"] if signature.ordered else []
        results, gradients = len(signature.results), len(signature.inputs)
        of_forward = self._forward_kernel(), self._forward_fake, self._forward_flops(work)
        of_backward = self._backward_kernel(), self._backward_fake, self._backward_flops(work)
        self.forward_op = Operator(name, [*self.names["forward"], *order], results, *of_forward)
        self.backward_op = Operator(f"{name}_backward", [*self.names["backward"], *order], gradients, *of_backward)
        for op, made in ((self.forward_op, signature.results), (self.backward_op, None)):
            op.batched(signature.heads, made)
            REGISTERED[op.name] = self
        self.function = self._function()
        self.transformed = transformed(self.function, self.origin)
        self.eager = in_one(self.transformed)
        self.forward_op.differentiated(self._differentiable())

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Inputs (and the order) -> results, differentiable."""
        compiling = torch.compiler.is_compiling()
        if compiling and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
            results = self.forward_op.call(*tensors)  # Dynamo would give the function's `forward` one argument too many
        else:
            called = self.transformed if torch._C._are_functorch_transforms_active() else self.eager
            results = (self.function if compiling else called).apply(*tensors)
        return results if isinstance(results, tuple) else (results,)

    def _split(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        return (list(tensors[:-1]), tensors[-1]) if self.signature.ordered else (list(tensors), None)

    @cached_property
    def _wide(self) -> Code:
        assert self._make_wide is not None
        return self._make_wide()

    @property
    def ran(self) -> str:
        """Which of the two the last call took, if there are two: GRAM or WIDE. It waits for a device that decides. That
        PyTorch ran, where there was no room for a kernel."""
        if self._instead.refused is not None:
            return f"generated PyTorch, for there is no room: {self._instead.refused.given}"
        took = known(*self._took) if isinstance(self._took, tuple) else self._took
        return "" if took is None else GRAM if took else WIDE

    @property
    def _decides(self) -> bool:
        return self._make_wide is not None and hasattr(self.code.module, "conditioned")

    def _decision(self, inputs: Sequence[Tensor]) -> Decision:
        """What a call with these inputs, in the compute dtype, decides."""
        heads, dtype = max(t.shape[0] for t in inputs), compute_dtype(inputs)
        return Decision(self.code.module.conditioned(*inputs), heads, dtype)

    def _code_for(self, inputs: Sequence[Tensor], decided: Tensor | None) -> Code:
        """The code for a call with these inputs, in the compute dtype; `decided`: what forward has kept of that. Where
        the host cannot know, the wide form: it is precise with all weights."""
        if not self._decides:
            return self.code
        device = inputs[0].device
        first = None if decided is None else known(decided, device)
        first = known(self._decision(inputs).kept, device) if first is None else first
        self._took = bool(first)
        return self.code if first else self._wide

    @cached_property
    def _other(self) -> TritonBatches | None:
        """The wide form, where kernels of both can be launched and the device decides between them."""
        if not self._decides or not isinstance(self.code.native, TritonBatches):
            return None
        try:
            native = self._wide.native
        except NoPlanError:
            return None
        return native if isinstance(native, TritonBatches) else None

    def _forward_kernel(self) -> Callable[..., list[Tensor]]:
        def kernel(*tensors: Tensor) -> list[Tensor]:
            inputs, order = self._split(tensors)
            made = self._instead.made("forward", inputs, order)
            return owned(made, *self.signature.layout(inputs), inputs)

        return kernel

    def made(self, name: str, tensors: list[Tensor], order: Tensor | None) -> list[Tensor]:
        """The results of `forward` or `backward`, in any layout, from what these take. Raises `SingularSystemError`."""
        own, tokens = tensors[: len(self.signature.inputs)], len(self.signature.tokens)
        if isinstance(self.code.native, TritonStream):  # which does all itself
            with _as_it_says(own[0].device.type), self._in_words():
                made = getattr(self.code.native, name)(*tensors, order)
            return list(made) if name == "forward" else or_zero(made, own)
        if isinstance(self.code.native, TritonCode):  # which reads tensors in the dtype that they have
            given, (inputs, low) = tensors, (own, None)
            if self._computes_outside:  # of tokens products alone, whose factors are rounded
                inputs, low = _prepare(own, own, tokens)
        else:
            given, low = _prepare(tensors, own)
            inputs = given[: len(own)]
        named = dict(zip(self.names[name], given, strict=True))
        with _as_it_says(own[0].device.type):
            if name == "forward" and self._other is not None:
                return self._either(self._other, own, inputs, order, low)
            code = self._code_for(inputs, named.pop(DECIDED, None))
            kept = [named.pop(f"shared_{n}") for n in self.signature.shared if f"shared_{n}" in named]
            common = getattr(code.module, "common", None)
            shared: Sequence[Tensor] = ()
            if common is not None:
                shared = kept if kept and code is self.code else _shared(code, inputs, low)
            rest = {n: named.pop(n) for n in self.names[name][len(own) :] if n in named}
            every = {**named, **dict(zip(code.shared, shared, strict=True)), **rest}
            with self._in_words():
                made = self._run(code, name, every, order, low)
            if name == "forward":
                return [*made, *self._kept(code, shared, inputs)]
            found, of_shared = list(made[: len(own)]), made[len(own) :]
            if common is not None:
                more = code.module.common_vjp(*inputs, *shared, *of_shared, low)
                found = [_add(a, b, like) for a, b, like in zip(found, more, inputs, strict=True)]
            return or_zero(found, inputs)

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        """While generated code runs: a system without a solution or a matrix without a factor, as users know it."""
        try:
            yield
        except Singular as met:
            raise singular_system(self.origin, str(met)) from None
        except Indefinite as met:
            raise indefinite_matrix(self.origin, str(met)) from None

    def _either(
        self, other: TritonBatches, own: Sequence[Tensor], inputs: Sequence[Tensor], order: Tensor | None, low: Any
    ) -> list[Tensor]:
        """The results of `forward` where the device decides."""
        decision = self._decision(inputs)
        self._took = decision.kept, inputs[0].device
        shared, others = (_shared(code, inputs, low) if code.shared else [] for code in (self.code, self._wide))
        native = self.code.native
        assert isinstance(native, TritonBatches)
        first: list[Any] = [*own, *shared, order]
        second: list[Any] = [*own, *others, order]
        made = native.either(decision.chosen, first, other, second)
        return [*made, *([*shared, decision.kept] if self.signature.kept_shared else [])]

    def _kept(self, code: Code, shared: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """What a call keeps of what all steps share: nothing but zeros where they take the other form."""
        if not self.signature.kept_shared:
            return []
        first = code is self.code
        values = shared if first else [inputs[0].new_zeros(())] * len(self.signature.shared)
        form = torch.full((), float(first), dtype=inputs[0].dtype)
        return [*values, *([form] if self.signature.decides else [])]

    def _run(self, code: Code, name: str, given: Mapping[str, Tensor], order: Tensor | None, low: Any) -> Sequence[Any]:
        """`forward` or `backward` of what runs."""
        inputs = [given[n] for n in self.signature.inputs]
        if isinstance(code.native, TritonCode) or code.runs_native(inputs, getattr(self.signature, "halo", 0)):
            return getattr(code.native, name)(*given.values(), order)
        shared = code.shared if name == "backward" else None
        return in_groups(getattr(code.module, name), self.signature, given, order, low, code.rows, shared)

    def _forward_fake(self, *tensors: Tensor) -> list[Tensor]:
        inputs, _ = self._split(tensors)
        return self.signature.empty(inputs)

    def _differentiable(self) -> Callable[..., Any]:
        """The op where it is called by its name, as a graph does that `torch.export` has made of a call."""
        forward_op, function, eager = self.forward_op.call, self.function, self.eager

        def kernel(*tensors: Tensor) -> Any:
            if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
                return function.apply(*tensors)  # which calls the op again, without gradients
            if forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled():
                return eager.apply(*tensors)  # which refuses tangents
            with torch._C._AutoDispatchBelowAutograd():
                return forward_op(*tensors)

        return kernel

    def _backward_kernel(self) -> Callable[..., list[Tensor]]:
        count, tokens = len(self.signature.inputs), len(self.signature.tokens)

        def kernel(*tensors: Tensor) -> list[Tensor]:
            given, order = self._split(tensors)
            own = given[:count]
            made = self._instead.made("backward", given, order)
            # where no step was taken, the cotangent of an initial fast weight is the end's, one per sequence
            made = [like_lead(g, t) for g, t in zip(made, own, strict=True)]
            # tokens' as `empty_like` lays them out, which the fake kernel promises
            strides = [strides_like(t.shape, t.stride()) if i < tokens else None for i, t in enumerate(own)]
            return owned(made, [t.shape for t in own], strides, [t.dtype for t in own], given)

        return kernel

    def _backward_fake(self, *tensors: Tensor) -> list[Tensor]:
        inputs, tokens = tensors[: len(self.signature.inputs)], len(self.signature.tokens)
        return [torch.empty_like(t) if i < tokens else t.new_empty(t.shape) for i, t in enumerate(inputs)]

    def _forward_flops(self, work: Callable[[int, int], tuple[int, int]]) -> Callable[..., int]:
        return lambda *shapes: work(max(s[1] for s in shapes), shapes[0][2])[0]

    def _backward_flops(self, work: Callable[[int, int], tuple[int, int]]) -> Callable[..., int]:
        return lambda *shapes: work(max(s[1] for s in shapes), shapes[0][2])[1]

    def _function(self) -> type[torch.autograd.Function]:
        # What the methods below close over are ops, numbers and tuples: all that Dynamo can put in a graph.
        forward_op, backward_op = self.forward_op.call, self.backward_op.call
        backward_once, results = once(self.origin, backward_op), self.signature.results
        states = tuple(results.index(name) for name in self.signature.saved)
        between = tuple(i for i, name in enumerate(results) if name.startswith(KEPT))
        inputs_count, cotangents, ordered = len(self.signature.inputs), len(self.cotangents), self.signature.ordered

        class NestedLoop(torch.autograd.Function):
            generate_vmap_rule = True

            @staticmethod
            def forward(*tensors: Tensor) -> Any:
                return forward_op(*tensors)

            @staticmethod
            def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
                made = output if isinstance(output, tuple) else (output,)
                ctx.mark_non_differentiable(*[made[i] for i in between])
                if not torch.compiler.is_compiling():  # Dynamo has its own way of leaving them out
                    ctx.set_materialize_grads(False)
                    ctx.like = [(t.shape, t.dtype) for t in made[:cotangents]]
                ctx.save_for_backward(*inputs, *[made[i] for i in states])

            @staticmethod
            def backward(ctx: Any, *grads: Tensor | None) -> Any:
                saved = ctx.saved_tensors
                inputs = saved[:inputs_count]
                order = saved[inputs_count : inputs_count + 1] if ordered else ()
                kept = saved[inputs_count + len(order) :]
                given: Sequence[Tensor | None] = grads[:cotangents]
                if any(grad is None for grad in given):
                    given = with_zeros(given, ctx.like, inputs[0])
                pull = backward_once if has_graph() else backward_op
                made = pull(*inputs, *kept, *given, *order)
                made = tuple(made) if isinstance(made, (tuple, list)) else (made,)
                return (*made, None) if ordered else made

        NestedLoop.__name__ = f"NestedLoop_{self.name}"
        return NestedLoop


def _prepare(tensors: Sequence[Tensor], deciding: Sequence[Tensor], factors: int = 0) -> tuple[list[Tensor], Any]:
    """Inputs in the compute dtype, and the low precision of products, if the tokens come in one; the first `factors`
    inputs may stay in that."""
    dtype = compute_dtype(deciding)
    low = deciding[0].dtype if deciding[0].dtype in LOW and dtype is torch.float32 else None
    kept = [(dtype, low) if index < factors else (dtype,) for index in range(len(tensors))]
    return [t if t.dtype in own else t.to(dtype) for t, own in zip(tensors, kept, strict=True)], low


def _shared(code: Code, inputs: Sequence[Tensor], low: torch.dtype | None) -> Sequence[Tensor]:
    """What all steps share, as `code` takes it: kernels read products as these are rounded."""
    made = code.module.common(*inputs, low)
    if low is None or isinstance(code.native, TritonCode):
        return list(made)
    return [t.to(torch.float32) for t in made]


def _as_it_says(device: str) -> AbstractContextManager[Any]:
    """Inside an op every product says its precision, and C++ reads memory in the compute dtype: no autocast."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)


def _add(a: Tensor | None, b: Tensor | None, like: Tensor) -> Tensor | None:
    """Two cotangents together, None being zero; neither need have been added up over what shares `like`."""
    if a is None or b is None:
        return b if a is None else a
    return like_lead(a, like) + like_lead(b, like)
