"""Mixup (arXiv 1710.09412): each image is blended with its neighbour in the batch, and so is its target."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nestloop.models.data.batches import Batch


class Targets(NamedTuple):
    """What the logits of a batch are compared with: `weight` [B] of `labels` [B], the rest of `others` [B].

    valid: bool [B]; an unreadable image has loss 0.
    """

    labels: Tensor
    others: Tensor
    weight: Tensor
    valid: Tensor

    def loss(self, logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy of logits [B, classes] -> [B]."""
        own, other = (
            F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
            for labels in (self.labels, self.others)
        )
        return torch.where(self.valid, other + self.weight * (own - other), 0.0)


def mixup(batch: Batch, alpha: float, seed: int) -> tuple[Tensor, Targets]:
    """Images [B, C, rows, cols] with their targets; alpha 0 mixes nothing.

    One share of at least a half, from Beta(alpha, alpha), for the whole batch; the partner of image i is
    image i - 1 of the same micro-batch. An unreadable image is nobody's partner.
    """
    weight = torch.ones(len(batch.labels), device=batch.images.device)
    if alpha == 0:
        return batch.images, Targets(batch.labels, batch.labels, weight, batch.valid)
    share = np.random.default_rng(seed).beta(alpha, alpha)
    weight = torch.where(batch.valid.roll(1), float(max(share, 1 - share)), weight)
    blend = weight[:, None, None, None]
    images = blend * batch.images + (1 - blend) * batch.images.roll(1, 0)
    return images, Targets(batch.labels, batch.labels.roll(1), weight, batch.valid)
