"""`python -m benchmarks.mttt_layer`: the MTTT-MLP layer against what people write without a compiler.

Forward and backward of projections, inner loop and output projection. The peers run in turn in one process,
so that all of them see the same machine; only ratios within one run mean anything. Then sizes, cost against
the number of tokens, and peak memory. Everything goes to one JSON file with the host and the versions.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import nestloop as nl
from benchmarks import machine, peak_memory, peers
from nestloop import zoo

RESULTS = Path(__file__).parent / "results"
BARS = {  # ratio: (slower peer, faster one, at least)
    "nestloop against compiled vmap(grad)": ("vmap(grad), compiled", "nestloop, cpp", 2.0),
    "nestloop against closed form, eager": ("closed form, eager", "nestloop, cpp", 1.5),
}
console = Console(width=110, soft_wrap=True)


@dataclass(frozen=True)
class Problem:
    """One size: B images of N tokens, D wide, H heads."""

    batch: int
    tokens: int
    width: int
    heads: int
    device: str = "cpu"

    def layer(self, loop: Any = zoo.MTTTMLP, backend: str = "auto", inductor: bool = False) -> nl.Layer:
        torch.manual_seed(0)
        return nl.Layer(loop, self.width, self.heads, backend=backend, inductor=inductor).to(self.device)

    def input(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.batch, self.tokens, self.width, generator=generator)
        return x.to(self.device).requires_grad_()


def build_peers(problem: Problem, compiled: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every peer by name, all with the same parameters."""
    layer = problem.layer(backend="torch")
    parameters = dict(layer.named_parameters())

    def peer(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: function(parameters, x)

    found: dict[str, Callable[[Tensor], Tensor]] = {
        "vmap(grad), eager": peer(peers.vmap_grad),
        "closed form, eager": peer(peers.closed_form),
        "nestloop, torch": layer,
    }
    if problem.device == "cpu":
        found["nestloop, cpp"] = problem.layer(backend="cpp")
    if compiled:
        fast = problem.layer(backend="torch", inductor=True)
        fast.load_state_dict(layer.state_dict())
        found |= {
            "vmap(grad), compiled": peer(torch.compile(peers.vmap_grad, dynamic=False)),
            "closed form, compiled": peer(torch.compile(peers.closed_form, dynamic=False)),
            "nestloop, inductor": fast,
        }
    return found


def time_once(function: Callable[[Tensor], Tensor], x: Tensor, device: str, autocast: bool = False) -> float:
    """Milliseconds of one forward and backward."""
    x.grad = None
    machine.synchronize(device)
    start = time.perf_counter()
    with torch.autocast(device, dtype=torch.bfloat16) if autocast else nullcontext():
        y = function(x)
    y.backward(torch.ones_like(y))
    machine.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def interleave(
    functions: Mapping[str, Callable[[], float]], rounds: int, warmups: int = 2
) -> dict[str, dict[str, float]]:
    """Best, median and spread of each function, one call of each a round, the order turning."""
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        for _ in range(warmups):
            functions[name]()
    for index in range(rounds):
        gc.collect()
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(functions[name]())
    return {
        name: {"best": min(t), "median": statistics.median(t), "spread": max(t) / min(t)} for name, t in times.items()
    }


def peers_at_one_size(problem: Problem, rounds: int, compiled: bool) -> dict[str, Any]:
    """The main table: every peer in float32, nestloop and the compiled definition also in bf16 autocast."""
    x, functions = problem.input(), build_peers(problem, compiled)
    with FlopCounterMode(display=False) as counter:
        time_once(functions["closed form, eager"], x, problem.device)
    gflops = counter.get_total_flops() / 1e9

    runs: dict[str, Callable[[], float]] = {}
    cold = {}
    for name, function in functions.items():
        runs[name] = partial(time_once, function, x, problem.device)
        start = time.perf_counter()
        runs[name]()
        cold[name] = time.perf_counter() - start
        console.print(f"  first call of {name}: {cold[name]:.1f} s")
    for name in ("nestloop, cpp", "nestloop, torch", "nestloop, inductor", "vmap(grad), compiled"):
        if name in functions:
            runs[f"{name}, bf16 autocast"] = partial(time_once, functions[name], x, problem.device, True)
    rates: list[float] = []

    def rate() -> float:
        rates.append(machine.gemm_rate(problem.device, repeats=2))
        return rates[-1]

    times = interleave({**runs, "GEMM": rate}, rounds)
    del times["GEMM"]
    gemm = statistics.median(rates)
    for name, row in times.items():
        row["share_of_gemm_rate"] = gflops / (row["best"] / 1e3) / max(rates)
        row["first_call_s"] = round(cold.get(name, 0.0), 2)
    return {
        "sizes": vars(problem),
        "gflop": gflops,
        "gemm_gflops": {"best": max(rates), "median": gemm},
        "ms": times,
    }


def ratios(times: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """How many times faster nestloop is than each peer of the bars, in best and in median."""
    found = {}
    for title, (slow, fast, bar) in BARS.items():
        if slow in times and fast in times:
            by_best, by_median = (times[slow][key] / times[fast][key] for key in ("best", "median"))
            found[title] = {"best": by_best, "median": by_median, "bar": bar, "met": by_best >= bar}
    return found


def print_peers(result: dict[str, Any]) -> None:
    problem, gemm = result["sizes"], result["gemm_gflops"]
    title = "MTTT-MLP layer, forward + backward, float32: B={batch} N={tokens} D={width} H={heads}".format(**problem)
    table = Table(title=title, title_justify="left")
    for column in ("", "best ms", "median ms", "max/min", "share of GEMM rate", "first call s"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in sorted(result["ms"].items(), key=lambda item: -item[1]["best"]):
        numbers = f"{row['best']:.1f}", f"{row['median']:.1f}", f"{row['spread']:.2f}"
        table.add_row(name, *numbers, f"{row['share_of_gemm_rate']:.0%}", f"{row['first_call_s']:.1f}")
    console.print(table)
    console.print(
        f"{result['gflop']:.1f} GFLOP (the closed form's); GEMM {gemm['best']:.0f} GFLOP/s best, "
        f"{gemm['median']:.0f} median, in the same rounds"
    )
    for title, ratio in result["ratios"].items():
        verdict = "met" if ratio["met"] else "NOT met"
        measured = f"{ratio['best']:.2f}x best, {ratio['median']:.2f}x median"
        console.print(f"{title}: {measured}; bar {ratio['bar']}x {verdict}")


def size_table(sizes: list[Problem], rounds: int, compiled: bool) -> list[dict[str, Any]]:
    """Best milliseconds of every peer over batch and tokens."""
    rows = []
    table = Table(title="best ms over B x N, D=384 H=6", title_justify="left")
    for problem in sizes:
        x = problem.input()
        functions = build_peers(problem, compiled)
        runs = {name: partial(time_once, function, x, problem.device) for name, function in functions.items()}
        times = {name: row["best"] for name, row in interleave(runs, rounds, warmups=1).items()}
        rows.append({"batch": problem.batch, "tokens": problem.tokens, "best_ms": times})
        if len(rows) == 1:
            for column in ("B", "N", *times):
                table.add_column(column, justify="right")
        table.add_row(str(problem.batch), str(problem.tokens), *(f"{ms:.1f}" for ms in times.values()))
    console.print(table)
    return rows


def cost_against_tokens(lengths: list[int], rounds: int, device: str) -> list[dict[str, Any]]:
    """Microseconds a token at B=1, D=192, H=3, full batch and shuffled: flat when the cost is linear."""
    rows = []
    table = Table(title="us a token, B=1 D=192 H=3 (flat: linear in N)", title_justify="left")
    for column in ("N", "MTTT-MLP", "MTTT-MLP, 4 shuffled batches"):
        table.add_column(column, justify="right")
    for tokens in lengths:
        problem = Problem(1, tokens, 192, 3, device)
        x = problem.input()
        layers = {loop.__name__: problem.layer(loop) for loop in (zoo.MTTTMLP, zoo.MTTTMLPSGD4)}
        runs = {name: partial(time_once, layer, x, device) for name, layer in layers.items()}
        micro = {name: row["best"] * 1e3 / tokens for name, row in interleave(runs, rounds, warmups=1).items()}
        rows.append({"tokens": tokens, "us_a_token": micro})
        table.add_row(f"{tokens:,}", *(f"{us:.2f}" for us in micro.values()))
    console.print(table)
    return rows


def main(
    quick: bool = False,
    json_path: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    rounds: int = 9,
    threads: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
) -> int:
    """Measure the MTTT-MLP layer.

    Args:
        quick: a small problem, nothing compiled by inductor, no long sequences: seconds, proves nothing.
        json_path: where the results go; benchmarks/results/mttt_layer-HOST.json otherwise, nowhere if quick.
        rounds: rounds of the main table; each runs every peer once.
        threads: threads of torch; 0 leaves torch's choice.
        device: where it runs.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    host = machine.facts()
    console.print(", ".join(f"{name} {value}" for name, value in host.items()))
    main_problem = Problem(2, 64, 96, 3, device) if quick else Problem(8, 196, 384, 6, device)
    result = peers_at_one_size(main_problem, 3 if quick else max(rounds, 7), compiled=not quick)
    result["ratios"] = ratios(result["ms"])
    print_peers(result)

    batches, lengths = ((1, 2), (16, 32)) if quick else ((1, 4, 16), (64, 196, 784))
    sizes = [Problem(b, n, *((96, 3) if quick else (384, 6)), device) for b in batches for n in lengths]
    report: dict[str, Any] = {
        "what": "MTTT-MLP layer (arXiv 2310.13807), projections and inner loop, forward + backward",
        "date": datetime.now(UTC).date().isoformat(),
        "host": host,
        "peers": result,
        "sizes": size_table(sizes, 3, compiled=False),
        "tokens": cost_against_tokens([196, 784] if quick else [196, 784, 3136, 12544, 50176], 3, device),
    }
    if device == "cpu":
        peak = peak_memory.measure("MTTTMLPSGD4", 1, 784 if quick else 50176, 192, 3, threads)
        report["peak_memory"] = peak
        console.print(
            f"peak memory of forward + backward, B=1 N={peak['tokens']:,} D=192 H=3, 4 shuffled batches: "
            f"{peak['peak_mib'] / 1024:.2f} GiB, {peak['before_mib'] / 1024:.2f} GiB of it before it ran"
        )
    if json_path is None and not quick:
        json_path = RESULTS / f"mttt_layer-{machine.kind(device)}.json"
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(report, indent=1) + "\n")
        console.print(f"written: {json_path}")
    return 0 if all(ratio["met"] for ratio in result["ratios"].values()) else 1


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
