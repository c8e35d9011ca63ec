"""One picture of several diffusion LoRA runs: a row for each run, a column for each validation prompt.

python -m recipes.diffusion.grid --runs out/sgd_sai out/adamw --output comparison.png [--report_to tensorboard]
"""

from recipes.common.start import run_main

import json
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from recipes.common.config import parse_config
from recipes.common.errors import UserError
from recipes.diffusion.data import open_image
from recipes.diffusion.samples import grid, save_picture
from recipes.diffusion.validation import new_accelerator, track


@dataclass
class GridArguments:
    """Which runs, and where the picture goes."""

    runs: list[str] = field(metadata={"help": "Output folders of recipes.diffusion."})
    output: str = field(default="comparison.png", metadata={"help": "The picture."})
    cell: int = field(default=160, metadata={"help": "Width of one sample in the picture, in pixels."})
    report_to: str | None = field(
        default=None, metadata={"help": "An accelerate tracker for the picture; files go to logs/ beside it."}
    )

    def __post_init__(self) -> None:
        if self.cell < 1:
            raise UserError(f"cell must be at least 1, got {self.cell}")


def last_samples(folder: Path) -> tuple[str, list[str], list[Image.Image]]:
    """Label (optimizer and learning rate), prompts and pictures of a run's last samples."""
    try:
        settings = json.loads((folder / "record.json").read_text(encoding="utf-8"))["config"]
    except OSError as error:
        raise UserError(f"runs: {folder} holds no finished run: {error.strerror}") from error
    steps = sorted((folder / "samples").glob("step-*"))
    if not steps:
        raise UserError(f"runs: {folder} has no samples; it was run without validation_prompts")
    prompts = [prompt for prompt in settings["validation_prompts"] for _ in range(settings["validation_images"])]
    label = " ".join(filter(None, (settings["optim"], settings["optim_args"], f"{settings['learning_rate']:g}")))
    return label, prompts, [open_image(path) for path in sorted(steps[-1].glob("*.png"))]


def main() -> None:
    [config] = parse_config([GridArguments], description=__doc__)
    labels, prompts, pictures = zip(*(last_samples(Path(run)) for run in config.runs), strict=True)
    for run, found in zip(config.runs, prompts, strict=True):
        if found != prompts[0]:
            raise UserError(f"runs: {run} has other prompts than {config.runs[0]}")
    # before the picture is written: a tracker that is not there must not leave half of the work done
    accelerator = new_accelerator(config.report_to, Path(config.output).parent / "logs")
    path = save_picture(grid(list(zip(labels, pictures, strict=True)), prompts[0], config.cell), config.output)
    if config.report_to:
        accelerator.init_trackers("diffusion_grid")
        track(accelerator.trackers, path, step=0)
    accelerator.end_training()
    print(path)


if __name__ == "__main__":
    run_main(main)
