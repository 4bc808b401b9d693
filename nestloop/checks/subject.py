"""A loop under check: its sizes, its backends, and what the reference makes of one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from nestloop.checks.certificate import Row
from nestloop.checks.comparison import call, differences, moved_by_rounding, run
from nestloop.checks.inputs import Inputs, draw
from nestloop.compiled import BACKENDS, CompiledLoop
from nestloop.errors import (
    CompileError,
    NoPlanError,
    UnknownBackendError,
    UnknownDeviceError,
    UnknownDtypeError,
    shown,
)
from nestloop.lang.declare import caller
from nestloop.lang.loop import LoopSpec
from nestloop.lang.schedule import Program, Stream

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# What an error may be at least: where the claim is algebra, rounding of a few hundred sums; else what sums in float32
# of products in that precision come to.
LEAST = {"float64": 1e-9, "float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}
MORE = 10  # times what the definition loses to rounding, code may lose
MORE_IN_HALVES = 2  # the same in two bytes, for which what is lost in four is scaled, beside the least
SHARE = 1e-4  # of the largest gradient (or output), by which one that should be zero is measured
UNDEFINED = "the definition is not finite there: "
FEW_TOKENS = 7
ROUND_LENGTHS = (8, 64)  # tokens, where the definition does not take others
MOST_TOKENS = 101  # where the length is not given: generated code takes up to 96 at once, the reference one by one


Entry = TypeVar("Entry", bound=Callable[..., object])


def entered(table: dict[str, Entry]) -> Callable[[Entry], Entry]:
    """A decorator that enters functions into a table, under their names in words."""

    def enter(function: Entry) -> Entry:
        table[function.__name__.replace("_", " ")] = function
        return function

    return enter


@dataclass
class Subject:
    """One loop with its sizes.

    Attributes:
        spec: its declaration.
        sizes: of every dim; N aside, which each check chooses.
        backends: that are checked.
        device: that they run on.
        dtypes: names of `DTYPES` that are checked beside float64.
        lengths: tokens of a sequence, ascending; one where it is given.
        seed: of the inputs.
    """

    spec: LoopSpec
    sizes: Mapping[str, int]
    backends: Sequence[str]
    device: str
    dtypes: Sequence[str]
    lengths: Sequence[int]
    seed: int
    _ops: dict[str, CompiledLoop] = field(default_factory=dict)
    _refusals: dict[int, str] = field(default_factory=dict)

    @property
    def dims(self) -> dict[str, int]:
        """The sizes that a call may be given by name."""
        return {name: size for name, size in self.sizes.items() if name in self.spec.dim_names}

    def op(self, backend: str) -> CompiledLoop:
        """The loop on a backend."""
        if backend not in self._ops:
            self._ops[backend] = CompiledLoop(self.spec.cls, backend, False, **self.dims)
        return self._ops[backend]

    def inputs(self, tokens: int) -> Inputs:
        """Random inputs, float64; a token's views have norms of about one, as those of trained layers do."""
        torch.manual_seed(self.seed)
        inputs = draw(self.spec, {**self.sizes, "N": tokens})
        views = self.spec.views

        def of_norm_one(name: str, value: Tensor) -> Tensor:
            features = math.prod(value.shape[value.ndim - len(views[name].dims) :])
            return value / math.sqrt(max(features, 1))

        return inputs.map(of_norm_one, views)

    def given(self, inputs: Inputs, dtype: str) -> Inputs:
        """The inputs as a call in a dtype gets them: views in it, weights in float32 (float64 beside float64)."""
        wide = torch.float64 if dtype == "float64" else torch.float32

        def cast(name: str, value: Tensor) -> Tensor:
            return value.to(self.device, DTYPES[dtype] if name in self.spec.inputs else wide)

        made = inputs.map(cast)
        made.order = None if inputs.order is None else inputs.order.to(self.device)
        return made

    def reference(self, inputs: Inputs) -> dict[str, Tensor]:
        """What the definition makes of inputs, computed in float64."""
        return run(self.op("reference"), _exactly(inputs))

    def run(self, backend: str, inputs: Inputs) -> dict[str, Tensor]:
        """What a backend makes of inputs, as float64 on the CPU."""
        return {name: value.cpu().double() for name, value in run(self.op(backend), inputs).items()}

    def refuses(self, tokens: int) -> str:
        """Why the definition takes no sequence of so many tokens; "" where it does."""
        if tokens not in self._refusals:
            self._refusals[tokens] = ""
            try:
                with torch.no_grad():
                    call(self.op("reference"), self.inputs(tokens))
            except (RuntimeError, ValueError, IndexError, CompileError) as error:  # PyTorch's own, and ours of shapes
                self._refusals[tokens] = str(error).splitlines()[0]
        return self._refusals[tokens]

    def leave_out_refused(self) -> list[Row]:
        """Leave out lengths that the definition does not take, as of a body that pairs tokens: a row each. Where it
        takes none, some stay, for what comes first to raise what is wrong."""
        refused = {tokens: why for tokens in self.lengths if (why := self.refuses(tokens))}
        if refused and not self.fixed:
            self.lengths = sorted({*self.lengths, *ROUND_LENGTHS})
        if taken := [tokens for tokens in self.lengths if not self.refuses(tokens)]:
            self.lengths = taken
            return [
                Row("definition", "reference", "float64", tokens, None, 0.0, f"not defined: {why}")
                for tokens, why in refused.items()
            ]
        self.lengths = self.lengths if self.fixed else ROUND_LENGTHS
        return []

    def single(self, inputs: Inputs) -> dict[str, Tensor]:
        """What the definition makes of inputs, computed in float32."""
        return self.run("reference", inputs.map(lambda name, value: value.float()))

    def bound(self, inputs: Inputs, wanted: Mapping[str, Tensor], dtype: str) -> float:
        """How far off code may be, at least, that computes in a dtype what the reference makes of inputs."""
        return LEAST[dtype] if dtype == "float64" else allowed(dtype, furthest(self.single(inputs), wanted)[0])

    def moved(self, inputs: Inputs, wanted: Mapping[str, Tensor], dtype: str) -> float:
        """How far off it may be where the inputs, rounded to that dtype, move the definition as far: over a kink, say,
        or because it is ill-conditioned."""
        eps, times = torch.finfo(DTYPES[dtype]).eps, MORE if dtype in ("float64", "float32") else MORE_IN_HALVES
        return times * moved_by_rounding(self.reference, _exactly(inputs), wanted, eps, SHARE)

    def calls(self, inputs: Inputs, backends: Sequence[str]) -> Iterator[tuple[str, CompiledLoop, Inputs]]:
        """(backend, the loop on it, the inputs in its closest dtype) of each of some backends."""
        for backend in backends:
            yield backend, self.op(backend), self.given(inputs, self.exact(backend))

    def between(
        self, check: str, backend: str, given: Inputs, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
    ) -> Row:
        """Two results of one of `calls` as a row. What rounding explains is asked only where they differ by more than
        the least bound."""
        (error, worst), dtype = furthest(found, wanted), self.exact(backend)
        row = Row(check, backend, dtype, given.tokens(self.spec), error, LEAST[dtype], worst)
        if row.holds:
            return row
        alike = all(torch.equal(found[name].isfinite(), value.isfinite()) for name, value in wanted.items())
        if alike and (where := not_finite(wanted)):
            return replace(row, error=None, worst=f"neither is finite there: {where}")
        return replace(row, bound=max(row.bound, self.moved(given, self.reference(given), dtype)))

    def told(self, row: Row, given: Inputs) -> Row:
        """The same row, but where the definition has no finite numbers that code could be compared with: there it says
        that."""
        if row.error is None or math.isfinite(row.error):
            return row
        where = not_finite(self.reference(given))
        where = where or ("" if row.dtype == "float64" else not_finite(self.single(given)))
        return replace(row, error=None, worst=UNDEFINED + where) if where else row

    @cached_property
    def missing(self) -> dict[str, str]:
        """Backends that have no code for the loop, each with the reason."""
        found = {}
        for backend in self.backends:
            try:
                for tokens in sorted({self.lengths[0], self.lengths[-1]}):  # one token has code of its own
                    with torch.no_grad():
                        inputs = self.given(self.inputs(tokens), "float32")
                        self.op(backend)(inputs.views, inputs.weights, None, inputs.order)
            except NoPlanError as error:
                found[backend] = str(error.given)
        return found

    @property
    def here(self) -> list[str]:
        """Backends that have code for the loop."""
        return [backend for backend in self.backends if backend not in self.missing]

    @property
    def walking(self) -> list[str]:
        """The same, and the reference."""
        return ["reference", *self.here]

    def having(self, dtype: str) -> list[str]:
        """Backends with code for views of a dtype."""
        return [backend for backend in self.here if dtype != "float64" or self.exact(backend) == "float64"]

    def exact(self, backend: str) -> str:
        """The dtype in which a backend is closest to algebra."""
        return "float32" if backend == "triton" else "float64"

    @property
    def fixed(self) -> bool:
        """Whether there is one length."""
        return len(self.lengths) == 1

    @property
    def short(self) -> int:
        """Tokens of a call that is made many times."""
        return next((tokens for tokens in self.lengths if tokens >= FEW_TOKENS), self.lengths[-1])


