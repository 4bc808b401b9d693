"""Peak memory of one layer, forward and backward, in a process of its own.

`python -m benchmarks.peak_memory LOOP BATCH TOKENS WIDTH HEADS` prints one line of JSON: the peak of the
whole process in MiB, and what it had before the layer ran.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def measure(loop: str, batch: int, tokens: int, width: int, heads: int, threads: int = 0) -> dict[str, Any]:
    """Run `main` below in a new process and read its line."""
    sizes = [str(size) for size in (batch, tokens, width, heads, threads)]
    command = [sys.executable, "-m", "benchmarks.peak_memory", loop, *sizes]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def peak_mib() -> float:
    """The largest resident size this process has had.

    Linux counts it for each program that a process executes (VmHWM); `getrusage` would also count the parent's.
    """
    try:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 2**10
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def main(loop: str, batch: int, tokens: int, width: int, heads: int, threads: int = 0) -> dict[str, Any]:
    import nestloop as nl
    from nestloop import zoo

    if threads:
        torch.set_num_threads(threads)
    layer = nl.Layer(getattr(zoo, loop), width, heads)
    layer(torch.randn(1, 8, width)).sum().backward()  # everything is compiled and allocated once
    before = peak_mib()
    x = torch.randn(batch, tokens, width, requires_grad=True)
    layer(x).square().mean().backward()
    finite = all(p.grad is not None and bool(p.grad.isfinite().all()) for p in [x, *layer.parameters()])
    return {"loop": loop, "tokens": tokens, "peak_mib": peak_mib(), "before_mib": before, "finite": finite}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:]))))
