"""Models by name: vit_<size><patch>_<mixer>, for every size, patch and mixer of the tables."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

from nestloop import errors
from nestloop.models.mixers import MIXERS, unknown
from nestloop.models.torchvision_ops import define_missing_schemas
from nestloop.models.vit import SIZES, ViT

PATCHES = (16, 8, 1)  # 1: raw pixels, 224 x 224 = 50,176 tokens

MODELS: dict[str, dict[str, Any]] = {
    f"vit_{size}{patch}_{mixer}": {"mixer": mixer, "patch_size": patch, **shape}
    for size, shape in SIZES.items()
    for patch in PATCHES
    for mixer in MIXERS
}


def names(pattern: str = "") -> list[str]:
    """The names `create` knows, those that contain `pattern`."""
    return [name for name in MODELS if pattern in name]


def create(name: str, num_classes: int = 1000, **overrides: Any) -> ViT:
    """A new model of the table, freshly initialised; `overrides` replace any argument of `ViT`.

    Raises:
        UnknownModelError: no such name; the message gives the nearest ones.
        InputError: no such argument.
        ModelSizeError: a size that is no count, or sizes that do not fit each other.
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS, "models.names() lists them all")
    known = list(inspect.signature(ViT).parameters)
    for argument, value in overrides.items():
        if argument not in known:
            nearest = difflib.get_close_matches(argument, known, n=1)
            raise errors.InputError(
                f"a model takes no argument {argument!r}",
                given=f"{argument}={errors.shown(value)}",
                need="one of " + ", ".join(known),
                fix=f"did you mean {nearest[0]}?" if nearest else "leave it out",
            )
    return ViT(**{**MODELS[name], "num_classes": num_classes, **overrides})


def register_with_timm() -> list[str]:
    """Make every model available as timm.create_model("nestloop_<name>"); returns those names.

    timm's names of arguments (img_size, in_chans, embed_dim, num_heads) work there. Weights come from
    `checkpoint_path` or from `ViT.from_pretrained`: there are none under timm's names.

    Raises:
        MissingPackageError: timm is not installed.
    """
    if importlib.util.find_spec("timm") is None:
        raise errors.MissingPackageError(
            "registering the models with timm needs timm",
            given="an environment without timm",
            need="timm and the torchvision that matches torch",
            fix="pip install -c constraints.txt timm",
        )
    define_missing_schemas()
    from timm.models import is_model, register_model

    registered = [f"nestloop_{name}" for name in MODELS]
    for name in MODELS:
        if not is_model(f"nestloop_{name}"):
            register_model(_entrypoint(name))
    return registered


def _entrypoint(name: str) -> Callable[..., ViT]:
    """The function timm calls: its names of sizes become ours, its arguments about weights must be empty."""

    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **arguments: Any,
    ) -> ViT:
        if pretrained or pretrained_cfg or pretrained_cfg_overlay:
            raise errors.UnknownModelError(
                f"there are no pretrained weights for {name} under timm's names",
                given="pretrained=True, or a pretrained configuration",
                need="a model without pretrained weights, or weights from the Hugging Face Hub",
                fix='ViT.from_pretrained("owner/name")',
            )
        renamed = {TIMM_NAMES.get(key, key): value for key, value in arguments.items()}
        return create(name, **renamed)

    build.__name__ = build.__qualname__ = f"nestloop_{name}"
    return build


TIMM_NAMES = {"img_size": "image_size", "in_chans": "channels", "num_heads": "heads", "embed_dim": "width"}
