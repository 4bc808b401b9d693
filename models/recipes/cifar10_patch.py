"""CIFAR-10 in patches of 4 x 4 pixels: 64 tokens an image, ViT-Ti.

paper     none for this size; the model and the inner loop are those of arXiv 2310.13807
data      Parquet in the layout of Hugging Face datasets:
          hf download uoft-cs/cifar10 --repo-type dataset --local-dir data/cifar10
          (then --data data/cifar10/plain_text)
command   nestloop train cifar10-patch --data PATH
cost      not measured for a whole run
expected  not measured for a whole run
"""

from nestloop.models.recipe import Recipe

recipe = Recipe(
    data="data/cifar10",
    model="vit_ti16_mttt_mlp",
    patch_size=4,
    image_size=32,
    crop="pad",
    flip=True,
    eval_resize=32,
    epochs=100,
    batch=256,
    lr=1e-3,
    warmup_steps=1000,
    label_smoothing=0.1,
    workers=2,
)
