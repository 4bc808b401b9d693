"""The Triton emitter for streams: the functions of an op's pieces, their memory, and calls of them on a tile.

One program runs one head of one sequence from its first token to its last. The state is a set of tiles that a loop
hands from one chunk to the next; tensors are read where they lie, by their strides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import fx

from nestloop.lang.state import identifier
from nestloop.lowering.axes import Axes
from nestloop.lowering.emit.scan import ROWWISE, TITLES, ScanTensors
from nestloop.lowering.emit.triton import TritonFunction
from nestloop.lowering.emit.triton_kernels import TritonKernels, indented
from nestloop.lowering.emit.triton_tiles import BARRIER, Rows, padded, walk
from nestloop.lowering.emit.triton_work import fewest_warps
from nestloop.lowering.ops.strided import NoSpelling
from nestloop.lowering.runtime.triton_plan import Handed, Launch, TritonPlan
from nestloop.lowering.schedule.apart import Block
from nestloop.lowering.schedule.roofline import TILE_REGISTERS, WIDE_REGISTERS
from nestloop.lowering.schedule.spread import WIDE_ROWS
from nestloop.lowering.streams.step import VALID

BLOCKS = (0, 32, 16)  # lengths of the blocks of a long axis, the best first; 0: all of it


class TritonStream(TritonKernels, ScanTensors):
    """What the modules of a scan and of one piece share.

    Attributes:
        spread: how it runs, in words.
        place_of_state: where the state lies, in words.
        strips: the axis of the state of which each program of a walk has a block; None where it has all of it.

    Raises:
        NoSpelling: something in it has no Triton; the text is the reason.
    """

    spread = "one program a head and sequence"
    place_of_state = "its state in registers"
    strips: Block | None = None

    def in_turns(self, name: str) -> bool:
        """Whether a function runs in a loop in which the places that it counts are better counted anew."""
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rows = self.longest or self.first.longest
        if not self.rows:
            raise NoSpelling("a tile of all the tokens of a call is more than registers hold")
        self.alone = self.form == "sequential"  # a tile is one token, and has no axis of them
        self.shapes = self._declared()
        self.functions: dict[str, TritonFunction] = {}
        self._add_functions()
        self.used: set[int] = set()

    def _add_functions(self) -> None:
        for name, piece in self.pieces.items():
            doc = f"{TITLES[name]}. Makes {', '.join(piece.results)}."
            self._add(name, piece.forward, list(piece.results), doc)
            wrt = [None if n == VALID else f"d_{n}" for n in piece.wrt]
            self._add(f"{name}_vjp", piece.backward, wrt, f"Cotangents of the inputs of {name}.")
        for name, module in self.states.items():
            left = [r for r in self.pieces["chunk"].results if r.endswith("_new")]
            wanted = [r if r.removesuffix("_new") in self.carry else None for r in left]
            self._add(name, module, wanted, f"{TITLES[name]}.")

    def _declared(self) -> dict[str, tuple[int, ...]]:
        """Sizes of one token's row, or of a weight's tile, without axes of size 1."""
        sizes, spec = self.captured.sizes, self.spec
        shapes: dict[str, tuple[int, ...]] = {VALID: (), "losses": (), "z": tuple(self.captured.output)}
        for name, entry in self.entries.items():
            rows = [entry.rows] if entry.rows else []
            shapes[identifier(name)] = (*rows, *[e.size(sizes) for e in entry.like.dims])
        steps = getattr(spec.schedule, "micro", 1)
        for n, view in spec.inputs.items():
            shapes[n] = (*([steps] if view.micro else []), *[e.size(sizes) for e in view.dims])
        shapes |= {n: tuple(e.size(sizes) for e in slow.dims) for n, slow in spec.slow.items()}
        shapes |= {f"{n}__initial": tuple(e.size(sizes) for e in fast.dims) for n, fast in spec.fast.items()}
        return {n: tuple(size for size in shape if size != 1) for n, shape in shapes.items()}

    def dims(self, name: str) -> list[str]:
        """What the axes of an entry's tile are called, those of size 1 left out."""
        sizes = self.captured.sizes
        (entry,) = (entry for n, entry in self.entries.items() if identifier(n) == name)
        rows = [(entry.rows, str(entry.rows))] if entry.rows else []
        return [dim for size, dim in [*rows, *[(e.size(sizes), str(e)) for e in entry.like.dims]] if size != 1]

    def _add(self, name: str, module: fx.GraphModule, results: Sequence[str | None], doc: str) -> None:
        per_token, axes, height = self.per_token, self._axes(module), self.rows + self.halo
        given = (name, module, results, per_token, doc, axes, height, self.token_rows)
        self.functions[name] = TritonFunction(*given, in_turns=self.in_turns(name))

    @property
    def token_rows(self) -> dict[str, Rows]:
        """How functions read and write tokens: windows that overlap add to the same rows."""
        rows = {n: Rows(self.halo if self.plain(n) in ROWWISE else 0) for n in [*self.per_token, *ROWWISE]}
        return rows | {f"d_{n}": Rows(added=bool(self.halo)) for n in self.tokens}

    def check_in_memory(self) -> None:
        """Raise `NoSpelling` for a scan whose state cannot lie in memory."""
        if self.anchor_period or self.alone:
            raise NoSpelling("an anchor of its own period or a token alone is kept in registers")
        if not self.carry:
            raise NoSpelling("no state is handed on")

    def add_blocked(
        self,
        name: str,
        module: fx.GraphModule,
        results: Sequence[str | None],
        doc: str,
        rows: Mapping[str, Rows],
        axes: Mapping[fx.Node, Axes] | None = None,
        blocked: Block | None = None,
    ) -> None:
        """A function that may walk a long axis in blocks.

        Args:
            rows: what it reads and writes itself.
            axes: the names of each value's axes, where its inputs do not tell.
            blocked: an axis that it walks rather than others; a strip, of which it computes a block alone.
        """
        per_token, named = self.per_token, axes or self._axes(module)

        def of_tile(height: int, block: Block | None, sums: Sequence[str] = ()) -> TritonFunction:
            given = (name, module, results, per_token, doc, named, height, rows)
            rounded = self.strips is not None and height >= WIDE_ROWS
            return TritonFunction(*given, block=block, rounded=rounded, in_turns=self.in_turns(name))

        height = self.rows + self.halo
        if blocked is not None and blocked.is_strip:
            self.functions[name] = of_tile(height, blocked)
            return
        tiles = [(height, length) for length in BLOCKS]
        self.functions[name] = self.fitting(of_tile, module, tiles, [[]], blocked)

    # ---- Source ----------------------------------------------------------------------------------------------------

    def emit(self, pulls: TritonStream | None = None) -> TritonPlan:
        """The module.

        Args:
            pulls: what writes its backward, where another does: of the same scan, with the state in another place.
        """
        pulls = pulls or self
        what = f"A scan over chunks of {self.longest} tokens" if self.longest else "One piece"
        forward, backward = self._launches("forward"), pulls._launches("backward")
        kernels = {one.kernel: self._kernel("forward", one) for one in forward}
        kernels |= {one.kernel: pulls._kernel("backward", one) for one in backward}
        spread = self.spread
        if pulls is not self:
            own = {function.name for function in self._functions_of("forward")}
            self.functions = {n: (self if n in own else pulls).functions[n] for n in self.functions}
            spread += f", {self.place_of_state} forward and {pulls.place_of_state} backward"
        return TritonPlan(
            text=self.module(f"{what}, {spread}: the {self.form} form.", [*kernels.values()], [*forward, *backward]),
            forward=tuple(self.given("forward")),
            backward=tuple(self.given("backward")),
            gradients=tuple(self.gradients),
            rounded=() if self.halo else tuple(self.seen),  # windows that overlap add to the same rows
            rows=self.rows,
            state=self._state,
            wide=tuple(n for n in self.given("backward") if self.elements(n) % 16 == 0),
            forward_launches=forward,
            backward_launches=backward,
            forward_handed=self._handed("forward"),
            backward_handed=pulls._handed("backward"),
            work=self.work(kernels, self._functions_of, self.alive_in),
        )

    def _launches(self, which: str) -> tuple[Launch, ...]:
        """The kernels of a direction."""
        states = self._state if which == "backward" else 0
        functions = self._functions_of(which)
        walks = any(one.block is not None for one in functions)  # blocks of an axis, whose loops must not spill
        each = TILE_REGISTERS if walks else WIDE_REGISTERS
        warps = fewest_warps(self.warps_for(self.alive_in(which), each), functions)
        return (Launch(which, "sequences", warps, self._scratch(which), states),)

    def _handed(self, which: str) -> tuple[Handed, ...]:
        """What the kernels of a direction leave for one another."""
        return ()

    def _written(self, kernel: str) -> tuple[str, list[str]]:
        """A sentence on a kernel, and its lines."""
        if kernel == "forward":
            return f"{', '.join(self.made)}: one head and sequence a program.", self._forward()
        doc = "Cotangents of forward's inputs, each chunk recomputed from the state it started with."
        states = [f"states = scratch + {self._scratch(kernel)}"] if self.kept else []
        return doc, [*states, *self._backward()]

    def _kernel(self, which: str, launch: Launch) -> str:
        self.used = set()
        self.strip = self.strips if launch.strips > 1 else None
        doc, body = self._written(launch.kernel)
        made = self.made + [f"between_{n}" for n in self.kept] if which == "forward" else self.gradients
        given = [*self.pointers(self.given(which)), *self.made_pointers(made)]
        given += [*[one.name for one in self._handed(which)], "memory", "H", "B", "N", "every"]
        room = f"{launch.scratch}" + (f" + every * {launch.states}" if launch.states else "")
        parts = self.parts.get(launch.over, "")
        return self.frame(launch.kernel, doc, given, room, body, parts, walks=launch.walks)

    @property
    def parts(self) -> dict[str, str]:
        """Programs of each head and sequence, as Triton, by what they are over."""
        chunks = f"tl.cdiv(N, {self.rows})"
        return {"chunks": chunks, "groups": f"tl.cdiv({chunks}, every)"}

    def _forward(self) -> list[str]:
        raise NotImplementedError

    def _backward(self) -> list[str]:
        raise NotImplementedError

    @property
    def per_token(self) -> list[str]:
        """What is given with a row for each token."""
        return [*self.tokens, "d_z", "d_losses"]

    def walks(self, name: str) -> bool:
        return name in self.per_token or name in ROWWISE

    def step(self, name: str, made: bool = False) -> str:
        return super().step(name, made) if self.walks(name) else "0"

    # ---- Memory ----------------------------------------------------------------------------------------------------

    @property
    def _state(self) -> int:
        return sum(self.elements(n) for n in self.kept)

    @property
    def _size(self) -> int:
        """Elements of a state in memory, each part from the start of a cache line."""
        return self.room_for(self.carry)

    def _functions_of(self, which: str) -> list[TritonFunction]:
        """The functions that a kernel calls."""
        chosen = [n for n in self.functions if (which == "backward") == (n.endswith("_vjp") or n == "advance")]
        return [self.functions[n] for n in chosen]

    def _scratch(self, which: str) -> int:
        return self.working(self._functions_of(which))

    @property
    def alive(self) -> int:
        """Elements of the tiles that are alive at once, at most."""
        return max(f.alive for f in self.functions.values())

    def alive_in(self, which: str) -> int:
        """The same of a direction, or of a kernel."""
        return max((f.alive for f in self._functions_of(which)), default=1)

    # ---- Tiles -----------------------------------------------------------------------------------------------------

    def place(self, name: str, made: bool = False) -> str:
        """Where a chunk's first row lies: of a tensor that is given, or made."""
        begins, step = (self.made_at(name) if made else self.at(name)), self.step(name, made)
        return f"{begins} + tl.cast(start, tl.int64) * {step}"

    def end(self, name: str) -> str:
        """Where a part of the state that forward leaves lies."""
        return f"end_{name}_made + item * {self.elements(name)}"

    def pulled(self, name: str) -> str:
        """Where the cotangent of a weight or of the state lies that backward makes."""
        return f"{name}_made + item * {self.elements(name)}"

    def between(self, name: str, index: str, made: bool = False) -> str:
        """Where a kept state's part lies, as forward makes it or backward takes it."""
        return f"between_{name}_{'made' if made else 'p'} + (({index}) * H * B + item) * {self.elements(name)}"

    def slots(self, index: str) -> dict[str, str]:
        """Where the states of a group lie, densely, in the program's memory."""
        places, offset = {}, 0
        for n in self.carry:
            places[n] = f"states + ({index}) * {self._state}" + (f" + {offset}" if offset else "")
            offset += self.elements(n)
        return places

    def clear(self, name: str) -> str:
        """The line that sets a chunk's rows of a result to zero."""
        if self.alone:
            return self.store(name, self.place(name, made=True), self.zeros(name))
        rows = "own" if self.plain(name) in ROWWISE else "n"
        return self.clear_rows(name, padded(self.rows + self.halo), rows)

    def clear_tokens(self) -> list[str]:
        """Lines that set the cotangents of tokens to zero, to which windows that overlap add."""
        if not self.halo:
            return []
        lines = [walk("index", f"0, tl.cdiv(N, {self.rows})")]
        alone = "n = tl.where(start + own < N, own, n)"  # what is beyond them is the next chunk's
        inner = [*self.span, alone, *[self.clear(n) for n in self.seen]]
        return [*lines, *indented(inner), BARRIER]

    # ---- Calls -----------------------------------------------------------------------------------------------------

    def either(self, lines: Callable[[str], list[str]]) -> list[str]:
        """Lines for a complete chunk, or one that is not; `lines`: those of "chunk", or of "partial"."""
        if "partial" not in self.pieces:
            return lines("chunk")
        chunk, partial = (indented(lines(name)) for name in ("chunk", "partial"))
        return [f"if own == {self.longest}:", *chunk, "else:", *partial]

    @property
    def span(self) -> list[str]:
        reach = f" + {self.halo}" if self.halo else ""
        return [f"start = index * {self.rows}", f"own = tl.minimum(N - start, {self.rows})", f"n = own{reach}"]

    def next_chunk(self, kernel: str) -> list[str]:
        """Lines that begin a chunk behind another, which has read the memory that this one works in."""
        return [*self.span, *([BARRIER] if self._scratch(kernel) else [])]

    def nothing_waits(self) -> list[str]:
        """Lines that leave a state in which no token waits for its step, until a chunk that is not complete."""
        lines = [line for n in self.extra if n.endswith("__pending") for line in self.clear_end(n)]
        return [*lines, *([BARRIER] if lines else [])]

    def clear_end(self, name: str) -> list[str]:
        """Lines that set a part of the state that forward leaves to zero."""
        return [self.store(name, self.end(name), self.zeros(name))]

    def leave_anchor(self) -> list[str]:
        """Lines that leave the last chunk's first weights, its anchor."""
        return [
            line
            for n, weight in self.last_anchors.items()
            for line in ("if start + own == N:", *indented([self.store(n, self.end(n), weight)]))
        ]

    def pull_anchor(self, last: str) -> list[str]:
        """Lines that add that one's cotangent to the weights'; `last`: whether the chunk is the last, as Triton."""
        lines = []
        for n, weight in self.last_anchors.items():
            lines += [self.load(f"d_{n}", self.at(f"d_end_{n}")), f"d_{weight} += d_{n}"]
        return [f"if {last}:", *indented(lines)] if lines else []

    def leave_anchor_of(self, first: Mapping[str, str]) -> list[str]:
        """Lines behind a walk in memory that leave the anchor; `first`: where the last chunk's first weights lie."""
        return [line for n, weight in self.last_anchors.items() for line in self.fill(n, first[weight], self.end(n))]

    def pull_anchor_into(self, pulled: Mapping[str, str], last: str) -> list[str]:
        """`pull_anchor` where the weights' cotangents lie in memory, at `pulled`."""
        lines = []
        for n, weight in self.last_anchors.items():
            lines += self.fill(n, self.at(f"d_end_{n}"), pulled[weight], added=True)
        return [BARRIER, f"if {last}:", *indented(lines)] if lines else []

    def read_only(self, which: str) -> list[str]:
        """Lines that read slow weights, and initial fast weights that all chunks see."""
        read = {n for f in self._functions_of(which) for n in f.inputs}
        names = self.shared if self.longest else self.slow
        return [self.load(n, self.at(n)) for n in names if n in read]

    def token_cotangents(self, name: str) -> list[str]:
        """Lines after a piece that writes cotangents of its tokens: those that it does not reach are zero."""
        if self.halo:  # windows that overlap add to the same rows, which were zero
            return [BARRIER]
        return [self.clear(n) for n in self.seen if n not in self.nonzero(name)]
