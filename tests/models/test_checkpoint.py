"""Checkpoints: atomic, pruned, safe to load, and complete: a killed run goes on bit for bit."""

import dataclasses
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from nestloop.models import checkpoint, evaluate
from nestloop.models.errors import CheckpointError, RunFolderError
from nestloop.models.logbook import read_log
from nestloop.models.recipe import Recipe
from nestloop.models.recipes.digits import recipe as digits
from nestloop.models.train import train

TINY = dataclasses.replace(
    digits,
    mixer="mttt_mlp_sgd4",
    width=16,
    depth=2,
    heads=2,
    epochs=2,
    batch=359,  # 4 steps an epoch
    warmup_steps=2,
    accumulate=1,
    crop="pad",
    mixup=0.2,
    ema=0.9,
    device="cpu",
    log_every=1,
    checkpoint_every=1,
    keep=100,
)
FLAGS = (
    "--mixer mttt_mlp_sgd4 --width 16 --depth 2 --heads 2 --epochs 2 --batch 359 --warmup-steps 2 --crop pad "
    "--mixup 0.2 --ema 0.9 --device cpu --log-every 1 --checkpoint-every 1 --keep 100"
)


def start(run_dir: Path, *flags: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "nestloop",
        "train",
        "digits",
        *FLAGS.split(),
        "--run-dir",
        str(run_dir),
        *flags,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole")
    train(TINY, run_dir)
    return run_dir


def assert_same_state(path: Path, reference: Path) -> None:
    """Every tensor and number of two checkpoints is bit for bit the same."""
    state, expected = checkpoint.load(path), checkpoint.load(reference)
    for part in ("model", "ema"):
        assert state[part].keys() == expected[part].keys()
        for name, weight in expected[part].items():
            assert torch.equal(state[part][name], weight), f"{part} {name}"
    for slot, moments in expected["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(state["optimizer"]["state"][slot][name], value), f"optimizer {slot} {name}"
    assert state["step"] == expected["step"]
    assert state["schedule"] == expected["schedule"]
    assert torch.equal(state["random"]["torch"], expected["random"]["torch"])


def test_killed_at_a_random_step_and_resumed_it_equals_the_uninterrupted_run(tmp_path, uninterrupted):
    kill_after = random.SystemRandom().randint(1, 6)
    process = start(tmp_path)
    deadline = time.monotonic() + 120
    log = tmp_path / "log.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and sum('"kind": "step"' in line for line in log.read_text().splitlines()) >= kill_after:
            break
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()[0]
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped_at = len([record for record in read_log(tmp_path) if record["kind"] == "step"])
    assert kill_after <= stopped_at < 8

    train(dataclasses.replace(TINY, resume=True), tmp_path)
    last = "checkpoints/step_00000008.pt"
    assert_same_state(tmp_path / last, uninterrupted / last)
    for suffix in (".safetensors", ".ema.safetensors"):
        weights = load_file((tmp_path / last).with_suffix(suffix))
        expected = load_file((uninterrupted / last).with_suffix(suffix))
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)

    def numbers(run_dir: Path) -> list[dict]:
        timing = ("time", "images_per_second", "data_wait", "seconds")
        return [{k: v for k, v in record.items() if k not in timing} for record in read_log(run_dir)]

    assert numbers(tmp_path) == numbers(uninterrupted)


@pytest.mark.parametrize("step", [2, 4, 5])
def test_resuming_from_any_checkpoint_ends_in_the_same_weights(tmp_path, uninterrupted, step):
    """Steps 2 and 5 are inside an epoch, 4 is between two."""
    (tmp_path / "checkpoints").mkdir()
    for name in ("config.json", f"checkpoints/step_{step:08d}.pt"):
        (tmp_path / name).write_bytes((uninterrupted / name).read_bytes())
    torch.manual_seed(99)  # what the process did before must not matter
    train(dataclasses.replace(TINY, resume=True, workers=step % 3), tmp_path)
    assert_same_state(tmp_path / "checkpoints/step_00000008.pt", uninterrupted / "checkpoints/step_00000008.pt")


def test_a_run_stopped_before_its_first_checkpoint_starts_over(tmp_path, uninterrupted):
    (tmp_path / "config.json").write_bytes((uninterrupted / "config.json").read_bytes())
    (tmp_path / "log.jsonl").write_text('{"kind": "step", "step": 1}\n{"kind": "st')
    train(dataclasses.replace(TINY, resume=True), tmp_path)
    assert_same_state(tmp_path / "checkpoints/step_00000008.pt", uninterrupted / "checkpoints/step_00000008.pt")
    assert [r["step"] for r in read_log(tmp_path) if r["kind"] == "step"] == list(range(1, 9))


def test_a_run_folder_is_not_used_twice(tmp_path, uninterrupted):
    with pytest.raises(RunFolderError) as error:
        train(TINY, uninterrupted)
    assert str(error.value) == (
        f"{uninterrupted} already holds a run\n"
        "  need:  a folder for each run\n"
        "  fix:   --resume to continue it, --run-dir FOLDER to start another"
    )
    with pytest.raises(RunFolderError) as error:
        train(dataclasses.replace(TINY, resume=True), tmp_path / "none")
    assert str(error.value) == (
        f"{tmp_path / 'none'} holds no run to continue\n"
        "  given: a folder that does not exist\n"
        "  need:  the folder of a run that was stopped\n"
        "  fix:   --run-dir FOLDER, or leave out --resume to start one here"
    )


def test_a_run_is_not_continued_with_other_numbers(uninterrupted):
    with pytest.raises(CheckpointError) as error:
        train(dataclasses.replace(TINY, resume=True, lr=1.0, epochs=3), uninterrupted)
    assert str(error.value) == (
        f"the run of {uninterrupted} has other settings\n"
        "  given: epochs=3, lr=1.0\n"
        "  need:  epochs=2, lr=0.002\n"
        "  fix:   continue with the run's own settings, or start a new run: --run-dir FOLDER"
    )


class Interrupted(Exception):
    """Stands for a kill in the middle of a write."""


def test_a_write_that_is_cut_short_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.pt"
    with checkpoint.atomically(path) as partial:
        partial.write_bytes(b"old")
    with pytest.raises(Interrupted), checkpoint.atomically(path) as partial:
        partial.write_bytes(b"ne")
        assert path.read_bytes() == b"old"
        raise Interrupted
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_last_k_are_kept(tmp_path):
    model = nn.Linear(2, 2)
    for step in (5, 10, 15, 20):
        state = {"step": step, "recipe": dataclasses.asdict(TINY)}
        checkpoint.save(tmp_path, state, {"": model, ".ema": model}, keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        f"step_000000{step}{suffix}" for step in (15, 20) for suffix in (".ema.safetensors", ".pt", ".safetensors")
    ]
    assert checkpoint.find(tmp_path).name == "step_00000020.pt"
    assert torch.equal(load_file(tmp_path / "step_00000020.safetensors")["weight"], model.weight)
    assert checkpoint.recipe_of(checkpoint.load(tmp_path / "step_00000020.pt")) == TINY


def test_every_random_state_comes_back(tmp_path):
    torch.save(checkpoint.random_states(), tmp_path / "states.pt")
    drawn = (torch.rand(3), random.random(), np.random.rand(), np.random.randn())
    checkpoint.restore_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    again = (torch.rand(3), random.random(), np.random.rand(), np.random.randn())
    assert torch.equal(drawn[0], again[0]) and drawn[1:] == again[1:]


def test_damaged_and_foreign_files_are_refused(tmp_path):
    damaged = tmp_path / "step_00000001.pt"
    checkpoint.save(tmp_path, {"step": 1, "recipe": dataclasses.asdict(TINY)}, {"": nn.Linear(2, 2)}, keep=1)
    damaged.write_bytes(damaged.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"step_00000001\.pt cannot be read as a checkpoint\n  given: "):
        checkpoint.load(damaged)

    class Dangerous:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    damaged.write_bytes(pickle.dumps({"recipe": Dangerous()}))
    with pytest.raises(CheckpointError):
        checkpoint.load(damaged)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(CheckpointError) as error:
        checkpoint.find(tmp_path / "absent")
    assert str(error.value) == (
        f"there is no checkpoint at {tmp_path / 'absent'}\n"
        "  given: a path that does not exist\n"
        "  need:  a run folder, or a file step_*.pt of its checkpoints"
    )


def test_settings_that_carry_a_run_out_exist():
    from nestloop.models.recipe import CARRIED_OUT

    assert set(CARRIED_OUT) < {field.name for field in dataclasses.fields(Recipe)}


def classes_of(folder: Path, *names: str, images: int = 8) -> str:
    """A class folder for each name, of one shade."""
    for shade, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index in range(images):
            Image.new("L", (8, 8), 40 * shade + index).save(folder / name / f"{index}.png")
    return str(folder)


@pytest.fixture(scope="module")
def shades(tmp_path_factory) -> tuple[Path, Recipe]:
    """A run on three classes of shades."""
    root = tmp_path_factory.mktemp("shades")
    data = classes_of(root / "data", "a", "b", "c")
    small: Any = {"mixer": None, "ema": 0.0, "mixup": 0.0, "batch": 8, "checkpoint_every": 0, "epochs": 30, "lr": 0.01}
    recipe = dataclasses.replace(TINY, data=data, channels=1, holdout=0.25, workers=0, crop="none", flip=False, **small)
    train(recipe, root / "run")
    return root / "run", recipe


def test_classes_are_told_by_name(shades, tmp_path):
    run_dir, _ = shades

    def top1(data: str) -> float:
        return evaluate.run(evaluate.EvalOptions(str(run_dir), data=data, workers=0, device="cpu"))["top1"]

    some = tmp_path / "some"
    for name in ("a", "c"):
        shutil.copytree(Path(shades[1].data) / name, some / name)
    assert top1(shades[1].data) == top1(str(some)) == 1.0  # c is the second class there, the third of the run
    with pytest.raises(CheckpointError, match="given: classes that it does not know: x, y"):
        top1(classes_of(tmp_path / "renamed", "a", "x", "y"))


def test_a_run_goes_on_with_its_own_data_alone(shades, tmp_path):
    run_dir, recipe = shades
    again = dataclasses.replace(recipe, resume=True)
    for data, message in (
        (classes_of(tmp_path / "renamed", "a", "b", "x"), "has other classes\n  given: 3 classes: a, b, x\n"),
        (classes_of(tmp_path / "more", "a", "b", "c", images=16), "has another number of images\n  given: 36 images"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train(dataclasses.replace(again, data=data), run_dir)


def test_with_mixup_a_run_keeps_its_micro_batches(uninterrupted):
    with pytest.raises(CheckpointError, match="given: accumulate=359"):
        train(dataclasses.replace(TINY, resume=True, accumulate=359), uninterrupted)


def test_damaged_bytes_and_other_versions_are_refused(tmp_path):
    path = checkpoint.save(tmp_path, {"step": 1, "recipe": dataclasses.asdict(TINY)}, {"": nn.Linear(2, 2)}, keep=1)
    for content in (b"\x80" + bytes(range(256)) * 4, b"", b"nonsense"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
            checkpoint.load(path)
    for state in ({"recipe": dataclasses.asdict(TINY)}, {"recipe": 3, "step": 1}, [1]):
        torch.save(state, path)
        with pytest.raises(CheckpointError, match="is no checkpoint of a run"):
            checkpoint.load(path)
    with pytest.raises(CheckpointError, match="another version of nestloop\n  given: settings depth_of_field"):
        checkpoint.recipe_of({"recipe": {**dataclasses.asdict(TINY), "depth_of_field": 3}})
    with pytest.raises(CheckpointError, match="are not those of its recipe's model"):
        checkpoint.load_weights(nn.Linear(2, 2), nn.Linear(3, 2).state_dict(), path)


def test_weights_are_as_open_as_other_files_and_none_is_left_over(tmp_path):
    before = os.umask(0o022)
    try:
        (tmp_path / "step_00000001.safetensors").write_bytes(b"of a save that was cut short")
        state = {"step": 5, "recipe": dataclasses.asdict(TINY)}
        checkpoint.save(tmp_path, state, {"": nn.Linear(2, 2)}, keep=1)
    finally:
        os.umask(before)
    assert {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {
        "step_00000005.pt": 0o644,
        "step_00000005.safetensors": 0o644,
    }
