"""`python -m tests.golden DIR`: one line a file; exit code 1 on any miss."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from tests.golden.check import check_file


def main(
    directory: tyro.conf.Positional[Path],
    backend: Literal["auto", "cpp", "torch", "reference"] = "auto",
    threads: Annotated[int, tyro.conf.arg(help="threads of torch")] = 1,
) -> int:
    """Check every *.safetensors file of a folder against nestloop, outputs, inner losses and all gradients.

    float64 must agree to 1e-10 and float32 to 5e-6, relative to the largest value of each tensor; a gradient
    whose true value is zero is compared with the size of the others. Where the official float32 run is itself
    further than that from its own float64 one, ours may be twice as far as it.

    Args:
        directory: the folder.
        backend: nestloop's backend.
    """
    torch.set_num_threads(threads)
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        print(f"no *.safetensors file in {directory}")
        return 1
    start, reports = time.perf_counter(), []
    for path in paths:
        report = check_file(path, backend)
        reports.append(report)
        if report.not_understood is None:
            print(report.line(), flush=True)
    foreign = [report for report in reports if report.not_understood is not None]
    if foreign:
        print(f"\nnot understood ({len(foreign)} files):")
        for report in foreign:
            print(f"      {report.name:<34} {report.not_understood}")
    missed = [report.name for report in reports if report.missed]
    checked = len(reports) - len(foreign)
    seconds = time.perf_counter() - start
    print(f"\n{checked} files checked with backend {backend} in {seconds:.0f} s, {len(missed)} missed")
    return 1 if missed or not checked else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
