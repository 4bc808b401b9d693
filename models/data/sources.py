"""Where labelled images come from: class folders, Parquet files, or scikit-learn's embedded digits.

A source knows how many images a split has and reads one of them; it decodes nothing before it is asked to,
and pickles small, so that worker processes can do the decoding.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from nestloop.errors import MissingPackageError
from nestloop.lowering.runtime.cache import cache_dir
from nestloop.models.errors import DatasetLayoutError, DatasetNotFoundError
from nestloop.models.seeding import Purpose, derive_seed

Split = Literal["train", "val"]
EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm")


class Source(Protocol):
    """Labelled images of one split."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The decoded image and its class number. Raises what Pillow raises for one it cannot read."""

    def name(self, index: int) -> str:
        """What to call the image in a log: its file, or its place in one."""


def open_source(path: str, split: Split, holdout: float = 0.2) -> Source:
    """The images of one split of the data set at `path`.

    path: "digits"; a folder with Parquet files, one or more a split; a folder with train/CLASS/ and
        val/CLASS/; or a folder of class folders, of whose files a fixed share `holdout` is the "val" split.
    """
    if path == "digits":
        return Digits(split)
    root = Path(path).expanduser()
    if root.is_dir():
        for folder in (root, root / "data"):
            if any(folder.glob("*.parquet")):
                return Parquet(folder, split)
        if (root / "train").is_dir() or _folders(root):
            return ClassFolders(root, split, holdout)
    raise DatasetNotFoundError(
        f"no data set at {path!r}",
        given="a folder with neither Parquet files nor class folders" if root.is_dir() else "a path that is no folder",
        need='"digits", a folder of *train*.parquet and *val*.parquet or *test*.parquet files, '
        "a folder with train/CLASS/ and val/CLASS/, or a folder of class folders",
        fix="--data PATH",
    )


def check_classes(train: Source, val: Source) -> None:
    """Raises DatasetLayoutError where the val split has classes that the train split has not."""
    unknown = [name for name in val.classes if name not in train.classes]
    if unknown:
        raise DatasetLayoutError(
            "the val split has classes that the train split has not",
            given=f"{', '.join(unknown[:8])}",
            need=f"some of the {len(train.classes)} classes of the train split",
            fix="leave these images out, or train on them too",
        )


def in_colour(image: Image.Image) -> Image.Image:
    """Three channels of 8 bits; of 16 bits, which Pillow would cut at white, the upper 8."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _folders(root: Path) -> list[str]:
    """Sorted names of the folders in a folder."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


class ClassFolders:
    """Image files in one folder per class.

    With train/ and val/ (ImageNet's own layout) each holds its split. Without them the split is made at file
    level: the same `holdout` share of the sorted files is "val" in every run.
    """

    def __init__(self, root: Path, split: Split, holdout: float = 0.2) -> None:
        self.root = root
        has_splits = (root / "train").is_dir()
        train_root = root / "train" if has_splits else root
        self.classes = tuple(_folders(train_root))
        files = self._files(train_root if not has_splits or split == "train" else root / "val")
        if not has_splits:
            permutation = np.random.default_rng(derive_seed(0, Purpose.SPLIT)).permutation(len(files))
            held_out = round(holdout * len(files))
            chosen = permutation[:held_out] if split == "val" else permutation[held_out:]
            files = [files[i] for i in np.sort(chosen)]
        if not files:
            raise DatasetLayoutError(
                f"the {split} split of {root} has no images",
                need=f"files that end in {', '.join(EXTENSIONS)} inside the class folders"
                + ("" if has_splits else f", enough of them that a share of {holdout} is not empty"),
                fix="--data PATH",
            )
        # One fixed-width array: a list of a million strings would be copied into every worker, reference
        # count by reference count.
        self._paths = np.array([os.fsencode(path) for path, _ in files])
        self._labels = np.array([label for _, label in files])

    def _files(self, folder: Path) -> list[tuple[str, int]]:
        """Sorted (path relative to the root, class number) of a folder of class folders."""
        numbers = {name: number for number, name in enumerate(self.classes)}
        found = _folders(folder) if folder.is_dir() else []
        unknown = [name for name in found if name not in numbers]
        if not found or unknown:
            raise DatasetLayoutError(
                f"{folder} does not hold the classes of the train split",
                given=f"folders that are no train classes: {', '.join(unknown[:5])}" if unknown else "no class folders",
                need=f"one folder a class, named as in {self.root / 'train'}",
                fix="sort the validation images into one folder a class, with the names of the train folders",
            )
        prefix = folder.relative_to(self.root)
        return [
            (str(prefix / name / file), numbers[name])
            for name in found
            for file in sorted(os.listdir(folder / name))
            if file.lower().endswith(EXTENSIONS)
        ]

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return os.fsdecode(bytes(self._paths[index]))

    def read(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(self.root / self.name(index)) as image:
            return in_colour(image), int(self._labels[index])


PARQUET_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("validation", "valid", "val", "test"),  # the first that is there
}


