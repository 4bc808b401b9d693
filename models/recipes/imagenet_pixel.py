"""ImageNet-1k, every pixel of 224 x 224 a token (50,176), with ViT-Ti: table 3 of arXiv 2310.13807.

data      as for imagenet-patch
command   torchrun --nproc-per-node 8 -m nestloop train imagenet-pixel --data PATH --bf16 --accumulate 16
cost      112,590 steps of 1,024 images; not measured
expected  the paper's top-1 after 90 epochs: MTTT-MLP SGD T=4 65.2, MTTT-MLP 61.9, MTTT-Linear 50.0,
          linear attention 49.9 (identity) and 53.7 (elu + 1); not reproduced here
"""

from nestloop.models.recipe import Recipe

recipe = Recipe(data="data/imagenet", model="vit_ti1_mttt_mlp_sgd4", backend="torch", recompute=True)
