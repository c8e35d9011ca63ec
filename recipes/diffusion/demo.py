"""Concept LoRA without downloads: SGD-SaI beside AdamW and scaled AdamW, with samples that a program can judge.

    python -m recipes.diffusion.demo

Pretrains a small Stable Diffusion on drawings (`diffusion_toy.py`), then teaches it one combination of shape and
pattern that it never saw, from five drawings bound to the token `<V>`, by `recipes.diffusion` with each optimizer at
several learning rates. Then `<V>` is asked for in colours and places in which the five drawings did not show it.
Writes the table to `output_dir/record.json` and the pictures to `output_dir/grid.png`; a second start makes only what
is not there or no longer true (other settings, another optimizer). A record to commit, and its picture:

    python -m recipes.diffusion.demo --record recipes/results/diffusion_demo.json \\
        --grid recipes/results/diffusion_demo.png

With a GPU, larger (not run by us yet):

    python -m recipes.diffusion.demo --output_dir outputs/demo64 --size 64 --channels 64 128 128 256 256 \\
        --pretrain_batch_size 64 --pretrain_steps 20000 --lora_steps 300
"""

from recipes.common.start import run_main

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import hf_sai
from recipes.common import optimizers
from recipes.common.config import parse_config
from recipes.common.errors import UserError, start_logging
from recipes.common.files import check_writable, write_json, write_text
from recipes.common.interrupt import resumable
from recipes.common.optimizers import OptimizerArguments
from recipes.common.provenance import run_record
from recipes.common.records import public_settings
from recipes.diffusion.config import DiffusionArguments
from recipes.diffusion.data import open_image
from recipes.diffusion.model import load_concept, load_pipeline
from recipes.diffusion.pretrain import draw_samples, new_pipeline, obeyed, pretrain
from recipes.diffusion.samples import grid, save_picture
from recipes.diffusion.toy import CONCEPT, PATTERNS, SHAPES, SIZE, Drawing, combinations, draw
from recipes.diffusion.train import fine_tune, in_one_piece

TOKEN = "<V>"
PRETRAINING = "pretraining.json"  # beside the base model: how it was made
SHARES = ("all", "object", "colour", "place", "nothing")  # of `obeyed`
_SCORES = "scores.json"  # of a run: written last, so a run that has it is whole
# The five drawings of the concept: each colour and each place is there, most pairs of them are not.
_SHOWN = (
    *(("red", "top left"), ("green", "top right"), ("blue", "bottom left"), ("yellow", "bottom right")),
    ("red", "bottom right"),
)


@dataclass(frozen=True)
class Contender:
    """An optimizer of the comparison; all have as many tries, and rates with the best of them in the middle."""

    optim: str
    learning_rates: tuple[float, ...]
    optim_args: str | None = None


CONTENDERS = {
    "SGD-SaI": Contender("sgd_sai", (3e-3, 1e-2, 3e-2)),
    "SGD-SaI raw": Contender("sgd_sai", (3.0, 10.0, 30.0), "scaling=raw"),
    "AdamW": Contender("adamw_torch", (3e-3, 1e-2, 3e-2)),
    "scaled AdamW": Contender("scaled_adamw", (3e-3, 1e-2, 3e-2)),
}


@dataclass
class DemoArguments:
    """Sizes of the demo. The defaults take under ten minutes of one CPU core."""

    output_dir: str = field(
        default="outputs/diffusion_demo",
        metadata={"help": "Where everything is written; what is there is not made again."},
    )
    record: str | None = field(default=None, metadata={"help": "Where the table goes besides output_dir/record.json."})
    grid: str | None = field(default=None, metadata={"help": "Where the pictures go besides output_dir/grid.png."})
    base: str | None = field(default=None, metadata={"help": "A pretrained toy pipeline; by default it is trained."})
    size: int = field(default=SIZE, metadata={"help": "Of the pictures, in pixels a side."})
    channels: list[int] = field(
        default_factory=lambda: [16, 32, 64], metadata={"help": "Of the UNet's levels; the last one reads the text."}
    )
    pretrain_steps: int = 2500
    pretrain_batch_size: int = 16
    pretrain_learning_rate: float = 1e-3
    lora_steps: int = field(default=200, metadata={"help": "Optimizer steps of each run, five drawings a step."})
    lora_r: int = 4
    seeds: int = field(default=2, metadata={"help": "Runs of each optimizer and learning rate."})
    samples: int = field(default=8, metadata={"help": "A run, of each of the 11 prompts that no drawing shows."})
    inference_steps: int = 12
    guidance_scale: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "pretrain_steps",
            "pretrain_batch_size",
            "lora_steps",
            "lora_r",
            "seeds",
            "samples",
            "inference_steps",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if any(width < 8 or width % 8 for width in self.channels):
            raise UserError(f"channels must be multiples of 8, got {' '.join(map(str, self.channels))}")
        multiple = max(8, 2 ** (len(self.channels) - 1))
        if self.size < multiple or self.size % multiple:
            raise UserError(
                f"size must be a multiple of {multiple} with {len(self.channels)} channels, got {self.size}"
            )


