"""`make gpu`, or `python -m benchmarks.gpu`: everything that wants a GPU, in one command; needs torch and nothing else.

First every loop of the zoo against the reference on the device (float64, values and gradients), then the MTTT-MLP layer
and whole ViT-S/16 training steps beside what people write without a compiler: medians of interleaved rounds, with the
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
from nestloop import models, zoo

LOOPS: dict[str, Any] = {name: getattr(zoo, name) for name in zoo.__all__ if name != "catalogue"}


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


def agreement(loop: Any, device: str) -> float:
    """The worst relative difference from the reference in float64, over the output and every gradient."""
    torch.manual_seed(0)
    layer = nl.Layer(loop, 32, 2, backend="torch").double().to(device).eval()
    reference = nl.Layer(loop, 32, 2, backend="reference").double().to(device).eval()
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(3, 16, 32, dtype=torch.float64, device=device)
    found = []
    for part in (layer, reference):
        given = x.clone().requires_grad_()
        y = part(given)
        (y * torch.linspace(-1, 1, y.numel(), device=device).reshape(y.shape)).sum().backward()
        found.append([y.detach(), given.grad, *[p.grad for p in part.parameters() if p.requires_grad]])
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
    print("ViT-S/16 training, images/s")
    for mixer, rate in result["training_step"].items():
        print(f"  {mixer:<20} {rate:9.1f}")


if __name__ == "__main__":
    sys.exit(main())
