"""Random numbers that depend on where they are used, not on what ran before.

Every random choice of a run gets its own seed from (run seed, purpose, position). So an image is cropped the
same way whichever worker decodes it, every rank of a step draws the same token orders, and a resumed run
continues as if it had never stopped.
"""

from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What a seed is for; the value is part of the seed, so never renumber."""

    ORDER = 0  # position: epoch
    AUGMENT = 1  # position: epoch, image
    MODEL = 2  # position: step
    MIXUP = 3  # position: step
    INIT = 4  # no position
    SPLIT = 5  # no position


def derive_seed(seed: int, purpose: Purpose, *position: int) -> int:
    """A 63-bit seed for one use; non-negative ints in, well mixed by numpy's SeedSequence."""
    word = np.random.SeedSequence([seed, int(purpose), *position]).generate_state(1, np.uint64)[0]
    return int(word >> np.uint64(1))


def generator(seed: int, purpose: Purpose, *position: int) -> torch.Generator:
    """A CPU generator seeded for one use."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *position))
