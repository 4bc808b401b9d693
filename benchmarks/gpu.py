"""`make gpu`, or `python -m benchmarks.gpu`: everything that wants a GPU, in one command; needs torch and Triton alone.

First, in several processes, which fill the compilers' caches: every loop of the zoo against the reference on the device
(float64) and its generated Triton against generated PyTorch (float32), values and gradients. Then the cases of
`gpu_cases` in this process alone: the plans of each in turn on fresh random inputs, forward and forward + backward, as
medians beside the time that the device's own copy and GEMM rates allow. What is absent (JAX, fla-core), fails, or has
no time left is put down as such. The table is printed last; the figures go to `gpu-DEVICE.json` in `$OUT`, or in
`benchmarks/results`, after every case, with the milliseconds of each kernel of a call. Where there is an `$OUT`, whole
tracebacks of what failed go to `gpu-failures.log` in it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import nestloop as nl
from benchmarks import machine
from benchmarks.calls import cotangent, distance, values_of
from benchmarks.gpu_cases import SETS, Case, Plan, Run, cases, training_steps
from nestloop import zoo
from tests.drawn import draw

LOOPS = {loop.__name__: loop for loop in zoo.loops()}
SECONDS = 500  # of a command, which a lent machine stops at 600
BEGAN = time.monotonic()
ENOUGH = 2000  # ms of one plan: after so much and three rounds its turn is over
BARS = {"float64 against the reference": 1e-10, "Triton against PyTorch, float32": 1e-4}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the command itself")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="begin nothing new after so long")
    parser.add_argument("--only", default="", help="cases whose name this regular expression is found in")
    parser.add_argument("--loops", default="", help="likewise, loops of which the agreement is measured")
    parser.add_argument("--plans", default="", help="likewise, plans")
    options = parser.parse_args(arguments)
    device, quick = options.device, options.quick
    if device == "cuda" and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device, so nothing was measured.", file=sys.stderr)
        return 2
    until = time.monotonic() + options.seconds
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")  # what fla-core tunes in one process serves the others
    folder = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": machine.facts(), "device": machine.kind(device), "quick": quick}
    name = "gpu-quick.json" if quick else f"gpu-{result['device']}.json"
    kept = folder / name if not quick or "OUT" in os.environ else None
    made = [only(case, options.plans) for case in cases(device, quick)]
    chosen = [index for index, case in enumerate(made) if re.search(options.only, case.name)]
    plans = [(index, name) for index in chosen for name in made[index].plans]
    loops = [name for name in LOOPS if re.search(options.loops, name)]
    result["agreement"] = prepare(device, quick, loops, plans, until)
    result |= {
        "gemm_tflops": gemm_tflops(device, quick),
        "copy_gb_s": machine.copy_rate(device, 2**20 if quick else 2**30),
    }
    result["cases"], result["training_step"] = [], {}
    for index, case in enumerate(made):
        if index in chosen:
            result["cases"].append(measure(case, device, 2 if quick else 15, until, result))
            keep(kept, result)
    for name, images, make in () if options.only else training_steps(device, quick):
        result["training_step"][name] = images_a_second(images, make, device, until, quick)
        keep(kept, result)
    report(result)
    missed = [n for n, found in result["agreement"].items() if any(is_missed(kind, e) for kind, e in found.items())]
    return 1 if missed else 0


def keep(path: Path | None, result: Mapping[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")


# ---- In several processes --------------------------------------------------------------------------------------------


def only(case: Case, plans: str) -> Case:
    """A case with those of its plans in whose names a regular expression is found."""
    return replace(case, plans={name: plan for name, plan in case.plans.items() if re.search(plans, name)})


def prepare(
    device: str, quick: bool, loops: list[str], plans: list[tuple[int, str]], until: float
) -> dict[str, dict[str, Any]]:
    """How far loops are off, by kind; plans (of which case, and which) are called once beside, so that the caches have
    what they compile."""
    tasks: dict[Any, str] = {}
    found: dict[str, dict[str, Any]] = {name: {} for name in loops}
    if device == "cpu":
        return {name: agreement(name, device) for name in loops}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.gpu_cases"])
    # A process each: a kernel that reads where it may not leaves nothing to use of its process.
    with ProcessPoolExecutor(max(1, min(12, machine.cores() - 2)), context, max_tasks_per_child=1) as pool:
        for index, plan in plans:
            tasks[pool.submit(warm, index, plan, device, quick)] = ""
        for name in loops:
            tasks[pool.submit(agreement, name, device)] = name
        try:
            for task in as_completed(tasks, timeout=max((until - time.monotonic()) / 2, 60)):
                if name := tasks[task]:
                    found[name] = outcome(task.result)
                    progress(f"{name}: {' / '.join(map(figure, found[name].values()))}")
        except TimeoutError:
            for process in list(pool._processes.values()):
                process.terminate()
    nothing = {kind: "no time left" for kind in BARS}
    return {name: made or nothing for name, made in found.items()}


def progress(message: str) -> None:
    """What is done, with the seconds since the command began; the table comes last."""
    print(f"[{time.monotonic() - BEGAN:5.0f} s] {message}", file=sys.stderr, flush=True)


def figure(error: Any) -> str:
    return f"{error:.1e}" if isinstance(error, float) else str(error)[:60]


def warm(index: int, plan: str, device: str, quick: bool) -> None:
    """Call a plan of a case once, forward and backward."""
    torch.set_num_threads(1)
    case = list(cases(device, quick))[index]
    outcome(lambda: once(case.plans[plan]()(0), case, device))


def agreement(name: str, device: str) -> dict[str, Any]:
    """The worst relative differences over the output and every gradient, by kind; a message where there is no such
    code."""
    if device == "cuda":
        torch.set_num_threads(1)  # a process each
    kinds = [(("torch", "reference"), torch.float64), (("triton", "torch"), torch.float32)]
    return {
        kind: outcome(lambda b=backends, t=dtype: apart(LOOPS[name], b, t, device))  # type: ignore[misc]
        for kind, (backends, dtype) in zip(BARS, kinds, strict=True)
    }


def apart(loop: type[nl.Loop], backends: tuple[str, str], dtype: torch.dtype, device: str) -> float:
    """How far two backends are apart, relative to the largest element of each tensor."""
    torch.manual_seed(0)
    tokens = 16
    views, weights = ({n: t.detach().to(device, dtype) for n, t in drawn.items()} for drawn in draw(loop.spec, tokens))
    order = torch.rand(2, tokens).argsort(-1).to(device) if loop.spec.schedule.needs_order else None
    leaves = [t.requires_grad_() for t in [*views.values(), *weights.values()]]
    found = []
    for backend in backends:
        z, _ = nl.compile(loop, backend=backend)(views, weights, order=order)
        cotangent = torch.linspace(-1, 1, z.numel(), device=device, dtype=z.dtype).reshape(z.shape)
        gradients = torch.autograd.grad((z * cotangent).sum(), leaves, allow_unused=True)
        zero = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, leaves, strict=True)]
        found.append([z.detach(), *zero])
    largest = max(float(t.abs().max()) for t in found[1])
    return max(
        float((a - b).abs().max()) / max(float(b.abs().max()), 1e-4 * largest) for a, b in zip(*found, strict=True)
    )


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or its failure as a message: the other figures are wanted all the same."""
    try:
        return call()
    except Exception as error:
        if "OUT" in os.environ:
            with open(Path(os.environ["OUT"]) / "gpu-failures.log", "a") as log:
                log.write(traceback.format_exc() + "\n")
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def is_missed(kind: str, error: Any) -> bool:
    return isinstance(error, float) and not error <= BARS[kind]


