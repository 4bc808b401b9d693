"""What `make gpu` runs, as far as a machine without a GPU can show it."""

import json

import pytest
import torch

from benchmarks import gpu


@pytest.mark.parametrize("name", ["MTTTMLPSGD4", "DeltaProduct", "KDA"])
def test_agreement_is_measured_against_the_reference(name: str):
    assert gpu.agreement(gpu.LOOPS[name], "cpu") < 1e-10


def test_the_whole_command_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu, "LOOPS", {"MTTTLinear": gpu.LOOPS["MTTTLinear"]})
    monkeypatch.setattr(gpu, "STREAMS", ("CausalLinearAttention",))
    assert gpu.main(["--device", "cpu", "--quick"]) == 0
    result = json.loads((tmp_path / "gpu-quick.json").read_text())
    assert result["agreement"]["MTTTLinear"] < 1e-10
    assert result["streams"][0]["off by"] < 1e-5 and min(result["streams"][0]["triton"]) > 0
    assert all(rate > 0 for rate in result["training_step"].values())
    assert "ViT-S/16 training, images/s" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert "sees no CUDA device, so nothing was measured" in capsys.readouterr().err
