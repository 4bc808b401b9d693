"""Every test of this folder draws the same numbers each time, and builds quickly."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed(quick_builds):
    torch.manual_seed(0)