# ---- In turn -------------------------------------------------------------------------------------------------------


def measure(case: Case, device: str, rounds: int, until: float, rates: Mapping[str, Any]) -> dict[str, Any]:
    """Median and best ms of each plan of a case, and its floor."""
    row: dict[str, Any] = {"case": case.name, **case.sizes, "plans": {}}
    made: dict[str, Plan] = {}
    values: dict[str, list[Tensor | None]] = {}
    for name, make in case.plans.items():
        if time.monotonic() > until:
            row["plans"][name] = "no time left"
            continue
        plan = outcome(make)
        first = plan if isinstance(plan, str) else outcome(lambda p=plan: once(p(0), case, device))  # type: ignore[misc]
        progress(f"{case.name}: {name} {'failed' if isinstance(first, str) else 'made'}")
        if isinstance(first, str):
            row["plans"][name] = first
            continue
        made[name], values[name] = plan, first
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    for index in range(rounds + SETS):
        for name, plan in made.items():
            enough = len(times[name]) >= 3 and sum(both for _, both in times[name]) > ENOUGH
            if not enough and time.monotonic() < until + 30:
                times[name].append(timed(plan(index % SETS), case, device))
    for name, every in times.items():
        spent_by = every[SETS:] if len(every) > SETS else every[1:]  # the first ones warm up
        kinds = {"forward": [f for f, _ in spent_by], "forward + backward": [b for _, b in spent_by]}
        row["plans"][name] = {k: [statistics.median(v), min(v), max(v)] for k, v in kinds.items() if v and v[0] > 0}
        row["plans"][name] |= {} if spent_by else {"not timed": "no time left"}
        if case.counted in values and name != case.counted and len(values[name]) == len(values[case.counted]):
            row["plans"][name]["off by"] = max(map(distance, values[name], values[case.counted]))
    if device == "cuda":
        few = [name for name, every in times.items() if sum(both for _, both in every) < ENOUGH]
        row["kernels"] = {name: outcome(lambda n=name: kernels(made[n](0), case, device)) for name in few}  # type: ignore[misc]
    if case.counted in made:
        row["floor"] = outcome(lambda: floor(made[case.counted](0), case, device, rates))
    row["targets"] = [
        {"faster": a, "slower": b, "wanted": wanted, "found": ratio(row["plans"], a, b)}
        for a, b, wanted in case.targets
    ]
    return row


