"""What each setting of a recipe may be: one table, read before anything of a run is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from nestloop.models.errors import RecipeError

Need = tuple[Callable[[Any], bool], str]

_SOME: Need = (lambda v: v >= 1, "1 or more")
_ANY: Need = (lambda v: v >= 0, "0 or more")
_POSITIVE: Need = (lambda v: 0 < v < math.inf, "a number above 0")
_SHARE: Need = (lambda v: 0 <= v < 1, "0 or more, and below 1")
_FINITE: Need = (lambda v: 0 <= v < math.inf, "a number, 0 or more")

NEEDS: Mapping[str, Need] = {
    **dict.fromkeys(("width", "depth", "heads", "patch_size", "max_steps"), _SOME),
    **dict.fromkeys(("image_size", "eval_resize", "epochs", "batch", "accumulate", "eval_batch", "keep"), _SOME),
    "log_every": _SOME,
    **dict.fromkeys(("workers", "warmup_steps", "checkpoint_every", "seed"), _ANY),
    **dict.fromkeys(("view_gain", "lr", "std"), _POSITIVE),
    **dict.fromkeys(("weight_decay", "clip", "mixup"), _FINITE),
    **dict.fromkeys(("ema", "label_smoothing"), _SHARE),
    "channels": (lambda v: v in (1, 3), "1 or 3"),
    "mean": (math.isfinite, "a number"),
    "betas": (lambda v: all(0 <= beta < 1 for beta in v), "two numbers, 0 or more, and below 1"),
    "holdout": (lambda v: 0 < v < 1, "a share, between 0 and 1"),
    "max_unreadable": (lambda v: 0 <= v <= 1, "a share, 0 to 1"),
    "randaugment": (lambda v: v[0] >= 1 and 0 <= v[1] <= 10, "1 or more ops, of a magnitude of 0 to 10"),
}


def check(settings: Mapping[str, Any]) -> None:
    """Raise `RecipeError` for a setting that is out of its range; those that are None are not set."""
    for name, (holds, need) in NEEDS.items():
        value = settings.get(name)
        if value is not None and not holds(value):
            option = f"--{name.replace('_', '-')}"
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            raise RecipeError(f"{option} cannot be {shown}", given=f"{option} {shown}", need=need)
    if settings.get("image_size", 0) > settings.get("eval_resize", math.inf):
        size, resize = settings["image_size"], settings["eval_resize"]
        raise RecipeError(
            "images would be evaluated with black margins",
            given=f"--image-size {size} --eval-resize {resize}",
            need="a shorter side, before the centre is cut out, of --image-size at least",
            fix=f"--eval-resize {round(size * 256 / 224)}",
        )
    if settings.get("randaugment") is not None and settings.get("data") == "digits":
        raise RecipeError(
            "RandAugment takes colour images of 8 bits",
            given="--randaugment with the digits",
            need="another data set, or no --randaugment",
        )
