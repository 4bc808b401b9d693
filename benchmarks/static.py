"""`python -m benchmarks.static`: what every Triton kernel of the zoo takes, compiled for GPUs that need not be there.

Registers, spills and shared memory of every kernel of each loop, its tokens in bfloat16, at heads of d features; and
how long compiling took. The table is printed last. The figures go to `benchmarks/results/static.json` kernel by kernel,
and what is there of the same code, compiled by the same Triton, is not compiled again.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest import mock

import tyro
from rich.console import Console
from rich.table import Table

import nestloop as nl
from benchmarks import machine
from benchmarks.mttt_layer import RESULTS
from nestloop import zoo
from nestloop.errors import NoPlanError
from nestloop.lang.schedule import Program
from nestloop.lowering import emit, names, pipeline
from nestloop.lowering.in_parts import in_parts
from nestloop.lowering.runtime import offline
from nestloop.lowering.runtime.assembler import hopper_assembler
from nestloop.lowering.runtime.triton_plan import TritonPlan
from nestloop.targets import trial_sizes

TABLE = RESULTS / "static.json"
# Features of a head, and the devices compiled for at each.
CASES = {64: ("sm_90", "sm_80", "gfx942"), 32: ("sm_90",), 128: ("sm_90",)}
HEADS = 6
LIMIT = 60.0  # seconds of CPU that a kernel may take
NAMED = ("loop", "part", "d", "device", "kernel")  # what tells a row from all others
Device = Literal["sm_80", "sm_90", "gfx942"]
Key = tuple[str, str, int, str, str]
console = Console(width=120, soft_wrap=True)


@dataclass(frozen=True)
class Kernel:
    """One row of the table.

    Attributes:
        loop: its name in the zoo.
        part: "loop" of batches, "scan" of a stream, "update" or "read" of a program.
        d: features of a head.
        device: one of offline.TARGETS.
        kernel: its name in the plan.
        plan: its Triton.
    """

    loop: str
    part: str
    d: int
    device: str
    kernel: str
    plan: TritonPlan

    @property
    def key(self) -> Key:
        return self.loop, self.part, self.d, self.device, self.kernel

    @property
    def code(self) -> str:
        """A digest of what is compiled, without its header and comments, which name lines of declarations, and by what
        assembler."""
        nvidia = offline.TARGETS[self.device][0] == "cuda"
        text = without_comments(self.plan.text_for(nvidia).split('"""', 2)[2])
        text += "".join(called(text, files_called()).values())
        options = self.plan.options(self.kernel, nvidia)
        assembler = str(hopper_assembler()) if self.device == "sm_90" else ""
        return hashlib.sha256(f"{text}{sorted(options.items())}{assembler}".encode()).hexdigest()[:12]

    def measure(self, limit: float) -> dict[str, Any]:
        """Its row: what it takes, or why it does not compile.

        Args:
            limit: seconds of CPU that compiling may take.
        """
        row = {**dict(zip(NAMED, self.key, strict=True)), "code": self.code}
        try:
            made = offline.compiled(self.plan, self.kernel, self.device, timeout=limit)
        except NoPlanError as refusal:
            return {**row, "refused": refusal.given}
        return {
            **row,
            "warps": made.warps,
            "registers": made.registers,
            "spilled": list(made.spilled),
            **({} if made.in_loops is None else {"in_loops": list(made.in_loops)}),
            "shared": made.shared,
            **({"assembler": made.assembler} if made.assembler else {}),
            "seconds": round(made.seconds, 1),
        }


def without_comments(text: str) -> str:
    return re.sub(r"[ \t]*#.*", "", text)


@cache
def files_called() -> str:
    """The text of the files whose functions generated modules call."""
    return "".join((Path(emit.__path__[0]) / name).read_text() for name in emit.CALLED)


def called(module: str, files: str) -> dict[str, str]:
    """The functions that a generated module calls on tiles, and those that these call, by name, without comments.

    `files`: as of `files_called`.
    """
    defined = _functions_of(files)
    found: dict[str, str] = {}
    left = set(re.findall(r"\b(?:elements|tiles)\.(\w+)", module))
    while left:
        name = left.pop()
        function = defined[name]
        documented = ast.get_source_segment(files, function.body[0]) if ast.get_docstring(function) else ""
        text = ast.get_source_segment(files, function) or ""
        found[name] = without_comments(text.replace(documented or "", "", 1))
        left |= {node.id for node in ast.walk(function) if isinstance(node, ast.Name)} & {*defined} - {*found}
    return dict(sorted(found.items()))