def ratio(plans: Mapping[str, Any], faster: str, slower: str) -> float | None:
    """How many times faster a plan is, by the medians of forward + backward; None where one was not measured."""
    found = [plans.get(name) for name in (faster, slower)]
    times = [p["forward + backward"][0] for p in found if isinstance(p, dict) and "forward + backward" in p]
    return times[1] / times[0] if len(times) == 2 else None


def once(run: Run, case: Case, device: str) -> list[Tensor | None]:
    """The output and the gradients of one call; nothing of a plan that PyTorch does not differentiate."""
    if run.forward is None:
        assert run.whole is not None
        run.whole()
        return []
    with autocast(case, device):
        forward = run.forward
        return values_of(lambda: forward(), list(run.leaves))


def autocast(case: Case, device: str) -> Any:
    return torch.autocast(device, dtype=case.dtype) if "layer" in case.name else nullcontext()


def timed(run: Run, case: Case, device: str) -> tuple[float, float]:
    """Milliseconds of forward, and of forward and backward; 0 for the first where that is no call of its own."""
    clock = machine.Clock(device)
    if run.forward is None:
        assert run.whole is not None
        clock.mark()
        run.whole()
        clock.mark()
        return 0.0, clock.between(0, 1)
    with autocast(case, device):
        clock.mark()
        y = run.forward()
        clock.mark()
    torch.autograd.grad(y, list(run.leaves), cotangent(y.shape, y.dtype, y.device), allow_unused=True)
    clock.mark()
    return clock.between(0, 1), clock.between(0, 2)


