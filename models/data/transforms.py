"""From a decoded image to the tensor a model sees, with and without augmentation.

Random choices come from torch's default CPU generator, which the data set seeds for every image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nestloop.errors import MissingPackageError
from nestloop.models.torchvision_ops import define_missing_schemas

Crop = Literal["none", "pad", "inception"]


@dataclass(frozen=True)
class TrainTransform:
    """Crop, flip, RandAugment, normalise: image -> float32 [channels, size, size].

    crop: "none" resizes to the size; "pad" takes a random window of the image with an eighth of zeros added
        on each side; "inception" a random window of 5 to 100 % of the area (arXiv 1409.4842), resized.
    randaugment: (ops, magnitude out of 10), arXiv 1909.13719, or None.
    """

    size: int
    channels: int = 3
    crop: Crop = "inception"
    flip: bool = True
    randaugment: tuple[int, int] | None = None
    mean: float = 0.5
    std: float = 0.5

    def __post_init__(self) -> None:
        if self.randaugment is not None:  # an absent torchvision is reported here, not in a worker process
            torchvision_transforms("RandAugment")

    def __call__(self, image: Image.Image) -> Tensor:
        if self.crop == "inception":
            image = inception_crop(image, self.size)
        else:
            image = _resize(image, self.size, self.size)
            if self.crop == "pad":
                image = pad_crop(image, self.size, padding=self.size // 8)
        if self.flip and torch.rand(()) < 0.5:
            image = ImageOps.mirror(image)
        if self.randaugment is not None:
            ops, magnitude = self.randaugment
            # 11 bins make a magnitude of 10 the strongest, as in the paper; torchvision's default is 31
            image = torchvision_transforms("RandAugment").RandAugment(ops, magnitude, num_magnitude_bins=11)(image)
        return to_tensor(image, self.channels, self.mean, self.std)


@dataclass(frozen=True)
class EvalTransform:
    """Resize the shorter side, crop the centre, normalise: image -> float32 [channels, size, size]."""

    size: int
    resize: int
    channels: int = 3
    mean: float = 0.5
    std: float = 0.5

    def __call__(self, image: Image.Image) -> Tensor:
        scale = self.resize / min(image.size)
        width, height = (max(self.resize, round(edge * scale)) for edge in image.size)
        image = _resize(image, width, height)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        return to_tensor(image, self.channels, self.mean, self.std)


def torchvision_transforms(wanted_for: str) -> ModuleType:
    """`torchvision.transforms.v2`. Raises MissingPackageError, naming what wants it, where it is missing."""
    define_missing_schemas()
    try:
        import torchvision.transforms.v2 as transforms
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"{wanted_for} needs torchvision",
            given="an environment without torchvision",
            need="the torchvision that matches this torch (0.28.0 for torch 2.13)",
            fix="pip install torchvision -c constraints.txt, or train without it: --randaugment None",
        ) from error
    return transforms


def inception_crop(
    image: Image.Image,
    size: int,
    area: tuple[float, float] = (0.05, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    attempts: int = 10,
) -> Image.Image:
    """A random window of a random area share and aspect ratio, resized to size x size.

    A window that does not fit is drawn again; after `attempts` it is the largest centred square.
    """
    width, height = image.size
    for _ in range(attempts):
        share = torch.empty(()).uniform_(*area).item()
        ratio = math.exp(torch.empty(()).uniform_(math.log(aspect[0]), math.log(aspect[1])).item())
        w = round(math.sqrt(width * height * share * ratio))
        h = round(math.sqrt(width * height * share / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(torch.randint(width - w + 1, ()))
            top = int(torch.randint(height - h + 1, ()))
            break
    else:
        w = h = min(width, height)
        left, top = (width - w) // 2, (height - h) // 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))


def pad_crop(image: Image.Image, size: int, padding: int) -> Image.Image:
    """A random size x size window of the image with `padding` zeros on each side."""
    left, top = (int(torch.randint(2 * padding + 1, ())) - padding for _ in range(2))
    return image.crop((left, top, left + size, top + size))  # Pillow fills with zeros outside the image


def to_tensor(image: Image.Image, channels: int, mean: float, std: float) -> Tensor:
    """float32 [channels, rows, cols] of (value - mean) / std; 0..255 becomes 0..1 first, floats stay."""
    if image.mode != "F":
        image = image.convert("RGB" if channels == 3 else "L")
    pixels = np.asarray(image, dtype=np.float32) / (1.0 if image.mode == "F" else 255.0)
    return torch.from_numpy((pixels - mean) / std).reshape(*pixels.shape[:2], -1).permute(2, 0, 1).contiguous()


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BILINEAR)
