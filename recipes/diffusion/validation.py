"""Looking at a run: samples of the validation prompts, their grid over the steps, and their CLIP scores."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from recipes.common.errors import UserError
from recipes.diffusion.config import DiffusionArguments
from recipes.diffusion.data import open_image
from recipes.diffusion.samples import grid, sample, save_picture
from recipes.diffusion.scores import ClipScorer


def new_accelerator(report_to: str | None, logs: Path, **settings: Any) -> Accelerator:
    """An `Accelerator` with a tracker.

    Args:
        report_to: name of the tracker, or None.
        logs: a folder, for trackers that write files.
        **settings: of the accelerator.

    Raises:
        UserError: the tracker is unknown or not installed, of which accelerate only warns.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            accelerator = Accelerator(log_with=report_to, project_dir=str(logs) if report_to else None, **settings)
    except ValueError as error:
        if report_to is None:
            raise
        raise UserError(f"report_to: {error}") from error
    if report_to and not accelerator.log_with:
        raise UserError(f"report_to: {report_to} is not installed: pip install {report_to}")
    return accelerator


def track(trackers: list[Any], path: Path, step: int) -> None:
    """Send a picture to those of accelerate's trackers that take pictures."""
    picture = np.asarray(open_image(path))[None]  # (1, height, width, 3)
    for tracker in trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": picture}, step=step, **layout)


class Validation:
    """Draws the validation prompts now and then, always from the same seeds, and keeps them under `samples/`.

    Args:
        config: prompts, number of images, sampler settings.
        folder: `samples/` of the run; emptied of pictures after step `first_step`, which a resumed run draws again.
        size: of the pictures, in pixels.
        first_step: the run starts or resumes here.
        scores: whether this process loads the CLIP model: now, so that one that is not there does not end a run.
    """

    def __init__(self, config: DiffusionArguments, folder: Path, size: int, first_step: int, scores: bool) -> None:
        self.config = config
        self.folder = folder
        self.size = size
        self.scorer = ClipScorer(config.clip_model) if scores and config.clip_model else None
        self.prompts = [prompt for prompt in config.validation_prompts or [] for _ in range(config.validation_images)]
        for old in folder.glob("step-*"):
            if first_step == 0 or int(old.name.removeprefix("step-")) > first_step:
                shutil.rmtree(old)

    def due(self, step: int) -> bool:
        """Whether samples are drawn at this step: every `validation_steps`, and at the end."""
        every = self.config.validation_steps
        return bool(self.prompts) and (step == self.config.max_steps or (every > 0 and step % every == 0))

    def draw(self, pipe: Any, step: int) -> list[Image.Image]:
        """Draw the prompts and write the pictures and the grid of all steps so far."""
        seeds = [self.config.seed + i for i in range(len(self.prompts))]
        found = sample(pipe, self.prompts, seeds, self.config.inference_steps, self.config.guidance_scale, 4, self.size)
        for i, picture in enumerate(found):
            save_picture(picture, self.folder / f"step-{step:06d}" / f"{i:02d}.png")
        save_picture(self.grid(), self.folder / "grid.png")
        return found

    def grid(self) -> Image.Image:
        """A row of pictures for each step, a column for each prompt."""
        rows = []
        for folder in sorted(self.folder.glob("step-*")):
            pictures = [open_image(path) for path in sorted(folder.glob("*.png"))]
            rows.append((f"step {int(folder.name.removeprefix('step-'))}", pictures))
        return grid(rows, self.prompts)

    def score(
        self, pictures: list[Image.Image], references: list[Image.Image], device: torch.device
    ) -> dict[str, float]:
        """CLIP scores of the last samples, if a CLIP model is given; the new tokens are read as their first words."""
        if self.scorer is None:
            return {}
        prompts = self.prompts
        for token, words in zip(self.config.concept_tokens, self.config.concept_init or [], strict=True):
            known = " ".join(word for word in words.split("+") if word != "random")
            prompts = [prompt.replace(token, known) for prompt in prompts]
        return self.scorer.to(device).score(pictures, prompts, references)
