"""ImageNet-1k in 14 x 14 patches of 16 pixels with ViT-S/16: table 1 of arXiv 2310.13807.

data      train/CLASS/*.JPEG and val/CLASS/*.JPEG, or Parquet in the layout of Hugging Face datasets
command   torchrun --nproc-per-node 8 -m nestloop train imagenet-patch --data PATH --bf16
cost      112,590 steps of 1,024 images; not measured
expected  the paper's top-1 after 90 epochs: MTTT-MLP 74.6, self-attention 76.5, MTTT-Linear 72.8,
          linear attention 73.0 (identity) and 73.2 (elu + 1); not reproduced here
"""

from nestloop.models.recipe import Recipe

recipe = Recipe(data="data/imagenet", model="vit_s16_mttt_mlp", randaugment=(2, 10), mixup=0.2)
