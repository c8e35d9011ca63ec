"""Looking at a run: samples of the validation prompts, their grid over the steps, and their CLIP scores."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from recipes.diffusion_config import DiffusionArguments
from recipes.diffusion_data import open_image
from recipes.diffusion_samples import grid, sample, save_picture


class Validation:
    """Draws the validation prompts now and then, always from the same seeds, and keeps them under `samples/`.

    Args:
        config: prompts, number of images, sampler settings.
        folder: `samples/` of the run; emptied of pictures after step `first_step`, which a resumed run draws again.
        size: of the pictures, in pixels.
        first_step: the run starts or goes on from here.
    """

    def __init__(self, config: DiffusionArguments, folder: Path, size: int, first_step: int) -> None:
        self.config = config
        self.folder = folder
        self.size = size
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

    def track(self, trackers: list[Any], step: int) -> None:
        """Send the grid to those of accelerate's trackers that take pictures."""
        picture = np.asarray(open_image(self.folder / "grid.png"))[None]  # (1, height, width, 3)
        for tracker in trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"validation": picture}, step=step, **layout)

    def score(
        self, pictures: list[Image.Image], references: list[Image.Image], device: torch.device
    ) -> dict[str, float]:
        """CLIP scores of the last samples, if a CLIP model is given; the new tokens are read as their first words."""
        if not self.config.clip_model:
            return {}
        from recipes.diffusion_scores import ClipScorer

        prompts = self.prompts
        for token, words in zip(self.config.concept_tokens, self.config.concept_init or [], strict=True):
            known = " ".join(word for word in words.split("+") if word != "random")
            prompts = [prompt.replace(token, known) for prompt in prompts]
        return ClipScorer(self.config.clip_model, device).score(pictures, prompts, references)