def write_concept(folder: Path, size: int) -> list[Image.Image]:
    """The five drawings and their captions, as an image folder."""
    lines, pictures = [], []
    for i, (colour, place) in enumerate(_SHOWN):
        drawing = Drawing(*CONCEPT, colour, place)
        pictures.append(Image.fromarray(draw(drawing, size)))
        save_picture(pictures[-1], folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": drawing.caption(TOKEN)}))
    write_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")
    return pictures


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


def device() -> str:
    """Where models run: the GPU, if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def base_model(config: DemoArguments) -> Path:
    """The folder of the pretrained pipeline: given, there from an earlier start with the same settings, or trained."""
    if config.base:
        return Path(config.base)
    base = Path(config.output_dir) / "base"
    wanted = {key: value for key, value in asdict(config).items() if key in ("size", "channels", "seed")}
    wanted |= {key: value for key, value in asdict(config).items() if key.startswith("pretrain_")}
    known = read_json(base / PRETRAINING)
    if known.get("settings") == wanted:
        print(f"the base is there: {base}")
        return base
    torch.manual_seed(config.seed)
    pipe = new_pipeline(config.size, config.channels).to(device())
    found = pretrain(
        pipe, config.pretrain_steps, config.pretrain_batch_size, config.pretrain_learning_rate, config.seed
    )

    def write(folder: Path) -> None:
        pipe.save_pretrained(folder)
        write_json(folder / PRETRAINING, {"settings": wanted, **found})

    in_one_piece(base, write)
    return base


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file, empty if there is none."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def digest(paths: Iterable[Path]) -> str:
    """Of the contents of files, in the order of their paths."""
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in sorted(paths))).hexdigest()


def one_run(
    base: Path, config: DemoArguments, contender: Contender, rate: float, seed: int, folder: Path
) -> tuple[dict[str, Any], list[Image.Image]]:
    """Train a LoRA, load it into a fresh pipeline, draw what no drawing of the concept showed; scores and pictures.

    A run that `folder` has already is only read, if the settings, the base and the optimizer's code are the same.
    """
    lora = DiffusionArguments(
        data=str(Path(config.output_dir) / "concept"),
        model=str(base),
        output_dir=str(folder),
        concept_tokens=[TOKEN],
        concept_init=[CONCEPT[0]],
        lora_r=config.lora_r,
        per_device_train_batch_size=len(_SHOWN),
        max_steps=config.lora_steps,
        max_grad_norm=0.0,
        cache_latents=True,
        logging_steps=config.lora_steps,
        overwrite_output_dir=True,
        seed=seed,
    )
    optimizer = OptimizerArguments(optim=contender.optim, optim_args=contender.optim_args, learning_rate=rate)
    sampling = (config.inference_steps, config.guidance_scale, seed)
    code = [*Path(hf_sai.__file__).parent.rglob("*.py"), Path(optimizers.__file__)]
    key = {
        "lora": public_settings(lora, optimizer),
        "samples": [config.samples, *sampling],
        "base": digest(base.rglob("*.safetensors")),
        "code": digest(code),
    }
    wanted = unseen() * config.samples
    paths = [folder / "drawn" / f"{i:03d}.png" for i in range(len(wanted))]
    known = read_json(folder / _SCORES)
    if known.get("key") == key:
        return known["scores"], [open_image(path) for path in paths[: len(unseen())]]
    (folder / _SCORES).unlink(missing_ok=True)
    start, start_cpu = time.perf_counter(), time.process_time()
    record = fine_tune(lora, optimizer)
    pipe = load_pipeline(str(base)).to(device())
    load_concept(pipe, folder / "lora")
    drawn = draw_samples(pipe, wanted, TOKEN, *sampling)
    pictures = [Image.fromarray(picture) for picture in drawn]
    for picture, path in zip(pictures, paths, strict=True):
        save_picture(picture, path)
    found = obeyed(drawn, wanted)
    scores = {
        "learning_rate": rate,
        "samples": len(wanted),
        **found,
        "optimizer_state_bytes": record["optimizer_state_bytes"],
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - start_cpu, 1),
    }
    write_json(folder / _SCORES, {"key": key, "scores": scores})
    return scores, pictures[: len(unseen())]


def compare(base: Path, config: DemoArguments) -> tuple[list[dict[str, Any]], list[tuple[str, list[Image.Image]]]]:
    """A LoRA for each optimizer and learning rate: their scores, and for the grid a row of pictures each."""
    table, rows = [], []
    for label, contender in CONTENDERS.items():
        for rate in contender.learning_rates:
            name = f"{label.replace(',', '').replace(' ', '-')}-{rate:g}"
            found = []
            for seed in range(config.seed, config.seed + config.seeds):
                folder = Path(config.output_dir) / f"{name}-seed{seed}"
                scores, pictures = one_run(base, config, contender, rate, seed, folder)
                found.append(scores)
                if seed == config.seed:
                    rows.append((f"{label} {rate:g}", pictures))
                print(
                    f"{folder.name}: {100 * scores['all']:.0f} % of {scores['samples']} samples all right", flush=True
                )
            table.append({"optimizer": label, **over_seeds(found)})
    return table, rows


def over_seeds(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The scores of runs that differ in their seed, as one: means of shares, sums of costs."""
    one = dict(found[0])
    for key in SHARES:
        one[key] = sum(scores[key] for scores in found) / len(found)
    for key in ("samples", "seconds", "cpu_seconds"):
        one[key] = sum(scores[key] for scores in found)
    one["all_interval"] = interval(one["all"], one["samples"])
    one["all_by_seed"] = [scores["all"] for scores in found]
    return one


def interval(share: float, samples: int) -> list[float]:
    """95 % confidence interval of a share of independent samples (Wilson's: not empty at 0 and 1 either)."""
    z = 1.96
    middle = (share + z**2 / (2 * samples)) / (1 + z**2 / samples)
    half = z / (1 + z**2 / samples) * math.sqrt(share * (1 - share) / samples + (z / (2 * samples)) ** 2)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def as_text(base: dict[str, dict[str, float]], table: list[dict[str, Any]]) -> str:
    """The scores as a Markdown table."""
    lines = [f"| | lr | {' | '.join(SHARES)} |", "|---|---:|" + "---:|" * len(SHARES)]
    rows = [(name, "", scores) for name, scores in base.items()]
    rows += [(row["optimizer"], f"{row['learning_rate']:g}", row) for row in table]
    lines += [f"| {name} | {rate} | {' | '.join(f'{100 * r[key]:.0f}' for key in SHARES)} |" for name, rate, r in rows]
    return "\n".join(lines)


def demo(config: DemoArguments) -> dict[str, Any]:
    """Pretrain, compare, write; returns the record. What an earlier or a killed start made is used, not made again."""
    output_dir = Path(config.output_dir)
    check_writable("output_dir", output_dir)
    base = base_model(config)
    pretraining = read_json(base / PRETRAINING)
    start, start_cpu = time.perf_counter(), time.process_time()
    base_scores = judge_base(load_pipeline(str(base)).to(device()), config)
    judged = {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - start_cpu, 1),
    }
    five = write_concept(output_dir / "concept", config.size)
    table, rows = compare(base, config)
    pictures = grid([("drawn for training", five), *rows], [drawing.caption(TOKEN) for drawing in unseen()], cell=64)
    save_picture(pictures, output_dir / "grid.png")
    if config.grid:
        save_picture(pictures, config.grid)
    record = run_record(
        "diffusion_demo",
        (config,),
        concept=" ".join(CONCEPT[::-1]),
        combinations_pretrained=len(SHAPES) * len(PATTERNS) - 1,
        pretraining=pretraining,
        base=base_scores,
        runs=table,
        # Of all parts, those of an earlier start too; on a busy machine the processor's say more than the clock's.
        **{
            key: round(sum(part.get(key, 0.0) for part in (pretraining, judged, *table)), 1)
            for key in ("seconds", "cpu_seconds")
        },
    )
    write_json(output_dir / "record.json", record)
    if config.record:
        write_json(config.record, record)
    print(as_text(base_scores, table))
    print(f"per cent of samples, judged by the detector of toy.py; pictures: {output_dir / 'grid.png'}")
    print(f"{record['seconds']:.0f} seconds, {record['cpu_seconds']:.0f} of them of the processor")
    return record


def main() -> None:
    start_logging(logging.WARNING)
    [config] = parse_config([DemoArguments], description=__doc__)
    # So small a model gains nothing from a second thread, and loses most of its time where other work holds a core:
    # threads that wait for one another spin.
    torch.set_num_threads(1)
    with resumable(lambda: ""):
        demo(config)


if __name__ == "__main__":
    run_main(main)
