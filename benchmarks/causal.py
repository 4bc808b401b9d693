"""`python -m benchmarks.causal`: causal loops against what people write without a compiler.

Forward and backward of the loops alone, float32. The peers run in turn in one process, so that all of them see the same
machine; only ratios within one run mean anything. Then the cost against the number of tokens, and peak memory.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
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
from benchmarks import causal_peers, machine
from benchmarks.calls import distance, problem, time_once, values_of
from benchmarks.mttt_layer import RESULTS, interleave
from benchmarks.peak_memory import peak_mib
from nestloop import zoo
from nestloop.lang.state import entries
from nestloop.lowering import lower
from nestloop.lowering.runtime.tiles import spacing_within

CORES = {"TTTLinear": causal_peers.ttt_linear, "TTTMLP": causal_peers.ttt_mlp}
# How many times faster one plan is to be than another, by loop: (ours, the other, at least).
BARS: dict[str, list[tuple[str, str, float]]] = {
    "TTTLinear": [
        ("nestloop, cpp", "dual form, eager", 4.0),
        ("nestloop, cpp", "nestloop, inductor", 2.0),
        ("nestloop, inductor", "dual form, eager", 1.5),
    ],
    "TTTMLP": [
        ("nestloop, cpp", "dual form, eager", 3.5),
        ("nestloop, cpp", "nestloop, inductor", 1.8),
        ("nestloop, inductor", "dual form, eager", 1.5),
    ],
    **{name: [("nestloop, cpp", "fla-core", 3.0)] for name in ("DeltaNet", "GatedDeltaNet", "GLA")},
}
LAYERS = {"TTTLinear": 1.4, "TTTMLP": 1.6}  # whole layers, projections included, against the compiled step
RECOMPUTED = 4  # forward's FLOPs in a forward and a backward that recomputes
LOOPS = (*CORES, "DeltaNet", "GatedDeltaNet", "GLA")
console = Console(width=110, soft_wrap=True)


def peers_of(
    name: str, views: Mapping[str, Tensor], weights: Mapping[str, Tensor], compiled: bool
) -> dict[str, Callable[[], Tensor]]:
    """Every peer of one loop by name."""
    loop = getattr(zoo, name)

    def op(**settings: Any) -> Callable[[], Tensor]:
        run = nl.compile(loop, **settings)
        return lambda: run(views, weights)[0]

    found = {"nestloop, torch": op(backend="torch")}
    if next(iter(views.values())).device.type == "cpu":
        found[plan_of("cpu")] = op(backend="cpp")
    if compiled:
        found["nestloop, inductor"] = op(backend="torch", inductor=True)
    if name in CORES:
        found["dual form, eager"] = partial(CORES[name], views, weights)
    other = causal_peers.fla_functions().get(name)
    if other is not None:
        found["fla-core"] = partial(other, views)
    return found


def measure(name: str, sizes: tuple[int, int, int, int], rounds: int, compiled: bool, device: str) -> dict[str, Any]:
    """One loop beside its peers: their times, that they agree, and the ratios of the bars."""
    views, weights = problem(getattr(zoo, name), *sizes, device)
    peers = peers_of(name, views, weights, compiled)
    leaves = [*views.values(), *weights.values()]
    result = compared(name, sizes, peers, leaves, BARS[name], rounds, device)
    with FlopCounterMode(display=False) as counter:  # knows the ops that there are when it is made
        peers["nestloop, torch"]()
    bound = RECOMPUTED * counter.get_total_flops() / result["gemm_gflops"]["best"] / 1e6
    return {**result, "flop_bound_ms": bound}


def compared(
    name: str,
    sizes: tuple[int, int, int, int],
    peers: Mapping[str, Callable[[], Tensor]],
    leaves: Mapping[str, list[Tensor]] | list[Tensor],
    bars: list[tuple[str, str, float]],
    rounds: int,
    device: str,
) -> dict[str, Any]:
    """Peers side by side: how far their outputs and gradients are off the first one's, times, and ratios.

    Args:
        leaves: what gradients are taken of; by peer, where each has tensors of its own.
    """
    of = leaves if isinstance(leaves, Mapping) else dict.fromkeys(peers, leaves)
    made = {peer: values_of(function, of[peer]) for peer, function in peers.items()}
    first = next(iter(made.values()))
    off = {peer: max(map(distance, values, first)) for peer, values in made.items()}
    del made, first  # the gradients of every peer
    times, gemm = against_gemm({p: partial(time_once, f, of[p], device) for p, f in peers.items()}, rounds, device)
    return {
        "loop": name,
        "sizes": sizes,
        "ms": times,
        "off_by": off,
        "ratios": ratios_of(bars, times),
        "gemm_gflops": gemm,
    }


def against_gemm(
    runs: dict[str, Callable[[], float]], rounds: int, device: str
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Times of each peer, and the rate of matrix products between them."""
    rates: list[float] = []

    def rate() -> float:
        rates.append(machine.gemm_rate(device, repeats=2))
        return rates[-1]

    times = interleave({**runs, "GEMM": rate}, rounds)
    del times["GEMM"]
    return times, {"best": max(rates), "median": statistics.median(rates)}


