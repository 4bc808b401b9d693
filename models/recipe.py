"""What a training run is: every setting, typed, in one frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from nestloop.layer import Branch
from nestloop.models import settings
from nestloop.models.data.transforms import Crop, EvalTransform, TrainTransform
from nestloop.models.errors import RecipeError
from nestloop.models.registry import create
from nestloop.models.vit import ViT


@dataclass(frozen=True)
class Recipe:
    """A training run: first the settings that decide its numbers, last those of how it is carried out."""

    data: str
    """Data set: "digits", or a folder (Parquet files, train/CLASS and val/CLASS, or class folders)."""
    model: str
    """Name in the table of models, vit_SIZEPATCH_MIXER; the six settings after it replace parts of it."""
    mixer: str | None = None
    """Token mixer in place of the model's own."""
    width: int | None = None
    """Width of the tokens in place of the model's own."""
    depth: int | None = None
    """Number of blocks in place of the model's own."""
    heads: int | None = None
    """Number of heads in place of the model's own."""
    patch_size: int | None = None
    """Edge of a patch in pixels, in place of the model's own; 1 makes every pixel a token."""
    view_gain: float = 1.0
    """Factor on the initial weights of the views' projections."""

    image_size: int = 224
    """Edge of the images the model sees, in pixels."""
    channels: int = 3
    """3 for colour, 1 for grey."""
    mean: float = 0.5
    """Subtracted from pixel values in 0..1."""
    std: float = 0.5
    """Divides what is left."""
    crop: Crop = "inception"
    """Training window: whole image, random window of the padded image, or 5-100 % of the area resized."""
    flip: bool = True
    """Mirror half of the training images."""
    randaugment: tuple[int, int] | None = None
    """RandAugment's number of ops and magnitude (0-10)."""
    mixup: float = 0.0
    """Parameter of mixup's Beta distribution; 0 is off."""
    eval_resize: int = 256
    """Shorter side before the centre crop in evaluation, in pixels."""
    holdout: float = 0.2
    """Share of files held out for evaluation where a class folder has no splits."""

    epochs: int = 90
    """Passes over the train split."""
    batch: int = 1024
    """Images of one optimizer step, over all processes and micro-batches together."""
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    weight_decay: float = 1e-4
    """Share a matrix loses per step at peak, whatever the learning rate; scheduled like it."""
    warmup_steps: int = 10_000
    """Steps of linear warm-up; a cosine to 0 follows."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 is off."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""
    ema: float = 0.0
    """Decay per step of an average of the weights, evaluated in their place; 0 is off."""
    bf16: bool = False
    """Autocast to bfloat16; weights, fast weights and the optimizer stay float32."""
    seed: int = 0
    """Seed of every random choice."""

    accumulate: int = 1
    """Micro-batches of one step in each process."""
    workers: int = 8
    """Decoding processes of each process; 0 decodes in the training process."""
    backend: str = "auto"
    """How the mixers are compiled: auto, cpp, torch, triton or reference."""
    inductor: bool = False
    """torch.compile the mixers' generated code."""
    recompute: bool = False
    """Keep one activation a block for the backward and recompute the rest."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is one."""
    eval_batch: int = 256
    """Images of one evaluation batch in each process."""
    max_steps: int | None = None
    """Stop after this many steps of the schedule, for trials."""
    max_unreadable: float = 0.01
    """Share of unreadable images of a split above which the run stops."""
    run_dir: str = ""
    """Folder of the run; runs/RECIPE where empty."""
    resume: bool = False
    """Continue the run in the run folder from its last checkpoint."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 is once an epoch."""
    keep: int = 3
    """Number of checkpoints kept, the last ones."""
    log_every: int = 50
    """Steps between lines of the log."""
    tensorboard: bool = False
    """Also write the log for TensorBoard."""

    def __post_init__(self) -> None:
        """Raises `RecipeError` for a setting that is out of its range."""
        settings.check(vars(self))

    def create_model(self, num_classes: int) -> ViT:
        """The model, freshly initialised from torch's global random numbers."""
        if self.recompute and self.backend == "reference":
            raise RecipeError(
                "the reference backend takes gradients inside its forward, which cannot be recomputed",
                given="--recompute --backend reference",
                need="the torch backend, or no recomputation",
                fix="--backend torch, or --no-recompute",
            )
        chosen = {name: getattr(self, name) for name in ("mixer", "width", "depth", "heads", "patch_size")}
        model = create(
            self.model,
            num_classes=num_classes,
            image_size=self.image_size,
            channels=self.channels,
            backend=self.backend,
            inductor=self.inductor,
            checkpoint=self.recompute,
            **{name: value for name, value in chosen.items() if value is not None},
        )
        for branch in [module for module in model.modules() if isinstance(module, Branch)]:
            for name in branch.spec.views.keys() & branch.labels.keys():
                made = branch.views[branch.labels[name]]
                linear = [module for module in made.modules() if isinstance(module, nn.Linear)]
                for last in linear[-1:]:  # of a projection of low rank, once
                    last.weight.data.mul_(self.view_gain)
        return model

    def train_transform(self) -> TrainTransform:
        return TrainTransform(
            self.image_size, self.channels, self.crop, self.flip, self.randaugment, self.mean, self.std
        )

    def eval_transform(self) -> EvalTransform:
        return EvalTransform(self.image_size, self.eval_resize, self.channels, self.mean, self.std)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.channels, self.image_size, self.image_size)


# Settings that may differ between a run and its continuation: the recipe's numbers do not depend on them.
# (Another number of processes or micro-batches, device or compilation changes the last bits. With mixup, which blends
# images of one micro-batch, it changes more: `checkpoint.check_same_run` refuses other micro-batches then.)
CARRIED_OUT = (
    *(
        "data",
        "accumulate",
        "workers",
        "backend",
        "inductor",
        "recompute",
        "device",
        "eval_batch",
        "max_steps",
    ),
    *("max_unreadable", "run_dir", "resume", "checkpoint_every", "keep", "log_every", "tensorboard"),
)
