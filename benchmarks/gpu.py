"""`make gpu`, or `python -m benchmarks.gpu`: everything that wants a GPU, in one command; needs torch and nothing else.

First every loop of the zoo against the reference on the device (float64, values and gradients), then streams in
generated Triton beside generated PyTorch (how far apart they are, and times), the MTTT-MLP layer and whole ViT-S/16
training steps beside what people write without a compiler: medians of interleaved rounds, with the
device's own GEMM rate. The table is printed last; the figures go to `$OUT/gpu.json`, or `benchmarks/results/gpu.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import nestloop as nl
from benchmarks import machine, peers
from benchmarks.calls import distance, problem, time_once, values_of
from nestloop import models, zoo
from tests.drawn import draw

STREAMS = ("CausalLinearAttention", "RetNet", "GLA", "DeltaNet", "GatedDeltaNet", "TTTLinear", "TTTMLP")
LOOPS = {loop.__name__: loop for loop in zoo.loops()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the command itself")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device, so nothing was measured.", file=sys.stderr)
        return 2
    result: dict[str, Any] = {
        "machine": machine.facts(),
        "device": machine.kind(options.device),
        "quick": options.quick,
    }
    result["agreement"] = {name: agreement(loop, options.device) for name, loop in LOOPS.items()}
    dtype, size = (torch.bfloat16, 8192) if options.device == "cuda" else (torch.float32, 1024)
    result["gemm_tflops"] = machine.gemm_rate(options.device, dtype, size) / 1e3
    sizes = [(2, 64, 96, 3)] if options.quick else [(256, 196, 384, 6), (4, 12_544, 192, 3), (1, 50_176, 192, 3)]
    result["layer"] = [layer_times(*size, options.device, 2 if options.quick else 9) for size in sizes]
    shapes = [(1, 40, 2, 16)] if options.quick else [(4, 2048, 32, 64), (1, 8192, 32, 64)]
    dtypes = [torch.float32] if options.quick else [torch.float32, torch.bfloat16]
    result["streams"] = [
        stream_times(name, shape, dtype, options.device, 1 if options.quick else 9)
        for name in STREAMS
        for shape in shapes
        for dtype in dtypes
    ]
    result["training_step"] = {
        mixer: training_step(mixer, options.device, options.quick)
        for mixer in ("self_attention", "linear_attention", "mttt_linear", "mttt_mlp")
    }
    folder = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    path = folder / ("gpu-quick.json" if options.quick else "gpu.json")
    if not options.quick or "OUT" in os.environ:
        path.write_text(json.dumps(result, indent=2) + "\n")
    missed = [name for name, error in result["agreement"].items() if error > 1e-10]
    report(result, missed)
    return 1 if missed else 0


def agreement(loop: type[nl.Loop], device: str) -> float:
    """The worst relative difference from the reference in float64, over the output and every gradient."""
    torch.manual_seed(0)
    tokens = 16
    views, weights = ({n: t.detach().to(device) for n, t in drawn.items()} for drawn in draw(loop.spec, tokens))
    order = torch.rand(2, tokens).argsort(-1).to(device) if loop.spec.schedule.needs_order else None
    leaves = [t.requires_grad_() for t in [*views.values(), *weights.values()]]
    found = []
    for backend in ("torch", "reference"):
        z, _ = nl.compile(loop, backend=backend)(views, weights, order=order)
        cotangent = torch.linspace(-1, 1, z.numel(), device=device, dtype=z.dtype).reshape(z.shape)
        gradients = torch.autograd.grad((z * cotangent).sum(), leaves, allow_unused=True)
        found.append(
            [z.detach(), *[torch.zeros_like(t) if g is None else g for g, t in zip(gradients, leaves, strict=True)]]
        )
    largest = max(float(t.abs().max()) for t in found[1])
    return max(
        float((a - b).abs().max()) / max(float(b.abs().max()), 1e-4 * largest) for a, b in zip(*found, strict=True)
    )


def layer_times(batch: int, tokens: int, width: int, heads: int, device: str, rounds: int) -> dict[str, Any]:
    """Median and best ms of forward + backward under bfloat16 autocast, the peers in turn."""
    torch.manual_seed(0)
    eager = nl.Layer(zoo.MTTTMLP, width, heads, backend="torch").to(device)
    fused = nl.Layer(zoo.MTTTMLP, width, heads, backend="torch", inductor=True).to(device)
    fused.load_state_dict(eager.state_dict())
    parameters: dict[str, torch.Tensor] = dict(eager.named_parameters())
    x = torch.randn(batch, tokens, width, device=device, requires_grad=True)
    compiled = {"vmap(grad), compiled": peers.vmap_grad, "closed form, compiled": peers.closed_form}
    runs: dict[str, Callable[[], torch.Tensor]] = {"nestloop, eager": lambda: eager(x)}
    if device == "cuda":
        runs["nestloop, inductor"] = lambda: fused(x)
        runs |= {name: partial(torch.compile(peer), parameters, x) for name, peer in compiled.items()}
    else:
        runs |= {name.replace("compiled", "eager"): partial(peer, parameters, x) for name, peer in compiled.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 2):
        for name, run in runs.items():
            elapsed = timed(partial(_forward_backward, run), device)
            if index >= 2:
                times[name].append(elapsed)
    size = {"B": batch, "N": tokens, "D": width, "H": heads}
    return {**size, **{name: [statistics.median(t) * 1e3, min(t) * 1e3] for name, t in times.items()}}


def stream_times(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, rounds: int
) -> dict[str, Any]:
    """Median and best ms of forward + backward of a loop's two backends, and how far Triton is off PyTorch.

    shape: sequences, tokens, heads and features of a head. What Triton refuses or cannot run is put down as a message.
    """
    views, weights = problem(getattr(zoo, name), *shape, device)
    views = {n: t.detach().to(dtype).requires_grad_() for n, t in views.items()}
    leaves = [*views.values(), *weights.values()]
    found: dict[str, Any] = {"loop": name, "B, N, H, d": shape, "dtype": str(dtype).removeprefix("torch.")}
    made = {}
    for backend in ("torch", "triton"):
        call = partial(_output, nl.compile(getattr(zoo, name), backend=backend), views, weights)
        run = partial(time_once, call, leaves, device)
        try:
            made[backend] = values_of(call, leaves)
            times = [run() for _ in range(rounds + 2)][2:]
        except Exception as error:  # the other figures are wanted all the same
            found[backend] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        found[backend] = [statistics.median(times), min(times)]
    if len(made) == 2:
        found["off by"] = max(map(distance, made["triton"], made["torch"]))
    return found


def _output(op: nl.CompiledLoop, views: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return op(views, weights)[0]


def _forward_backward(run: Callable[[], torch.Tensor]) -> None:
    run().float().sum().backward()


def training_step(mixer: str, device: str, quick: bool) -> float:
    """Images a second of whole ViT-S/16 training steps (AdamW, bfloat16 autocast)."""
    size, batch, depth = (32, 4, 1) if quick else (224, 256, 12)
    fused = {} if device == "cpu" or mixer == "self_attention" else {"inductor": True}
    model = models.create(f"vit_s16_{mixer}", image_size=size, depth=depth, **fused).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(1000, (batch,), device=device)

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    spent = [timed(step, device) for _ in range(3 if quick else 8)]
    return batch / statistics.median(spent[-5:])


def timed(function: Callable[[], None], device: str) -> float:
    """Seconds of one call, the device's work included."""
    machine.synchronize(device)
    start = time.perf_counter()
    with torch.autocast(device, dtype=torch.bfloat16):
        function()
    machine.synchronize(device)
    return time.perf_counter() - start


