"""Data: layouts, splits, unreadable images, randomness by place, order over ranks and steps."""

import importlib.util
import io
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nestloop.models.data import (
    Digits,
    EvalOrder,
    EvalTransform,
    ImageDataset,
    TrainOrder,
    TrainTransform,
    UnreadableImages,
    batch_loader,
    check_classes,
    open_source,
)
from nestloop.models.data.mixup import mixup
from nestloop.models.data.transforms import inception_crop, pad_crop, to_tensor
from nestloop.models.errors import (
    DatasetLayoutError,
    DatasetNotFoundError,
    RecipeError,
    TooManyUnreadableError,
)


def jpeg(seed: int, size: tuple[int, int] = (24, 18)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def class_folders(root: Path, files_per_class: int = 5) -> Path:
    for label, name in enumerate(("bee", "ant", "cat")):
        (root / name).mkdir(parents=True)
        for number in range(files_per_class):
            (root / name / f"{number}.JPEG").write_bytes(jpeg(100 * label + number))
    return root


def parquet(
    folder: Path, split: str, rows: int = 6, image: str = "image", labels: list[int | None] | None = None
) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    images = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(rows)]
    table = pa.table({image: images, "label": labels or [i % 3 for i in range(rows)]})
    pq.write_table(table, folder / f"{split}-00000-of-00001.parquet", row_group_size=2)


class TestSources:
    def test_digits_have_a_fixed_held_out_fifth(self):
        train, val = Digits("train"), Digits("val")
        assert (len(train), len(val)) == (1437, 360)
        names = {source.name(i) for source in (train, val) for i in range(len(source))}
        assert len(names) == 1797
        assert val.name(0) == Digits("val").name(0) == "digit 1532"
        image, label = val.read(0)
        assert image.size == (8, 8) and 0 <= label <= 9
        assert np.asarray(image).max() == 1.0

    def test_class_folders_without_splits_are_split_by_file(self, tmp_path):
        root = class_folders(tmp_path)
        train, val = open_source(str(root), "train"), open_source(str(root), "val")
        assert train.classes == val.classes == ("ant", "bee", "cat")
        assert (len(train), len(val)) == (12, 3)
        both = sorted(s.name(i) for s in (train, val) for i in range(len(s)))
        assert both == sorted(f"{c}/{n}.JPEG" for c in ("ant", "bee", "cat") for n in range(5))
        for index in range(len(train)):
            image, label = train.read(index)
            assert image.size == (24, 18) and train.name(index).startswith(train.classes[label])

    def test_imagenet_layout(self, tmp_path):
        class_folders(tmp_path / "train")
        class_folders(tmp_path / "val", files_per_class=2)
        train, val = open_source(str(tmp_path), "train"), open_source(str(tmp_path), "val")
        assert (len(train), len(val)) == (15, 6)
        assert val.name(0) == os.path.join("val", "ant", "0.JPEG")

    def test_a_val_split_of_other_classes_is_refused(self, tmp_path):
        class_folders(tmp_path / "train")
        (tmp_path / "val" / "dog").mkdir(parents=True)
        with pytest.raises(DatasetLayoutError) as error:
            open_source(str(tmp_path), "val")
        assert str(error.value) == (
            f"{tmp_path / 'val'} does not hold the classes of the train split\n"
            "  given: folders that are no train classes: dog\n"
            f"  need:  one folder a class, named as in {tmp_path / 'train'}\n"
            "  fix:   sort the validation images into one folder a class, with the names of the train folders"
        )

    @pytest.mark.parametrize("column", ["image", "img"])
    def test_parquet(self, tmp_path, column):
        parquet(tmp_path, "train", image=column)
        parquet(tmp_path, "test", rows=3, image=column)
        train, val = open_source(str(tmp_path), "train"), open_source(str(tmp_path), "val")
        assert (len(train), len(val)) == (6, 3)
        assert train.classes == ("0", "1", "2")
        image, label = train.read(4)
        assert label == 1 and image.tobytes() == Image.open(io.BytesIO(jpeg(4))).convert("RGB").tobytes()
        assert train.name(4) == "train-00000-of-00001.parquet row 4 (4.jpg)"

    @pytest.mark.parametrize(
        ("labels", "given"),
        [([0, 1, -1, 2, 1, 0], "labels from -1 to 2"), ([0, None, 1, 2, 1, 0], "1 rows without one")],
    )
    def test_labels_that_are_no_classes_are_refused(self, tmp_path, labels, given):
        parquet(tmp_path, "train", labels=labels)
        with pytest.raises(DatasetLayoutError) as error:
            open_source(str(tmp_path), "train")
        assert str(error.value) == (
            f"the train split of {tmp_path} has labels that are no classes\n"
            f"  given: {given}\n"
            "  need:  0 to 2, in every row"
        )

    def test_classes_of_the_val_split_alone_are_refused(self, tmp_path):
        parquet(tmp_path, "train")
        parquet(tmp_path, "test", labels=[0, 1, 2, 3, 4, 1])
        with pytest.raises(DatasetLayoutError) as error:
            check_classes(*[open_source(str(tmp_path), split) for split in ("train", "val")])
        assert str(error.value) == (
            "the val split has classes that the train split has not\n"
            "  given: 3, 4\n"
            "  need:  some of the 3 classes of the train split\n"
            "  fix:   leave these images out, or train on them too"
        )

    def test_sixteen_bits_are_cut_to_the_upper_eight(self, tmp_path):
        (tmp_path / "a").mkdir()
        shades = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
        for index in range(2):
            Image.fromarray(shades).save(tmp_path / "a" / f"{index}.png")
        image, _ = open_source(str(tmp_path), "train", 0.5).read(0)
        assert image.mode == "RGB" and np.array_equal(np.asarray(image)[..., 1], shades >> 8)

    def test_parquet_of_another_layout_is_refused(self, tmp_path):
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"pixels": [1], "label": [0]}), tmp_path / "train.parquet")
        with pytest.raises(DatasetLayoutError) as error:
            open_source(str(tmp_path), "train")
        assert str(error.value) == (
            "train.parquet is not in the layout of Hugging Face datasets\n"
            "  given: columns pixels: int64, label: int64\n"
            "  need:  columns image: struct<bytes: binary, path: string> and label: int64"
        )

    def test_no_data_set(self, tmp_path):
        with pytest.raises(DatasetNotFoundError) as error:
            open_source(str(tmp_path / "nowhere"), "train")
        assert str(error.value) == (
            f"no data set at '{tmp_path / 'nowhere'}'\n"
            "  given: a path that is no folder\n"
            '  need:  "digits", a folder of *train*.parquet and *val*.parquet or *test*.parquet files, '
            "a folder with train/CLASS/ and val/CLASS/, or a folder of class folders\n"
            "  fix:   --data PATH"
        )

    def test_shared_samples(self, shared):
        if not (shared / "data").is_dir():
            pytest.skip("the image samples are not here")
        pytest.importorskip("pyarrow")
        cifar = open_source(str(shared / "data"), "val")
        assert len(cifar) == 10_000 and len(cifar.classes) == 10 and cifar.read(7)[0].size == (32, 32)
        photos = open_source(str(shared / "data" / "imagenet-sample"), "train")
        assert len(photos) == 160 and len(photos.classes) == 200 and min(photos.read(0)[0].size) == 256


