"""Two processes under torchrun train as one does at the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from nestloop.models.logbook import read_log

FLAGS = (
    "--mixer mttt_mlp_sgd4 --width 16 --depth 2 --heads 2 --epochs 1 --max-steps 4 --batch 120 "
    "--warmup-steps 2 --crop pad --device cpu --log-every 1 --eval-batch 50"
)


def run(run_dir: Path, processes: int, *flags: str) -> list[dict]:
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [*launcher, "nestloop", "train", "digits", *FLAGS.split(), "--run-dir", str(run_dir), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return read_log(run_dir)


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
