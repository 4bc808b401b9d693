"""How heads come in views: each its own, several with one, all with one. Loops here differ in nothing else, their name
included, so that what they generate is the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import nestloop as nl
from nestloop import zoo
from tests.lowering.body_loops import Linear, Recall
from tests.lowering.comparison import assert_equal, differences, random_inputs, run

LAYOUTS: dict[str, dict[str, Any]] = {"own": {}, "grouped": {"group": 2}, "shared": {"shared": True}}
EVERY = list(itertools.product(LAYOUTS, repeat=3))
SCHEDULES = [nl.FullBatch(steps=2), nl.Causal(4), nl.Online()]


def loop_with(layouts: tuple[str, ...], **declared: Any) -> type[nl.Loop]:
    views = {name: nl.view("d", **LAYOUTS[layout]) for name, layout in zip("kqv", layouts, strict=True)}
    return type("Laid", (Recall,), {"learner": Linear, **views, **declared})


def agree(loop: type[nl.Loop], backend: str, dtype: torch.dtype = torch.float64) -> None:
    inputs = random_inputs(loop.spec, {"d": 4, "H": 4}, tokens=7)
    wanted = run(nl.compile(loop, backend="reference"), inputs)
    for group in (inputs.views, inputs.weights):
        group.update({name: t.detach().to(dtype).requires_grad_() for name, t in group.items()})
    found = run(nl.compile(loop, backend=backend), inputs)
    assert_equal(
        differences({n: t.double() for n, t in found.items()}, wanted), 1e-10 if dtype == torch.float64 else 1e-4
    )


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("layouts", EVERY, ids="-".join)
def test_pytorch_and_cpp_take_each_of_them(layouts: tuple[str, ...], schedule: Any):
    for backend in ("torch", "cpp"):
        agree(loop_with(layouts, schedule=schedule), backend)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_takes_each_of_them(layout: str, schedule: Any):
    pytest.importorskip("triton")
    agree(loop_with((layout, "own", layout), schedule=schedule), "triton", torch.float32)


@pytest.mark.parametrize("layouts", [laid for laid in EVERY if {*laid} != {"shared"}], ids="-".join)
@pytest.mark.parametrize("kernel", [zoo.SelfAttention.kernel, lambda self, q, k: torch.sigmoid(q @ k.T)])
def test_kernel_estimators_take_each_of_them(layouts: tuple[str, ...], kernel: Any):
    views = {name: nl.view("d", **LAYOUTS[layout]) for name, layout in zip("kqv", layouts, strict=True)}
    agree(type("Laid", (nl.Loop,), {"learner": nl.KernelEstimator, "kernel": kernel, **views}), "torch")


@pytest.mark.parametrize("slow", ["own", "shared"])
def test_slow_weights_of_all_heads(slow: str):
    def readout(self: Any, f: Any, t: Any) -> torch.Tensor:
        return f(t.q) * self.s

    weight = nl.slow("d", shared=slow == "shared")
    for backend in ("torch", "cpp"):
        agree(loop_with(("own",) * 3, schedule=nl.FullBatch(steps=2), s=weight, readout=readout), backend)


@pytest.mark.parametrize("dtypes", list(itertools.permutations([torch.float64, torch.float32, torch.bfloat16])))
def test_attention_takes_views_of_several_dtypes(dtypes: tuple[torch.dtype, ...]):
    op, reference = (nl.compile(zoo.SelfAttention, backend=backend) for backend in ("torch", "reference"))
    inputs = random_inputs(zoo.SelfAttention.spec, {"d": 4, "H": 2}, tokens=5)
    views = {name: t.detach().to(dtype) for (name, t), dtype in zip(inputs.views.items(), dtypes, strict=True)}
    torch.testing.assert_close(op(views, {})[0], reference(views, {})[0])