class TestUnreadable:
    def loader(self, root: Path, workers: int = 0):
        dataset = ImageDataset(open_source(str(root), "train", holdout=0.2), TrainTransform(8), seed=1)
        return dataset, batch_loader(dataset, EvalOrder(len(dataset.source), 4), (3, 8, 8), workers)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_truncated_and_corrupt_images_keep_their_place_without_weight(self, tmp_path, workers):
        root = class_folders(tmp_path, files_per_class=10)
        dataset, loader = self.loader(root, workers)
        truncated, garbage, empty = (root / dataset.source.name(index) for index in (1, 5, 6))
        truncated.write_bytes(truncated.read_bytes()[:400])
        garbage.write_bytes(b"not an image")
        empty.write_bytes(b"")
        batches = list(loader)
        valid = torch.cat([batch.valid for batch in batches])
        assert [i for i in range(len(valid)) if not valid[i]] == [1, 5, 6]
        assert all(len(batch.images) == 4 for batch in batches)
        assert batches[0].images[1].abs().max() == 0
        named = [failure[:2] for batch in batches for failure in batch.unreadable]
        assert named == [(index, dataset.source.name(index)) for index in (1, 5, 6)]

    def test_each_is_counted_once_and_too_many_stop_the_run_with_the_list(self):
        images = UnreadableImages("train", 200, limit=0.01)
        assert images.add([(3, "a.jpg", "OSError: cut")]) == ["skipped unreadable image a.jpg: OSError: cut"]
        assert images.add([(3, "a.jpg", "OSError: cut")]) == []
        images.add([(4, "b.jpg", "OSError: cut")])
        with pytest.raises(TooManyUnreadableError) as error:
            images.add([(5, "c.jpg", "ValueError: odd")])
        assert str(error.value) == (
            "3 of 200 images of the train split cannot be read:\n"
            "    a.jpg: OSError: cut\n    b.jpg: OSError: cut\n    c.jpg: ValueError: odd\n"
            "  need:  at most 0.01 of the images\n"
            "  fix:   repair or remove these files, or allow more with --max-unreadable SHARE"
        )


