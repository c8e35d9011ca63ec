"""Concept images with captions: reading, checking, and samples that depend on nothing but the seed and their number.

Sample number n of a run has its image, crop, flip, noise and timestep from a generator seeded with (seed, n). So the
order of the data needs no state to resume, and a step on several processes uses what one process would have used.
"""

import csv
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from recipes.common.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)
_MAX_ASPECT = 20
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Example:
    """An image file (or its bytes, for a set from the hub) with its caption."""

    name: str
    source: Path | bytes
    caption: str


def open_image(source: Path | bytes) -> Image.Image:
    """The image in RGB, turned as its EXIF tag says, transparent parts white."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as stored:
        image: Image.Image = ImageOps.exif_transpose(stored)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"data: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"data: {path} must be UTF-8 ({error}); convert it, for example by iconv") from error


def _rows(path: Path) -> list[dict[str, Any]]:
    text = _read_text(path)
    if path.suffix == ".csv":
        try:
            return list(csv.DictReader(io.StringIO(text), strict=True))
        except csv.Error as error:
            raise UserError(f"{path}: not CSV ({error}); double each quotation mark in a quoted cell") from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from error
        if row is not None:
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: expected an object with file_name and text, got {line!r}")
            rows.append(row)
    return rows


def _captions(folder: Path, images: list[Path]) -> dict[str, str]:
    """Captions by file name: from `metadata.jsonl` or `metadata.csv`, else from `NAME.txt` beside each image."""
    path = next((p for name in ("metadata.jsonl", "metadata.csv") if (p := folder / name).is_file()), None)
    if path is None:
        beside = {image.name: image.with_suffix(".txt") for image in images}
        if not any(text.is_file() for text in beside.values()):
            raise UserError(
                f"data: {folder} has no captions; add metadata.jsonl (lines of file_name and text), "
                "a .txt beside each image, or set --caption for all of them"
            )
        if missing := sorted(name for name, text in beside.items() if not text.is_file()):
            raise UserError(f"data: no caption file for {_some(missing)} in {folder}")
        return {name: _read_text(text).strip() for name, text in beside.items()}
    captions: dict[str, str] = {}
    for number, row in enumerate(_rows(path), 1):
        name, text = row.get("file_name"), row.get("text")
        if not name or not isinstance(name, str) or not isinstance(text, str):
            keys = ", ".join(map(str, row))
            raise UserError(f"{path}, entry {number}: expected file_name and text, got the keys {keys or 'none'}")
        if name in captions:
            raise UserError(f"{path}: {name} is listed twice")
        captions[name] = text.strip()
    names = {image.name for image in images}
    if missing := sorted(captions.keys() - names):
        raise UserError(f"{path} lists {_some(missing)}, not in {folder}{did_you_mean(missing[0], names)}")
    if missing := sorted(names - captions.keys()):
        raise UserError(f"{path} has no caption for {_some(missing)}; add a line, or move the image away")
    return captions


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_folder(folder: str | Path, caption: str | None = None) -> list[Example]:
    """The images of a folder in the order of their names, with their captions or with `caption` for all."""
    folder = Path(folder)
    try:
        images = sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES)
    except OSError as error:
        raise UserError(f"data: cannot read the folder {folder}: {error.strerror}") from error
    if not images:
        raise UserError(f"data: no images in {folder}; expected files ending in {', '.join(sorted(_SUFFIXES))}")
    captions = dict.fromkeys((p.name for p in images), caption) if caption else _captions(folder, images)
    return [Example(image.name, image, captions[image.name] or "") for image in images]


def read_hub(name: str, split: str, image_column: str, caption_column: str, caption: str | None) -> list[Example]:
    """The rows of a data set on the hub, not decoded."""
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises a dozen kinds for a name that is wrong or cannot be reached
        raise UserError(f"data: {name!r} is no folder here, and as a hub data set: {error}") from error
    needed = [image_column] if caption else [image_column, caption_column]
    if missing := [column for column in needed if column not in rows.column_names]:
        raise UserError(f"data: {name!r} has no column {missing[0]!r}; its columns: {', '.join(rows.column_names)}")
    if not isinstance(rows.features[image_column], datasets.Image):
        raise UserError(f"data: the column {image_column!r} of {name!r} does not hold images")
    rows = rows.cast_column(image_column, datasets.Image(decode=False))
    return [
        Example(
            row[image_column]["path"] or f"row {i}",
            row[image_column]["bytes"] or Path(row[image_column]["path"]),
            caption or str(row[caption_column]),
        )
        for i, row in enumerate(rows)
    ]


def usable(examples: list[Example], on_bad_image: str, max_pixels: int) -> list[Example]:
    """The examples whose image can be decoded and is not huge; a bad one is named, and skipped or an error."""
    good = []
    for example in examples:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is the rule here
                source = io.BytesIO(example.source) if isinstance(example.source, bytes) else example.source
                with Image.open(source) as image:
                    width, height = image.size
                    if width * height > max_pixels:
                        raise ValueError(f"{width}x{height} has more than max_image_pixels ({max_pixels}) pixels")
                    if max(width, height) > _MAX_ASPECT * min(width, height):  # huge once its shorter side is scaled
                        raise ValueError(f"{width}x{height} is over {_MAX_ASPECT} times as long as wide; crop it")
                open_image(example.source)
        except Exception as error:  # Pillow raises a dozen kinds for damaged files
            message = f"data: bad image {example.name}: {error}"
            if on_bad_image == "stop":
                raise UserError(f"{message}; --on_bad_image skip trains on the others") from error
            logger.warning("%s; skipped", message)
        else:
            good.append(example)
    if not good:
        raise UserError(f"data: none of {len(examples)} images is usable")
    return good


def load_examples(
    data: str,
    caption: str | None = None,
    split: str = "train",
    image_column: str = "image",
    caption_column: str = "text",
    on_bad_image: str = "skip",
    max_image_pixels: int = 50_000_000,
) -> list[Example]:
    """Checked examples from a folder, or from the hub if there is no such folder.

    Raises:
        UserError: no images, captions that do not match them, nothing usable, or a bad image with on_bad_image="stop".
    """
    path = Path(data)
    is_path = path.exists() or path.is_absolute() or data.startswith(".")
    found = read_folder(path, caption) if is_path else read_hub(data, split, image_column, caption_column, caption)
    return usable(found, on_bad_image, max_image_pixels)


class ConceptImages(Dataset[dict[str, Any]]):
    """Training samples by number, without end: each epoch is a new order of the examples.

    An item holds `number`, `index` (of the example), `flipped`, `pixels` (3, resolution, resolution) in [-1, 1] and
    `sizes`, SDXL's (original height, width, top and left of the crop, height and width of the result).
    """

    def __init__(self, examples: list[Example], resolution: int, seed: int, random_crop: bool, flip: bool) -> None:
        self.examples = examples
        self.resolution = resolution
        self.seed = seed
        self.random_crop = random_crop
        self.flip = flip

    def __len__(self) -> int:
        return len(self.examples)

    def pick(self, number: int) -> tuple[int, bool, np.random.Generator]:
        """Which example sample `number` is, whether it is mirrored, and the generator for its crop."""
        epoch, place = divmod(number, len(self.examples))
        index = int(np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.examples))[place])
        rng = np.random.default_rng([self.seed, 1, number])
        return index, bool(self.flip and rng.random() < 0.5), rng

    def __getitem__(self, number: int) -> dict[str, Any]:
        index, flipped, rng = self.pick(number)
        return {"number": number, **self.item(index, flipped, rng if self.random_crop else None)}

    def item(self, index: int, flipped: bool, rng: np.random.Generator | None) -> dict[str, Any]:
        """An example, resized so that its shorter side is the resolution, and cropped: in the centre without `rng`."""
        image = open_image(self.examples[index].source)
        width, height = image.size
        scale = self.resolution / min(width, height)
        across, down = max(self.resolution, round(width * scale)), max(self.resolution, round(height * scale))
        if (across, down) != (width, height):
            image = image.resize((across, down), Image.Resampling.LANCZOS)
        spare = (down - self.resolution, across - self.resolution)
        top, left = (s // 2 if rng is None else int(rng.integers(s + 1)) for s in spare)
        pixels = np.asarray(image)[top : top + self.resolution, left : left + self.resolution]
        if flipped:
            pixels = pixels[:, ::-1]
        return {
            "index": index,
            "flipped": flipped,
            "pixels": torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1.0,
            "sizes": torch.tensor([height, width, top, left, self.resolution, self.resolution]),
        }


class SampleNumbers(Sampler[list[int]]):
    """The sample numbers of this process's batches, from batch `first` to batch `last`, all processes side by side."""

    def __init__(self, first: int, last: int, batch_size: int, process: int, processes: int) -> None:
        self.batches = range(first, last)
        self.batch_size = batch_size
        self.process = process
        self.processes = processes

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            start = (batch * self.processes + self.process) * self.batch_size
            yield list(range(start, start + self.batch_size))


class CachedLatents(Dataset[dict[str, Any]]):
    """The samples of `images` with the VAE's posterior (`mean` and `std`) instead of pixels, encoded once.

    Args:
        images: without random crops.
        encode: from pixels (1, 3, height, width) to mean and standard deviation, each (1, channels, height, width).
    """

    def __init__(self, images: ConceptImages, encode: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self.images = images
        self.known: dict[tuple[int, bool], dict[str, Any]] = {}
        for index in range(len(images)):
            for flipped in (False, True) if images.flip else (False,):
                item = images.item(index, flipped, None)
                mean, std = encode(item.pop("pixels")[None])
                self.known[index, flipped] = {**item, "mean": mean[0].cpu(), "std": std[0].cpu()}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> dict[str, Any]:
        index, flipped, _ = self.images.pick(number)
        return {"number": number, **self.known[index, flipped]}
