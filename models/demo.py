"""`nestloop demo` (make demo): four token mixers learn handwritten digits side by side, in minutes."""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from nestloop import inspection
from nestloop.errors import MissingPackageError
from nestloop.models.mixers import resolve
from nestloop.models.recipe import Recipe
from nestloop.models.recipes.digits import recipe as digits
from nestloop.models.train import Run, train
from nestloop.models.vit import ViT

# Equal models, data and epochs. Only the scale of MTTT-MLP's initial views differs: at 1 the part of its
# read-out that mixes tokens starts so small beside the rest that it learns slowly.
COMPARED: dict[str, dict[str, float]] = {
    "self_attention": {"view_gain": 1.0},
    "linear_attention": {"view_gain": 1.0},
    "mttt_linear": {"view_gain": 1.0},
    "mttt_mlp": {"view_gain": 2.0},
}
WHAT_IT_IS = (
    "Four vision transformers of equal width and depth, trained for equal epochs on 1,437 digits and tested "
    "on the 360 held out. It shows that each inner loop learns. It does not rank them: a test image is 0.28 "
    "points, another seed moves a result by up to 3, and the settings were chosen on the same images."
)


@dataclass(frozen=True)
class DemoOptions:
    """Trains self-attention, linear attention, MTTT-Linear and MTTT-MLP ViTs on digits and compares them."""

    epochs: int = digits.epochs
    """Passes over the digits, the same for every mixer."""
    run_dir: str = ""
    """Where to write; a folder under runs/demo named by the time where empty."""
    seed: int = 0
    """Seed of every random choice."""


def main(argv: list[str]) -> int:
    """`nestloop demo ARGV`; returns 0."""
    options = tyro.cli(DemoOptions, args=argv, prog="nestloop demo")
    folder = Path(options.run_dir or f"runs/demo/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(WHAT_IT_IS + "\n")
    started = time.perf_counter()
    runs: dict[str, Run] = {}
    for mixer, settings in COMPARED.items():
        console.print(f"training {mixer}")
        common: dict[str, Any] = {"mixer": mixer, "epochs": options.epochs, "seed": options.seed, "log_every": 44}
        recipe = dataclasses.replace(digits, **{**common, **settings})
        runs[mixer] = train(recipe, folder / mixer, console)

    console.print(comparison(runs))
    picture, stages = folder / "curves.png", folder / "mttt_mlp_stages.txt"
    draw(runs, picture)
    stages.write_text(lowered_stages(digits), encoding="utf-8")
    console.print(
        f"\n{time.perf_counter() - started:.0f} s in all\n"
        f"learning curves and inner losses  {picture}\n"
        f"MTTT-MLP, stage by stage          {stages}\n"
        f"logs and checkpoints              {folder}/MIXER",
        markup=False,
    )
    return 0


def flops_per_image(model: ViT, image_shape: tuple[int, int, int]) -> int:
    """Floating-point operations of one image's forward pass, a multiply and an add counted as two."""
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *image_shape, device=device))
    return counter.get_total_flops()


def comparison(runs: dict[str, Run]) -> Table:
    """One row a mixer: held-out accuracy after the last epoch, parameters, FLOPs, median seconds an epoch."""
    table = Table()
    table.add_column("mixer", no_wrap=True)
    for heading in ("held out", "parameters", "MFLOP/image", "s/epoch"):
        table.add_column(heading, justify="right")
    for mixer, run in runs.items():
        evaluations = [record for record in run.records if record["kind"] == "eval"]
        table.add_row(
            mixer,
            f"{evaluations[-1]['top1']:.2%}",
            f"{sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad):,}",
            f"{flops_per_image(run.model, digits.image_shape) / 1e6:.2f}",
            f"{statistics.median(record['seconds'] for record in evaluations):.2f}",
        )
    return table


def draw(runs: dict[str, Run], path: Path) -> None:
    """Accuracy and training loss over epochs above, the inner losses before and after learning below."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            "the demo's picture needs matplotlib",
            given="an environment without matplotlib",
            need="matplotlib",
            fix="pip install matplotlib -c constraints.txt",
        ) from error
    inner = {mixer: [r for r in run.records if "inner_first" in r] for mixer, run in runs.items()}
    inner = {mixer: records for mixer, records in inner.items() if records}
    figure = Figure(figsize=(12, 7), layout="constrained")
    outer_row, inner_row = figure.subfigures(2, 1, squeeze=False)[:, 0]
    accuracy, loss = outer_row.subplots(1, 2)
    for mixer, run in runs.items():
        evaluations = [record for record in run.records if record["kind"] == "eval"]
        accuracy.plot([r["epoch"] + 1 for r in evaluations], [100 * r["top1"] for r in evaluations], label=mixer)
        steps = [record for record in run.records if record["kind"] == "step"]
        loss.plot([r["step"] for r in steps], [r["loss"] for r in steps], label=mixer)
    accuracy.set(xlabel="epoch", ylabel="held-out accuracy (%)", title="accuracy")
    loss.set(xlabel="step", ylabel="cross-entropy", title="training loss")
    accuracy.legend()
    inner_row.suptitle("inner loss, mean over blocks and heads")
    axes = inner_row.subplots(1, len(inner), squeeze=False)[0]
    for axis, (mixer, records) in zip(axes, inner.items(), strict=True):
        steps = [record["step"] for record in records]
        axis.plot(steps, [record["inner_first"] for record in records], label="before the inner loop")
        axis.plot(steps, [record["inner_last"] for record in records], label="after it")
        axis.set(xlabel="step", title=mixer)
    axes[0].legend()
    figure.savefig(path, dpi=120)


def lowered_stages(recipe: Recipe) -> str:
    """Every stage of MTTT-MLP's way to a kernel, at the sizes of the recipe."""
    assert recipe.width is not None and recipe.heads is not None
    sizes = {"D": recipe.width, "H": recipe.heads, "d": recipe.width // recipe.heads}
    return inspection.inspect_text(resolve("mttt_mlp"), None, {"B": recipe.batch, "N": recipe.image_size**2, **sizes})