class TestRandomness:
    def test_augmentation_depends_on_seed_epoch_and_image_alone(self, tmp_path):
        source = open_source(str(class_folders(tmp_path)), "train")
        dataset = ImageDataset(source, TrainTransform(8), seed=1)
        order = TrainOrder(len(source), 4, seed=1)

        def images(workers: int, epoch: int, step: int = 0) -> list[torch.Tensor]:
            order.start_at(epoch, step)
            return [batch.images for batch in batch_loader(dataset, order, (3, 8, 8), workers)]

        before = torch.random.get_rng_state()
        reference = images(0, epoch=1)
        assert torch.equal(torch.random.get_rng_state(), before)
        for workers in (1, 2):
            assert all(torch.equal(a, b) for a, b in zip(reference, images(workers, 1), strict=True))
        assert torch.equal(images(2, epoch=1, step=2)[0], reference[2])
        place, other_epoch = (1, 0), (2, 0)
        first = dataset[place].image
        second = dataset[other_epoch].image
        assert first is not None and second is not None and not torch.equal(first, second)
        other_seed = ImageDataset(source, TrainTransform(8), seed=2)[place].image
        assert other_seed is not None and not torch.equal(first, other_seed)


class TestOrder:
    def test_an_epoch_is_a_permutation_and_epochs_differ(self):
        order = TrainOrder(20, 5, seed=3)
        epochs = []
        for epoch in range(2):
            order.start_at(epoch)
            places = list(itertools.chain(*order))
            assert {place[0] for place in places} == {epoch}
            epochs.append([index for _, index in places])
        assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
        assert epochs[0] != epochs[1]

    @pytest.mark.parametrize("step", range(5))
    def test_any_step_can_be_resumed_at(self, step):
        order = TrainOrder(23, 4, seed=3)
        order.start_at(1)
        whole = list(order)
        order.start_at(1, step)
        assert list(order) == whole[step:] and len(order) == len(whole[step:])

    @pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 3), (2, 3)])
    def test_ranks_and_micro_batches_cut_the_same_global_batches(self, world, accumulate):
        whole = list(TrainOrder(40, 12, seed=5))
        ranks = [list(TrainOrder(40, 12, rank, world, accumulate, 5)) for rank in range(world)]
        for step, batch in enumerate(whole):
            parts = [part for rank in ranks for part in rank[step * accumulate : (step + 1) * accumulate]]
            assert list(itertools.chain(*parts)) == batch

    @pytest.mark.parametrize("world", [1, 2, 3, 4])
    def test_evaluation_reads_every_image_once(self, world):
        read = [i for rank in range(world) for b in EvalOrder(11, 3, rank, world) for _, i in b]
        assert sorted(read) == list(range(11))

    def test_batches_that_do_not_split_or_fit_are_refused(self):
        with pytest.raises(RecipeError) as error:
            TrainOrder(100, 10, world=2, accumulate=2)
        assert str(error.value) == (
            "a batch of 10 does not split evenly\n"
            "  given: batch 10, 2 processes, 2 micro-batches each\n"
            "  need:  a batch that processes x micro-batches divides\n"
            "  fix:   --batch 8"
        )
        with pytest.raises(RecipeError, match="a batch is larger than the train split"):
            TrainOrder(10, 12)