@cache
def _functions_of(files: str) -> dict[str, ast.FunctionDef]:
    """Its functions by name, read once for all kernels."""
    return {node.name: node for node in ast.parse(files).body if isinstance(node, ast.FunctionDef)}


def plans(loop: type[nl.Loop], d: int) -> dict[str, TritonPlan | str]:
    """The Triton of each part of a loop, or why there is none.

    Args:
        d: features of a head: of keys and of values, where these have dims of their own.
    """
    spec = names.safe(loop.spec, True)
    if spec.is_kernel_estimator:
        return {"loop": "a kernel estimator: PyTorch's attention runs it"}
    sizes = trial_sizes(spec, {**dict.fromkeys(("d", "dk", "dv", "dx", "dy"), d), "H": HEADS})
    tokens = sizes["N"] if spec.sees_grid else None
    sizes = {name: size for name, size in sizes.items() if name not in ("B", "N", "n")}
    spec, parts = in_parts(spec, sizes, tokens), ["loop"]
    if spec.streams:
        parts = ["update", "read"] if isinstance(spec.schedule, Program) else ["scan"]
    made = {part: pipeline.any_stages(spec, sizes, tokens, part, triton=True) for part in parts}
    return {part: lowered.triton or lowered.not_triton for part, lowered in made.items()}


class Results:
    """The table as it was written; an empty one where there is none.

    Attributes:
        path: its file.
        head: on what and with which versions it was taken.
        kernels: its rows, by what tells them apart.
        no_plan: parts of loops that have no Triton, and why.
    """

    def __init__(self, path: Path = TABLE) -> None:
        self.path = path
        self.head: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        kernels, no_plan = self.head.pop("kernels", []), self.head.pop("no_plan", [])
        self.head.pop("left_out", None)  # `write` finds it again
        self.kernels: dict[Key, dict[str, Any]] = {key_of(row): row for row in kernels}
        self.no_plan: dict[tuple[str, str, int], dict[str, Any]] = {key_of(row)[:3]: row for row in no_plan}

    def forget(self, loop: str, part: str, d: int, devices: Sequence[str] = (), kernels: Sequence[str] = ()) -> None:
        """Drop the rows of a part of a loop, but for these kernels on these devices."""
        self.no_plan.pop((loop, part, d), None)
        for key in [key for key in self.kernels if key[:3] == (loop, part, d)]:
            if key[3] not in devices or key[4] not in kernels:
                del self.kernels[key]

    def left_out(self) -> dict[str, list[str]]:
        """Loops that were not measured, by device and size; a run of the whole command leaves none."""
        loops = [loop.__name__ for loop in zoo.loops()]
        missing = {}
        for d, devices in CASES.items():
            without = {name for name, _, size in self.no_plan if size == d}
            for device in devices:
                known = without | {key[0] for key in self.kernels if key[2:4] == (d, device)}
                missing[f"{device}, d = {d}"] = [name for name in loops if name not in known]
        return {case: names for case, names in missing.items() if names}

    def write(self) -> None:
        """A row a line, in an order of their own, so that what differs in two tables is figures."""

        def lines(rows: dict[Any, dict[str, Any]]) -> str:
            return "[\n" + ",\n".join(f"  {json.dumps(rows[key], sort_keys=True)}" for key in sorted(rows)) + "\n ]"

        head = {**self.head, "left_out": self.left_out()}
        text = json.dumps({**head, "kernels": "KERNELS", "no_plan": "NO_PLAN"}, indent=1, sort_keys=True)
        text = text.replace('"KERNELS"', lines(self.kernels)).replace('"NO_PLAN"', lines(self.no_plan))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(text + "\n")
        beside.replace(self.path)  # whoever stops the command finds a whole table


def key_of(row: dict[str, Any]) -> Any:
    """What tells a row from all others."""
    return tuple(row[name] for name in NAMED if name in row)


