"""Concept LoRA without downloads: SGD-SaI beside AdamW and scaled AdamW, with samples that a program can judge.

    python recipes/diffusion_demo.py

Pretrains a small Stable Diffusion on drawings (`diffusion_toy.py`), then teaches it one combination of shape and
pattern that it never saw, from five drawings bound to the token `<V>`, by `diffusion_lora.py` with each optimizer at
several learning rates. Then `<V>` is asked for in colours and places in which the five drawings did not show it.
Writes the table to `output_dir/record.json` and the pictures to `output_dir/grid.png`.
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from recipes.common import UserError, parse_config, run_main, run_record, write_json, write_text
from recipes.diffusion_config import DiffusionArguments
from recipes.diffusion_data import open_image
from recipes.diffusion_lora import in_one_piece, run
from recipes.diffusion_model import load_concept, load_pipeline
from recipes.diffusion_pretrain import draw_samples, new_pipeline, obeyed, pretrain
from recipes.diffusion_samples import grid, save_picture
from recipes.diffusion_toy import CONCEPT, PATTERNS, SHAPES, Drawing, combinations, draw
from recipes.optimizers import OptimizerArguments

TOKEN = "<V>"
PRETRAINING = "pretraining.json"  # beside the base model: how it was made
# The five drawings of the concept: each colour and each place is there, most pairs of them are not.
_SHOWN = (
    *(("red", "top left"), ("green", "top right"), ("blue", "bottom left"), ("yellow", "bottom right")),
    ("red", "bottom right"),
)
# By the label of the table: name, arguments, and whether the learning rate is in the paper's units, not AdamW's.
OPTIMIZERS: dict[str, tuple[str, str | None, bool]] = {
    "SGD-SaI": ("sgd_sai", None, False),
    "SGD-SaI raw": ("sgd_sai", "scaling=raw", True),
    "AdamW": ("adamw_torch", None, False),
    "scaled AdamW": ("scaled_adamw", None, False),
}


@dataclass
class DemoArguments:
    """Sizes of the demo. The defaults take about ten minutes on two CPU cores."""

    output_dir: str = field(default="out/diffusion_demo", metadata={"help": "Where everything is written."})
    record: str | None = field(default=None, metadata={"help": "Where the table goes besides output_dir/record.json."})
    grid: str | None = field(default=None, metadata={"help": "Where the pictures go besides output_dir/grid.png."})
    base: str | None = field(default=None, metadata={"help": "A pretrained toy pipeline; by default it is trained."})
    pretrain_steps: int = 1500
    pretrain_batch_size: int = 32
    pretrain_learning_rate: float = 3e-3
    lora_steps: int = field(default=100, metadata={"help": "Optimizer steps of each run, five drawings a step."})
    lora_r: int = 4
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-3, 3e-3, 1e-2], metadata={"help": "Of the optimizers in AdamW's units."}
    )
    raw_learning_rates: list[float] = field(
        default_factory=lambda: [0.1], metadata={"help": "Of SGD-SaI in the paper's units; 0.1 is its default there."}
    )
    samples: int = field(default=2, metadata={"help": "Of each of the 11 prompts that no drawing shows."})
    inference_steps: int = 12
    guidance_scale: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("pretrain_steps", "pretrain_batch_size", "lora_steps", "lora_r", "samples", "inference_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")


def write_concept(folder: Path) -> None:
    """The five drawings and their captions, as an image folder."""
    lines = []
    folder.mkdir(parents=True, exist_ok=True)
    for i, (colour, place) in enumerate(_SHOWN):
        drawing = Drawing(*CONCEPT, colour, place)
        save_picture(Image.fromarray(draw(drawing)), folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": drawing.caption(TOKEN)}))
    write_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")


def unseen() -> list[Drawing]:
    """The concept in the pairs of colour and place that no drawing of it shows."""
    return [drawing for drawing in combinations(concept=True) if (drawing.colour, drawing.place) not in _SHOWN]


def judge_base(pipe: Any, config: DemoArguments) -> dict[str, dict[str, float]]:
    """How well the pretrained model obeys: prompts as in its training, and the concept in its own words."""
    rng = np.random.default_rng(config.seed)
    known = combinations(concept=False)
    known = [known[i] for i in rng.permutation(len(known))[:64]]
    concept = unseen()
    settings = (config.inference_steps, config.guidance_scale, config.seed)
    return {
        "prompts of pretraining": obeyed(draw_samples(pipe, known, None, *settings), known),
        "the concept by its words, never drawn": obeyed(draw_samples(pipe, concept, None, *settings), concept),
        "the word that <V> starts from": obeyed(draw_samples(pipe, concept, CONCEPT[0], *settings), concept),
    }


def compare(base: Path, config: DemoArguments) -> tuple[list[dict[str, Any]], list[tuple[str, list[Image.Image]]]]:
    """A LoRA for each optimizer and learning rate: their scores, and for the grid a row of pictures each."""
    output_dir = Path(config.output_dir)
    write_concept(output_dir / "concept")
    wanted = unseen() * config.samples
    table, rows = [], []
    for label, (optim, optim_args, raw) in OPTIMIZERS.items():
        for rate in config.raw_learning_rates if raw else config.learning_rates:
            folder = output_dir / f"{label.replace(' ', '-')}-{rate:g}"
            record = run(
                DiffusionArguments(
                    data=str(output_dir / "concept"),
                    model=str(base),
                    output_dir=str(folder),
                    concept_tokens=[TOKEN],
                    concept_init=[CONCEPT[0]],
                    lora_r=config.lora_r,
                    train_batch_size=len(_SHOWN),
                    max_steps=config.lora_steps,
                    cache_latents=True,
                    logging_steps=config.lora_steps,
                    seed=config.seed,
                ),
                OptimizerArguments(optim=optim, optim_args=optim_args, learning_rate=rate),
            )
            pipe = load_pipeline(str(base))
            load_concept(pipe, folder / "lora")
            pictures = draw_samples(pipe, wanted, TOKEN, config.inference_steps, config.guidance_scale, config.seed)
            table.append(
                {
                    "optimizer": label,
                    "learning_rate": rate,
                    **obeyed(pictures, wanted),
                    "optimizer_state_bytes": record["optimizer_state_bytes"],
                    "step_ms": record["time"].get("step_ms"),
                }
            )
            rows.append((f"{label} {rate:g}", [Image.fromarray(picture) for picture in pictures[: len(unseen())]]))
    return table, rows


def as_text(base: dict[str, dict[str, float]], table: list[dict[str, Any]]) -> str:
    """The scores as a Markdown table."""
    keys = ("all", "object", "colour", "place", "nothing")
    lines = [f"| | lr | {' | '.join(keys)} |", "|---|---:|" + "---:|" * len(keys)]
    rows = [(name, "", scores) for name, scores in base.items()]
    rows += [(row["optimizer"], f"{row['learning_rate']:g}", row) for row in table]
    lines += [f"| {name} | {rate} | {' | '.join(f'{100 * r[key]:.0f}' for key in keys)} |" for name, rate, r in rows]
    return "\n".join(lines)


def demo(config: DemoArguments) -> dict[str, Any]:
    """Pretrain, compare, write; returns the record."""
    output_dir = Path(config.output_dir)
    base = Path(config.base or output_dir / "base")
    if config.base is None:
        torch.manual_seed(config.seed)
        pipe = new_pipeline()
        pretraining = pretrain(
            pipe, config.pretrain_steps, config.pretrain_batch_size, config.pretrain_learning_rate, config.seed
        )
        in_one_piece(base, pipe.save_pretrained)
        write_json(base / PRETRAINING, pretraining)
    about = base / PRETRAINING
    base_scores = judge_base(load_pipeline(str(base)), config)
    table, rows = compare(base, config)
    five = [open_image(path) for path in sorted((output_dir / "concept").glob("*.png"))]
    pictures = grid([("drawn for training", five), *rows], [drawing.caption(TOKEN) for drawing in unseen()], cell=64)
    for path in filter(None, (output_dir / "grid.png", config.grid)):
        save_picture(pictures, path)
    record = run_record(
        "diffusion_demo",
        (config,),
        concept=" ".join(CONCEPT[::-1]),
        combinations_pretrained=len(SHAPES) * len(PATTERNS) - 1,
        pretraining=json.loads(about.read_text(encoding="utf-8")) if about.is_file() else None,
        base=base_scores,
        runs=table,
    )
    for path in filter(None, (output_dir / "record.json", config.record)):
        write_json(path, record)
    print(as_text(base_scores, table))
    print(f"per cent of samples, judged by the detector of diffusion_toy.py; pictures: {output_dir / 'grid.png'}")
    return record


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    [config] = parse_config([DemoArguments], description=__doc__)
    demo(config)


if __name__ == "__main__":
    run_main(main)
