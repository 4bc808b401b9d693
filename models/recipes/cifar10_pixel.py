"""CIFAR-10, every pixel a token: 1,024 tokens an image, ViT-Ti.

paper     none for this size; the model and the inner loop are those of arXiv 2310.13807
data      as for cifar10-patch
command   nestloop train cifar10-pixel --data PATH
cost      not measured for a whole run
expected  not measured for a whole run
"""

from nestloop.models.recipe import Recipe

recipe = Recipe(
    data="data/cifar10",
    model="vit_ti1_mttt_mlp",
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