class TestTransforms:
    def test_evaluation_resizes_the_shorter_side_and_takes_the_centre(self):
        ramp = np.tile(np.arange(80, dtype=np.uint8)[None, :, None], (40, 1, 3))
        tensor = EvalTransform(size=20, resize=40, mean=0.0, std=1.0)(Image.fromarray(ramp))
        assert tensor.shape == (3, 20, 20)
        assert torch.equal((tensor[0, 0] * 255).round().int(), torch.arange(30, 50, dtype=torch.int32))

    def test_inception_crop_stays_inside_and_varies(self):
        ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (100, 1)))
        spans = []
        for seed in range(40):
            torch.manual_seed(seed)
            row = np.asarray(inception_crop(ramp, 32)).astype(int)[16]
            assert 0 <= row[0] < row[-1] <= 199
            spans.append(row[-1] - row[0])
        assert min(spans) < 40 and max(spans) > 100

    def test_inception_crop_of_a_sliver_takes_the_centred_square(self):
        sliver = Image.fromarray(np.tile(np.arange(250, dtype=np.uint8), (1, 1)))
        cropped = inception_crop(sliver, 1, area=(0.9, 1.0))
        assert int(np.asarray(cropped)[0, 0]) == (250 - 1) // 2

    def test_pad_crop_fills_with_zeros(self):
        image = Image.fromarray(np.full((8, 8), 9, np.uint8))
        windows = set()
        for seed in range(30):
            torch.manual_seed(seed)
            pixels = np.asarray(pad_crop(image, 8, padding=2))
            assert pixels.shape == (8, 8)
            windows.add(int((pixels == 9).sum()))
        assert 36 <= min(windows) < 50 < max(windows) <= 64

    def test_flip_mirrors_half_of_the_images(self):
        image = Image.fromarray(np.arange(64, dtype=np.float32).reshape(8, 8) / 64)
        transform = TrainTransform(8, channels=1, crop="none", flip=True, mean=0.0, std=1.0)
        plain = to_tensor(image, 1, 0.0, 1.0)
        torch.manual_seed(0)
        results = [transform(image) for _ in range(200)]
        mirrored = sum(torch.equal(result, plain.flip(2)) for result in results)
        assert mirrored + sum(torch.equal(result, plain) for result in results) == 200
        assert 70 <= mirrored <= 130

    def test_grey_and_colour_become_what_the_model_takes(self):
        grey = Image.fromarray(np.full((4, 4), 255, np.uint8))
        assert torch.equal(to_tensor(grey, 3, 0.5, 0.5), torch.ones(3, 4, 4))
        assert to_tensor(grey.convert("RGB"), 1, 0.5, 0.5).shape == (1, 4, 4)

    def test_randaugment_comes_from_torchvision_and_is_seeded(self):
        if importlib.util.find_spec("torchvision") is None:
            pytest.skip("torchvision is not installed")
        image = Image.open(io.BytesIO(jpeg(1, (32, 32)))).convert("RGB")
        transform = TrainTransform(32, crop="none", flip=False, randaugment=(2, 10))
        results = []
        for seed in (0, 0, 1, 2, 3, 4):
            torch.manual_seed(seed)
            results.append(transform(image))
        assert torch.equal(results[0], results[1])
        assert sum(not torch.equal(results[0], result) for result in results[2:]) >= 3


class TestMixup:
    def batch(self, valid: list[bool]):
        from nestloop.models.data import Batch

        images = torch.arange(4.0)[:, None, None, None].expand(4, 1, 2, 2)
        return Batch(images, torch.tensor([0, 1, 2, 3]), torch.tensor(valid), [])

    def test_images_and_targets_are_blended_alike(self):
        images, targets = mixup(self.batch([True] * 4), alpha=0.2, seed=1)
        weight = targets.weight[0].item()
        assert 0.5 <= weight < 1
        expected = weight * torch.arange(4.0) + (1 - weight) * torch.tensor([3.0, 0.0, 1.0, 2.0])
        torch.testing.assert_close(images[:, 0, 0, 0], expected)
        logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
        log_p = logits.log_softmax(1)
        by_hand = -torch.stack([weight * log_p[i, i] + (1 - weight) * log_p[i, (i - 1) % 4] for i in range(4)])
        torch.testing.assert_close(targets.loss(logits), by_hand)

    def test_an_unreadable_image_is_nobodys_partner_and_has_no_loss(self):
        images, targets = mixup(self.batch([True, False, True, True]), alpha=0.2, seed=1)
        assert images[2, 0, 0, 0] == 2.0 and targets.weight[2] == 1.0
        assert targets.loss(torch.randn(4, 5))[1] == 0.0

    def test_alpha_zero_changes_nothing(self):
        batch = self.batch([True] * 4)
        images, targets = mixup(batch, alpha=0.0, seed=1)
        assert images is batch.images
        logits = torch.randn(4, 5)
        expected = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none", label_smoothing=0.1)
        assert torch.equal(targets.loss(logits, 0.1), expected)