def plan_of(device: str) -> str:
    """What nestloop runs by default on a device."""
    return "nestloop, cpp" if device == "cpu" else "nestloop, torch"


def ratios_of(bars: list[tuple[str, str, float]], times: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Every bar whose two peers were measured, and whether it is met."""
    found = []
    for ours, other, bar in bars:
        if ours in times and other in times:
            best, median = (times[other][key] / times[ours][key] for key in ("best", "median"))
            found.append({"ours": ours, "other": other, "best": best, "median": median, "bar": bar, "met": best >= bar})
    return found


def measure_layer(name: str, sizes: tuple[int, int, int, int], rounds: int, device: str) -> dict[str, Any]:
    """A whole layer, its projections included, in C++ and with its compiled step."""
    batch, tokens, heads, d = sizes
    x = torch.randn(batch, tokens, heads * d, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    peers: dict[str, Callable[[], Tensor]] = {}
    leaves: dict[str, list[Tensor]] = {}
    for peer, settings in {"cpp": {"backend": "cpp"}, "inductor": {"backend": "torch", "inductor": True}}.items():
        torch.manual_seed(0)
        layer = nl.Layer(getattr(zoo, name), heads * d, heads, **settings).to(device)
        peers[f"nestloop, {peer}"] = partial(layer, x)
        leaves[f"nestloop, {peer}"] = [x, *layer.parameters()]
    bars = [("nestloop, cpp", "nestloop, inductor", LAYERS[name])]
    return compared(f"{name} layer", sizes, peers, leaves, bars, rounds, device)


def print_loop(result: dict[str, Any]) -> None:
    b, n, h, d = result["sizes"]
    table = Table(title=f"{result['loop']}: B={b} N={n} H={h} d={d}, forward + backward", title_justify="left")
    for column in ("", "best ms", "median ms", "max/min", "off by"):
        table.add_column(column, justify="left" if not column else "right")
    for peer, row in sorted(result["ms"].items(), key=lambda item: -item[1]["best"]):
        numbers = f"{row['best']:.1f}", f"{row['median']:.1f}", f"{row['spread']:.2f}"
        table.add_row(peer, *numbers, f"{result['off_by'][peer]:.0e}")
    console.print(table)
    for ratio in result["ratios"]:
        verdict = "met" if ratio["met"] else "NOT met"
        console.print(
            f"{ratio['ours']} against {ratio['other']}: {ratio['best']:.2f}x best, {ratio['median']:.2f}x median; "
            f"bar {ratio['bar']}x {verdict}; GEMM {result['gemm_gflops']['best']:.0f} GFLOP/s"
        )
    if "flop_bound_ms" in result:
        best = min(times["best"] for peer, times in result["ms"].items() if peer.startswith("nestloop"))
        bound = result["flop_bound_ms"]
        console.print(
            f"its FLOPs at the GEMM rate: {bound:.1f} ms; the fastest of nestloop's: {best / bound:.2f}x that"
        )


def cost_against_tokens(lengths: list[int], heads: int, d: int, device: str) -> list[dict[str, Any]]:
    """Microseconds a token at B=1: flat when the cost is linear."""
    rows = []
    table = Table(title=f"us a token, B=1 H={heads} d={d} (flat: linear in N)", title_justify="left")
    for column in ("N", *LOOPS):
        table.add_column(column, justify="right")
    for tokens in lengths:
        micro = {}
        for name in LOOPS:
            views, weights = problem(getattr(zoo, name), 1, tokens, heads, d, device)
            run = peers_of(name, views, weights, False)[plan_of(device)]
            leaves = [*views.values(), *weights.values()]
            micro[name] = min(time_once(run, leaves, device) for _ in range(2)) * 1e3 / tokens
        rows.append({"tokens": tokens, "us_a_token": micro})
        table.add_row(f"{tokens:,}", *(f"{us:.1f}" for us in micro.values()))
    console.print(table)
    return rows


def peak(name: str, tokens: int, heads: int, d: int) -> dict[str, Any]:
    """Peak memory of one forward and backward in a process of its own, beside what its tensors take."""
    code = f"import benchmarks.causal as c; c.peak_of_process({name!r}, {tokens}, {heads}, {d})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{name} at {tokens} tokens failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def peak_of_process(name: str, tokens: int, heads: int, d: int) -> None:
    """Print what `peak` reads: MiB of the process, of it before, of inputs, outputs and gradients, of states kept."""
    loop = getattr(zoo, name)
    op = nl.compile(loop, backend="cpp")
    views, weights = problem(loop, 1, 64, heads, d, "cpu")
    z = op(views, weights)[0]
    z.backward(torch.ones_like(z))  # PyTorch imports sympy, 30 MiB, the first time
    sizes = {"d": d, "dk": d, "dv": d, "D": d, "H": heads}
    plan = lower.plan_for(loop.spec, sizes, None, False, False, part="scan")
    chunk = plan.chunk if plan.native is None else plan.native.rows
    before = peak_mib()
    views, weights = problem(loop, 1, tokens, heads, d, "cpu")
    z, state = op(views, weights)
    z.backward(torch.ones_like(z))
    inputs = sum(t.numel() for t in (*views.values(), *weights.values()))
    carried = sum(state[n].numel() for n, e in entries(loop.spec).items() if e.part in ("weight", "momentum"))
    count = -(-tokens // chunk)
    every = spacing_within(count, sum(t.numel() for t in views.values()), carried)
    tensors = 4 * (2 * inputs + 2 * z.numel()) / 2**20
    print(
        json.dumps(
            {
                "loop": name,
                "tokens": tokens,
                "peak_mib": peak_mib(),
                "before_mib": before,
                "inputs_outputs_gradients_mib": tensors,
                "states_kept_mib": 4 * (-(-count // every) - 1 + every) * carried / 2**20,
                "chunk": chunk,
                "chunks_between_states": every,
            }
        )
    )


def main(
    quick: bool = False,
    json_path: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    rounds: int = 7,
    threads: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
) -> int:
    """Measure causal loops. fla-core's functions are peers where that package is (pip install --no-deps
    fla-core==0.6.0 einops==0.8.2).

    Args:
        quick: a small problem, nothing compiled by inductor, no long sequences: seconds, proves nothing.
        json_path: where the results go; benchmarks/results/causal-HOST.json otherwise, nowhere if quick.
        rounds: rounds of each table; each runs every peer once.
        threads: threads of torch; 0 leaves torch's choice.
        device: where it runs.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    host = machine.facts()
    console.print(", ".join(f"{name} {value}" for name, value in host.items()))
    sizes = (1, 64, 2, 16) if quick else (2, 1024, 6, 64)
    results = []
    for name in LOOPS:
        results.append(measure(name, sizes, 2 if quick else rounds, name in CORES and not quick, device))
        print_loop(results[-1])
    for name in LAYERS if not quick and device == "cpu" else ():
        results.append(measure_layer(name, sizes, rounds, device))
        print_loop(results[-1])
    lengths = [64, 128] if quick else [1024, 4096, 16384, 65536]
    report: dict[str, Any] = {
        "what": "causal loops alone, forward + backward, float32",
        "date": datetime.now(UTC).date().isoformat(),
        "host": host,
        "loops": results,
        "tokens": cost_against_tokens(lengths, 2, sizes[3], device),
    }
    if device == "cpu":
        report["peak_memory"] = [peak(name, lengths[-1], 2, sizes[3]) for name in ("TTTLinear", "TTTMLP", "GLA")]
        for row in report["peak_memory"]:
            console.print(
                f"{row['loop']} at {row['tokens']:,} tokens: peak {row['peak_mib'] - row['before_mib']:.0f} MiB above "
                f"the process before; inputs, outputs and gradients {row['inputs_outputs_gradients_mib']:.0f} MiB, "
                f"states kept {row['states_kept_mib']:.0f} MiB"
            )
    if json_path is None and not quick:
        json_path = RESULTS / f"causal-{machine.kind(device)}.json"
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(report, indent=1) + "\n")
        console.print(f"written: {json_path}")
    met = [ratio["met"] for result in results for ratio in result["ratios"]]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
