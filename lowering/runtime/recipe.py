"""All that an op is made of: what is left of its declaration, its plan, and how that is to run.

It is small and plain, so that it can be kept beside a program that calls the op (`nestloop.saved`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from nestloop.errors import Location
from nestloop.lang.loop import LoopSpec, user_files
from nestloop.lang.schedule import BatchSchedule, FullBatch, Shuffled
from nestloop.lowering.runtime import plan as plans
from nestloop.lowering.runtime.plan import Plan

_SCHEDULES: dict[str, Callable[[int, str], BatchSchedule]] = {"FullBatch": FullBatch, "Shuffled": Shuffled}


@dataclass(frozen=True)
class Origin:
    """What is left of a declaration in an op.

    Attributes:
        name, where: of the loop.
        files: in which its bodies are written.
        tokens, slow: names of its views and gates, and of its slow weights.
        schedule: of batches; None of a stream, whose ops do not know it.
        halo: rows before a call's own tokens.
    """

    name: str
    where: Location
    files: tuple[str, ...]
    tokens: tuple[str, ...]
    slow: tuple[str, ...]
    schedule: BatchSchedule | None
    halo: int

    @staticmethod
    def of(spec: LoopSpec) -> Origin:
        """What is left of `spec`."""
        return Origin(
            name=spec.name,
            where=spec.where,
            files=tuple(sorted(user_files(spec))),
            tokens=tuple(spec.inputs),
            slow=tuple(spec.slow),
            schedule=spec.schedule if isinstance(spec.schedule, BatchSchedule) else None,
            halo=(spec.optimizer.window or 1) - 1,
        )


@dataclass(frozen=True)
class Asked:
    """What is to run.

    Attributes:
        backend: "torch"; "cpp"; "triton"; or "auto": where the plan has C++ and it can be built, C++ or PyTorch by the
            sizes of a call; else PyTorch; on a GPU Triton, where the plan has it (`choice`).
        inductor: whether `torch.compile` compiles generated PyTorch.
        double: whether it is float64 that will be computed in.
        gpu: whether "auto" may be Triton.
    """

    backend: str = "torch"
    inductor: bool = False
    double: bool = False
    gpu: bool = False

    @property
    def may_be_triton(self) -> bool:
        return self.backend == "triton" or (self.backend == "auto" and self.gpu)


@dataclass(frozen=True)
class Recipe:
    """All that an op is made of.

    Attributes:
        heads: H.
        losses: whether the inner losses are a result; of a stream, its plan says.
        asked: what is to run.
        make_wide: gives the plan for weights that `plan` is not precise with (`rewrites.gram`), when they come.
    """

    origin: Origin
    plan: Plan
    heads: int
    losses: bool
    asked: Asked
    make_wide: Callable[[], Plan] | None = None

    @cached_property
    def wide(self) -> Plan | None:
        """That plan, where there may be such weights."""
        return None if self.make_wide is None else self.make_wide()

    @property
    def kept(self) -> dict[str, Any]:
        """All of it as JSON takes it, the other plan included."""
        origin, schedule = self.origin, self.origin.schedule
        return {
            "origin": {
                **asdict(origin),
                "where": [origin.where.file, origin.where.line],
                "schedule": None if schedule is None else [type(schedule).__name__, schedule.steps, schedule.reduction],
            },
            "plan": asdict(self.plan),
            "wide": None if self.wide is None else asdict(self.wide),
            "heads": self.heads,
            "losses": self.losses,
            "asked": asdict(self.asked),
        }


def remade(kept: Mapping[str, Any]) -> Recipe:
    """A recipe from what is `kept` of it.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    origin, wide = dict(kept["origin"]), kept["wide"]
    made = origin["schedule"]
    schedule = None if made is None else _SCHEDULES[made[0]](*made[1:])
    lists = {name: tuple(origin[name]) for name in ("files", "tokens", "slow")}
    other = None if wide is None else plans.remade(wide)
    return Recipe(
        Origin(**{**origin, **lists, "where": Location(*origin["where"]), "schedule": schedule}),
        plans.remade(kept["plan"]),
        kept["heads"],
        kept["losses"],
        Asked(**kept["asked"]),
        make_wide=None if other is None else lambda: other,
    )
