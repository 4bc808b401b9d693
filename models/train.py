"""Training: `nestloop train RECIPE [--key value ...]`, or under torchrun

    torchrun --nproc-per-node 8 -m nestloop train imagenet-patch --data PATH

`train` is the whole run from top to bottom; each part it uses is in a file of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from torch import Tensor, nn

from nestloop.models import checkpoint, recipes
from nestloop.models.data import (
    Batch,
    EvalOrder,
    ImageDataset,
    TrainOrder,
    UnreadableImages,
    batch_loader,
    check_classes,
    open_source,
)
from nestloop.models.data.mixup import Targets, mixup
from nestloop.models.data.sources import Split
from nestloop.models.distributed import Ranks, join
from nestloop.models.errors import NonFiniteError, RunFolderError
from nestloop.models.evaluate import evaluate
from nestloop.models.learned import Learned
from nestloop.models.logbook import Logbook
from nestloop.models.nonfinite import first_nonfinite_gradient, first_nonfinite_layer, tensors
from nestloop.models.recipe import Recipe
from nestloop.models.seeding import Purpose, derive_seed
from nestloop.models.vit import ViT

SPLITS: tuple[Split, Split] = ("train", "val")


@dataclass(frozen=True)
class Run:
    """A finished run: its model, its folder, and the records of its log (on the main process)."""

    model: ViT
    run_dir: Path
    records: list[dict[str, Any]]


def train(recipe: Recipe, run_dir: Path, console: Console | None = None) -> Run:
    """Trains as the recipe says; writes config.json, log.jsonl and checkpoints/ into `run_dir`.

    Raises:
        TrainingError: a subclass for each thing that can be wrong with the data, the settings, the run folder
            or the numbers; the message says what to do.
    """
    with join(recipe.device) as ranks:
        return train_on(ranks, recipe, run_dir, console)


def train_on(ranks: Ranks, recipe: Recipe, run_dir: Path, console: Console | None) -> Run:
    """`train`, as one of the processes that `join` connected; what it wraps does not outlive it."""
    with contextlib.ExitStack() as stack:
        # Data: the order and every random choice depend on (seed, epoch, step, image) alone.
        sources = {split: open_source(recipe.data, split, recipe.holdout) for split in SPLITS}
        check_classes(sources["train"], sources["val"])
        unreadable = {s: UnreadableImages(s, len(sources[s]), recipe.max_unreadable) for s in SPLITS}
        order = TrainOrder(len(sources["train"]), recipe.batch, ranks.rank, ranks.world, recipe.accumulate, recipe.seed)
        eval_order = EvalOrder(len(sources["val"]), recipe.eval_batch, ranks.rank, ranks.world)
        images = ImageDataset(sources["train"], recipe.train_transform(), recipe.seed)
        eval_images = ImageDataset(sources["val"], recipe.eval_transform())
        on_gpu = ranks.device.type == "cuda"
        loader = batch_loader(images, order, recipe.image_shape, recipe.workers, on_gpu)
        eval_loader = batch_loader(eval_images, eval_order, recipe.image_shape, recipe.workers, on_gpu)
        steps_per_epoch = order.steps_per_epoch
        total_steps = steps_per_epoch * recipe.epochs
        last_step = min(total_steps, recipe.max_steps or total_steps)

        # Model and optimizer.
        torch.manual_seed(derive_seed(recipe.seed, Purpose.INIT))
        learned = Learned(recipe.create_model(len(sources["train"].classes)).to(ranks.device), recipe, total_steps)
        model, parallel = learned.model, ranks.wrap(learned.model)

        # Position: the start, or the last checkpoint of the run folder.
        step = 0
        state = continued_state(run_dir, recipe) if recipe.resume else None
        if state is not None:
            train_images = sources["train"]
            checkpoint.check_same_data(state, train_images.classes, len(train_images), run_dir)
            learned.load(state, run_dir)
            checkpoint.restore_random_states(state["random"])
            for split, found in state["unreadable"].items():
                unreadable[split].add((index, name, reason) for index, (name, reason) in found.items())
            step = state["step"]
        elif ranks.is_main and not recipe.resume:
            start_run_folder(run_dir, recipe)
        ranks.barrier()
        log = Logbook(run_dir, ranks.is_main, last_step, step, recipe.tensorboard, console)
        stack.callback(log.close)
        note_long_warmup(log, recipe, step, total_steps)

        def full_state() -> dict[str, Any]:
            return {
                "step": step,
                "recipe": dataclasses.asdict(recipe),
                "classes": list(sources["train"].classes),
                "images": len(sources["train"]),
                **learned.state(),
                "random": checkpoint.random_states(),
                "unreadable": {split: images.found for split, images in unreadable.items()},
            }

        def save_checkpoint() -> None:
            if ranks.is_main:
                checkpoint.save(run_dir / "checkpoints", full_state(), learned.models(), recipe.keep)
            ranks.barrier()

        while step < last_step:
            epoch, epoch_start, meter = step // steps_per_epoch, time.perf_counter(), Meter()
            order.start_at(epoch, step % steps_per_epoch)
            model.train()
            for batches in meter.waiting_for(groups(loader, recipe.accumulate)):
                log_now = (step + 1) % recipe.log_every == 0 or step + 1 == last_step

                # Which images of the global batch are readable, and did the run meet too many that are not?
                failures = [failure for batch in batches for failure in batch.unreadable]
                counts = torch.tensor([sum(int(batch.valid.sum()) for batch in batches), len(failures)])
                readable, failed = ranks.sum(counts).tolist()
                if failed:
                    for line in unreadable["train"].add(ranks.gather(failures)):
                        log.record("unreadable", step, line, image=line)

                # Gradients of the mean loss over the readable images of the global batch.
                figures = backward(parallel, batches, recipe, step, ranks, readable, inner_losses=log_now)
                norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
                if not (math.isfinite(figures["loss"]) and math.isfinite(norm)):
                    where = nonfinite_origin(model, batches, recipe, step, ranks.device)
                    dump = run_dir / f"nonfinite_step_{step + 1:08d}_rank_{ranks.rank}.pt"
                    with checkpoint.atomically(dump) as partial:
                        torch.save({**full_state(), "batches": [tuple(batch) for batch in batches]}, partial)
                    log.record("nonfinite", step, loss=str(figures["loss"]), norm=str(norm.item()), where=where)
                    raise nonfinite(step, figures["loss"], norm.item(), where, dump)
                if recipe.clip:
                    torch.nn.utils.clip_grads_with_norm_(model.parameters(), recipe.clip, norm)
                learning_rate = learned.step()
                step += 1

                meter.count(readable, figures["loss"])
                log.advance(step, epoch, recipe.epochs)
                if log_now:
                    figures |= {**meter.read(), "lr": learning_rate, "gradient_norm": norm.item()}
                    log.record("step", step, step_line(step, total_steps, figures), epoch=epoch, **figures)
                if step == last_step:
                    break
                if recipe.checkpoint_every and step % recipe.checkpoint_every == 0 and step % steps_per_epoch:
                    save_checkpoint()  # at the end of an epoch it waits for the evaluation

            seconds = time.perf_counter() - epoch_start
            figures = evaluate(learned.evaluated, eval_loader, ranks, unreadable["val"], bf16=recipe.bf16)
            line = (
                f"epoch {epoch + 1}/{recipe.epochs}  accuracy {figures['top1']:.2%}  "
                f"top-5 {figures['top5']:.2%}  loss {figures['loss']:.4f}  ({seconds:.1f} s)"
            )
            log.record("eval", step, line, epoch=epoch, seconds=seconds, **figures)
            save_checkpoint()
        return Run(model, run_dir, log.records)


def note_long_warmup(log: Logbook, recipe: Recipe, step: int, total_steps: int) -> None:
    """Says so where the run ends before the learning rate is at its peak."""
    if recipe.warmup_steps >= total_steps:
        share = total_steps / recipe.warmup_steps
        note = (
            f"the run ends in its warm-up, at {share:.2g} of the peak learning rate: it has "
            f"{total_steps} steps, --warmup-steps is {recipe.warmup_steps}"
        )
        log.record("note", step, note, warmup_share=share)


def backward(
    parallel: nn.Module,
    batches: list[Batch],
    recipe: Recipe,
    step: int,
    ranks: Ranks,
    readable: int,
    inner_losses: bool,
) -> dict[str, float]:
    """Adds up the gradients of one step over its micro-batches and processes.

    Every image counts 1 / readable, wherever it lies: the gradient is that of the mean over the global batch.
    Returns that mean as "loss"; if asked also the first and last inner loss, mean over images, heads, blocks.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=ranks.device)  # loss, first and last inner loss
    has_inner = False
    for part, batch in enumerate(batches):
        images, targets = prepare(batch, recipe, step, ranks.device)
        last = part + 1 == len(batches)
        with (
            contextlib.nullcontext() if last or ranks.world == 1 else parallel.no_sync(),  # type: ignore[operator]
            torch.autocast(ranks.device.type, torch.bfloat16, enabled=recipe.bf16),
        ):
            output = parallel(images, return_losses=inner_losses)
            logits, inner = output if inner_losses else (output, None)
            losses = targets.loss(logits.float(), recipe.label_smoothing)  # [B], 0 where unreadable
            # DDP takes the mean over processes, so each multiplies by their number
            (losses.sum() * (ranks.world / max(readable, 1))).backward()
        totals[0] += losses.detach().sum()
        if blocks := tensors(inner):  # [B, H, T+1] each
            has_inner = True
            for place, end in ((1, 0), (2, -1)):
                per_image = torch.stack([block.detach()[:, :, end].mean(1) for block in blocks]).mean(0)
                totals[place] += torch.where(targets.valid, per_image, 0.0).sum()
    loss, first, last_inner = (ranks.sum(totals) / max(readable, 1)).tolist()
    return {"loss": loss, "inner_first": first, "inner_last": last_inner} if has_inner else {"loss": loss}


