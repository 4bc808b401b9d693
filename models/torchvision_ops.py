"""Import torchvision also beside a torch without CUDA.

torchvision's wheels are built for CUDA. Beside a CPU build of torch their compiled ops do not load, and its
import fails on two operators that nothing here calls; with their schemas defined first, the transforms work.
"""

from __future__ import annotations

import torch

SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: torch.library.Library | None = None  # the definitions live as long as this object


def define_missing_schemas() -> None:
    """Call before the first import of torchvision, or of anything that imports it; repeating is harmless."""
    global _library
    if _library is not None or torch.version.cuda is not None:
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            _library.define(schema)
