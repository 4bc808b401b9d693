"""The Triton emitter for loops of batches: one program walks the schedule for one head of one sequence.

What a step hands to the next lies in the program's memory; a piece reads of it what it needs, tile of tokens by tile.
Sums over tokens stay in registers from one tile to the next where they are few, and else are added up in memory.
Cotangents of what sequences share are each program's own, and are summed outside: no result depends on who is first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from nestloop.lowering.axes import readout_axes, type_axes
from nestloop.lowering.capture import Captured
from nestloop.lowering.differentiate import Piece
from nestloop.lowering.emit.batches import Batches
from nestloop.lowering.emit.torch import TITLES
from nestloop.lowering.emit.triton import TritonFunction
from nestloop.lowering.emit.triton_kernels import ALIVE, TritonKernels, aligned, indented, zeros
from nestloop.lowering.emit.triton_tiles import walk
from nestloop.lowering.emit.triton_work import work
from nestloop.lowering.ops.strided import NoSpelling, extent
from nestloop.lowering.runtime.triton_plan import Launch, TritonPlan

BARRIER = "tl.debug_barrier()"
HEIGHTS = (64, 32, 16)  # tokens of a tile
# Tokens of a tile, and the length of a block of a long axis (0: all of it), best first: with fewer tokens weights are
# read more often, and products have fewer rows.
TILES = ((64, 0), (64, 64), (64, 32), (32, 0), (32, 64), (32, 32), (16, 0), (16, 64), (16, 32), (16, 16))
CARRIED = ALIVE // 2  # elements of sums that stay in registers from one tile of tokens to the next
SUMS = ("loss_sum", "loss_after")


class TritonLoop(TritonKernels, Batches):
    """Writes the module of one lowered loop.

    Args:
        heights: tokens that a tile may have; the first at which a function's tiles fit registers, else the last.

    Raises:
        NoSpelling: something in it has no Triton; the text is the reason.
    """

    prefixes = ("", "d_", "gradient_", "d_gradient_", "end_", "between_")

    def __init__(
        self,
        captured: Captured,
        pieces: dict[str, Piece],
        losses: bool,
        carried: bool,
        heights: Sequence[int] = HEIGHTS,
    ) -> None:
        super().__init__(captured, pieces, losses, carried, str)  # `names.safe` has made them fit
        self.heights = heights
        self._check_tiles()
        self.shapes = {n: tuple(size for size in tile if size != 1) for n, tile in self.tiles().items()}
        self.ordered = self.spec.schedule.needs_order
        self.used = set()
        self.functions = {}
        for name, piece in self.pieces.items():
            self._add(name, name, [self.name(r) for r in piece.results])
        for name, piece in self.pieces.items():
            self._add(f"{name}_vjp", name, [f"d_{self.name(n)}" for n in piece.wrt])

    def _check_tiles(self) -> None:
        if self.whole:
            raise NoSpelling("its tokens mix, and a tile of all of them is more than registers hold")
        for piece in self.pieces.values():
            for node in piece.backward.graph.find_nodes(op="placeholder"):
                if not self.walks(self.name(node.name)) or (size := extent(node.meta["val"].shape[0])).has_tokens:
                    continue
                if not size.is_one:
                    raise NoSpelling("its graphs hold for one number of tokens, and a tile has another")
                self.heights = (1,)  # a call with one token: a tile is that token, and has no axis of them

    def _add(self, name: str, of: str, results: list[str]) -> None:
        """A piece's function, or its backward's."""
        pulls = name.endswith("_vjp")
        piece = self.pieces[of]
        module = piece.backward if pulls else piece.forward
        doc = f"Cotangents of the inputs of {of}." if pulls else f"{TITLES[of]}. Makes {', '.join(results)}."
        summed = self._summed(name, results)
        rows: dict[str, tuple[int, bool | str]] = {n: (0, False) for n in [*self.shapes, *results]}
        rows |= {n: (0, True) for n in summed}
        rows |= {f"d_{n}": (0, added) for n, added in self._added(of).items()} if pulls else {}
        handed = [*SUMS, "d_loss_sum", "d_loss_after"]
        if of.endswith("update"):  # of the gradient: where the sum of it is
            step = self.functions[of.replace("update", "gradient")]
            handed += [f"gradient_{n}" for n in self.fast if f"gradient_{n}" not in step.rows]
        axes = type_axes(self.spec, module, readout_axes(self.captured)).axes
        tokens = [*self.tokens, "d_z"]
        ordered = self.ordered and of.endswith("gradient")

        def of_tile(height: int, block: tuple[int, int] | None, carried: Sequence[str]) -> TritonFunction:
            own = {n: row for n, row in rows.items() if n not in (*carried, *handed)}
            given = (axes, height, own, self.name, ordered, block)
            return TritonFunction(name, module, results, tokens, doc, *given)

        carried = summed if sum(map(self.tile_elements, summed)) <= CARRIED else []
        tiles = [tile for tile in TILES if tile[0] in self.heights]
        if self.heights == (1,):
            tiles = [(1, length) for height, length in TILES if height == HEIGHTS[-1]]
        self.functions[name] = self.fitting(of_tile, module, tiles, [carried, []] if carried else [[]])

    def _summed(self, name: str, results: Sequence[str]) -> list[str]:
        """Results that tiles, and steps, add up."""
        if name.endswith("update_vjp"):
            return [f"d_{n}" for n in self.slow if f"d_{n}" in results]
        if name.endswith("_vjp"):
            reached = [f"d_{n}" for n in self.reached(name.removesuffix("_vjp")) if n not in self.tokens]
            return [r for r in results if r in reached]
        return [r for r in results if name.endswith("gradient") and r not in SUMS]

    def _added(self, piece: str) -> dict[str, bool | str]:
        """Of tokens, whether a cotangent is added to what an earlier piece, or "again" an earlier step, has written."""
        seen = [n for n in self.tokens if n in self.reached(piece)]
        if piece == "readout":
            return dict.fromkeys(seen, False)
        written = set(self.reached("readout"))
        if piece.endswith("gradient"):
            written |= {*self._cleared, *(self.reached("final_loss") if self.losses else [])}
        again = piece.endswith("gradient") and not self.ordered and "again"
        return {n: True if n in written else again for n in seen}

    @property
    def _cleared(self) -> list[str]:
        """Tokens with a cotangent from some steps only, which is zero from the start."""
        seen = [set(self.reached(f"{v}gradient")) for v in self.variants]
        before = {*self.reached("readout"), *(self.reached("final_loss") if self.losses else [])}
        return [n for n in self.tokens if n in set.union(*seen) - set.intersection(*seen) - before]

    # ---- Source ----------------------------------------------------------------------------------------------------

    def emit(self) -> TritonPlan:
        """The module."""
        plan = "One program a head and sequence walks the steps, tile of tokens by tile."
        kernels = {name: self._kernel(name) for name in ("forward", "backward")}
        return TritonPlan(
            text=self.module(plan, [*kernels.values()]),
            forward=tuple(map(self.original, self.given("forward"))),
            backward=tuple(map(self.original, self.given("backward"))),
            gradients=tuple(map(self.original, self.gradients)),
            rows=max(f.longest for f in self.functions.values()),
            state=0,
            wide=tuple(n for n in self.given("backward") if n != "d_losses" and self.elements(n) % 16 == 0),
            forward_launches=(self._launch("forward"),),
            backward_launches=(self._launch("backward"),),
            common=(*self.hoisted, *self.captured.projected),
            work=work(self.functions, self.shapes, kernels, self._functions_of, self._alive),
        )

    def _launch(self, which: str) -> Launch:
        return Launch(which, "sequences", self.warps_for(self._alive(which)), self._room(which))

    def _kernel(self, which: str) -> str:
        self.used = set()
        body = self._forward() if which == "forward" else self._backward()
        made = self.gradients
        doc = "Cotangents of forward's inputs, each step recomputed from the state it started from."
        if which == "forward":
            made = ["z", *[f"end_{n}" for n in self.fast], *(["losses"] if self.losses else [])]
            doc = f"{', '.join(made)}, the states between steps."
            made += [f"between_{n}" for n in self.fast]
        given: list[str] = []
        for n in self.given(which):
            given += [f"{n}_p"] if n.startswith("between_") else self.pointers(n, self.walks(n))
        given += [f"{n}_made" for n in made]
        given += ["order_p", "order_h", "order_b"] if self.ordered else []
        given += ["bounds", "weights", "rates", "memory", "H", "B", "N", "steps"]
        parts = [f"{name} = scratch + {at}" for name, at in self._parts(which)[0].items()]
        order = ["order = order_p + head * order_h + sequence * order_b"] if self.ordered else []
        return self.frame(which, doc, given, f"{self._room(which)}", [*parts, *order, *body])

    def _functions_of(self, which: str) -> list[TritonFunction]:
        """The functions of a kernel; `backward` sums the gradient again."""
        pulls = which == "backward"
        return [f for n, f in self.functions.items() if n.endswith("_vjp") == pulls or (pulls and "gradient" in n)]

    def _alive(self, which: str) -> int:
        """Elements of the tiles that are alive at once, those that the tiles of tokens hand on among them."""
        handed = {f: sum(self.tile_elements(r) for r in f.returned if r not in SUMS) for f in self._functions_of(which)}
        return max(f.alive + more for f, more in handed.items())

    # ---- Memory ----------------------------------------------------------------------------------------------------

    @property
    def _state(self) -> int:
        """Elements of the fast weights, each from the start of a cache line."""
        return self.room_for(self.fast)

    def _parts(self, which: str) -> tuple[dict[str, int], int]:
        """Where the parts of a program's memory begin, behind what its functions work in; and how much it is."""
        size = aligned(self.working(self._functions_of(which)))
        wanted = (
            {"states": 2, "sums": 1} if which == "forward" else {"states": 1, "sums": 1, "cotangents": 2, "pulled": 1}
        )
        places = {}
        for name, states in wanted.items():
            places[name] = size
            size += states * self._state
        return places, size

    def _room(self, which: str) -> int:
        return self._parts(which)[1]

    def _in(self, part: str) -> dict[str, str]:
        """Where each fast weight, or what has its shape, lies in a part of the program's memory."""
        return self.side_by_side(part, self.fast)

    def place(self, name: str, made: bool = False) -> str:
        if made:
            return f"{name}_made + (item * N + first) * {self.elements(name)}"
        return f"{self.at(name)} + tl.cast(first, tl.int64) * {name}_n"

    def step(self, name: str) -> str:
        return f"{name}_n" if self.walks(name) else "0"

    def _read(self, name: str, states: Mapping[str, str]) -> dict[str, str]:
        """Where a function finds what it reads, the fast weights in `states`."""
        function = self.functions[name]
        places = {n: self.at(n) for n in [*self.slow, *self.hoisted]}
        places |= {**states, **{f"gradient_{n}": place for n, place in self._in("sums").items()}}
        if function.ordered:
            places |= {n: self.at(n) for n in self.tokens}
            places |= {f"d_{n}": f"{n}_made + item * N * {self.elements(n)}" for n in self.tokens}
        return {n: place for n, place in places.items() if n in function.rows}

    def _cotangents(self, fast: Mapping[str, str]) -> dict[str, str]:
        """Where cotangents of what is no token add up."""
        shared = [n for n in [*self.slow, *self.hoisted] if n in self.gradients]
        places = {n: f"{n}_made + item * {self.elements(n)}" for n in shared} | dict(fast)
        return {f"d_{n}": place for n, place in places.items()}

    # ---- Calls -----------------------------------------------------------------------------------------------------

    def _variants(self, lines: Callable[[str], list[str]]) -> list[str]:
        if len(self.variants) == 1:
            return lines(self.variants[0])
        first, others = (indented(lines(v)) for v in self.variants)
        return ["if step == 0:", *first, "else:", *others]

    def _over_tiles(
        self, name: str, bounds: tuple[str, str], read: Mapping[str, str], into: Mapping[str, str]
    ) -> list[str]:
        """A piece on every tile of tokens; `into`: where results add up, those that no place is given for in tiles."""
        function = self.functions[name]
        if not function.results:
            return []
        start, stop = bounds
        returned = [r for r in function.returned if r in into]
        height = function.longest
        inner = [f"n = tl.minimum({stop} - first, {height})"]
        inner.append(self.call(name, {**read, **into}, "c_"))
        inner += [f"{r} += c_{r}" for r in function.returned]
        if function.scratch or any(r in into for r in function.results if r not in function.returned):
            inner.append(BARRIER)  # the next tile works in the same memory
        return [
            *[self.load(r, into[r]) for r in returned],
            walk("first", f"{start}, {stop}, {height}"),
            *indented(inner),
            *[self.store(r, into[r], r) for r in returned],
        ]

    def more(self, function: TritonFunction) -> list[str]:
        return [*(["order + first"] if function.ordered else []), *(["back > 0"] if function.again else [])]

    @property
    def _begin(self) -> list[str]:
        """Lines that read a step's batch and numbers."""
        return [
            "start, stop = tl.load(bounds + 2 * step), tl.load(bounds + 2 * step + 1)",
            "weight, rate = tl.load(weights + step), tl.load(rates + step)",
        ]

    def _gradient(self, states: Mapping[str, str]) -> list[str]:
        """Lines that sum a step's gradient over tiles, and its losses."""
        functions = [self.functions[f"{v}gradient"] for v in self.variants]
        sums = self._in("sums")
        cleared = [n for n in self.fast if any(f"gradient_{n}" in f.rows for f in functions)]
        lines = [f"gradient_{n} = {self.zeros(n)}" for n in self.fast if n not in cleared]
        lines += [*self.clear_all(cleared, sums), BARRIER] if cleared else []
        lines += ["loss_sum = " + zeros([])] if any("loss_sum" in f.returned for f in functions) else []
        into = {f"gradient_{n}": sums[n] for n in cleared}
        lines += self._variants(
            lambda v: self._over_tiles(f"{v}gradient", ("start", "stop"), self._read(f"{v}gradient", states), into)
        )
        return lines

    # ---- Forward ---------------------------------------------------------------------------------------------------

    def _forward(self) -> list[str]:
        fast, states = self.fast, self._in("states")
        body: list[str] = []
        ends = {n: f"end_{n}_made + item * {self.elements(n)}" for n in fast}
        for n in fast:  # the end too: without tokens there is no step
            body += self.fill(n, self.at(n) if n in self.starts else None, states[n], ends[n])
        now, then = self._in("now"), self._in("then")
        turn = [f"now = states + step % 2 * {self._state}", f"then = states + (step + 1) % 2 * {self._state}"]
        step = [*self._begin, *turn, *self._gradient(now)]
        if self.losses:
            step.append(self._loss("step", "loss_sum", "stop - start"))

        def update(variant: str) -> list[str]:
            name = f"{variant}update"
            made = {f"{n}_new": then[n] for n in fast}
            unmade = [n for n in fast if f"{n}_new" not in self.functions[name].results]
            call = self.call(name, {**self._read(name, now), **made}, count="0")
            return [line for line in [call, *self.clear_all(unmade, then)] if line]

        step += [BARRIER, *self._variants(update), BARRIER]
        for n in fast:
            between = f"between_{n}_made + (tl.cast(step, tl.int64) * H * B + item) * {self.elements(n)}"
            step += ["if step + 1 < steps:", *indented(self.fill(n, then[n], between))]
            step += ["else:", *indented(self.fill(n, then[n], ends[n]))]
        body += [BARRIER, walk("step", "0, steps"), *indented(step)]
        body.append(f"now = states + steps % 2 * {self._state}")
        body += self._over_tiles("readout", ("0", "N"), self._read("readout", now), {})
        if self.losses:
            body.append("loss_after = " + zeros([]))
            body += self._over_tiles("final_loss", ("0", "N"), self._read("final_loss", now), {})
            body.append(self._loss("steps", "loss_after", "N"))
        return body

    @staticmethod
    def _loss(index: str, total: str, count: str) -> str:
        return f"tl.store(losses_made + item * (steps + 1) + {index}, {total} / tl.cast({count}, S))"

    # ---- Backward --------------------------------------------------------------------------------------------------

    def _backward(self) -> list[str]:
        fast, height = self.fast, self.heights[0]
        shared = [n for n in [*self.slow, *self.hoisted] if n in self.gradients]
        body = self.clear_all(shared, {n: f"{n}_made + item * {self.elements(n)}" for n in shared})
        cotangents = self._in("cotangents")
        for n in fast:
            body += self.fill(n, self.at(f"d_{n}"), cotangents[n])
        if self._cleared:
            inner = [f"n = tl.minimum(N - first, {height})", *[self.clear_rows(n, height, "n") for n in self._cleared]]
            body += [walk("first", f"0, N, {height}"), *indented(inner)]
        body.append(BARRIER)
        ends = {n: self.at(f"end_{n}") for n in fast}
        body += self._pull("readout", ("0", "N"), ends, self._cotangents(cotangents))
        if self.losses:
            body.append(f"d_loss_after = tl.load({self.at('d_losses')} + steps).to(S) / tl.cast(N, S)")
            body += self._pull("final_loss", ("0", "N"), ends, self._cotangents(cotangents))
        body += [walk("back", "0, steps"), *indented(self._pull_step())]
        last = self._in("d_now")
        body.append(f"d_now = cotangents + steps % 2 * {self._state}")
        for n in self.starts:
            body += self.fill(n, last[n], f"{n}_made + item * {self.elements(n)}")
        return body

    def _pull_step(self) -> list[str]:
        """Lines of one step's backward."""
        fast, states = self.fast, self._in("states")
        now, then, pulled = self._in("d_now"), self._in("d_then"), self._in("pulled")
        lines = ["step = steps - 1 - back", *self._begin]
        lines += [
            f"d_now = cotangents + back % 2 * {self._state}",
            f"d_then = cotangents + (back + 1) % 2 * {self._state}",
        ]
        first: list[str] = []
        later: list[str] = []
        for n in fast:
            between = f"between_{n}_p + (tl.cast(step - 1, tl.int64) * H * B + item) * {self.elements(n)}"
            first += self.fill(n, self.at(n) if n in self.starts else None, states[n])
            later += self.fill(n, between, states[n])
        lines += ["if step == 0:", *indented(first), "else:", *indented(later), BARRIER]
        updates = [self.functions[f"{v}update_vjp"] for v in self.variants]
        if any(f"gradient_{n}" in f.inputs for f in updates for n in fast):
            lines += [*self._gradient(states), BARRIER]

        def pull_update(variant: str) -> list[str]:
            name = f"{variant}update_vjp"
            results = self.functions[name].results
            made = {f"d_{n}_new": now[n] for n in fast} | {f"d_gradient_{n}": pulled[n] for n in fast}
            into = self._cotangents(then)
            unmade = self.clear_all([n for n in fast if f"d_{n}" not in results], then)
            unmade += self.clear_all([n for n in fast if f"d_gradient_{n}" not in results], pulled)
            found = [r for r in self.functions[name].returned if r in into]
            call = self.call(name, {**self._read(name, states), **made, **into}, "c_", count="0")
            added = [line for r in found for line in (self.load(r, into[r]), self.store(r, into[r], f"{r} + c_{r}"))]
            return [line for line in [call, *unmade, *added] if line]

        lines += [*self._variants(pull_update), BARRIER]
        if self.losses:
            lines.append(f"d_loss_sum = tl.load({self.at('d_losses')} + step).to(S) / tl.cast(stop - start, S)")
        given = {**states, **{f"d_gradient_{n}": pulled[n] for n in fast}}
        lines += self._variants(lambda v: self._pull(f"{v}gradient", ("start", "stop"), given, self._cotangents(then)))
        return lines

    def _pull(
        self, piece: str, bounds: tuple[str, str], states: Mapping[str, str], into: Mapping[str, str]
    ) -> list[str]:
        """Lines that run a piece's backward over tiles."""
        name = f"{piece}_vjp"
        lines = self._over_tiles(name, bounds, self._read(name, states), into)
        return [*lines, BARRIER] if lines else []