def prepare(batch: Batch, recipe: Recipe, step: int, device: torch.device) -> tuple[Tensor, Targets]:
    """A micro-batch on the device, mixed up, and the model's random numbers at the start of the step.

    Every process and micro-batch of a step draws the same token orders for its shuffled loops.
    """
    mixed = mixup(batch.to(device), recipe.mixup, derive_seed(recipe.seed, Purpose.MIXUP, step))
    torch.manual_seed(derive_seed(recipe.seed, Purpose.MODEL, step))
    return mixed


def groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """The micro-batches of one step after another."""
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, size)):
        yield group


def nonfinite_origin(model: ViT, batches: list[Batch], recipe: Recipe, step: int, device: torch.device) -> str:
    """Runs the step's forward again, as it was, and names what first gave a number that is not finite."""
    for batch in batches:
        images, _ = prepare(batch, recipe, step, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
            if found := first_nonfinite_layer(model, images):
                return found
    return first_nonfinite_gradient(model) or "the loss itself: every layer and gradient here is finite"


def nonfinite(step: int, loss: float, norm: float, where: str, dump: Path) -> NonFiniteError:
    """The refusal to take such a step."""
    return NonFiniteError(
        f"step {step + 1} gave loss {loss} and a gradient of norm {norm}",
        given=f"first in {where}",
        need="finite numbers; the weights were not updated",
        fix=f"batch and state are in {dump}; a lower --lr or more --warmup-steps often helps",
    )


def step_line(step: int, total_steps: int, figures: dict[str, float]) -> str:
    """What people see of a step."""
    line = (
        f"step {step}/{total_steps}  loss {figures['loss']:.4f}  "
        f"{figures['images_per_second']:.0f} images/s  waiting for data {figures['data_wait']:.0%}"
    )
    if "inner_first" in figures:
        line += f"  inner loss {figures['inner_first']:.4g} -> {figures['inner_last']:.4g}"
    return line


class Meter:
    """Loss, images a second and the share of time spent waiting for data, since the last reading."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._waited = self._loss = 0.0
        self._images = self._steps = 0

    def waiting_for(self, batches: Iterable[list[Batch]]) -> Iterator[list[Batch]]:
        """The same batches; the time until each is there counts as waiting."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def count(self, images: int, loss: float) -> None:
        """Counts one step."""
        self._images, self._steps, self._loss = self._images + images, self._steps + 1, self._loss + loss

    def read(self) -> dict[str, float]:
        """The figures since the last reading, which start over."""
        seconds = time.perf_counter() - self._start
        figures = {
            "loss": self._loss / self._steps,
            "images_per_second": self._images / seconds,
            "data_wait": self._waited / seconds,
        }
        Meter.__init__(self)
        return figures


def start_run_folder(run_dir: Path, recipe: Recipe) -> None:
    """Creates the folder with config.json.

    Raises:
        RunFolderError: it already holds a run.
    """
    if (run_dir / "config.json").exists():
        raise RunFolderError(
            f"{run_dir} already holds a run",
            need="a folder for each run",
            fix="--resume to continue it, --run-dir FOLDER to start another",
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    config = {
        "recipe": dataclasses.asdict(recipe),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    with checkpoint.atomically(run_dir / "config.json") as partial:
        partial.write_text(json.dumps(config, indent=2) + "\n")


def continued_state(run_dir: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The last checkpoint of a run folder; None where the run was stopped before its first, and starts over.

    Raises:
        RunFolderError: the folder holds no run.
        CheckpointError: the run has other settings, or the checkpoint is damaged.
    """
    config = run_dir / "config.json"
    if not config.exists():
        raise RunFolderError(
            f"{run_dir} holds no run to continue",
            given="a folder without config.json" if run_dir.is_dir() else "a folder that does not exist",
            need="the folder of a run that was stopped",
            fix="--run-dir FOLDER, or leave out --resume to start one here",
        )
    try:
        written = json.loads(config.read_text())
    except ValueError:
        written = None
    if not isinstance(written, dict) or not isinstance(written.get("recipe"), dict):
        raise checkpoint.CheckpointError(
            f"{config} is damaged", need="the settings that the run began with", fix="start a new run: --run-dir FOLDER"
        )
    checkpoint.check_same_run(written, recipe, run_dir)
    return checkpoint.load(checkpoint.find(run_dir)) if checkpoint.all_checkpoints(run_dir / "checkpoints") else None


def main(name: str, argv: list[str]) -> int:
    """`nestloop train NAME ARGV`: a recipe by name or file, any of its settings replaced; returns 0.

    Raises:
        TrainingError: as `train`, or the recipe does not exist.
    """
    stem, recipe, description = recipes.load(name)
    recipe = tyro.cli(Recipe, default=recipe, args=argv, prog=f"nestloop train {name}", description=description)
    run = train(recipe, Path(recipe.run_dir or f"runs/{stem}"))
    if run.records:  # the main process alone
        print(f"log and checkpoints are in {run.run_dir}")
    return 0