def report(result: dict[str, Any], missed: list[str]) -> None:
    print("agreement with the reference, float64 (bar 1e-10)")
    for name, error in result["agreement"].items():
        print(f"  {name:<20} {error:.1e}{'  MISSED' if name in missed else ''}")
    print(f"GEMM {result['gemm_tflops']:.1f} TFLOP/s")
    for row in result["layer"]:
        print("MTTT-MLP layer, forward + backward, bf16 autocast: " + " ".join(f"{k}={row[k]}" for k in "BNDH"))
        for name, value in row.items():
            if isinstance(value, list):
                print(f"  {name:<24} median {value[0]:9.2f} ms   best {value[1]:9.2f} ms")
    for row in result["streams"]:
        print(f"{row['loop']}, forward + backward, {row['dtype']}, B, N, H, d = {row['B, N, H, d']}")
        for backend in ("torch", "triton"):
            value = row[backend]
            shown = value if isinstance(value, str) else f"median {value[0]:9.2f} ms   best {value[1]:9.2f} ms"
            print(f"  nestloop, {backend:<14} {shown}")
        if "off by" in row:
            print(f"  off by {row['off by']:.1e}")
    print("ViT-S/16 training, images/s")
    for mixer, rate in result["training_step"].items():
        print(f"  {mixer:<20} {rate:9.1f}")


if __name__ == "__main__":
    sys.exit(main())
