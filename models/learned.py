"""What a run of training changes, and how a checkpoint keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nestloop.models import checkpoint
from nestloop.models.optim import outer_optimizer, warmup_cosine
from nestloop.models.recipe import Recipe
from nestloop.models.vit import ViT


class Learned:
    """The model, its optimizer and schedule, and the mean of its weights where it keeps one.

    Attributes:
        evaluated: the model that accuracies are of: that of the mean, where there is one.
    """

    def __init__(self, model: ViT, recipe: Recipe, total_steps: int) -> None:
        self.model, self._optimizer = model, outer_optimizer(model, recipe)
        self._schedule = warmup_cosine(self._optimizer, recipe.warmup_steps, total_steps)
        self._ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema)) if recipe.ema else None
        self.evaluated: nn.Module = model if self._ema is None else self._ema.module

    def step(self) -> float:
        """Takes a step along the gradients, which are zero then. Returns its learning rate."""
        learning_rate = self._optimizer.param_groups[0]["lr"]
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._schedule.step()
        if self._ema is not None:
            self._ema.update_parameters(self.model)
        return learning_rate

    def models(self) -> dict[str, nn.Module]:
        """The models to be kept, by the ending of a checkpoint's name."""
        return {"": self.model} | ({} if self._ema is None else {".ema": self._ema.module})

    def state(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "ema": self._ema.state_dict() if self._ema is not None else None,
        }

    def load(self, state: dict[str, Any], run_dir: Path) -> None:
        """Goes on from a checkpoint of the run in `run_dir`."""
        checkpoint.load_weights(self.model, state["model"], run_dir)
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        if self._ema is not None:
            self._ema.load_state_dict(state["ema"])
