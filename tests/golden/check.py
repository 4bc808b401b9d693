"""Is what nestloop computed what the file recorded? Relative errors, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tests.golden.case import Case, NotUnderstood, Quantities, Run
from tests.golden.families import FAMILIES

ROUNDED_TO = 5e-6  # float32, or recorded in float32
ZERO = 1e-12  # a gradient below this share of the largest one is zero, and its digits are rounding noise
SAMPLES = 2048  # a recorded sample of a gradient is its flattened [:: max(1, size // SAMPLES)]
ROUNDED = {"pos_emb"}  # recorded as float32 numbers even where the name says f64


@dataclass(frozen=True)
class Error:
    """How far one tensor is off, and how far it may be; `exact` against a float64 run."""

    name: str
    relative: float
    tolerance: float
    exact: bool

    @property
    def missed(self) -> bool:
        return not self.relative <= self.tolerance  # NaN is a miss


@dataclass(frozen=True)
class Report:
    """The outcome for one file: errors by dtype, or why there are none."""

    name: str
    errors: dict[torch.dtype, list[Error]]
    failure: str | None = None
    not_understood: str | None = None

    @property
    def missed(self) -> bool:
        return self.failure is not None or any(error.missed for errors in self.errors.values() for error in errors)

    def line(self) -> str:
        """One line: verdict, and the worst error of each dtype with the tensor that has it."""
        if self.failure:
            return f"MISS  {self.name:<34} {self.failure}"
        verdict = "MISS" if self.missed else "ok"
        parts = []
        for dtype, errors in self.errors.items():
            # against a quantity recorded in float32 alone, the error is that rounding: not the worst of ours
            worst = max(errors, key=lambda error: (error.missed, error.exact, error.relative))
            parts.append(f"{str(dtype)[6:]} {worst.relative:.1e} {worst.name}")
        compared = len(next(iter(self.errors.values())))
        return f"{verdict:<5} {self.name:<32} {compared:>3} tensors  {'  '.join(parts)}"


def check_file(path: Path, backend: str) -> Report:
    """Run one file in float64 and float32."""
    try:
        case = Case.load(path)
        family = next((family for family in FAMILIES if family.matches(case)), None)
        if family is None:
            raise NotUnderstood("no family for these settings")
        case = family.read(case)
        errors = {}
        for dtype in (torch.float64, torch.float32):
            found = {}
            for declaration, quantities in family.run(case, Run(dtype, backend)):
                for error in compare(case, quantities, dtype, family.exact(case), family.amplifies(case)):
                    found[declaration, error.name] = replace(error, name=f"{declaration}:{error.name}")
            errors[dtype] = list(found.values())
            absent = sorted(recorded(case) - {name for _, name in found} - family.not_compared)
            if absent:
                return Report(case.name, {}, failure=f"recorded, but not computed: {', '.join(absent)}")
        return Report(case.name, errors)
    except NotUnderstood as reason:
        return Report(path.stem, {}, not_understood=str(reason))
    except Exception as problem:  # a checker that dies is a miss of this file, not the end of the run
        first = (str(problem).strip() or "no message").splitlines()[0]
        return Report(path.stem, {}, failure=f"{type(problem).__name__}: {first}")


def recorded(case: Case) -> set[str]:
    """Names of the recorded outputs, inner losses and gradients, without their f64 prefix."""
    apart = ("in.", "param.", "mid.", "cot.", "sgd.", "check.", "updates.", "state.", "rope.")
    return {name.removeprefix("f64.") for name in case.tensors if not name.removeprefix("f64.").startswith(apart)}


def compare(
    case: Case, quantities: Quantities, dtype: torch.dtype, exact_tolerance: float, amplifies: float
) -> Iterator[Error]:
    """The error of every tensor of the file that `quantities` gives a value for."""
    scale = max((_largest(tensor) for tensor in case.inputs("f64.grad").values()), default=0.0)
    norm_scale = max((_largest(tensor) for tensor in case.inputs("f64.gradnorm").values()), default=0.0)
    noise = {kind: _official_error(case, kind, scale, norm_scale) for kind in (True, False)}
    inside = {name for name in quantities if name in case.tensors or f"f64.{name}" in case.tensors}
    for name in sorted(recorded(case) | inside):
        got = _computed(name, quantities)
        if got is None:
            continue
        exact, rounded = case.tensors.get(f"f64.{name}"), case.tensors.get(name)
        is_exact = exact is not None and name not in ROUNDED
        want = exact if is_exact or rounded is None else rounded
        assert want is not None
        floor = _floor(case, name, scale, norm_scale)
        tolerance = exact_tolerance if dtype == torch.float64 and is_exact else ROUNDED_TO
        if dtype == torch.float32 or not is_exact:
            # where the official float32 run itself is further off, in this tensor or another of its kind, ours may be
            # some times as far
            tolerance = max(tolerance, amplifies * noise[name.startswith("grad")])
        yield Error(name, relative_error(got, want, floor), tolerance, is_exact)


def _official_error(case: Case, gradients: bool, scale: float, norm_scale: float) -> float:
    """The worst error of the official float32 run against the float64 one, among gradients or all else."""
    worst = 0.0
    for name, rounded in case.tensors.items():
        exact = case.tensors.get(f"f64.{name}")
        if exact is not None and name.startswith("grad") == gradients and name not in ROUNDED:
            worst = max(worst, relative_error(rounded, exact, _floor(case, name, scale, norm_scale)))
    return worst


def _computed(name: str, quantities: Quantities) -> Tensor | None:
    """The computed value of a recorded quantity; norms and samples of gradients are taken here."""
    kind, _, rest = name.partition(".")
    if kind in ("gradnorm", "gradsample"):
        gradient = quantities.get(f"grad.{rest}", quantities.get(f"grad.param.{rest}"))
        if gradient is None:
            return None
        if kind == "gradnorm":
            return gradient.norm().reshape(1)
        return gradient.flatten()[:: max(1, gradient.numel() // SAMPLES)]
    return quantities.get(name)


def _floor(case: Case, name: str, scale: float, norm_scale: float) -> float | None:
    """For a gradient whose true value is zero: the size of the case's gradients, at least one."""
    kind, _, rest = name.partition(".")
    if not kind.startswith("grad"):
        return None
    for prefix, largest in (("f64.grad", scale), ("f64.gradnorm", norm_scale)):
        exact = case.tensors.get(f"{prefix}.{rest}")
        if exact is not None:
            return max(1.0, largest) if _largest(exact) <= ZERO * largest else None
    return None


def relative_error(got: Tensor, want: Tensor, floor: float | None = None) -> float:
    """max |got - want| / max |want|, or / `floor` where the true value is zero; infinities must be equal."""
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape:
        raise ValueError(f"shape {list(got.shape)}, recorded {list(want.shape)}")
    infinite = want.isinf()
    if not torch.equal(got[infinite], want[infinite]):
        return float("inf")
    got, want = got[~infinite], want[~infinite]
    if want.numel() == 0:
        return 0.0
    off = (got - want).abs().max().item()
    size = floor if floor is not None else _largest(want)
    return off / size if size else off


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