def kernels(run: Run, case: Case, device: str) -> dict[str, list[float]]:
    """How often each kernel of a call runs, and its milliseconds; the longest first, up to 20."""
    if run.forward is None:
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        once(run, case, device)
        machine.synchronize(device)
    found = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)[:20]
    return {event.key[:100]: [event.count, round(event.self_device_time_total / 1e3, 4)] for event in found}


def floor(run: Run, case: Case, device: str, rates: Mapping[str, Any]) -> dict[str, Any]:
    """Milliseconds that products at the GEMM rate take, or reading each input and writing each output once at the copy
    rate, whichever is more."""
    assert run.forward is not None
    with FlopCounterMode(display=False) as forward, autocast(case, device):
        y = run.forward()
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(y, list(run.leaves), cotangent(y.shape, y.dtype, y.device), allow_unused=True)
    moved = sum(t.nbytes for t in run.leaves) + y.nbytes
    both = forward.get_total_flops() + backward.get_total_flops()
    found = {"forward": (forward.get_total_flops(), moved), "forward + backward": (both, 3 * moved)}
    return {
        kind: max(flops / rates["gemm_tflops"] / 1e9, size / rates["copy_gb_s"] / 1e6)
        for kind, (flops, size) in found.items()
    }


def gemm_tflops(device: str, quick: bool) -> float:
    dtype, size = (torch.bfloat16, 8192) if device == "cuda" else (torch.float32, 256 if quick else 1024)
    return machine.gemm_rate(device, dtype, size) / 1e3


def images_a_second(images: int, make: Callable[[], Callable[[], None]], device: str, until: float, quick: bool) -> Any:
    if time.monotonic() > until:
        return "no time left"

    def rate() -> float:
        step, spent = make(), []
        for _ in range(3 if quick else 8):
            clock = machine.Clock(device)
            clock.mark()
            step()
            clock.mark()
            spent.append(clock.between(0, 1))
        return 1e3 * images / statistics.median(spent[-5:])

    return outcome(rate)


# ---- The table -----------------------------------------------------------------------------------------------------


def report(result: Mapping[str, Any]) -> None:
    print(f"agreement (bars {', '.join(f'{kind}: {bar:g}' for kind, bar in BARS.items())})")
    for name, found in result["agreement"].items():
        errors = [figure(e) + "  MISSED" * is_missed(k, e) for k, e in found.items()]
        print(f"  {name:<26} {'   '.join(errors)}")
    print(f"GEMM {result['gemm_tflops']:.1f} TFLOP/s, copies {result['copy_gb_s']:.0f} GB/s; medians in ms")
    for row in result["cases"]:
        sizes = " ".join(f"{n}={row[n]}" for n in "BNDHdT" if n in row)
        least = row.get("floor")
        shown = f"   floor {' / '.join(f'{ms:.3f}' for ms in least.values())}" if isinstance(least, dict) else ""
        print(f"{row['case']} {sizes}: forward / forward + backward{shown}")
        for name, found in row["plans"].items():
            if isinstance(found, str):
                print(f"  {name:<26} {found[:90]}")
                continue
            times = [f"{found[k][0]:9.3f}" if k in found else "        -" for k in ("forward", "forward + backward")]
            off = f"   off by {found['off by']:.1e}" if "off by" in found else ""
            print(f"  {name:<26} {' / '.join(times)}{off}   {found.get('not timed', '')}".rstrip())
        for target in row["targets"]:
            reached = "not measured" if target["found"] is None else f"{target['found']:.2f}x"
            print(f"  {target['faster']} over {target['slower']}: {reached} (wanted {target['wanted']}x)")
    print("ViT-S/16 training, images/s")
    for name, rate in result["training_step"].items():
        print(f"  {name:<24} {f'{rate:9.1f}' if isinstance(rate, float) else rate}")


if __name__ == "__main__":
    sys.exit(main())
