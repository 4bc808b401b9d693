"""Handwritten digits of 8 x 8 pixels, every pixel a token: the smallest real run of an inner loop.

paper     none; the data set is scikit-learn's: 1,797 images, a fixed fifth held out
command   nestloop train digits
cost      about 1 minute on two quiet CPU cores, whatever the mixer
expected  95-98 % of the held-out fifth; one image is 0.28 points, two seeds differ by up to 3:
          it decides nothing between mixers
"""

from nestloop.models.recipe import Recipe

recipe = Recipe(
    data="digits",
    model="vit_ti1_mttt_mlp",
    width=32,
    depth=3,
    heads=2,
    view_gain=2.0,
    image_size=8,
    channels=1,
    mean=0.3,
    std=0.38,
    crop="none",
    flip=False,
    eval_resize=8,
    epochs=35,
    batch=32,
    lr=2e-3,
    betas=(0.9, 0.98),
    weight_decay=2e-4,  # 0.1 in AdamW's terms
    warmup_steps=88,  # 2 epochs
    label_smoothing=0.1,
    workers=0,
    log_every=22,
)
