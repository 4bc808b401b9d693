"""The vision transformer: the paper's parameter counts, its parts against their definitions, its options."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop import models, zoo
from nestloop.models.mixers import MIXERS
from nestloop.models.vit import SIZES, ViT, sincos_positions


def tiny(mixer, **arguments):
    """A model of 2 blocks, 16 wide, on 8 x 8 images, its head no longer zero."""
    torch.manual_seed(0)
    sizes = {"width": 16, "depth": 2, "heads": 2, "num_classes": 5, "image_size": 8, "patch_size": 2}
    model = ViT(mixer, **{**sizes, **arguments})
    torch.nn.init.normal_(model.head.weight)
    return model


def learned(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "exact", "printed"),
    [  # arXiv 2310.13807, tables 1 and 3
        ("vit_s16_self_attention", 22_122_472, "22.1M"),
        ("vit_s16_linear_attention", 22_122_472, "22.1M"),
        ("vit_s16_linear_attention_elu", 22_122_472, "22.1M"),
        ("vit_s16_mttt_linear", 22_122_472, "22.1M"),
        ("vit_s16_mttt_mlp", 24_560_104, "24.6M"),
        ("vit_ti1_linear_attention", 5_569_576, "5.6M"),
        ("vit_ti1_mttt_linear", 5_569_576, "5.6M"),
        ("vit_ti1_mttt_mlp", 6_774_568, "6.8M"),
        ("vit_ti1_mttt_mlp_sgd4", 6_774_568, "6.8M"),
    ],
)
def test_parameter_counts_are_the_papers(name, exact, printed):
    with torch.device("meta"):
        count = learned(models.create(name))
    print(f"{name}: {count:,} learned parameters")
    assert count == exact
    assert f"{count / 1e6:.1f}M" == printed


def test_a_pixel_model_has_a_token_a_pixel():
    with torch.device("meta"):
        model = models.create("vit_ti1_mttt_mlp")
    assert model.grid == (224, 224)
    assert model.positions.shape == (50_176, 192)


def test_sizes():
    assert [tuple(s.values()) for s in SIZES.values()] == [(192, 12, 3), (384, 12, 6), (768, 12, 12)]


def test_positions_are_the_formula():
    rows, cols, width = 3, 5, 16
    got = sincos_positions(rows, cols, width)
    for y in range(rows):
        for x in range(cols):
            for i in range(width // 4):
                omega = 10_000 ** -(i / (width / 4 - 1))
                want = [math.sin(x * omega), math.cos(x * omega), math.sin(y * omega), math.cos(y * omega)]
                assert got[y * cols + x, i :: width // 4].tolist() == pytest.approx(want, abs=1e-6)


def test_positions_are_not_saved():
    assert not [name for name in tiny("mttt_mlp").state_dict() if "positions" in name]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_made_without_memory_has_positions(assign, dtype):
    model, images = tiny("mttt_mlp").to(dtype), torch.randn(2, 3, 8, 8, dtype=dtype)
    with torch.device("meta"):
        empty = tiny("mttt_mlp").to(dtype)
    if not assign:
        empty.to_empty(device="cpu")
        assert torch.equal(empty.positions, model.positions)
    empty.load_state_dict(model.state_dict(), assign=assign)
    assert torch.equal(empty(images), model(images))


def test_positions_keep_their_precision():
    model = tiny("mttt_mlp")
    assert torch.equal(tiny("mttt_mlp").bfloat16().float().positions, model.positions)


def test_tokens_are_a_strided_convolution_plus_positions():
    model = tiny("mttt_mlp", image_size=(8, 6)).double()
    images = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    kernel = model.embedding.weight.unflatten(1, (2, 2, 3)).permute(0, 3, 1, 2)  # row, col, channel -> conv's
    convolved = F.conv2d(images, kernel, model.embedding.bias, stride=2).flatten(2).transpose(1, 2)
    tokens, grid = model.tokens(images)
    assert grid == (4, 3)
    torch.testing.assert_close(tokens, convolved + sincos_positions(4, 3, 16), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_model_is_its_definition(mixer):
    """Every mixer, on a grid that is not square: logits, inner losses, gradients of the written-out model."""
    model = tiny(mixer, image_size=(8, 4)).double().eval()
    images = torch.randn(2, 3, 8, 4, dtype=torch.float64)
    logits, inner = model(images, return_losses=True)

    x, _ = model.tokens(images)
    grid = {"h": 4, "w": 2} if mixer == "vit3" else {}
    for block, losses in zip(model.blocks, inner, strict=True):
        normed = F.layer_norm(x, (16,), block.norm1.weight, block.norm1.bias, 1e-6)
        mixed, want = block.mixer(normed, return_losses=True, **grid)
        torch.testing.assert_close(losses, want)
        x = x + mixed
        normed = F.layer_norm(x, (16,), block.norm2.weight, block.norm2.bias, 1e-6)
        hidden = F.gelu(block.mlp.up(normed), approximate="tanh")
        x = x + hidden @ block.mlp.down.weight.T + block.mlp.down.bias
    pooled = F.layer_norm(x, (16,), model.encoder_norm.weight, model.encoder_norm.bias, 1e-6).mean(1)
    want = model.head(torch.tanh(model.pre_logits(pooled)))
    torch.testing.assert_close(logits, want, rtol=1e-12, atol=1e-12)

    weights = [p for p in model.parameters() if p.requires_grad]
    cotangent = torch.randn_like(logits)
    got = torch.autograd.grad(logits, weights, cotangent)
    for ours, theirs in zip(got, torch.autograd.grad(want, weights, cotangent), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    if mixer == "self_attention":
        assert inner == [None, None]


def test_a_new_head_gives_zeros():
    model = ViT("mttt_linear", 16, 1, 2, num_classes=5, image_size=8, patch_size=4)
    assert torch.equal(model(torch.randn(3, 3, 8, 8)), torch.zeros(3, 5))


def test_another_image_size_gets_its_own_positions():
    small, large = tiny("mttt_mlp"), tiny("mttt_mlp", image_size=(12, 10))
    large.load_state_dict(small.state_dict())
    images = torch.randn(2, 3, 12, 10)
    torch.testing.assert_close(small(images), large(images))


def test_a_loop_of_ones_own_is_a_mixer():
    class TwoSteps(zoo.MTTTMLP):
        schedule = nl.FullBatch(steps=2)

    _, inner = tiny(TwoSteps)(torch.randn(3, 3, 8, 8), return_losses=True)
    assert [losses.shape for losses in inner] == [(3, 2, 3)] * 2


def test_recomputation_changes_nothing():
    images = torch.randn(2, 3, 8, 8)
    results = []
    for checkpoint in (False, True):
        model = tiny("mttt_mlp_sgd4", checkpoint=checkpoint).train()
        torch.manual_seed(1)  # the token orders are drawn in the forward, and must be redrawn alike
        logits = model(images)
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        results.append([logits, *gradients])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


def test_a_loop_may_be_lowered_inside_a_recomputed_block():
    images = torch.randn(2, 3, 8, 8)
    model = tiny("mttt_mlp", width=24, checkpoint=True)  # sizes of its own: nothing has lowered them before
    _, losses = model(images, return_losses=True)
    with torch.no_grad():
        _, expected = model(images, return_losses=True)
    for recomputed, plain in zip(losses, expected, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


def test_a_shuffled_run_is_replayed_by_its_orders():
    model, images = tiny("mttt_mlp_sgd4").train(), torch.randn(2, 3, 8, 8)
    orders = [torch.rand(2, 16).argsort(-1) for _ in range(2)]
    torch.testing.assert_close(model(images, order=orders), model(images, order=orders), rtol=0, atol=0)
    assert not torch.equal(model(images, order=orders), model(images, order=orders[::-1]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: tiny("mttt_mlp")(torch.randn(1, 3, 9, 8)),
            "the image cannot be cut into patches of 2 x 2\n"
            "  given: an image of 9 x 8\n"
            "  need:  rows and columns that 2 divides\n"
            "  fix:   resize or crop the images, or choose another patch_size",
        ),
        (
            lambda: tiny("mttt_mlp")(torch.randn(1, 1, 8, 8)),
            "the images are not what the model was built for\n"
            "  given: a tensor [1, 1, 8, 8]\n"
            "  need:  [B, 3, rows, cols]\n"
            "  fix:   channels first, and ViT(channels=1) for other images",
        ),
        (
            lambda: tiny("mttt_mlp")(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)),
            "the images are not a tensor of floating numbers\n"
            "  given: torch.uint8\n"
            "  need:  [B, 3, rows, cols] in float32, or the dtype of the model\n"
            "  fix:   images.float() / 255 for bytes, normalised as in training",
        ),
        (
            lambda: tiny("mttt_mlp")(np.zeros((1, 3, 8, 8))),
            "the images are not a tensor of floating numbers\n"
            "  given: ndarray [1, 3, 8, 8]\n"
            "  need:  [B, 3, rows, cols] in float32, or the dtype of the model\n"
            "  fix:   torch.as_tensor(images)",
        ),
        (
            lambda: tiny("mttt_mlp")(torch.randn(3, 8, 8)),
            "the images are not what the model was built for\n"
            "  given: a tensor [3, 8, 8]\n"
            "  need:  [B, 3, rows, cols]\n"
            "  fix:   add the axis of images: images[None]",
        ),
        (
            lambda: sincos_positions(2, 2, 18),
            "sin-cos positions need four channels a frequency and two frequencies\n"
            "  given: width=18\n"
            "  need:  a width of 8 or more that 4 divides\n"
            "  fix:   width=16",
        ),
    ],
)
def test_sizes_that_do_not_fit(call, message):
    with pytest.raises((nl.errors.ModelSizeError, nl.errors.InputError)) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "size", "least", "fix"),
    [
        *[("width", "32", 1, 384), ("width", 0, 1, 384), ("depth", -1, 0, 12), ("heads", 2.0, 1, 6)],
        *[("num_classes", -2, 0, 1000), ("patch_size", 0, 1, 16), ("channels", True, 1, 3), ("mlp_ratio", None, 1, 4)],
    ],
)
def test_sizes_that_are_no_counts(name, size, least, fix):
    with pytest.raises(nl.errors.ModelSizeError) as caught:
        tiny("mttt_linear", **{name: size})
    assert str(caught.value) == (
        f"the {name} of a model is not a count\n"
        f"  given: {name}={size!r}\n"
        f"  need:  a whole number, {least} or more\n"
        f"  fix:   {name}={fix}"
    )


@pytest.mark.parametrize("size", [0, "224", (8,), (8, 0), None])
def test_an_image_size_that_is_none(size):
    with pytest.raises(nl.errors.ModelSizeError) as caught:
        tiny("mttt_linear", image_size=size)
    assert str(caught.value) == (
        "the image_size of a model is not that of an image\n"
        f"  given: image_size={size!r}\n"
        "  need:  a whole number, 1 or more, or (rows, cols)\n"
        "  fix:   image_size=224"
    )


def test_a_model_without_blocks():
    model = tiny("mttt_linear", depth=0, image_size=[8, 6])
    assert model(torch.randn(2, 3, 8, 6)).shape == (2, 5)


def test_the_short_name_is_refused(root):
    run = subprocess.run([sys.executable, "-c", "import models"], cwd=root, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == (
        "ImportError: the models of nestloop were imported as 'models', a name that other distributions and "
        "your own folders use too; import them by their full name: from nestloop import models"
    )
