"""A loop as an `nn.Module`: `making` makes views from x, `branch` runs a loop on them, `layer` projects the output."""

from nestloop.layer.branch import Branch
from nestloop.layer.layer import Layer
from nestloop.layer.making import Parameters

__all__ = ["Branch", "Layer", "Parameters"]
