"""Vision transformers whose token mixer is any declared inner loop, and what trains them.

`models.create("vit_s16_mttt_mlp")` gives logits [B, 1000] from images [B, 3, 224, 224]; `models.names()`
lists every name.
"""

if __name__ != "nestloop.models":
    raise ImportError(
        f"the models of nestloop were imported as {__name__!r}, a name that other distributions and your own "
        "folders use too; import them by their full name: from nestloop import models"
    )

from nestloop.models.registry import create, names, register_with_timm
from nestloop.models.vit import ViT
from nestloop.models.weights import load_safetensors, save_safetensors

__all__ = ["ViT", "create", "load_safetensors", "names", "register_with_timm", "save_safetensors"]
