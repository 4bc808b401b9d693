"""Checkpoints: everything a run needs to go on as if it had never stopped, written so that a kill harms none.

RUN/checkpoints/step_00000440.pt             weights, optimizer, schedule, average, position, random states
RUN/checkpoints/step_00000440.safetensors    the weights alone, to share
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nestloop.models.errors import CheckpointError
from nestloop.models.recipe import CARRIED_OUT, Recipe
from nestloop.models.weights import save_safetensors


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Yields a path to write to; afterwards the whole of it is on disk under `path`, or nothing is."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)  # the new name itself
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def random_states() -> dict[str, Any]:
    """The states of torch's, Python's and numpy's global generators, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(keys.astype(np.int64)), *rest),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """The inverse of `random_states`; CUDA states are left alone where the number of devices differs."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def save(folder: Path, state: dict[str, Any], models: dict[str, nn.Module], keep: int) -> Path:
    """Writes the checkpoint of a step and the models' weights beside it; keeps the last `keep`.

    models: suffix of the file name -> model, "" for the trained weights, ".ema" for their average.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{state['step']:08d}.pt"
    for suffix, model in models.items():
        with atomically(path.with_suffix(f"{suffix}.safetensors")) as partial:
            save_safetensors(model, partial)
    with atomically(path) as partial:
        torch.save(state, partial)
    for old in all_checkpoints(folder)[:-keep]:
        for file in folder.glob(f"{old.stem}.*"):
            file.unlink()
    return path


def all_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a folder, oldest first."""
    return sorted(folder.glob("step_*.pt"))


def find(place: str | Path) -> Path:
    """The checkpoint that `place` names: itself, or the last one of a run folder.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        found = all_checkpoints(path / "checkpoints") or all_checkpoints(path)
        if found:
            return found[-1]
    elif path.is_file():
        return path
    raise CheckpointError(
        f"there is no checkpoint at {place}",
        given="a folder without checkpoints" if path.is_dir() else "a path that does not exist",
        need="a run folder, or a file step_*.pt of its checkpoints",
    )


def load(path: Path) -> dict[str, Any]:
    """The state of a checkpoint, on the CPU. Only tensors and plain values are read; no code runs.

    Raises:
        CheckpointError: the file is damaged or of another kind.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as problem:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint",
            given=str(problem).splitlines()[0] if str(problem) else type(problem).__name__,
            need="a file step_*.pt written by nestloop train",
            fix="remove it to continue from the checkpoint before it",
        ) from problem
    if not isinstance(state, dict) or "recipe" not in state:
        raise CheckpointError(
            f"{path} is no checkpoint of a run",
            given=type(state).__name__,
            need="a file written by nestloop train",
        )
    return state


def recipe_of(state: dict[str, Any], **changes: Any) -> Recipe:
    """The recipe a checkpoint was trained with, with changes."""
    stored = {name: tuple(value) if isinstance(value, list) else value for name, value in state["recipe"].items()}
    return Recipe(**{**stored, **changes})


def check_same_run(state: dict[str, Any], recipe: Recipe, path: Path) -> None:
    """Raises CheckpointError where the recipe would continue the checkpoint's run with other numbers."""
    stored, asked = dataclasses.asdict(recipe_of(state)), dataclasses.asdict(recipe)
    changed = [name for name in asked if name not in CARRIED_OUT and stored[name] != asked[name]]
    if changed:
        raise CheckpointError(
            f"the run of {path} has other settings",
            given=", ".join(f"{name}={asked[name]}" for name in changed),
            need=", ".join(f"{name}={stored[name]}" for name in changed),
            fix="continue with the run's own settings, or start a new run: --run-dir FOLDER",
        )
