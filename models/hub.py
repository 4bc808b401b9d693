"""from_pretrained, save_pretrained and push_to_hub, through huggingface_hub's mixin where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nestloop import errors
from nestloop.models import mixers
from nestloop.models.weights import load_safetensors

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError:

    class HubMixin:
        """Stands where huggingface_hub is missing: each of its methods says how to install it."""

        @staticmethod
        def _missing(*args: Any, **kwargs: Any) -> Any:
            raise errors.MissingPackageError(
                "loading from and saving for the Hugging Face Hub needs huggingface_hub",
                given="an environment without huggingface_hub",
                need="huggingface_hub",
                fix="pip install huggingface_hub (nestloop.models.save_safetensors needs nothing)",
            )

        from_pretrained = save_pretrained = push_to_hub = _missing

else:

    class HubMixin(  # type: ignore[no-redef]
        PyTorchModelHubMixin,
        library_name="nestloop",
        paper_url="https://arxiv.org/abs/2310.13807",
        pipeline_tag="image-classification",
        license="mit",
    ):
        """huggingface_hub's mixin: config.json holds the model's arguments, model.safetensors its weights."""

        mixer: Any

        def save_pretrained(  # type: ignore[override]  # the mixin's other keywords go through kwargs
            self, directory: str | Path, *, config: Any = None, **kwargs: Any
        ) -> str | None:
            """Write config.json and model.safetensors.

            Raises:
                UnknownModelError: the mixer is a loop that `mixers.MIXERS` does not hold: it has no name
                    that could be read back.
            """
            if config is None:
                arguments: Any = self._hub_mixin_config or {}
                config = {**arguments, "mixer": _mixer_name(self.mixer)}
            return super().save_pretrained(directory, config=config, **kwargs)

        @classmethod
        def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
            # the mixin's own loader skips names it does not find; ours names them
            load_safetensors(model, model_file)
            return model.to(map_location) if map_location != "cpu" else model


def _mixer_name(mixer: Any) -> str:
    name = mixers.name_of(mixer)
    if name is None:
        raise errors.UnknownModelError(
            "the model's mixer has no name under which config.json could hold it",
            given=f"{mixer!r}",
            need="a loop of nestloop.models.mixers.MIXERS",
            fix='MIXERS["my_mixer"] = MyLoop, here and wherever the model is loaded; or '
            "nestloop.models.save_safetensors(model, path), which saves the weights alone",
        )
    return name
