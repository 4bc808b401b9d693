"""Stage `run` for streams: a sequence as calls of the ops of its parts, joined by its state.

A call cuts its tokens where the schedule does: what is left of a chunk that an earlier call began, then whole chunks in
one scan, each span between two resets on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nestloop.lang.binding import Binding
from nestloop.lang.kept import Kept
from nestloop.lang.loop import LoopSpec
from nestloop.lang.schedule import Causal, Chunked, Program, resets_at
from nestloop.lang.state import Entry, State, counts_tokens, identifier
from nestloop.lowering.runtime import cache
from nestloop.lowering.runtime.choice import choose
from nestloop.lowering.runtime.code import Code
from nestloop.lowering.runtime.executable import compiled_pieces, heads_first
from nestloop.lowering.runtime.library import NestedLoopOp
from nestloop.lowering.runtime.native import NativePlan
from nestloop.lowering.runtime.native_stream import NativeStream
from nestloop.lowering.runtime.plan import Plan
from nestloop.lowering.runtime.recipe import Asked, Origin, Recipe
from nestloop.lowering.runtime.signature import Signature, seen
from nestloop.lowering.runtime.tiles import join, spacing
from nestloop.lowering.runtime.triton import TritonStream
from nestloop.lowering.runtime.triton_plan import TritonPlan
from nestloop.lowering.runtime.work import pays

VALID = "window__valid"  # 1 for a row that holds a token, 0 before a sequence begins

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class StreamSignature(Signature):
    """Tensors of a stream's op: a scan over chunks, or one piece.

    Attributes:
        made: names of the results before what is kept.
        kept: carried tensors that a scan keeps between chunks.
        chunk: tokens of a chunk in generated PyTorch; 0 for one piece.
        chunk_cpp: tokens of a chunk in generated C++, which runs on a CPU; 0 where there is none.
        halo: rows before a call's own tokens.
    """

    made: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    chunk: int = 0
    chunk_cpp: int = 0
    halo: int = 0

    @cached_property
    def results(self) -> tuple[str, ...]:
        return (*self.made, *self.between)

    @cached_property
    def between(self) -> tuple[str, ...]:
        return tuple(f"between_{n}" for n in self.kept)

    @cached_property
    def saved(self) -> tuple[str, ...]:
        return self.between

    def shapes(self, inputs: Sequence[Tensor]) -> list[list[Any]]:
        (heads, sequences), length = self.lead(inputs), self.length(inputs)
        found: list[list[Any]] = []
        for name in self.made:
            if name in ("z", "losses"):
                found.append([heads, sequences, length, *(self.tiles["z"] if name == "z" else ())])
            else:
                found.append([heads, sequences, *self.tiles[name.removeprefix("end_")]])
        if self.chunk:
            if isinstance(length, torch.SymInt):  # in a graph for any length: how many are kept shows when it runs
                states = torch.library.get_ctx().new_dynamic_size()
            else:
                states = -(-self._chunks(inputs) // self.spacing(inputs)) - 1
            found += [[states, heads, sequences, *self.tiles[n]] for n in self.kept]
        return found

    @staticmethod
    def lead(inputs: Sequence[Tensor]) -> tuple[int, int]:
        """Heads and sequences of a call; the first of its inputs is a view, which sequences never share."""
        return max(t.shape[0] for t in inputs), inputs[0].shape[1]

    def length(self, inputs: Sequence[Tensor]) -> int:
        """A call's own tokens."""
        return inputs[0].shape[2] - self.halo

    def _chunks(self, inputs: Sequence[Tensor]) -> int:
        return -(-int(self.length(inputs)) // self.chunk_on(inputs)) if self.chunk else 0

    def chunk_on(self, inputs: Sequence[Tensor]) -> int:
        """Tokens of a chunk of what runs on the inputs' device."""
        return self.chunk_cpp if self.chunk_cpp and inputs[0].device.type == "cpu" else self.chunk

    def spacing(self, inputs: Sequence[Tensor]) -> int:
        """Chunks from one state that is kept for backward to the next."""
        return self._spacings.of(seen(inputs), lambda: self._spacing(inputs))

    def _spacing(self, inputs: Sequence[Tensor]) -> int:
        named = zip(self.fast, inputs[len(self.tokens) :], strict=False)
        state = [t for n, t in named if not n.endswith("__initial")]  # what one chunk hands to the next
        return spacing(self._chunks(inputs), *inputs[: len(self.tokens)], state=state)

    @cached_property
    def _spacings(self) -> Kept[int]:
        return Kept()


@dataclass(frozen=True)
class StreamOp:
    """One op of a stream, called with tensors by name."""

    op: NestedLoopOp
    signature: StreamSignature

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Inputs by name -> results by name, those for backward aside."""
        made = self.op(*[tensors[name] for name in self.signature.inputs])
        return dict(zip(self.signature.made, made, strict=False))


STREAM_OPS: dict[str, StreamOp] = {}


def build_stream(spec: LoopSpec, plan: Plan, heads: int, asked: Asked) -> str:
    """Make one op of a stream runnable; its name in `STREAM_OPS`. Arguments, and what it raises, as for `build`."""
    return stream_op(Recipe(Origin.of(spec), plan, heads, False, asked)).op.name


@cache.one_thread()
def stream_op(recipe: Recipe, name: str = "") -> StreamOp:
    """The op of a stream, or of a part of it, made where there is none of that name. Arguments as for `batch_op`."""
    origin, plan = recipe.origin, recipe.plan
    chosen = choose(origin, plan, recipe.asked)
    path = cache.write(plan.name, plan.source)
    name = name or path.stem + chosen.suffix
    if name in STREAM_OPS:
        return STREAM_OPS[name]
    signature = _signature(recipe, chosen.native)
    module = cache.load(path)
    module = compiled_pieces(module, plan) if recipe.asked.inductor else module
    library: NativeStream | TritonStream | None = None
    if isinstance(chosen.native, NativePlan):
        library = NativeStream(plan.name, chosen.native, module, signature)
    elif chosen.native is not None:
        library = TritonStream(plan.name, chosen.native, module, signature)
    code = Code(module, plan.rows, (), library, pays(origin, plan) if chosen.by_size else None)

    def instead() -> NestedLoopOp:
        return stream_op(replace(recipe, asked=replace(recipe.asked, backend="torch"))).op

    op = NestedLoopOp(name, code, signature, recipe, instead=instead if chosen.falls_back else None)
    STREAM_OPS[name] = StreamOp(op, signature)
    return STREAM_OPS[name]


def _signature(recipe: Recipe, native: NativePlan | TritonPlan | None) -> StreamSignature:
    origin, plan = recipe.origin, recipe.plan
    return StreamSignature(
        tokens=(*origin.tokens, *([VALID] if origin.halo else [])),
        fast=plan.inputs,
        slow=origin.slow,
        tiles={**plan.tiles, "z": plan.output},
        ends=(),
        losses="losses" in plan.results,
        steps=lambda length: 1,
        ordered=False,
        heads=recipe.heads,
        made=plan.results,
        kept=plan.kept,
        chunk=native.rows if plan.chunk and isinstance(native, TritonPlan) else plan.chunk,
        chunk_cpp=native.rows if isinstance(native, NativePlan) else 0,
        halo=origin.halo,
    )


def run_stream(
    spec: LoopSpec,
    binding: Binding,
    op: Callable[[str, int], StreamOp],
    views: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    state: State | None,
    return_losses: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, State, Tensor | None]:
    """A call of a stream.

    Args:
        op: (part, tokens) -> the op of that part for so many tokens.
        views, weights, state: as `CompiledLoop` takes them.

    Returns:
        z [B, H, N, *], the state, each token's loss [B, H, N].
    """
    call = _Call(spec, binding, op, views, weights, state, return_losses, dtype)
    if isinstance(spec.schedule, Program):
        call.operations(spec.schedule)
    elif binding.tokens:
        call.spans()
    return call.results()


class _Call:
    def __init__(
        self,
        spec: LoopSpec,
        binding: Binding,
        op: Callable[[str, int], StreamOp],
        views: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        state: State | None,
        return_losses: bool,
        dtype: torch.dtype,
    ) -> None:
        self.spec, self.binding, self.op, self.return_losses = spec, binding, op, return_losses
        self.tokens = {name: heads_first(spec, name, views[name]) for name in spec.inputs}
        self.slow = {n: weights[n][None, None] if spec.slow[n].shared else weights[n].unsqueeze(1) for n in spec.slow}
        self.entries, self.sizes = spec.entries, binding.sizes
        first = next(iter(self.tokens.values()))
        self.like = first.new_empty(0, dtype=dtype)
        self.initial = {n: self._initial(n, weights) for n in spec.fast}
        self.begun = state is not None
        self.position = 0 if state is None or not counts_tokens(spec) else state["position"]
        if state is None:
            self.carry = self._fresh()
        else:
            self.carry = {n: state[n].transpose(0, 1).to(dtype) for n in self.entries}
        self.halo = (spec.optimizer.window or 1) - 1
        if self.halo:
            self._prepend()
        self.z: list[tuple[int, Tensor]] = []
        self.losses: list[tuple[int, Tensor]] = []

    def _initial(self, name: str, weights: Mapping[str, Tensor]) -> Tensor:
        """An initial fast weight [H, 1, *]."""
        if name in weights:
            return weights[name].unsqueeze(1)
        shape = [e.size(self.sizes) for e in self.spec.fast[name].dims]
        return self.like.new_zeros(self.binding.heads, 1, *shape)

    def _fresh(self) -> Tensors:
        """The state at the start of a sequence, the same for all sequences."""
        made = {}
        for name, entry in self.entries.items():
            if entry.part in ("weight", "anchor"):
                made[name] = self.initial[entry.like.name]
            else:
                heads = 1 if entry.part == "tail" else self.binding.heads  # no view of every head's need be made
                made[name] = self.like.new_zeros(heads, 1, *self._tile(entry))
        return made

    def _tile(self, entry: Entry) -> list[int]:
        rows = [entry.rows] if entry.rows else []
        return [*rows, *[e.size(self.sizes) for e in entry.like.dims]]

    def _prepend(self) -> None:
        """The tail of the state before the call's tokens, and which of these rows hold one; the tail becomes theirs.

        Rows before a sequence's first token count for nothing, but bodies see them: they hold the call's first token,
        since of zeros a body may have no value, or no derivative.
        """
        absent = max(0, self.halo - self.position)
        rows = self.halo + self.binding.tokens
        for name, view in self.tokens.items():
            tail = self.carry[f"{name}.tail"]  # of a view that heads share too, each head has one of its own
            heads, sequences = max(len(tail), len(view)), view.shape[1]
            tail = tail.expand(heads, sequences, *tail.shape[2:]).to(view.dtype)
            whole = torch.cat([tail, view.expand(heads, *view.shape[1:])], 2)
            self.carry[f"{name}.tail"] = whole[:, :, rows - self.halo :].to(self.like.dtype)
            if absent and rows > self.halo:
                first = whole[:, :, self.halo : self.halo + 1].expand(-1, -1, absent, *whole.shape[3:])
                whole = torch.cat([first, whole[:, :, absent:]], 2)
            self.tokens[name] = whole
        dtype = next(iter(self.tokens.values())).dtype  # as a view's: z is in the dtype of all tokens
        valid = (torch.arange(rows, device=self.like.device) >= absent).to(dtype)
        self.tokens[VALID] = valid[None, None]

    def _cut(self, start: int, stop: int) -> Tensors:
        """The tokens start:stop, behind the rows that a window sees before them."""
        if (start, stop) == (0, self.binding.tokens):
            return self.tokens
        return {n: t[:, :, start : stop + self.halo] for n, t in self.tokens.items()}

    def _inputs(self, tokens: Tensors) -> Tensors:
        """All that an op takes."""
        carried = {identifier(n): t for n, t in self.carry.items()}
        return {**tokens, **carried, **{f"{n}__initial": t for n, t in self.initial.items()}, **self.slow}

    def _run(self, part: str, start: int, stop: int) -> None:
        """One op on the tokens start:stop; the carry becomes what it leaves."""
        self._keep(start, self.op(part, stop - start)(self._inputs(self._cut(start, stop))))

    def _keep(self, start: int, made: Tensors) -> None:
        """An op's results, of the tokens from `start` on."""
        if "z" in made:
            self.z.append((start, made["z"]))
        if "losses" in made:
            self.losses.append((start, made["losses"]))
        for name in self.carry:
            key = f"end_{identifier(name)}"
            if key in made:
                self.carry[name] = made[key]

    def spans(self) -> None:
        """Every span between two resets, cut at the chunks that calls began or will end inside."""
        schedule, start, tokens = self.spec.schedule, 0, self.binding.tokens
        reset = schedule.reset
        while start < tokens:
            at = self.position + start
            if resets_at(schedule, at):
                tails = {n: t for n, t in self.carry.items() if self.entries[n].part == "tail"}
                self.carry = {**self._fresh(), **tails}  # what a window sees is not learned
            given = not at and self.begun  # what a first span starts from
            whole = 0 if not reset or at % reset or given or self.halo else (tokens - start) // reset
            if whole > 1:
                self._at_once(start, whole, reset)
                start += whole * reset
                continue
            stop = tokens if not reset else min(tokens, start + reset - at % reset)
            self._span(start, stop)
            start = stop

    def _at_once(self, start: int, count: int, length: int) -> None:
        """Whole spans between two resets, which see nothing of one another, as so many sequences; the carry becomes the
        last one's."""
        cut = self._cut(start, start + count * length)
        cut = {n: t.unflatten(2, (count, length)).flatten(1, 2) for n, t in cut.items()}
        made = self.op("scan", length)(self._inputs(cut))
        apart = {n: t.unflatten(1, (-1, count)) for n, t in made.items()}
        self._keep(start, {n: t.flatten(2, 3) if n in ("z", "losses") else t[:, :, -1] for n, t in apart.items()})

    def _span(self, start: int, stop: int) -> None:
        schedule = self.spec.schedule
        size, period = self._periods()
        waits = isinstance(schedule, Chunked) and schedule.order == "apply-update"
        while start < stop and (self.position + start) % period:
            # Only what decides is asked: while Dynamo traces a call, places are symbols, and each answer has a graph.
            left = size - (self.position + start) % size
            end = stop if stop - start <= left else start + left
            complete = not waits or end - start == left
            self._run("inside" if complete else "inside partial", start, end)
            if complete and waits:  # nothing waits any more
                for name, entry in self.entries.items():
                    if entry.part == "pending":
                        self.carry[name] = torch.zeros_like(self.carry[name])
            start = end
        if start < stop:
            self._run("scan", start, stop)

    def _periods(self) -> tuple[int, int]:
        """Tokens of a chunk, and of the period at whose multiples a scan may begin."""
        schedule = self.spec.schedule
        if isinstance(schedule, Causal):
            return schedule.chunk, schedule.chunk
        assert isinstance(schedule, Chunked)
        return schedule.size, schedule.anchor or schedule.size

    def operations(self, program: Program) -> None:
        for kind, start, stop in program.on(self.sizes, self.spec.where):
            self._run("update" if kind == "update" else "read", start, stop)
        self.losses = []

    def results(self) -> tuple[Tensor, State, Tensor | None]:
        heads, sequences = self.binding.heads, self.binding.sequences
        if not self.z:
            self._run("scan", 0, 0)
        z = self._joined(self.z)
        end: State = {}
        for name, entry in self.entries.items():
            carried = self.carry[name]
            if carried.shape[:2] != (heads, sequences):  # what no step has written yet
                carried = carried.expand(heads, sequences, *self._tile(entry))
            end[name] = carried.transpose(0, 1)
        if counts_tokens(self.spec):
            end["position"] = self.position + self.binding.tokens
        if not self.return_losses:
            return z, end, None
        if not self.losses:
            return z, end, z.new_zeros(sequences, heads, 0, dtype=self.like.dtype)
        return z, end, self._joined(self.losses)

    def _joined(self, parts: list[tuple[int, Tensor]]) -> Tensor:
        """Parts of the tokens, each with its first, as [B, H, N, *]; those of a `Program` come in any order."""
        if isinstance(self.spec.schedule, Program):
            parts = sorted(parts, key=lambda part: part[0])
        return join([t for _, t in parts]).transpose(0, 1)
