"""Labelled images: from the hub, a local folder or scikit-learn's digits, as data sets that give whole batches.

Small sets are decoded once into one uint8 tensor (`preload`), so that a step pays for no decoding; large ones are
decoded when they are asked for. Both give the same batches where both resize alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from recipes.common.errors import UserError, did_you_mean
from recipes.images.augment import mix, rand_augment, random_resized_crop, resize_and_center, shift_and_flip

# Of ImageNet's training images in red, green and blue; used where the images are not all in memory.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}
_SPLITS = {"train": "train", "validation": "validation", "val": "validation", "dev": "validation", "test": "test"}


@dataclass
class ImageArguments:
    """Where the images come from, their size, and how training images are changed."""

    dataset: str = field(
        default="digits",
        metadata={"help": "Name on the hub, folder of parquet files or of images, or `digits` (scikit-learn's)."},
    )
    dataset_config: str | None = None
    image_column: str | None = field(default=None, metadata={"help": "By default the only column of images."})
    label_column: str | None = field(default=None, metadata={"help": "By default the only column of classes."})
    train_split: str = "train"
    validation_split: str | None = field(
        default=None, metadata={"help": "By default `validation`, else `test`, else a part of the training split."}
    )
    validation_fraction: float = field(
        default=0.2, metadata={"help": "Of the training split, always the same images; where no other split is found."}
    )
    image_size: int | None = field(default=None, metadata={"help": "Side in pixels; by default that of the images."})
    preload: bool = field(default=True, metadata={"help": "Decode all images into memory before training."})
    crop_padding: int = field(default=0, metadata={"help": "With preload: shift by up to N pixels."})
    flip: bool = field(default=False, metadata={"help": "Mirror half of the training images."})
    crop_smallest: float | None = field(
        default=None, metadata={"help": "Without preload: random crops of at least this share of the area."}
    )
    validation_resize: int | None = field(
        default=None, metadata={"help": "Shorter side before the middle is cut out; by default image_size."}
    )
    randaugment_layers: int = field(default=0, metadata={"help": "Without preload: operations on an image."})
    randaugment_magnitude: float = field(default=10.0, metadata={"help": "0 to 10."})
    mixup: float = field(default=0.0, metadata={"help": "alpha of mixup's Beta distribution; 0 is none."})

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction must be in (0, 1), got {self.validation_fraction}")
        if self.crop_smallest is not None and not 0 < self.crop_smallest <= 1:
            raise UserError(f"crop_smallest must be in (0, 1], got {self.crop_smallest}")
        if not 0 <= self.randaugment_magnitude <= 10:
            raise UserError(f"randaugment_magnitude must be from 0 to 10, got {self.randaugment_magnitude}")
        for name in ("crop_padding", "randaugment_layers", "mixup"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("image_size", "validation_resize"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.validation_resize is not None and self.validation_resize < (self.image_size or 1):
            raise UserError(
                f"validation_resize must be at least image_size ({self.image_size}), got {self.validation_resize}"
            )
        if self.preload and (self.crop_smallest is not None or self.randaugment_layers):
            raise UserError("crop_smallest and randaugment_layers need `preload: false`")
        if not self.preload and self.crop_padding:
            raise UserError("crop_padding needs `preload: true`; without it take crop_smallest")
        if not self.preload and self.image_size is None:
            raise UserError("`preload: false` needs image_size")


class ImageSet(Dataset[dict[str, Tensor]]):
    """Images and labels of one split; `__getitems__` gives a batch: `pixel_values` and `labels`.

    Args:
        images: (count, height, width, channels) uint8, or a sequence of PIL images decoded when asked for.
        labels: (count,) int64.
        options: size and augmentation.
        mode: PIL's, "L" or "RGB".
        mean, std: of each channel, for values in [0, 1].
        augment_seed: None for a split that is not trained on.
    """

    def __init__(
        self,
        images: Tensor | Sequence[Image.Image],
        labels: Tensor,
        options: ImageArguments,
        mode: str,
        mean: Sequence[float],
        std: Sequence[float],
        augment_seed: int | None = None,
    ):
        self.images, self.labels, self.options, self.mode = images, labels, options, mode
        self.mean = torch.tensor(mean).view(1, -1, 1, 1)
        self.std = torch.tensor(std).view(1, -1, 1, 1)
        self.augment_seed = augment_seed
        self.set_epoch(0)

    def __len__(self) -> int:
        return len(self.labels)

    def set_epoch(self, epoch: int) -> None:
        """Draw the shifts and mirrorings of an epoch, the same for a run and for its resumed rest."""
        self.epoch = epoch
        if self.augment_seed is not None:
            rng = np.random.default_rng((self.augment_seed, epoch))
            shape = (len(self), 2)
            self.offsets = torch.from_numpy(rng.integers(0, 2 * self.options.crop_padding + 1, shape))
            self.flips = torch.from_numpy(rng.random(len(self)) < (0.5 if self.options.flip else 0.0))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: values[0] for key, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A batch: `pixel_values` (batch, channels, height, width) float32, `labels` (batch,); see also `mix`."""
        places = torch.tensor(indices)
        augmented = self.augment_seed is not None
        if isinstance(self.images, Tensor):
            pixels = self.images[places]
            if augmented and (self.options.crop_padding or self.options.flip):
                pixels = shift_and_flip(pixels, self.offsets[places], self.flips[places], self.options.crop_padding)
        else:
            pixels = torch.stack([self._decoded(index) for index in indices])
        values = (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        batch = {"pixel_values": values, "labels": self.labels[places]}
        if self.augment_seed is not None and self.options.mixup:
            # one more number than an image's key has: a separate stream
            batch = mix(
                batch, self.options.mixup, np.random.default_rng((self.augment_seed, self.epoch, indices[0], 0))
            )
        return batch

    def _decoded(self, index: int) -> Tensor:
        options: Any = self.options
        images: Any = self.images
        try:
            image = images[index].convert(self.mode)
        except OSError as error:
            raise UserError(f"dataset: image {index} cannot be read ({error})") from error
        if self.augment_seed is None:
            return to_tensor(resize_and_center(image, options.image_size, options.validation_resize))
        rng = np.random.default_rng((self.augment_seed, self.epoch, index))
        if options.crop_smallest is None:
            image = resize_and_center(image, options.image_size)
        else:
            image = random_resized_crop(image, options.image_size, options.crop_smallest, rng)
        if bool(self.flips[index]):
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(rand_augment(image, options.randaugment_layers, options.randaugment_magnitude, rng))


def to_tensor(image: Image.Image) -> Tensor:
    """(height, width, channels) uint8."""
    array = np.array(image)
    return torch.from_numpy(array[:, :, None] if array.ndim == 2 else array)


@dataclass
class ImageData:
    """Both splits and what a model has to know of them."""

    train: ImageSet
    validation: ImageSet
    classes: int
    channels: int
    image_size: int
    mean: list[float]
    std: list[float]


def load_images(options: ImageArguments, seed: int) -> ImageData:
    """Both splits of `options.dataset`.

    Args:
        options: source, columns, size, augmentation.
        seed: of the augmentation.

    Raises:
        UserError: no such data, split or column; images of several sizes; a label that is none of the classes.
    """
    (train_images, train_labels), (validation_images, validation_labels), classes, mode = (
        _digits(options) if options.dataset == "digits" else _splits(options)
    )
    size, mean, std = options.image_size, list(IMAGENET_MEAN), list(IMAGENET_STD)
    if mode == "L":
        mean, std = [sum(mean) / 3], [sum(std) / 3]
    if options.preload:
        train_images = _stacked(train_images, mode, size, None, options.train_split)
        size = train_images.shape[1]
        validation_images = _stacked(validation_images, mode, size, options.validation_resize, "validation")
        mean, std = channel_statistics(train_images)
    assert size is not None  # ImageArguments sees to it
    train = ImageSet(train_images, train_labels, options, mode, mean, std, seed)
    validation = ImageSet(validation_images, validation_labels, options, mode, mean, std)
    return ImageData(train, validation, classes, len(mean), size, mean, std)


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, for values in [0, 1]: exact, and without a copy in floating point.

    Args:
        images: (count, height, width, channels) uint8.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in images.unbind(3):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean.append((share * levels).sum().item())
        std.append(max(1e-3, (share * (levels - mean[-1]).square()).sum().sqrt().item()))
    return mean, std


def _stacked(images: Iterable[Image.Image], mode: str, size: int | None, resize_to: int | None, split: str) -> Tensor:
    """All images as one (count, size, size, channels) uint8 tensor."""
    decoded: list[Any] = []
    for row, image in enumerate(_readable(images, split)):
        side = size or (len(decoded[0]) if decoded else image.width)
        if size is None and image.size != (side, side):
            wanted = f"{side}x{side} like those before" if decoded else "square"
            raise UserError(
                f"image_size: image {row} of the {split} split is {image.width}x{image.height}, not {wanted}; "
                "give the size to which all shall be brought"
            )
        decoded.append(to_tensor(resize_and_center(image.convert(mode), side, resize_to)))
    return torch.stack(decoded)


def _readable(images: Iterable[Image.Image], split: str) -> Iterable[Image.Image]:
    row = 0
    iterator = iter(images)
    while True:
        try:
            image = next(iterator)
        except StopIteration:
            return
        except OSError as error:
            raise UserError(f"dataset: image {row} of the {split} split cannot be read ({error})") from error
        yield image
        row += 1


# ---------------------------------------------------------------- sources


def _held_out(count: int, fraction: float) -> tuple[list[int], list[int]]:
    """Rows to train on and rows to validate on, whatever the run's seed."""
    order = np.random.default_rng(0).permutation(count).tolist()
    held = max(1, round(fraction * count))
    if held >= count:
        raise UserError(f"validation_fraction: {count} images cannot be split at {fraction}; give validation_split")
    return sorted(order[held:]), sorted(order[:held])


def _digits(options: ImageArguments) -> tuple[Any, Any, int, str]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("dataset: `digits` needs the package scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), 0 to 16
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    train, validation = (
        ([Image.fromarray(pixels[row]) for row in rows], labels[rows])
        for rows in _held_out(len(pixels), options.validation_fraction)
    )
    return train, validation, 10, "L"


def _splits(options: ImageArguments) -> tuple[Any, Any, int, str]:
    splits = _open(options)
    if options.train_split not in splits:
        raise UserError(f"train_split: {options.dataset} has no split {options.train_split!r}, only {list(splits)}")
    name = options.validation_split or next((s for s in ("validation", "test") if s in splits), None)
    if name is not None and name not in splits:
        raise UserError(f"validation_split: {options.dataset} has no split {name!r}, only {list(splits)}")
    train = splits[options.train_split]
    image, label = _columns(train.features, options)
    names = getattr(train.features[label], "names", None)
    if name is None or name == options.train_split:
        rows = _held_out(len(train), options.validation_fraction)
        train, validation = train.select(rows[0]), train.select(rows[1])
    else:
        validation = splits[name]
        if missing := [column for column in (image, label) if column not in validation.column_names]:
            raise UserError(f"validation_split: {name!r} has no column {missing[0]!r}, only {validation.column_names}")
    if not len(train) or not len(validation):
        raise UserError(f"dataset: {options.dataset} has an empty split")
    labels = _labels(train, label, options.train_split, names)
    classes = len(names) if names else int(labels.max()) + 1
    found = [(_images(train, image), labels)]
    found.append((_images(validation, image), _labels(validation, label, name or options.train_split, names, classes)))
    mode = "L" if next(iter(_readable(found[0][0], options.train_split))).mode in ("1", "L") else "RGB"
    return found[0], found[1], classes, mode


def _open(options: ImageArguments) -> Any:
    """The splits as `datasets.Dataset`s by name."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    folder = Path(options.dataset)
    if folder.is_dir():
        tables = sorted(folder.glob("*.parquet"))
        if not tables and not any(path.suffix.lower() in _SUFFIXES for path in folder.rglob("*")):
            raise UserError(f"dataset: {options.dataset} holds neither *.parquet files nor images")
        files: dict[str, list[str]] = {}
        for table in tables:
            split = next((_SPLITS[word] for word in _SPLITS if table.stem.lower().startswith(word)), "")
            files.setdefault(split, []).append(str(table))
        if list(files) == [""]:
            files = {"train": files[""]}
        elif "" in files:
            raise UserError(
                f"dataset: {Path(files[''][0]).name} names no split, as other files of {options.dataset} do; "
                f"begin its name with one of {', '.join(_SPLITS)}, or move it away"
            )
    elif folder.exists() or options.dataset.startswith((".", "/", "~")) or options.dataset.count("/") > 1:
        raise UserError(f"dataset: {options.dataset!r} is no folder; a folder, a name on the hub, or `digits`")
    try:
        if not folder.is_dir():
            return load_dataset(options.dataset, options.dataset_config)
        if tables:
            return load_dataset("parquet", data_files=files)
        return load_dataset("imagefolder", data_dir=str(folder))
    except (OSError, RuntimeError, ValueError, DatasetNotFoundError, DatasetGenerationError) as error:
        raise UserError(f"dataset: could not load {options.dataset} ({error}); a local folder also does") from error


def _columns(features: Any, options: ImageArguments) -> tuple[str, str]:
    """The names of the images' and the labels' columns."""
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    def bytes_of_images(feature: Any) -> bool:
        return isinstance(feature, ImageFeature) or (isinstance(feature, dict) and "bytes" in feature)

    fitting = {
        "image_column": [name for name, feature in features.items() if bytes_of_images(feature)],
        "label_column": [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
        or [name for name in ("label", "labels", "target") if name in features],
    }
    chosen = []
    for option, names in fitting.items():
        wanted = getattr(options, option)
        if wanted is not None and wanted not in features:
            near = did_you_mean(wanted, features)
            raise UserError(f"{option}: {options.dataset} has no column {wanted!r}, only {list(features)}{near}")
        if wanted is None and len(names) != 1:
            which = f"several that fit: {names}" if names else f"none that fits, only {list(features)}"
            raise UserError(f"{option}: {options.dataset} has {which}; name one")
        chosen.append(wanted or names[0])
    return chosen[0], chosen[1]


def _images(split: Any, column: str) -> Any:
    from datasets import Image as ImageFeature

    if not isinstance(split.features[column], ImageFeature):  # parquet that another program wrote
        try:
            split = split.cast_column(column, ImageFeature())
        except (TypeError, ValueError, NotImplementedError) as error:
            raise UserError(f"image_column: {column!r} holds no images ({error})") from error
    return split[column]


def _labels(split: Any, column: str, name: str, names: Sequence[str] | None, classes: int | None = None) -> Tensor:
    """(count,) int64, each checked to be one of the classes."""
    values = split[column][:]
    count = len(names) if names else classes
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0 or (count and value >= count):
            rule = f"from 0 to {count - 1}" if count else "a whole number of at least 0"
            raise UserError(
                f"label_column: the label of image {row} of the {name} split must be {rule}, got {value!r}; "
                "is this split labelled, is this the right column?"
            )
    return torch.tensor(values, dtype=torch.int64)
