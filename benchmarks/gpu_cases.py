"""What is measured on a GPU: each case with its sizes, the plans that run in turn, and the ratios to reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import nestloop as nl
from benchmarks import gpu_peers, peers
from benchmarks.calls import problem
from nestloop import models, zoo

SETS = 3  # of random inputs, which the rounds take in turn
TRITON, TORCH, INDUCTOR = "nestloop, triton", "nestloop, torch", "nestloop, inductor"
IN_A_GRAPH = "nestloop, triton, compiled"  # the whole layer by `torch.compile`, as its peer is


@dataclass(frozen=True)
class Run:
    """One plan with its inputs made: `forward` gives y, of which `leaves` have gradients.

    Attributes:
        whole: forward and backward in one call, for a plan that PyTorch does not differentiate.
    """

    forward: Callable[[], Tensor] | None
    leaves: Sequence[Tensor] = ()
    whole: Callable[[], Any] | None = None


Plan = Callable[[int], Run]  # from which set of inputs


@dataclass(frozen=True)
class Case:
    """Attributes:
    name: what is measured.
    sizes: of that.
    plans: by name, each made when its turn comes, because making it may compile; what cannot be made is put down.
    targets: (faster plan, slower one, how many times).
    counted: the plan whose products are counted for the floor, and bytes that forward reads and writes.
    """

    name: str
    sizes: Mapping[str, int]
    plans: Mapping[str, Callable[[], Plan]]
    targets: Sequence[tuple[str, str, float]] = ()
    counted: str = TORCH
    dtype: torch.dtype = field(default=torch.bfloat16)


def cases(device: str, quick: bool) -> Iterator[Case]:
    """Every case, the most telling first."""
    sizes = (2, 33, 24, 3) if quick else (256, 196, 384, 6)
    yield layer_case(zoo.MTTTMLP, *sizes, device)
    streams = ((1, 33, 2, 16),) if quick else ((16, 2048, 32, 64), (4, 8192, 32, 64), (1, 32768, 32, 64))
    nonlinear: Sequence[Any] = (zoo.TTTLinear, gpu_peers.TTTLinearFla, zoo.TTTMLP)
    linear: Sequence[Any] = (
        zoo.CausalLinearAttention,
        zoo.DeltaNet,
        zoo.GLA,
        zoo.LightningAttentionFla,
        zoo.GatedDeltaNet,
    )
    for loop in nonlinear:
        for shape in streams:
            yield stream_case(loop, *shape, device, stepwise=shape is streams[0])
    shapes = ((1, 33, 2, 16),) if quick else ((8, 2048, 16, 128), (1, 16384, 16, 128))
    for loop in linear:
        for shape in shapes:
            yield stream_case(loop, *shape, device, stepwise=shape is shapes[0])
    yield layer_case(zoo.MTTTLinear, *sizes, device)
    pixels = (1, 40, 12, 3) if quick else (4, 50_176, 192, 3)
    yield layer_case(zoo.MTTTMLP4, *pixels, device, steps=4, attention=True)


def layer_case(
    loop: Any, batch: int, tokens: int, width: int, heads: int, device: str, steps: int = 1, attention: bool = False
) -> Case:
    """A whole layer under bfloat16 autocast, beside `vmap(grad)` by `torch.compile` and by JAX."""

    @cache
    def inputs() -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        drawn = [torch.randn(batch, tokens, width, generator=generator) for _ in range(2 * SETS)]
        return [(x.to(device).requires_grad_(), c.to(device)) for x, c in zip(drawn[:SETS], drawn[SETS:], strict=True)]

    @cache
    def layer(backend: str, inductor: bool = False) -> nl.Layer:
        torch.manual_seed(0)
        return nl.Layer(loop, width, heads, backend=backend, inductor=inductor).to(device)

    def plan(function: Callable[[Tensor], Tensor], parameters: Sequence[Tensor]) -> Plan:
        def run(index: int) -> Run:
            x = inputs()[index][0]
            return Run(partial(function, x), [x, *parameters])

        return run

    def ours(backend: str, inductor: bool = False, in_a_graph: bool = False) -> Plan:
        made = layer(backend, inductor)
        called = torch.compile(made, fullgraph=True, dynamic=False) if in_a_graph else made
        return plan(called, [p for p in made.parameters() if p.requires_grad])

    def compiled() -> Plan:
        parameters = dict(layer("torch").named_parameters())
        function = torch.compile(partial(peers.vmap_grad, steps=steps), dynamic=False)
        return plan(lambda x: function(parameters, x), [p for p in parameters.values() if p.requires_grad])

    def jitted() -> Plan:
        function = gpu_peers.jax_layer(dict(layer("torch").named_parameters()), steps)
        import jax

        given = [tuple(jax.numpy.asarray(t.detach().cpu().numpy()) for t in one) for one in inputs()]
        return lambda index: Run(None, whole=lambda: jax.block_until_ready(function(*given[index])))

    def softmax() -> Plan:
        torch.manual_seed(0)
        made = nl.Layer(zoo.SelfAttention, width, heads).to(device)
        return plan(made, list(made.parameters()))

    plans: dict[str, Callable[[], Plan]] = {
        TRITON: partial(ours, "triton"),
        IN_A_GRAPH: partial(ours, "triton", in_a_graph=True),
        TORCH: partial(ours, "torch"),
        INDUCTOR: partial(ours, "torch", True),
        "vmap(grad), compiled": compiled,
        "vmap(grad), JAX": jitted,
    }
    if attention:
        plans["softmax attention"] = softmax
    targets = [
        (TRITON, "vmap(grad), compiled", 3.0),
        (TRITON, TORCH, 1.5),
        (TRITON, "vmap(grad), JAX", 2.0),
        (IN_A_GRAPH, "vmap(grad), compiled", 3.0),
    ]
    sizes = {"B": batch, "N": tokens, "D": width, "H": heads, "T": steps}
    return Case(f"{loop.__name__} layer", sizes, plans, targets)


def stream_case(loop: Any, batch: int, tokens: int, heads: int, d: int, device: str, stepwise: bool = True) -> Case:
    """A stream alone on bfloat16 views, beside fla-core's kernels or the dual form by hand.

    stepwise: whether what launches kernels for every chunk is measured too: of many chunks it takes seconds a call.
    """
    name = loop.__name__

    @cache
    def inputs() -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        made = []
        for seed in range(SETS):
            views, weights = problem(loop, batch, tokens, heads, d, device, seed)
            low = {n: t.detach().to(torch.bfloat16).requires_grad_() for n, t in views.items()}
            made.append((low, weights))
        return made

    def plan(function: Callable[[Any, Any], Tensor]) -> Plan:
        def run(index: int) -> Run:
            views, weights = inputs()[index]
            return Run(partial(function, views, weights), [*views.values(), *weights.values()])

        return run

    def ours(**settings: Any) -> Plan:
        op = nl.compile(loop, **settings)
        return plan(lambda views, weights: op(views, weights)[0])

    plans: dict[str, Callable[[], Plan]] = {TRITON: partial(ours, backend="triton")}
    plans |= {TORCH: partial(ours, backend="torch")} if stepwise else {}
    targets: list[tuple[str, str, float]] = []
    if kernel := gpu_peers.fla_kernels().get(name):
        plans["fla-core"] = lambda: plan(kernel)
        targets.append((TRITON, "fla-core", 1.2 if name == "TTTLinearFla" else 1.0))
    if stepwise and name in ("TTTLinear", "TTTMLP"):
        plans[INDUCTOR] = partial(ours, backend="torch", inductor=True)
        plans["dual form, compiled"] = lambda: plan(gpu_peers.dual_form(name))
        targets.append((TRITON, "dual form, compiled", 5.0))
    return Case(name, {"B": batch, "N": tokens, "H": heads, "d": d}, plans, targets)


def training_steps(device: str, quick: bool) -> Iterator[tuple[str, int, Callable[[], Callable[[], None]]]]:
    """Whole ViT-S/16 training steps (AdamW, bfloat16 autocast): what, images of a step, and what makes it."""
    size, batch, depth = (32, 4, 1) if quick else (224, 256, 12)

    def make(mixer: str, **settings: Any) -> Callable[[], None]:
        model = models.create(f"vit_s16_{mixer}", image_size=size, depth=depth, **settings).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        images = torch.randn(batch, 3, size, size, device=device)
        labels = torch.randint(1000, (batch,), device=device)

        def step() -> None:
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    for mixer in ("self_attention", "linear_attention", "mttt_mlp"):
        yield mixer, batch, partial(make, mixer)
    if device == "cuda":  # elsewhere it is interpreted
        yield "mttt_mlp, triton", batch, partial(make, "mttt_mlp", backend="triton")
