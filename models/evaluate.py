"""Evaluation: every image of the val split once, over all processes together. `nestloop eval CHECKPOINT`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import nn

from nestloop.models import checkpoint, settings
from nestloop.models.data import Batch, EvalOrder, ImageDataset, UnreadableImages, batch_loader, open_source
from nestloop.models.distributed import Ranks, join, own_rank
from nestloop.models.errors import CheckpointError


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    ranks: Ranks,
    unreadable: UnreadableImages,
    *,
    bf16: bool = False,
) -> dict[str, float]:
    """Accuracy (top1, top5), mean cross-entropy (loss) and number of readable images over all processes.

    `batches` are this process's share. Leaves the model in evaluation mode.
    """
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64)  # loss, right, right among the first five, images
    failures = []
    with torch.no_grad():
        for batch in batches:
            failures += batch.unreadable
            images, labels, valid, _ = batch.to(ranks.device)
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16):
                logits = model(images).float()
            losses = F.cross_entropy(logits, labels, reduction="none")
            first = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            counts = torch.stack([losses, first[:, 0], first.any(1), torch.ones_like(losses)]).double()
            totals += counts[:, valid].sum(1).cpu()
    unreadable.add(ranks.gather(failures))
    loss, top1, top5, images_seen = ranks.sum(totals).tolist()
    seen = max(images_seen, 1)
    return {"top1": top1 / seen, "top5": top5 / seen, "loss": loss / seen, "images": int(images_seen)}


@dataclass(frozen=True)
class EvalOptions:
    """Evaluates a checkpoint on the val split of its data set."""

    checkpoint: tyro.conf.Positional[str]
    """A run folder (its last checkpoint), or a file step_*.pt."""
    data: str | None = None
    """Another place of the data set than the recipe's."""
    weights: Literal["auto", "trained", "ema"] = "auto"
    """auto is the average (ema) where the run kept one."""
    eval_batch: int = 256
    """Images of one batch."""
    workers: int = 2
    """Decoding processes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is one."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object."""


def run(options: EvalOptions) -> dict[str, float]:
    """What `nestloop eval` computes: the figures of `evaluate` for a checkpoint."""
    path = checkpoint.find(options.checkpoint)
    state = checkpoint.load(path)
    recipe = checkpoint.recipe_of(state)
    settings.check({"eval_batch": options.eval_batch, "workers": options.workers})
    if options.weights == "ema" and state["ema"] is None:
        raise CheckpointError(f"{path} holds no average of the weights", given="--weights ema", need="a run with --ema")
    with join(options.device) as ranks:
        source = open_source(options.data or recipe.data, "val", recipe.holdout)
        unknown = [name for name in source.classes if name not in state["classes"]]
        if unknown:
            raise CheckpointError(
                f"{path} was trained on other classes",
                given=f"classes that it does not know: {', '.join(unknown[:8])}",
                need=f"some of its {len(state['classes'])}, by name: {', '.join(state['classes'][:8])}",
                fix="--data PATH",
            )
        numbers = [state["classes"].index(name) for name in source.classes]
        model = recipe.create_model(len(state["classes"])).to(ranks.device)
        weights = state["model"]
        if state["ema"] is not None and options.weights != "trained":
            prefix = "module."
            weights = {name[len(prefix) :]: w for name, w in state["ema"].items() if name.startswith(prefix)}
        checkpoint.load_weights(model, weights, path)
        order = EvalOrder(len(source), options.eval_batch, rank=ranks.rank, world=ranks.world)
        images = ImageDataset(source, recipe.eval_transform(), numbers=numbers)
        batches = batch_loader(images, order, recipe.image_shape, options.workers)
        unreadable = UnreadableImages("val", len(source), recipe.max_unreadable)
        return evaluate(model, batches, ranks, unreadable, bf16=recipe.bf16)


def main(argv: list[str]) -> int:
    """`nestloop eval ARGV`; returns 0."""
    options = tyro.cli(EvalOptions, args=argv, prog="nestloop eval")
    figures = run(options)
    if own_rank():  # every process has them, the main one alone speaks
        return 0
    if options.as_json:
        print(json.dumps(figures))
    else:
        print(
            f"accuracy {figures['top1']:.2%}  top-5 {figures['top5']:.2%}  loss {figures['loss']:.4f}  "
            f"({figures['images']} images)"
        )
    return 0
