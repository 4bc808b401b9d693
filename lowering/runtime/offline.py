"""Generated Triton compiled for a device that need not be there: its code at every stage, and what the kernel takes.

Registers, spills and shared memory are facts about a kernel before any GPU runs it. A process of its own compiles each,
since the compiler may end the one it runs in. Importing Triton takes longer than most kernels do, so another process,
`python -m nestloop.lowering.runtime.offline`, imports it once, takes requests on its standard input, and forks.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Collection, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from threading import Timer
from typing import Any

from nestloop.errors import NoPlanError
from nestloop.lowering.runtime import cache
from nestloop.lowering.runtime.assembler import assembling
from nestloop.lowering.runtime.machine_code import spilled_in_loops
from nestloop.lowering.runtime.refusals import no_room
from nestloop.lowering.runtime.triton_plan import TritonPlan

TARGETS = {"sm_80": ("cuda", 80), "sm_90": ("cuda", 90), "sm_100": ("cuda", 100), "gfx942": ("hip", "gfx942")}
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # bytes a program may take
STAGES = ("ttir", "ttgir", "ptx", "sass", "amdgcn")
LATE = 3  # exit status of a process whose assembler took too long
_NUMBERS = {
    "memory": "*fp32",
    "weights": "*fp32",
    "rates": "*fp32",
    "bounds": "*i32",
    "chosen": "*i32",
    "order_p": "*i64",
}
_COMPUTED = ("between_", "end_", "d_", "hoisted_", "projected_", "gram_")  # names of tensors in the compute dtype
_PRODUCTS = {"bf16": "bf16", "fp16": "fp16", "fp32": "tf32"}


@dataclass(frozen=True)
class Compiled:
    """One kernel on one device.

    Attributes:
        kernel: its name.
        device: one of TARGETS.
        dtype: of the tokens: "bf16", "fp16" or "fp32".
        warps: of a program.
        registers: of a thread.
        spilled: bytes that a thread's registers spill, written and read.
        shared: bytes of shared memory of a program.
        seconds: of CPU that compiling took, the assembler's included: on a busy machine only they mean anything.
        text: the code by stage: "ttir", "ttgir", then "ptx" and "sass", or "amdgcn".
        assembler: what made its machine code, where it matters which of NVIDIA's it was.
    """

    kernel: str
    device: str
    dtype: str
    warps: int
    registers: int
    spilled: tuple[int, int]
    shared: int
    seconds: float
    text: Mapping[str, str]
    assembler: str = ""

    @property
    def in_loops(self) -> tuple[int, int] | None:
        """What of `spilled` is in innermost loops; None where there is no disassembly of NVIDIA's to count it in."""
        return spilled_in_loops(self.text["sass"]) if self.text.get("sass") else None

    @property
    def summary(self) -> str:
        """A line on what it takes."""
        written, read = self.spilled
        inner = self.in_loops if written or read else None
        return (
            f"{self.kernel} for {self.device}, {self.dtype}: {self.warps} warps, {self.registers} registers a thread, "
            f"spills {written} bytes written and {read} read"
            + (f" ({inner[0]} and {inner[1]} in innermost loops)" if inner else "")
            + f", {self.shared} bytes of shared memory"
            + (f"; {self.assembler}" if self.assembler else "")
        )


def compiled(
    plan: TritonPlan, kernel: str, device: str = "sm_90", dtype: str = "bf16", timeout: float = 300
) -> Compiled:
    """One kernel of a plan, compiled.

    Args:
        kernel: its name.
        device: one of TARGETS.
        dtype: of the tokens.
        timeout: seconds of CPU that Triton, and then its assembler, may take.

    Raises:
        NoPlanError: it does not compile, or not in time.
        SharedMemoryError: it does, and wants more shared memory than a program may take there.
    """
    nvidia = TARGETS[device][0] == "cuda"
    request: dict[str, Any] = {"text": plan.text_for(nvidia), "kernel": kernel, "device": device, "dtype": dtype}
    request |= {"wide": plan.wide, "low": plan.low, "computed": plan.computed, "timeout": timeout}
    request["options"] = plan.options(kernel, nvidia)
    ran = _ask({**request, "environment": dict(os.environ)})
    if not ran["status"]:
        made = json.loads(ran["out"].splitlines()[-1])
        if made["shared"] > SHARED[device]:
            raise no_room(plan, kernel, made["shared"], SHARED[device])
        return Compiled(**{**made, "spilled": tuple(made["spilled"])})
    reason = f"longer than {timeout:g} seconds"
    if ran["status"] not in (-signal.SIGXCPU, -signal.SIGKILL, LATE):
        said = [line for line in ran["err"].splitlines() if line.strip() and not line.startswith("Repro command")]
        reason = said[-1] if said else "no message"  # without the paths of this machine
    raise NoPlanError(
        f"The {kernel} kernel does not compile for {device}.",
        given=reason,
        need="generated Triton that the installed Triton compiles",
        fix='write backend="torch": generated PyTorch runs every loop, on a GPU too',
    )