class Parquet:
    """Encoded images in Parquet files, in the layout of Hugging Face `datasets`.

    Columns `image` (a struct of `bytes` and `path`) or `img`, and `label` (integers). The files are copied
    once into a memory-mapped Arrow file in the cache folder, from which any row can be read at once and
    which all workers share; a Parquet row would cost the decompression of its whole row group.
    """

    def __init__(self, folder: Path, split: Split) -> None:
        found = sorted(folder.glob("*.parquet"))
        for pattern in PARQUET_NAMES[split]:
            files = [file for file in found if pattern in file.name.lower()]
            if files:
                break
        else:
            raise DatasetLayoutError(
                f"{folder} has no Parquet file for the {split} split",
                given=", ".join(file.name for file in found),
                need=f"a file with one of {', '.join(PARQUET_NAMES[split])} in its name",
            )
        self._arrow = arrow_copy(files)
        self._table: Any = None
        table = self._rows()
        if not table.num_rows:
            raise DatasetLayoutError(f"the {split} split of {folder} has no images", given=f"{files[0].name}: no rows")
        labels = table["label"]
        numbers = labels.drop_null().to_numpy()
        ends = (int(numbers.min()), int(numbers.max())) if len(numbers) else (0, 0)
        self.classes = _class_names(table.schema) or tuple(str(n) for n in range(ends[1] + 1))
        if labels.null_count or ends[0] < 0 or ends[1] >= len(self.classes):
            missing = f"{labels.null_count} rows without one"
            raise DatasetLayoutError(
                f"the {split} split of {folder} has labels that are no classes",
                given=missing if labels.null_count else f"labels from {ends[0]} to {ends[1]}",
                need=f"0 to {len(self.classes) - 1}, in every row",
            )
        self._labels = numbers.astype(np.int64)
        self._stem = files[0].name if len(files) == 1 else f"{folder.name} {split}"

    def _rows(self) -> Any:
        """The memory-mapped table, opened once a process."""
        if self._table is None:
            import pyarrow as pa

            self._table = pa.ipc.open_file(pa.memory_map(str(self._arrow))).read_all()
        return self._table

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_table": None}

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, index: int) -> str:
        path = self._rows()["image"][index]["path"].as_py()
        return f"{self._stem} row {index}" + (f" ({path})" if path else "")

    def read(self, index: int) -> tuple[Image.Image, int]:
        encoded = self._rows()["image"][index]["bytes"].as_py()
        with Image.open(io.BytesIO(encoded)) as image:
            return in_colour(image), int(self._labels[index])


def arrow_copy(files: list[Path]) -> Path:
    """An uncompressed Arrow file with the columns `image` and `label` of Parquet files, made once and kept.

    It lies in nestloop's cache, in arrow/, under a name that changes with the files' paths, sizes and times;
    written under another name and renamed, so half a file is never seen.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingPackageError(
            "Parquet files need pyarrow",
            need="pyarrow",
            fix='pip install "nestloop[train]" -c constraints.txt',
        ) from error
    facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
    cache = cache_dir() / "arrow"
    target = cache / f"{key}.arrow"
    if target.exists():
        return target
    schema = pq.read_schema(files[0])
    image = next((name for name in ("image", "img") if name in schema.names), None)
    if image is None or "label" not in schema.names or not pa.types.is_struct(schema.field(image).type):
        raise DatasetLayoutError(
            f"{files[0].name} is not in the layout of Hugging Face datasets",
            given=f"columns {', '.join(f'{field.name}: {field.type}' for field in schema)}",
            need="columns image: struct<bytes: binary, path: string> and label: int64",
        )
    cache.mkdir(exist_ok=True)
    partial = cache / f"{key}.{os.getpid()}.partial"
    # large_binary: the images of one split may pass 2 GiB
    encoded = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
    kept = pa.schema([("image", encoded), ("label", pa.int64())], metadata=schema.metadata)
    try:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, kept) as writer:
            for file in files:
                for batch in pq.ParquetFile(file).iter_batches(columns=[image, "label"], batch_size=1024):
                    given = batch.column(0)
                    parts = [
                        given.field("bytes").cast(pa.large_binary()),
                        given.field("path").cast(pa.string()),
                    ]
                    images = pa.StructArray.from_arrays(parts, fields=list(encoded))
                    writer.write(pa.record_batch([images, batch.column(1).cast(pa.int64())], schema=kept))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _class_names(schema) -> tuple[str, ...] | None:
    """Class names from the metadata that `datasets` writes, where it is there."""
    stored = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(stored)["info"]["features"] if stored else {}
    names = features.get("label", {}).get("names")
    return tuple(names) if names else None


class Digits:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: a fixed fifth (360) is the val split."""

    classes = tuple("0123456789")

    def __init__(self, split: Split) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise MissingPackageError(
                "the digits need scikit-learn",
                need="scikit-learn",
                fix='pip install "nestloop[train]" -c constraints.txt',
            ) from error
        images, labels = load_digits(return_X_y=True)
        permutation = np.random.RandomState(1000).permutation(len(labels))
        held_out = math.ceil(len(labels) / 5)
        chosen = permutation[:held_out] if split == "val" else permutation[held_out:]
        self._rows = chosen
        self._images = (images[chosen] / 16).reshape(-1, 8, 8).astype(np.float32)  # 0..1
        self._labels = labels[chosen]

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, index: int) -> str:
        return f"digit {self._rows[index]}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._images[index]), int(self._labels[index])  # mode F
