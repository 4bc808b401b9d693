"""Labelled images for training and evaluation: sources, transforms, order, batches."""

from nestloop.models.data.batches import Batch, ImageDataset, UnreadableImages, batch_loader
from nestloop.models.data.order import EvalOrder, TrainOrder
from nestloop.models.data.sources import ClassFolders, Digits, Parquet, Source, check_classes, open_source
from nestloop.models.data.transforms import EvalTransform, TrainTransform

__all__ = [
    "Batch",
    "ClassFolders",
    "Digits",
    "EvalOrder",
    "EvalTransform",
    "ImageDataset",
    "Parquet",
    "Source",
    "TrainOrder",
    "TrainTransform",
    "UnreadableImages",
    "batch_loader",
    "check_classes",
    "open_source",
]