def _signature(
    function: Any, dtype: str, wide: Collection[str], low: Collection[str], computed: Collection[str]
) -> tuple[dict[str, str], set[str]]:
    """The type of each argument as a launch gives it; those that are multiples of 16.

    Args:
        wide: tensors whose rows are, and so the steps between them.
        low: arguments in the tokens' dtype, beside the tokens.
        computed: tensors in the compute dtype, beside those that are always.
    """
    types, multiples = {}, set()
    for name in function.arg_names:
        if name in ("S", "PRODUCT"):
            types[name] = "constexpr"
        elif name in _NUMBERS:
            types[name] = _NUMBERS[name]
            multiples.add(name)
        elif name in low or (name.endswith("_p") and not name.startswith(_COMPUTED) and name[:-2] not in computed):
            types[name] = f"*{dtype}"
            multiples.add(name)
        elif name.endswith(("_p", "_made", "_handed")):
            types[name] = "*fp32"
            multiples.add(name)
        else:
            types[name] = "i32"
            plain = name[:-2].removesuffix("_made")
            multiples |= {name} if plain in wide or f"d_{plain}" in wide else set()
    return types, multiples


def source_of(
    text: str, kernel: str, dtype: str, wide: Collection[str], low: Collection[str], computed: Collection[str]
) -> Any:
    """A kernel of a module and the types of its arguments, as Triton compiles it; `wide`, `low`, `computed`: as a plan
    has them."""
    import triton
    import triton.language as tl

    function = getattr(cache.load(cache.write("offline", text)), kernel)
    types, multiples = _signature(function, dtype, wide, low, computed)
    at = {name: (index,) for index, name in enumerate(function.arg_names)}
    constants = {at["S"]: tl.float32, at["PRODUCT"]: _PRODUCTS[dtype]}
    return triton.compiler.ASTSource(function, types, constants, {at[n]: [["tt.divisibility", 16]] for n in multiples})


def _compile(request: Mapping[str, Any]) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget

    device, dtype = request["device"], request["dtype"]
    backend, arch = TARGETS[device]
    source = source_of(*[request[name] for name in ("text", "kernel", "dtype", "wide", "low", "computed")])
    before = sum(os.times()[:4])
    target = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
    # What Triton's caches have, it assembles no more, and so says nothing of.
    triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True
    with assembling(arch // 10 if isinstance(arch, int) else 0) as assembler, redirect_stdout(StringIO()) as log:
        options = request["options"] | ({} if assembler is None else assembler.options)
        made = triton.compile(source, target=target, options=options)
    took = sum(os.times()[:4]) - before
    text = {stage: made.asm[stage] for stage in STAGES if stage in made.asm}
    if backend == "cuda":
        text["sass"] = _disassembled(made.asm["cubin"])
    found = _said_by_ptxas(log.getvalue()) if backend == "cuda" else _of_amd(text["amdgcn"])
    warps, named = request["options"]["num_warps"], "" if assembler is None else str(assembler)
    return Compiled(request["kernel"], device, dtype, warps, *found, made.metadata.shared, took, text, named)


def _disassembled(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(cubin)
        binary.flush()
        return subprocess.run([str(tool), "-c", binary.name], capture_output=True, text=True).stdout


def _said_by_ptxas(log: str) -> tuple[int, tuple[int, int]]:
    """Registers and spills of the code that Triton launches: of a run of its own, ptxas would allocate otherwise unless
    it had every option that Triton gives it."""
    written, read = (sum(map(int, re.findall(rf"(\d+) bytes spill {kind}", log))) for kind in ("stores", "loads"))
    return max(map(int, re.findall(r"Used (\d+) registers", log))), (written, read)


def _of_amd(text: str) -> tuple[int, tuple[int, int]]:
    def found(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", text)
        return 0 if match is None else int(match[1])

    spilled = 4 * found("vgpr_spill_count")
    return found("vgpr_count"), (spilled, spilled)


# ---- The process that forks ------------------------------------------------------------------------------------------

_IDLE: dict[str, list[subprocess.Popen[str]]] = {}  # by where they import from, what waits for a request


def _ask(request: Mapping[str, Any]) -> dict[str, Any]:
    """What became of a request: its exit status, standard output and standard error. Threads may ask at a time."""
    waiting = _IDLE.setdefault(os.environ.get("PYTHONPATH", ""), [])
    try:
        process = waiting.pop()
    except IndexError:
        command = [sys.executable, "-m", "nestloop.lowering.runtime.offline"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except BaseException:  # whoever is interrupted does not read another's answer later
        process.kill()
        raise
    if not answer:
        raise RuntimeError(f"the process that compiles ended with status {process.wait()}")
    waiting.append(process)
    found: dict[str, Any] = json.loads(answer)
    return found


@atexit.register
def _end() -> None:
    for process in [one for waiting in _IDLE.values() for one in waiting]:
        process.communicate()  # closes its input, at the end of which it ends


def _serve() -> None:
    """Answer requests, a line each, until there are no more."""
    import triton.backends.nvidia.compiler
    import triton.language  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = os.fork()
            if not child:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                os.environ.clear()
                os.environ.update(request["environment"])
                os._exit(_answer(request))
            # The limit is one of CPU, since a busy machine takes longer; what waits for nothing ends all the same.
            late = Timer(10 * request["timeout"], os.kill, (child, signal.SIGKILL))
            late.start()
            _, status = os.waitpid(child, 0)
            late.cancel()
            said = {"out": out, "err": err}
            for file in said.values():
                file.seek(0)
            found = {name: file.read() for name, file in said.items()}
        print(json.dumps({"status": os.waitstatus_to_exitcode(status), **found}), flush=True)


def _answer(request: Mapping[str, Any]) -> int:
    """Compile what is asked for, onto standard output; the exit status."""
    import resource  # Unix alone has it, as it alone has Triton

    limit = math.ceil(request["timeout"])
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))  # of this process, and of the assembler that it starts
    status = 0
    try:
        print("\n" + json.dumps(asdict(_compile(request))))
    except Exception:
        status = 1 if resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime <= limit - 2 else LATE
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    _serve()