def allowed(dtype: str, off: float) -> float:
    """How far off code may be that computes in a dtype what the definition, step by step in float32, is off by."""
    if dtype == "float32":
        return max(LEAST[dtype], MORE * off)
    digits = torch.finfo(DTYPES[dtype]).eps / torch.finfo(torch.float32).eps
    return LEAST[dtype] + MORE_IN_HALVES * digits * off


def _exactly(inputs: Inputs) -> Inputs:
    """The same numbers in float64, on the CPU."""
    made = inputs.map(lambda name, value: value.cpu().double())
    made.order = None if inputs.order is None else inputs.order.cpu()
    return made


def not_finite(found: Mapping[str, Tensor]) -> str:
    """The first element that is no finite number; "" where all are."""
    for name, value in found.items():
        places = value.isfinite().logical_not().nonzero()
        if len(places):
            return f"{name}{places[0].tolist()} is {value[tuple(places[0])].item()}"
    return ""


def furthest(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], share: float = SHARE) -> tuple[float, str]:
    """The largest difference of all tensors, and of which it is; NaN before any other. `share` as in `differences`."""
    errors = differences(found, wanted, share=share)
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return errors[worst], worst


def lengths_of(spec: LoopSpec, sizes: Mapping[str, int]) -> list[int]:
    """Lengths at which code goes different ways: a token, a chunk less or more one, and more than a tile's tokens."""
    if spec.grid or isinstance(spec.schedule, Program):
        return [sizes["N"]]
    schedule = spec.schedule
    period = schedule.period if isinstance(schedule, Stream) else schedule.steps
    return sorted(n for n in {1, FEW_TOKENS, period - 1, period + 1, MOST_TOKENS} if 0 < n <= MOST_TOKENS)


