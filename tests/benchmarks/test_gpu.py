"""What `make gpu` runs, as far as a machine without a GPU can show it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import nestloop as nl
from benchmarks import causal_peers, gpu, gpu_peers, peers
from benchmarks.calls import distance, problem, values_of
from benchmarks.gpu_cases import Case, cases
from nestloop import zoo

KINDS = list(gpu.BARS)


def case_of(name: str, **plans: Any) -> Case:
    """A small case with plans of its own; "" for those it has."""
    found = next(case for case in cases("cpu", True) if case.name == name)
    return replace(found, plans={n: found.plans[n] if plan == "" else plan for n, plan in plans.items()})


@pytest.mark.parametrize("name", ["MTTTMLPSGD4", "DeltaProduct", "KDA"])
def test_agreement_is_measured_against_the_reference(name: str):
    found = gpu.apart(gpu.LOOPS[name], ("torch", "reference"), torch.float64, "cpu")
    assert isinstance(found, float) and not gpu.is_missed(KINDS[0], found)
    assert gpu.is_missed(KINDS[0], 1e-9) and gpu.is_missed(KINDS[0], float("nan"))


def test_the_whole_command_on_a_cpu(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("triton")
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu, "LOOPS", {"MTTTLinear": gpu.LOOPS["MTTTLinear"]})
    own = {"nestloop, triton": "", "nestloop, torch": ""}
    chosen = [case_of(name, **own) for name in ("MTTTLinear layer", "CausalLinearAttention")]
    monkeypatch.setattr(gpu, "cases", lambda device, quick: iter(chosen))
    assert gpu.main(["--device", "cpu", "--quick"]) == 0
    result = json.loads((tmp_path / "gpu-quick.json").read_text())
    for kind, error in result["agreement"]["MTTTLinear"].items():
        assert error < gpu.BARS[kind]
    assert len(result["cases"]) == 2
    for row in result["cases"]:
        ours = row["plans"]["nestloop, triton"]
        assert ours["off by"] < 0.02 and min(ours["forward + backward"]) > 0 and min(row["floor"].values()) > 0
    assert len(result["training_step"]) == 3 and all(rate > 0 for rate in result["training_step"].values())
    shown = capsys.readouterr().out
    assert "ViT-S/16 training, images/s" in shown and "not measured (wanted" in shown


def test_what_fails_or_has_no_time_is_put_down():
    def failing() -> Any:
        raise RuntimeError("no such kernel\nand more")

    case = case_of("CausalLinearAttention", broken=failing, **{"nestloop, torch": ""})
    rates: Mapping[str, Any] = {"gemm_tflops": 1.0, "copy_gb_s": 10.0}
    row = gpu.measure(case, "cpu", 1, float("inf"), rates)
    assert row["plans"]["broken"] == "RuntimeError: no such kernel"
    assert row["plans"]["nestloop, torch"]["forward + backward"][0] > 0
    late = gpu.measure(case, "cpu", 1, 0.0, rates)
    assert set(late["plans"].values()) == {"no time left"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]):
    assert gpu.main([]) == 2
    assert "sees no CUDA device, so nothing was measured" in capsys.readouterr().err


@pytest.mark.parametrize(("loop", "steps"), [(zoo.MTTTLinear, 1), (zoo.MTTTMLP, 1), (zoo.MTTTMLP4, 4)])
def test_the_layers_peer_is_the_layer(loop: Any, steps: int):
    torch.manual_seed(0)
    layer = nl.Layer(loop, 12, 3, backend="torch").double()
    x = torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)
    parameters: dict[str, Tensor] = dict(layer.named_parameters())
    leaves = [x, *[p for p in parameters.values() if p.requires_grad]]
    found = values_of(lambda: peers.vmap_grad(parameters, x, steps), leaves)
    assert max(map(distance, found, values_of(lambda: layer(x), leaves))) < 1e-10


def test_fla_core_has_the_same_ttt_linear():
    """Its naive function in PyTorch, which its kernels are tested with."""
    if importlib.util.find_spec("fla") is None:
        pytest.skip("fla-core is not installed")
    naive = causal_peers.fla_naive("ttt")
    assert naive is not None
    views, weights = problem(gpu_peers.TTTLinearFla, 1, 32, 2, 8, "cpu")
    views, weights = ({n: t.detach().double() for n, t in part.items()} for part in (views, weights))
    q, k, v, eta = (views[n].clone() for n in ("q", "k", "v", "eta"))
    start: list[Tensor] = [torch.zeros(1, 2, 8, 8).double(), torch.zeros(1, 2, 1, 8).double()]
    given = (q, k, v, weights["gamma"], weights["beta"], eta[..., None], 8**-0.5, 1e-6, 16, *start, False)
    theirs = naive.ttt_linear(*given)[0]
    ours = nl.compile(gpu_peers.TTTLinearFla, backend="torch")(views, weights)[0]
    assert distance(ours, theirs) < 1e-6  # its norms are in float32
