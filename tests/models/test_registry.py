"""Models by name, their weights as files, and the two registries of other libraries."""

import importlib.util
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import nestloop as nl
from nestloop import models, zoo
from nestloop.models import mixers
from nestloop.models.hub import HubMixin
from nestloop.models.vit import ViT

TINY: dict[str, Any] = {
    "width": 16,
    "depth": 2,
    "heads": 2,
    "num_classes": 5,
    "image_size": 8,
    "patch_size": 4,
}
needs_hub = pytest.mark.skipif(not importlib.util.find_spec("huggingface_hub"), reason="needs huggingface_hub")
needs_timm = pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="needs timm")


def tiny(mixer="mttt_mlp", **arguments):
    """A model whose head is not zero, so that equal outputs mean equal weights."""
    model = models.create(f"vit_s16_{mixer}", **{**TINY, **arguments})
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


def test_every_size_patch_and_mixer_has_a_name():
    assert len(models.names()) == 3 * 3 * 8 == len(set(models.names()))
    assert models.names("ti1_mttt") == [
        "vit_ti1_mttt_linear",
        "vit_ti1_mttt_mlp",
        "vit_ti1_mttt_mlp4",
        "vit_ti1_mttt_mlp_sgd4",
    ]


def test_a_name_decides_size_patch_and_mixer():
    with torch.device("meta"):
        model = models.create("vit_b8_self_attention", num_classes=10)
    assert (len(model.blocks), model.patch_size, model.mixer) == (12, 8, "self_attention")
    assert model.embedding.weight.shape == (768, 8 * 8 * 3)
    assert model.head.weight.shape == (10, 768)


def test_overrides_replace_arguments():
    model = tiny(channels=1, mlp_ratio=2)
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 5)
    assert model.blocks[0].mlp.up.weight.shape == (32, 16)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(nl.errors.UnknownModelError) as caught:
        models.create("vit_s16_mtt_mlp")
    assert str(caught.value) == (
        "there is no model named 'vit_s16_mtt_mlp'\n"
        "  given: 'vit_s16_mtt_mlp'\n"
        f"  need:  one of {', '.join(models.names()[:12])}, ...\n"
        "  fix:   did you mean vit_s16_mttt_mlp or vit_s16_mttt_mlp4 or vit_s1_mttt_mlp? "
        "models.names() lists them all"
    )


@pytest.mark.parametrize(("argument", "fix"), [("patch", "did you mean patch_size?"), ("zzz", "leave it out")])
def test_an_unknown_argument_gets_the_nearest(argument, fix):
    with pytest.raises(nl.errors.InputError) as caught:
        models.create("vit_s16_mttt_mlp", **{argument: 4})
    assert str(caught.value) == (
        f"a model takes no argument '{argument}'\n"
        f"  given: {argument}=4\n"
        "  need:  one of mixer, width, depth, heads, num_classes, image_size, patch_size, channels, mlp_ratio, "
        "mixer_dims, backend, inductor, checkpoint\n"
        f"  fix:   {fix}"
    )


def test_an_unknown_mixer_gets_the_nearest():
    with pytest.raises(nl.errors.UnknownModelError) as caught:
        ViT("mttt_linaer", 16, 1, 2)
    assert str(caught.value) == (
        "there is no mixer named 'mttt_linaer'\n"
        "  given: 'mttt_linaer'\n"
        f"  need:  one of {', '.join(mixers.MIXERS)}\n"
        "  fix:   did you mean mttt_linear or mttt_mlp or mttt_mlp4? pass the loop itself for one that "
        "is not in the table"
    )


@pytest.mark.parametrize("mixer", ["mttt_linear", "mttt_mlp", "self_attention", "vit3"])
def test_weights_through_a_file(tmp_path, mixer):
    saved, loaded, images = tiny(mixer), tiny(mixer), torch.randn(2, 3, 8, 8)
    assert not torch.equal(saved(images), loaded(images))
    models.save_safetensors(saved, tmp_path / "model.safetensors")
    models.load_safetensors(loaded, tmp_path / "model.safetensors")
    assert torch.equal(saved(images), loaded(images))
    assert load_file(tmp_path / "model.safetensors").keys() == saved.state_dict().keys()


