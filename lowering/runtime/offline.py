"""Generated Triton compiled for a device that need not be there: its code at every stage, and what the kernel takes.

Registers, spills and shared memory are facts about a kernel before any GPU runs it. A process of its own compiles,
since the compiler may end the one it runs in: `python -m nestloop.lowering.runtime.offline`, with a request on its
standard input.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nestloop.errors import NoPlanError
from nestloop.lowering.runtime import cache
from nestloop.lowering.runtime.assembler import assembling
from nestloop.lowering.runtime.refusals import no_room
from nestloop.lowering.runtime.triton_plan import TritonPlan

TARGETS = {"sm_80": ("cuda", 80), "sm_90": ("cuda", 90), "sm_100": ("cuda", 100), "gfx942": ("hip", "gfx942")}
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # bytes a program may take
STAGES = ("ttir", "ttgir", "ptx", "sass", "amdgcn")
LATE = 3  # exit status of a process whose assembler took too long
_NUMBERS = {"memory": "*fp32", "weights": "*fp32", "rates": "*fp32", "bounds": "*i32", "order_p": "*i64"}
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
    def summary(self) -> str:
        """A line on what it takes."""
        written, read = self.spilled
        return (
            f"{self.kernel} for {self.device}, {self.dtype}: {self.warps} warps, {self.registers} registers a thread, "
            f"spills {written} bytes written and {read} read, {self.shared} bytes of shared memory"
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
    request: dict[str, Any] = {"text": plan.text, "kernel": kernel, "device": device, "dtype": dtype, "wide": plan.wide}
    request["timeout"] = timeout
    request["options"] = plan.options(kernel, TARGETS[device][0] == "cuda")
    command = [sys.executable, "-m", "nestloop.lowering.runtime.offline"]
    reason = f"longer than {timeout:g} seconds"
    try:
        ran = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=10 * timeout)
        if not ran.returncode:
            made = json.loads(ran.stdout.splitlines()[-1])
            if made["shared"] > SHARED[device]:
                raise no_room(plan, kernel, made["shared"], SHARED[device])
            return Compiled(**{**made, "spilled": tuple(made["spilled"])})
        if ran.returncode not in (-signal.SIGXCPU, LATE):
            said = [line for line in ran.stderr.splitlines() if line.strip() and not line.startswith("Repro command")]
            reason = said[-1] if said else "no message"  # without the paths of this machine
    except subprocess.TimeoutExpired:
        pass
    raise NoPlanError(
        f"The {kernel} kernel does not compile for {device}.",
        given=reason,
        need="generated Triton that the installed Triton compiles",
        fix='write backend="torch": generated PyTorch runs every loop, on a GPU too',
    )


def _signature(function: Any, dtype: str, wide: Collection[str]) -> tuple[dict[str, str], set[str]]:
    """The type of each argument as a launch gives it; those that are multiples of 16.

    wide: tensors whose rows are, and so the steps between them.
    """
    types, multiples = {}, set()
    for name in function.arg_names:
        if name in ("S", "PRODUCT"):
            types[name] = "constexpr"
        elif name in _NUMBERS:
            types[name] = _NUMBERS[name]
            multiples.add(name)
        elif name == "d_z_p" or (name.endswith("_p") and not name.startswith(_COMPUTED)):
            types[name] = f"*{dtype}"
            multiples.add(name)
        elif name.endswith(("_p", "_made", "_handed")):
            types[name] = "*fp32"
            multiples.add(name)
        else:
            types[name] = "i32"
            multiples |= {name} if name[:-2] in wide else set()
    return types, multiples


def _compile(request: Mapping[str, Any]) -> Compiled:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    device, dtype = request["device"], request["dtype"]
    backend, arch = TARGETS[device]
    function = getattr(cache.load(cache.write("offline", request["text"])), request["kernel"])
    types, multiples = _signature(function, dtype, request["wide"])
    at = {name: (index,) for index, name in enumerate(function.arg_names)}
    constants = {at["S"]: tl.float32, at["PRODUCT"]: _PRODUCTS[dtype]}
    source = triton.compiler.ASTSource(
        function, types, constants, {at[n]: [["tt.divisibility", 16]] for n in multiples}
    )
    before = sum(os.times()[:4])
    target = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
    with assembling(arch // 10 if isinstance(arch, int) else 0) as assembler:
        options = request["options"] | ({} if assembler is None else assembler.options)
        made = triton.compile(source, target=target, options=options)
        took = sum(os.times()[:4]) - before
        text = {stage: made.asm[stage] for stage in STAGES if stage in made.asm}
        found = _of_nvidia(made, target, text) if backend == "cuda" else _of_amd(text["amdgcn"])
    warps, named = request["options"]["num_warps"], "" if assembler is None else str(assembler)
    return Compiled(request["kernel"], device, dtype, warps, *found, made.metadata.shared, took, text, named)


def _of_nvidia(made: Any, target: Any, text: dict[str, str]) -> tuple[int, tuple[int, int]]:
    """Registers and spills, as the assembler that Triton took counts them; the machine code goes to `text`."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        binary, assembly = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        binary.write_bytes(made.asm["cubin"])
        assembly.write_text(text["ptx"])
        (name,) = re.findall(r"\.target (sm_\w+)", text["ptx"])[:1]
        command = [get_ptxas(target.arch).path, "-v", f"--gpu-name={name}", assembly, "-o", Path(folder) / "again"]
        log = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stderr
        shown = subprocess.run([str(tools / "nvdisasm"), "-c", str(binary)], capture_output=True, text=True)
        text["sass"] = shown.stdout
    written, read = (sum(map(int, re.findall(rf"(\d+) bytes spill {kind}", log))) for kind in ("stores", "loads"))
    return max(map(int, re.findall(r"Used (\d+) registers", log))), (written, read)


def _of_amd(text: str) -> tuple[int, tuple[int, int]]:
    def found(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", text)
        return 0 if match is None else int(match[1])

    spilled = 4 * found("vgpr_spill_count")
    return found("vgpr_count"), (spilled, spilled)


def _main() -> int:
    """Compile what standard input asks for; a busy machine takes longer, so the limit is one of CPU."""
    import resource  # Unix alone has it, as it alone has Triton

    request = json.load(sys.stdin)
    limit = math.ceil(request["timeout"])
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))  # of this process, and of the assembler that it starts
    try:
        made = _compile(request)
    except Exception:
        if resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime > limit - 2:
            return LATE
        raise
    sys.stdout.write("\n" + json.dumps(asdict(made)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
