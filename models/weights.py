"""A model's weights as one safetensors file, in and out, names and shapes strict."""

from __future__ import annotations

from pathlib import Path

import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nestloop import errors


def save_safetensors(model: nn.Module, path: str | Path) -> None:
    """Write `model.state_dict()` to `path`."""
    # contiguous copies: safetensors refuses views and storage that two names share
    state = {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(state, str(path), metadata={"format": "pt"})


def load_safetensors(model: nn.Module, path: str | Path) -> None:
    """Read `path` into `model`, on the model's own device and in its own dtypes.

    Raises:
        WeightsMismatchError: the file's names or shapes are not the model's, each one named; or the file is
            not a whole safetensors file. The model is then unchanged.
    """
    try:
        given = load_file(str(path))
    except SafetensorError as problem:
        raise errors.WeightsMismatchError(
            f"{path} cannot be read as safetensors",
            given=str(problem),
            need="a whole file written by nestloop.models.save_safetensors",
            fix="copy the file again: it is truncated, or of another format",
        ) from problem
    needed = model.state_dict()
    mismatches = [
        f"{name}: {_shape(given.get(name))} in the file, {_shape(needed.get(name))} in the model"
        for name in sorted(needed.keys() | given.keys())
        if _shape(given.get(name)) != _shape(needed.get(name))
    ]
    if mismatches:
        raise errors.WeightsMismatchError(
            f"the weights in {path} are not those of this {type(model).__name__}",
            given="\n         ".join(mismatches),
            need="the same names and shapes",
            fix="create the model with the arguments it was saved with: mixer, width, depth, heads, "
            "num_classes, patch_size, channels",
        )
    model.load_state_dict(given)


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(list(tensor.shape))
