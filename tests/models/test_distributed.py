"""Two processes under torchrun train as one does at the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from nestloop.models.logbook import read_log

PROCESS = """
import os
from pathlib import Path
import torch
from nestloop.models.distributed import Ranks, join

def step(ranks: Ranks) -> None:
    model = ranks.wrap(torch.nn.Linear(4, 4))
    model(torch.ones(2, 4)).sum().backward()
    ranks.sum(torch.ones(2))

with join("cpu") as ranks:
    step(ranks)
    during = len(os.listdir("/proc/self/task"))
Path(os.environ["RESULTS"], str(ranks.rank)).write_text(f"{during > 1} {len(os.listdir('/proc/self/task'))}")
"""
"""What a run does with its group, and how many threads it has before the group ends and after."""

SHARDED = """
import os
from pathlib import Path
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import nestloop as nl
from nestloop import zoo
from nestloop.models.distributed import join

def drawn(layer: nl.Layer) -> nl.Layer:
    torch.manual_seed(0)
    layer.reset_parameters()
    return layer

def same() -> bool:
    with torch.device("meta"):
        layer = nl.Layer(zoo.TTTLinear, 16, 2, backend="reference")
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    drawn(layer.to_empty(device="cpu"))
    whole = drawn(nl.Layer(zoo.TTTLinear, 16, 2, backend="reference"))
    parameters = whole.named_parameters()
    return all(torch.equal(layer.get_parameter(name).full_tensor(), value) for name, value in parameters)

with join("cpu") as ranks:
    Path(os.environ["RESULTS"], str(ranks.rank)).write_text(str(same()))
os._exit(0)
"""
"""A layer that is sharded before it has memory, and one that is not. PyTorch's caches for such layers hold the group
and its threads for good, so the interpreter had better not shut down (`test_no_thread_of_a_group_outlives_it`)."""

FLAGS = (
    "--mixer mttt_mlp_sgd4 --width 16 --depth 2 --heads 2 --epochs 1 --max-steps 4 --batch 120 "
    "--warmup-steps 2 --crop pad --device cpu --log-every 1 --eval-batch 50"
)


def launch(processes: int, *command: str, **environment: str) -> None:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **environment}
    finished = subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True, timeout=180)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def run(run_dir: Path, processes: int, *flags: str) -> list[dict]:
    launch(processes, "-m", "nestloop", "train", "digits", *FLAGS.split(), "--run-dir", str(run_dir), *flags)
    return read_log(run_dir)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux lists them")
def test_no_thread_of_a_group_outlives_it(tmp_path):
    """A thread of gloo that needs the interpreter while it shuts down aborts the process."""
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    launch(2, str(script), RESULTS=str(tmp_path))
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["True 1", "True 1"]


def test_a_sharded_layer_starts_as_a_whole_one(tmp_path):
    script = tmp_path / "process.py"
    script.write_text(SHARDED)
    launch(2, str(script), RESULTS=str(tmp_path))
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["True", "True"]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path):
    """Sums are taken in another order, so float32 differs in its last bits: 1e-4 after four steps."""
    one = run(tmp_path / "one", 1)
    two = run(tmp_path / "two", 2, "--accumulate", "2")
    for name in ("loss", "gradient_norm", "inner_first", "inner_last"):
        by_one, by_two = ([r[name] for r in records if r["kind"] == "step"] for records in (one, two))
        assert len(by_one) == 4
        np.testing.assert_allclose(by_two, by_one, rtol=1e-4, err_msg=name)
    first, second = (next(r for r in records if r["kind"] == "eval") for records in (one, two))
    assert first["images"] == second["images"] == 360  # every held-out image once
    np.testing.assert_allclose(second["loss"], first["loss"], rtol=1e-4)
    assert sum(record["kind"] == "step" for record in two) == 4  # one process writes the log
    last = "checkpoints/step_00000004.safetensors"
    weights, expected = load_file(tmp_path / "two" / last), load_file(tmp_path / "one" / last)
    for name, value in expected.items():
        np.testing.assert_allclose(weights[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