def check_device(device: str) -> None:
    """Raise `UnknownDeviceError` for one on which no tensor can be made here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError):
        here = "'cpu' or 'cuda'" if torch.cuda.is_available() else "'cpu': PyTorch sees no GPU here"
        raise UnknownDeviceError(
            "There is no such device to run loops on.",
            where=caller(),
            given=shown(device),
            need=here,
            fix='write device="cpu"',
        ) from None


def check_backends(names: Sequence[str] | None, device: str, others: Sequence[str] = ()) -> tuple[str, ...]:
    """The backends asked for; for None those that run on a device at full speed.

    others: that are taken beside those which generate code.

    Raises:
        UnknownBackendError, UnknownDeviceError: there is no such one.
    """
    check_device(device)
    if names is None:
        return ("torch", "cpp") if device == "cpu" else ("torch", "triton")
    known = [name for name in BACKENDS if name not in ("auto", "reference") or name in others]
    for name in names:
        if name not in known:
            raise UnknownBackendError(
                "There is no such backend to run.",
                where=caller(),
                given=shown(name),
                need=", ".join(map(repr, known)),
                fix='write backends=("torch", "cpp")',
            )
    return tuple(names)


def check_dtypes(names: Sequence[str]) -> None:
    """Raise `UnknownDtypeError` for a name that is not one of `DTYPES`."""
    for name in names:
        if name not in DTYPES:
            raise UnknownDtypeError(
                "There is no such dtype of views.",
                where=caller(),
                given=shown(name),
                need=", ".join(DTYPES),
                fix='write "float32"',
            )
