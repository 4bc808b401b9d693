"""What a measurement was taken on, and how fast that machine multiplies matrices at that moment."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nestloop.products import product


def synchronize(device: str) -> None:
    """Wait for the work queued on `device`."""
    if device == "cuda":
        torch.cuda.synchronize()


def gemm_rate(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 1024, repeats: int = 5) -> float:
    """GFLOP/s of one [size, size] x [size, size] product by PyTorch's faster library, the best of `repeats`."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: product(a, b), device, repeats) / 1e6


def copy_rate(device: str = "cpu", size: int = 2**30, repeats: int = 5) -> float:
    """GB/s of copying `size` bytes, read and written, the best of `repeats`."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / _best(lambda: target.copy_(source), device, repeats) / 1e6


def _best(function: Callable[[], Any], device: str, repeats: int) -> float:
    """Milliseconds of a call, the best of `repeats` behind one that warms up."""
    times = []
    for _ in range(repeats + 1):
        clock = Clock(device)
        clock.mark()
        function()
        clock.mark()
        times.append(clock.between(0, 1))
    return min(times[1:])


class Clock:
    """Milliseconds between marks: by the device's own events on a GPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: list[Any] = []
        synchronize(device)

    def mark(self) -> None:
        if self.device != "cuda":
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def between(self, first: int, last: int) -> float:
        """From one mark to another, by their numbers."""
        synchronize(self.device)
        a, b = self.marks[first], self.marks[last]
        return float(a.elapsed_time(b)) if self.device == "cuda" else (b - a) * 1e3


def processor() -> str:
    """The model of the processor."""
    return _of_processor("model name") or platform.processor() or platform.machine()


def generation() -> str:
    """Family and model as CPUID numbers them, "25-17": one name may cover several generations ("" where unknown)."""
    return "-".join(filter(None, map(_of_processor, ("cpu family", "model"))))


def _of_processor(field: str) -> str:
    """What Linux says of the first core; "" where it does not."""
    try:
        found = re.search(rf"^{field}\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found[1] if found else ""


def vector_width() -> str:
    """The widest vector instructions that torch uses here, as torch names them."""
    return torch.backends.cpu.get_cpu_capability()


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gib() -> float:
    """Physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def facts() -> dict[str, Any]:
    """Host and versions, for the result file."""
    import nestloop

    found: dict[str, Any] = {
        "processor": processor(),
        "generation": generation(),
        "vectors": vector_width(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory_gib(), 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nestloop": nestloop.__version__,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "not set"),
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def kind(device: str) -> str:
    """A short name of this kind of host, for file names."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{processor()} {generation()} {cores()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main() -> int:
    for name, value in facts().items():
        print(f"{name:<16} {value}")
    for dtype in (torch.float32, torch.bfloat16):
        print(f"{f'{dtype} GEMM'[6:]:<16} {gemm_rate(dtype=dtype):.0f} GFLOP/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
