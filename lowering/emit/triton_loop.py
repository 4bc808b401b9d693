"""The Triton emitter for loops of batches: one program walks the schedule for one head of one sequence, and then for
another; or, where these are few, kernels over ranges of tokens follow one another (`triton_ranges`)."""

from __future__ import annotations

from nestloop.lowering.emit.triton_ranges import TritonRanges
from nestloop.lowering.emit.triton_steps import WHOLE
from nestloop.lowering.emit.triton_tiles import BARRIER
from nestloop.lowering.runtime.triton_plan import InRanges, Launch, TritonPlan


class TritonLoop(TritonRanges):
    """Writes the module of one lowered loop."""

    def emit(self) -> TritonPlan:
        """The module."""
        plan = (
            "One program walks the steps of a head and sequence, tile of tokens by tile, and then those of another;\n"
            "or, where these are few, one a range of tokens sums up what a step needs, and one a head and sequence\n"
            "takes it."
        )
        ranged = {which: self.range_kernels(which) for which in ("forward", "backward")}
        kernels = {name: self._kernel(name) for name in ("forward", "backward")}
        kernels |= {kernel.name: self.write_kernel(kernel) for made in ranged.values() for kernel in made}
        called = {name: self.functions_of(name) for name in ranged}
        called |= {kernel.name: self.called(kernel) for made in ranged.values() for kernel in made}
        launches = [self._launch("forward"), self._launch("backward")]
        launches += [self.launch(kernel) for made in ranged.values() for kernel in made]
        return TritonPlan(
            text=self.module(plan, [*kernels.values()], launches),
            forward=tuple(map(self.original, self.given("forward"))),
            backward=tuple(map(self.original, self.given("backward"))),
            gradients=tuple(map(self.original, self.gradients)),
            rounded=tuple(map(self.original, self.rounded)),
            rows=self.rows,
            state=0,
            wide=tuple(n for n in self.given("backward") if n != "d_losses" and self.elements(n) % 16 == 0),
            forward_launches=(self._launch("forward"),),
            backward_launches=(self._launch("backward"),),
            forward_handed=self.rows_handed(),
            backward_handed=(*self.rows_handed(), *self.pulled_handed("programs")),
            ranges=InRanges(
                forward_launches=tuple(map(self.launch, ranged["forward"])),
                backward_launches=tuple(map(self.launch, ranged["backward"])),
                forward_handed=self.handed("forward"),
                backward_handed=self.handed("backward"),
            ),
            decided=self.decided,
            sums=self.sums(),
            apart=self.room_for(self.shared),
            computed=tuple(self.starts),
            common=(*self.hoisted, *self.captured.projected),
            work=self.work(kernels, called.__getitem__, lambda name: self.alive(called[name])),
        )

    def _launch(self, which: str) -> Launch:
        return Launch(which, "sequences", self.warps_of(self.functions_of(which)), self._room(which), walks=True)

    def _kernel(self, which: str) -> str:
        self.used = set()
        body = self._forward() if which == "forward" else self._backward()
        doc = "Cotangents of forward's inputs, each step recomputed from the state it started from."
        if which == "forward":
            doc = f"{', '.join(self.results)}, the states between steps."
        places, room = self.parts(self.functions_of(which), self.kept(which))
        parts = [f"{name} = scratch + {at}" for name, at in places.items()]
        parts += self.at_pulled("tl.program_id(0).to(tl.int64)") if which == "backward" else []
        own = [*parts, *self.order, *body]
        return self.frame(which, doc, self.arguments(which), f"{room}", own, chosen=self.chooses(which), walks=True)

    def _room(self, which: str) -> int:
        return self.parts(self.functions_of(which), self.kept(which))[1]

    def _forward(self) -> list[str]:
        step = [*self.numbers, *self.turns("forward"), *self.gradient(self.found("now"))]
        step += [self.loss("step", "loss_sum", "stop - start")] if self.losses else []
        step += [BARRIER, *self.update()]
        body = [*self.start(), BARRIER, *self.each_turn("step", "0, steps", step)]
        body += [*self.turn("forward"), *self.read_out(WHOLE)]
        return [*body, self.loss("steps", "loss_after", "N")] if self.losses else body

    def _backward(self) -> list[str]:
        step = ["step = steps - 1 - back", *self.numbers, *self.turns("backward"), *self.recall()]
        step += [*self.gradient(self.found("state")), BARRIER] if self.sums_again else []
        step += [*self.pull_update(WHOLE), BARRIER, *self.d_loss, *self.pull_gradient(WHOLE, self.found("d_then"))]
        return [
            *self.clear_shared(WHOLE),
            *self.given_cotangents(),
            *self.pull_read_out(WHOLE, self.held("cotangents")),
            *self.each_turn("back", "0, steps", step),
            *self.give_back(),
        ]
