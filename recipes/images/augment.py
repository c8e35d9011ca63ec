"""Random changes of training images: shifts and mirroring of batches of tensors, crops and RandAugment of PIL images.

Every draw depends on the seed, the epoch and the image's number only: not on the batch size, the number of processes
or the optimizer, so that rivals see the same images and a resumed run sees what the run never killed would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.nn.functional import pad


def shift_and_flip(pixels: Tensor, offsets: Tensor, flips: Tensor, padding: int) -> Tensor:
    """Each image padded with black and cropped to its size at its own place, and mirrored where `flips` says so.

    Args:
        pixels: (batch, height, width, channels).
        offsets: (batch, 2) int64, row and column of the crop's corner in the padded image, 0 to 2 * padding.
        flips: (batch,) bool.
        padding: in pixels, on each side.

    Returns:
        Same shape and dtype as `pixels`.
    """
    batch, height, width, _ = pixels.shape
    padded = pad(pixels, (0, 0, padding, padding, padding, padding))
    rows = offsets[:, :1] + torch.arange(height)  # (batch, height)
    columns = offsets[:, 1:] + torch.arange(width)  # (batch, width)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    return padded[torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]


def mix(batch: dict[str, Tensor], alpha: float, rng: np.random.Generator) -> dict[str, Tensor]:
    """mixup (arXiv 1710.09412): each image blended with another of its batch, one share for the batch.

    Args:
        batch: `pixel_values` (batch, channels, height, width) float32 and `labels` (batch,) int64.
        alpha: the first image's share is drawn from Beta(alpha, alpha).
        rng: draws the share.

    Returns:
        The batch with blended pixels and, besides `labels`, `other_labels` (batch,) and `share` (batch,) float32.
    """
    share = float(rng.beta(alpha, alpha))
    pixels, labels = batch["pixel_values"], batch["labels"]
    return {
        "pixel_values": share * pixels + (1 - share) * pixels.roll(1, 0),
        "labels": labels,
        "other_labels": labels.roll(1, 0),
        "share": torch.full((len(labels),), share),
    }


# ---------------------------------------------------------------- PIL images


def resize_and_center(image: Image.Image, size: int, resize_to: int | None = None) -> Image.Image:
    """The middle `size` x `size` pixels after the shorter side was resized to `resize_to` (`size` by default)."""
    scale = (resize_to or size) / min(image.size)
    if scale != 1:
        wide, high = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((wide, high), Image.Resampling.BILINEAR)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_resized_crop(image: Image.Image, size: int, smallest: float, rng: np.random.Generator) -> Image.Image:
    """A crop of `smallest` to 1 of the area with sides 3:4 to 4:3, resized ("Inception crop", arXiv 1409.4842)."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(smallest, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(rng.integers(width - wide + 1)), int(rng.integers(height - high + 1))
            box = (left, top, left + wide, top + high)
            return image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return resize_and_center(image, size)


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    grey = 128 if image.mode == "L" else (128, 128, 128)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=grey)


def _enhance(kind: Callable[[Image.Image], Any]) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, level: kind(image).enhance(1 + 0.9 * level)


# The fourteen operations of RandAugment (arXiv 1909.13719, section 3); `level` is the magnitude over 10, with a sign.
OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, level: image,
    "autocontrast": lambda image, level: ImageOps.autocontrast(image),
    "equalize": lambda image, level: ImageOps.equalize(image),
    "rotate": lambda image, level: image.rotate(30 * level, fillcolor=128 if image.mode == "L" else (128, 128, 128)),
    "solarize": lambda image, level: ImageOps.solarize(image, round(256 * (1 - abs(level)))),
    "posterize": lambda image, level: ImageOps.posterize(image, max(1, 8 - round(4 * abs(level)))),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, level: _affine(image, (1, 0.3 * level, 0, 0, 1, 0)),
    "shear_y": lambda image, level: _affine(image, (1, 0, 0, 0.3 * level, 1, 0)),
    "translate_x": lambda image, level: _affine(image, (1, 0, 0.45 * level * image.width, 0, 1, 0)),
    "translate_y": lambda image, level: _affine(image, (1, 0, 0, 0, 1, 0.45 * level * image.height)),
}


def rand_augment(image: Image.Image, layers: int, magnitude: float, rng: np.random.Generator) -> Image.Image:
    """`layers` of the `OPERATIONS`, drawn with replacement, at `magnitude` of 0 to 10, to either side."""
    operations = list(OPERATIONS.values())
    for _ in range(layers):
        sign = 1 if rng.random() < 0.5 else -1
        image = operations[int(rng.integers(len(operations)))](image, sign * magnitude / 10)
    return image
