"""Checkpoints: everything a run needs to go on as if it had never stopped, written so that a kill harms none.

RUN/checkpoints/step_00000440.pt             weights, optimizer, schedule, average, position, random states
RUN/checkpoints/step_00000440.safetensors    the weights alone, to share
"""

from __future__ import annotations

import dataclasses
import os
import random
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from nestloop.models.errors import CheckpointError
from nestloop.models.recipe import CARRIED_OUT, Recipe
from nestloop.models.weights import save_safetensors


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Yields a path to write to; afterwards the whole of it is on disk under `path`, or nothing is."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.touch()
        mode = stat.S_IMODE(partial.stat().st_mode)
        yield partial
        partial.chmod(mode)  # as files of yours are; safetensors closes its own to others
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
    try:
        for suffix, model in models.items():
            with atomically(path.with_suffix(f"{suffix}.safetensors")) as partial:
                save_safetensors(model, partial)
        with atomically(path) as partial:
            torch.save(state, partial)
    except (RuntimeError, SafetensorError) as problem:  # what PyTorch makes of a full disk
        raise CheckpointError(
            f"{path} cannot be written",
            given=str(problem).splitlines()[0],
            need="room on the disk",
            fix=f"make room, and go on with --resume: the checkpoints in {folder} are whole",
        ) from problem
    kept = {file.stem for file in all_checkpoints(folder)[-keep:]}
    for file in folder.glob("step_*"):
        if file.name.partition(".")[0] not in kept:  # also of a checkpoint that was cut short
            file.unlink(missing_ok=True)
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
    except Exception as problem:  # of damaged bytes PyTorch makes errors of many kinds
        said = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        ours = path.name.startswith("step_")
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint",
            given="bytes that are none of tensors and plain values" if "weights_only" in said else said,
            need="a file step_*.pt written by nestloop train",
            fix="remove it, and what comes before it is the last" if ours else "name such a file, or a run's folder",
        ) from problem
    if not isinstance(state, dict) or not isinstance(state.get("recipe"), dict) or "step" not in state:
        raise CheckpointError(
            f"{path} is no checkpoint of a run",
            given=type(state).__name__,
            need="a file written by nestloop train",
        )
    return state


def recipe_of(state: dict[str, Any], **changes: Any) -> Recipe:
    """The recipe a checkpoint was trained with, with changes.

    Raises:
        CheckpointError: another version of nestloop wrote it, with other settings.
    """
    stored = {name: tuple(value) if isinstance(value, list) else value for name, value in state["recipe"].items()}
    known = [field.name for field in dataclasses.fields(Recipe)]
    unknown = sorted(stored.keys() - {*known})
    if unknown or not {"data", "model"} <= stored.keys():
        raise CheckpointError(
            "the recipe of this run is of another version of nestloop",
            given=f"settings {', '.join(unknown)}" if unknown else "no data or model",
            need=f"settings of this version: {', '.join(known)}",
        )
    return Recipe(**{**stored, **changes})


def check_same_data(state: dict[str, Any], classes: Sequence[str], images: int, path: Path) -> None:
    """Raises CheckpointError where a run would go on with other classes, or with epochs of other images."""
    kept = list(state["classes"])
    if kept != list(classes):
        raise CheckpointError(
            f"the run of {path} has other classes",
            given=_some(classes),
            need=_some(kept),
            fix="--data PATH of the data set that the run began with",
        )
    if state.get("images", images) != images:
        raise CheckpointError(
            f"the run of {path} has another number of images",
            given=f"{images} images in the train split",
            need=f"{state['images']}: the schedule and the order of images are theirs",
            fix="--data PATH of the data set that the run began with",
        )


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} classes: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"


def load_weights(model: nn.Module, weights: dict[str, Any], path: Path) -> None:
    """A checkpoint's weights into the model that its recipe makes. Raises CheckpointError where they are another's."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as problem:
        raise CheckpointError(
            f"the weights of {path} are not those of its recipe's model",
            given=" ".join(str(problem).split())[:300],
            need="the weights that the run has trained",
        ) from problem


def check_same_run(state: dict[str, Any], recipe: Recipe, path: Path) -> None:
    """Raises CheckpointError where the recipe would continue the checkpoint's run with other numbers."""
    stored, asked = dataclasses.asdict(recipe_of(state)), dataclasses.asdict(recipe)
    free = set(CARRIED_OUT) - ({"accumulate"} if recipe.mixup else set())
    changed = [name for name in asked if name not in free and stored[name] != asked[name]]
    if changed:
        raise CheckpointError(
            f"the run of {path} has other settings",
            given=", ".join(f"{name}={asked[name]}" for name in changed),
            need=", ".join(f"{name}={stored[name]}" for name in changed),
            fix="continue with the run's own settings, or start a new run: --run-dir FOLDER",
        )