def kernels(results: Results, loops: Sequence[str], devices: Sequence[str], sizes: Sequence[int]) -> Iterator[Kernel]:
    """The kernels of these loops, devices and sizes, all where none is named; `results` forgets what is no more."""
    declared = {loop.__name__: loop for loop in zoo.loops()}
    for loop, part, d in [*results.no_plan, *{key[:3] for key in results.kernels}]:
        if loop not in declared or d not in CASES:
            results.forget(loop, part, d)
    for d, name in product(CASES, declared):
        targets = [target for target in CASES[d] if not devices or target in devices]
        if not targets or (loops and name not in loops) or (sizes and d not in sizes):
            continue
        for part, plan in plans(declared[name], d).items():
            if isinstance(plan, str):
                results.forget(name, part, d)
                results.no_plan[name, part, d] = {"loop": name, "part": part, "d": d, "why": plan}
                continue
            results.forget(name, part, d, CASES[d], [kernel for one in plan.forms for kernel in one.kernels])
            for one in plan.forms:
                yield from (Kernel(name, part, d, *which, one) for which in product(targets, one.kernels))


def recorded(running: set[Future[dict[str, Any]]], results: Results, at_most: int) -> set[Future[dict[str, Any]]]:
    """Wait until at most so many kernels are being compiled, and write down the others. Returns those."""
    while len(running) > at_most:
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for row in (future.result() for future in done):
            results.kernels[key_of(row)] = row
            console.print(*key_of(row), row.get("refused", f"{row.get('seconds')} s"))
        results.write()
    return running


def _bytes(spilled: Sequence[int] | None) -> str:
    if spilled is None:
        return "not counted"
    return f"[yellow]{spilled[0]} + {spilled[1]}[/yellow]" if any(spilled) else "0"


def shown(rows: Iterable[dict[str, Any]]) -> Table:
    """Rows as a table; what spills or does not fit stands out."""
    table = Table("loop", "d", "device", "kernel")
    for name in ("warps", "registers", "spilled", "in loops", "shared", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        named = [row["loop"] if row["part"] in ("loop", "scan") else f"{row['loop']} {row['part']}"]
        named += [str(row["d"]), row["device"], row["kernel"]]
        if "refused" in row:
            table.add_row(*named, "", "", f"[red]{row['refused']}[/red]", "", "", "")
            continue
        spilled, in_loops = (_bytes(row.get(name)) for name in ("spilled", "in_loops"))
        figures = [str(row["warps"]), str(row["registers"]), spilled, in_loops, f"{row['shared']:,}"]
        table.add_row(*named, *figures, f"{row['seconds']:.1f}")
    return table


def main(
    loop: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = (),
    device: tuple[Device, ...] = (),
    d: tuple[int, ...] = (),
    again: bool = False,
    processes: int = 2,
    limit: float = LIMIT,
    json_path: Annotated[Path, tyro.conf.arg(name="json")] = TABLE,
) -> int:
    """Compile the zoo's Triton kernels offline and write down what they take.

    Args:
        loop: names of loops of the zoo; all by default.
        device: devices to compile for: sm_90, and at d = 64 sm_80 and gfx942, by default.
        d: features of a head: 32, 64 and 128 by default.
        again: compile what the table has, too.
        processes: kernels compiled at a time.
        limit: seconds of CPU that a kernel may take.
        json_path: the table.
    """
    unknown = set(loop) - {known.__name__ for known in zoo.loops()}
    if unknown or set(d) - set(CASES):
        print(f"no loop of the zoo, or no size of the table: {sorted([*unknown, *(set(d) - set(CASES))], key=str)}")
        return 2
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed, so nothing was compiled: pip install 'nestloop[triton]'", file=sys.stderr)
        return 2
    results = Results(json_path)
    if results.head.get("triton") != version("triton"):
        results.kernels, results.no_plan = {}, {}
    results.head = {
        "what": "generated Triton of every loop of the zoo compiled offline: registers of a thread, bytes it spills "
        "(written, read), those of them in innermost loops, bytes of shared memory of a program, seconds of CPU that "
        "compiling took",
        "date": datetime.now(UTC).date().isoformat(),
        "host": machine.facts(),
        "triton": version("triton"),
        "dtype": "bf16",
        "heads": HEADS,
        "limit_seconds": limit,
    }
    chosen: list[Key] = []
    with ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        # What Triton compiled before would take no time.
        stack.enter_context(mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache))
        pool = stack.enter_context(ThreadPoolExecutor(processes))
        running: set[Future[dict[str, Any]]] = set()
        for made in kernels(results, loop, device, d):
            chosen.append(made.key)
            if again or results.kernels.get(made.key, {}).get("code") != made.code:
                running.add(pool.submit(made.measure, limit))
                running = recorded(running, results, 2 * processes)
        recorded(running, results, 0)
    results.write()
    console.print(shown(results.kernels[key] for key in chosen))
    console.print(f"written: {json_path}")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