def test_weights_that_do_not_fit_are_all_named_and_nothing_is_loaded(tmp_path):
    model, path = tiny(), tmp_path / "model.safetensors"
    state = dict(model.state_dict())
    del state["encoder_norm.bias"]
    state |= {"head.bias": torch.zeros(7), "extra": torch.zeros(2), "pre_logits.bias": torch.ones(16)}
    save_file(state, path)
    with pytest.raises(nl.errors.WeightsMismatchError) as caught:
        models.load_safetensors(model, path)
    assert str(caught.value) == (
        f"the weights in {path} are not those of this ViT\n"
        "  given: encoder_norm.bias: absent in the file, [16] in the model\n"
        "         extra: [2] in the file, absent in the model\n"
        "         head.bias: [7] in the file, [5] in the model\n"
        "  need:  the same names and shapes\n"
        "  fix:   create the model with the arguments it was saved with: mixer, width, depth, heads, "
        "num_classes, patch_size, channels"
    )
    assert not model.pre_logits.bias.any()


def test_a_truncated_file_is_refused(tmp_path):
    model, path = tiny(), tmp_path / "model.safetensors"
    models.save_safetensors(model, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(nl.errors.WeightsMismatchError, match=r"cannot be read as safetensors\n  given: .*\n"):
        models.load_safetensors(model, path)


@needs_hub
def test_a_hub_folder_holds_the_whole_model(tmp_path):
    saved = tiny("mttt_mlp4", mlp_ratio=2, image_size=(8, 12), mixer_dims={"d": 4})
    saved.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["mixer"], config["width"], config["mixer_dims"]) == ("mttt_mlp4", 16, {"d": 4})
    loaded, images = ViT.from_pretrained(tmp_path), torch.randn(2, 3, 8, 12)
    assert loaded.grid == (2, 3)
    assert torch.equal(loaded(images), saved(images))


@needs_hub
def test_a_loop_of_the_table_is_saved_by_its_name(tmp_path):
    saved = ViT(zoo.MTTTLinear, **TINY)
    saved.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["mixer"] == "mttt_linear"
    assert ViT.from_pretrained(tmp_path).mixer == "mttt_linear"


@needs_hub
def test_a_loop_without_a_name_is_not_saved(tmp_path):
    class Mine(zoo.MTTTLinear):
        pass

    with pytest.raises(nl.errors.UnknownModelError) as caught:
        ViT(Mine, **TINY).save_pretrained(tmp_path)
    assert str(caught.value) == (
        "the model's mixer has no name under which config.json could hold it\n"
        f"  given: {Mine!r}\n"
        "  need:  a loop of nestloop.models.mixers.MIXERS\n"
        '  fix:   MIXERS["my_mixer"] = MyLoop, here and wherever the model is loaded; or '
        "nestloop.models.save_safetensors(model, path), which saves the weights alone"
    )
    assert not list(tmp_path.iterdir())


@needs_hub
def test_a_hub_folder_with_other_weights_is_refused(tmp_path):
    tiny().save_pretrained(tmp_path)
    models.save_safetensors(tiny("mttt_linear"), tmp_path / "model.safetensors")
    with pytest.raises(nl.errors.WeightsMismatchError, match=r"blocks\.0\.mixer\.fast\.b1: absent in the file"):
        ViT.from_pretrained(tmp_path)


@needs_hub
def test_the_mixin_is_huggingface_hubs():
    from huggingface_hub import PyTorchModelHubMixin

    assert issubclass(HubMixin, PyTorchModelHubMixin)


@needs_timm
def test_a_layer_is_the_attention_of_timms_blocks():
    models.register_with_timm()  # timm needs torchvision's ops, which may be of another build
    from timm.models.vision_transformer import Block

    torch.manual_seed(0)
    block, x = Block(16, 2), torch.randn(2, 9, 16)
    block.attn = nl.Layer(nl.zoo.MTTTMLP, 16, 2)
    y = block(x)
    y.square().mean().backward()
    assert y.shape == x.shape and all(p.grad is not None for p in block.attn.parameters())


@needs_timm
def test_timm_creates_every_model():
    registered = models.register_with_timm()
    assert models.register_with_timm() == registered  # a second call changes nothing
    import timm

    assert set(registered) <= set(timm.list_models("nestloop_*"))
    model = timm.create_model(
        "nestloop_vit_s16_mttt_mlp",
        num_classes=5,
        img_size=8,
        in_chans=1,
        embed_dim=16,
        depth=2,
        num_heads=2,
        patch_size=4,
    )
    assert isinstance(model, ViT)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 5)
    with pytest.raises(nl.errors.UnknownModelError, match="no pretrained weights for vit_s16_mttt_mlp"):
        timm.create_model("nestloop_vit_s16_mttt_mlp", pretrained=True)
