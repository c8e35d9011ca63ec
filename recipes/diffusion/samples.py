"""Pictures from a pipeline, and grids of pictures with labels."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

_MARGIN = 4


def sample(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float, batch_size: int, size: int
) -> list[Image.Image]:
    """One picture a prompt, each from a generator with its own seed, so that batches do not matter.

    Args:
        pipe: a Stable Diffusion pipeline, with whatever is loaded into it.
        prompts: n of them.
        seeds: n of them.
        steps: of the pipeline's sampler.
        guidance: classifier-free guidance scale; 1 is none.
        batch_size: pictures at once.
        size: width and height in pixels.
    """
    pictures = []
    for start in range(0, len(prompts), batch_size):
        chunk = slice(start, start + batch_size)
        latents = pipe(
            list(prompts[chunk]),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[chunk]],
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=size,
            width=size,
            output_type="latent",
        ).images
        # Decoded here because the pipeline would do it in the UNet's half precision, in which SDXL's VAE overflows.
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            decoded = pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample
        pictures += pipe.image_processor.postprocess(decoded, output_type="pil")
    return pictures


def grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str], cell: int = 128) -> Image.Image:
    """Labelled rows of pictures.

    Args:
        rows: a label and a picture for each column.
        columns: labels, broken into lines where they do not fit.
        cell: width and height at which each picture is shown, in pixels.
    """
    font: Any = ImageFont.load_default(size=11)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    heads = [_broken(label, font, cell) for label in columns]
    line = sum(font.getmetrics()) + 1
    top = max((head.count("\n") + 1 for head in heads), default=0) * line + 2 * _MARGIN
    left = int(max((pen.textlength(label, font) for label, _ in rows), default=0)) + 2 * _MARGIN
    step = cell + _MARGIN
    sheet = Image.new("RGB", (left + step * len(columns), top + step * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for j, head in enumerate(heads):
        pen.multiline_text((left + j * step, _MARGIN), head, fill="black", font=font, spacing=1)
    for i, (label, pictures) in enumerate(rows):
        y = top + i * step
        pen.text((_MARGIN, y + (cell - line) // 2), label, fill="black", font=font)
        for j, picture in enumerate(pictures):
            # Enlarged pixels stay square; photographs are made smaller smoothly.
            how = Image.Resampling.NEAREST if picture.width < cell else Image.Resampling.LANCZOS
            sheet.paste(picture.convert("RGB").resize((cell, cell), how), (left + j * step, y))
    return sheet


def _broken(label: str, font: Any, width: int) -> str:
    lines = [""]
    for word in label.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def save_picture(picture: Image.Image, path: str | Path) -> Path:
    """Write a PNG in one piece: under a temporary name in the same folder, then renamed. Folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".png")
    os.close(handle)
    try:
        picture.save(temporary, optimize=True)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
