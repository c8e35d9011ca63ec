"""A tour of a few minutes: LoRA on E2E-style data with SGD-SaI beside AdamW, at one learning rate.

    python -m recipes.e2e.demo                      # SmolLM2-135M, on generated sentences
    python -m recipes.e2e.demo --data FOLDER        # the same on a part of the real E2E set (the official CSV files)
    python -m recipes.e2e.demo --base toy           # offline: a small GPT-2 that is pretrained first

It fine-tunes the base twice with `recipes.e2e`, generates, scores, and writes `report.md` with a table, sentences
and plots. Where SmolLM2 is out of reach, it says so and takes the toy base.
"""

from recipes.common.start import run_main

import csv
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hf_sai.plots import plot_losses
from recipes.common.config import parse_config
from recipes.common.e2e_data import E2EData, Group, Row, clean, group, load_e2e, write_csv
from recipes.common.errors import UserError, did_you_mean
from recipes.common.files import check_writable, write_text
from recipes.common.models import load_model
from recipes.common.optimizers import RecipeArguments
from recipes.common.progress import TrainingProgress, quiet
from recipes.common.records import markdown_text
from recipes.common.smollm2 import smollm2_folder
from recipes.e2e.toy_base import pretrain, pretraining_rows, train_tokenizer
from recipes.e2e.toy_data import write_sample
from recipes.e2e.train import E2EArguments, generate
from recipes.e2e.train import fine_tune as train

OPTIMIZERS = {"SGD-SaI": "sgd_sai", "AdamW": "adamw_torch"}
BASE = "base model"  # beside the optimizers, in the sentences
SCORES = {"bleu": "BLEU", "nist": "NIST", "meteor": "METEOR", "rouge_l": "ROUGE-L", "cider": "CIDEr"}
SHOWN = 6  # meaning representations whose outputs are shown


@dataclass(frozen=True)
class Size:
    """How much of everything for a base, and its settings of `recipes.e2e`: a few minutes on two cores."""

    steps: int
    batch: int
    eval_rows: int
    test_mrs: int
    settings: dict[str, Any]


BASES = {
    "smollm2": Size(50, 4, 32, 24, {"lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"], "num_beams": 1}),
    "toy": Size(300, 16, 400, 60, {"num_beams": 4}),
}


@dataclass
class DemoArguments:
    """What the demo takes; the base says how much of it, unless it is given."""

    base: str = field(default="smollm2", metadata={"help": f"Model to fine-tune: {' or '.join(BASES)}."})
    data: str | None = field(default=None, metadata={"help": "Folder of E2E CSV files; by default a generated set."})
    output_dir: str = field(default="outputs/demo", metadata={"help": "Folder for everything that is written."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Of both optimizers: SGD-SaI takes AdamW's units."})
    steps: int | None = field(default=None, metadata={"help": "Of fine-tuning."})
    test_mrs: int | None = field(default=None, metadata={"help": "Meaning representations to generate for and score."})
    pretrain_steps: int = field(default=1200, metadata={"help": "Of the toy base, 16 texts each."})

    def __post_init__(self) -> None:
        if self.base not in BASES:
            raise UserError(f"base must be {' or '.join(BASES)}, got {self.base!r}{did_you_mean(self.base, BASES)}")
        for name in ("steps", "test_mrs", "pretrain_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.data is not None and not Path(self.data).is_dir():
            raise UserError(f"data: {self.data!r} is not a folder; it must hold the E2E set's CSV files")


class Clock:
    """Headlines with the seconds since the start."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def say(self, text: str) -> None:
        print(f"\n[{time.perf_counter() - self._start:4.0f} s] {text}", flush=True)


def write_part(data: E2EData, folder: Path, size: Size) -> Path:
    """As much of the set as the demo takes, by chance: its files sort the meaning representations."""
    rng = random.Random(1)
    groups = group(data.test)
    test = rng.sample(groups, min(size.test_mrs, len(groups)))
    write_csv(folder / "train.csv", rng.sample(data.train, min(size.steps * size.batch, len(data.train))))
    write_csv(folder / "dev.csv", rng.sample(data.validation, min(size.eval_rows, len(data.validation))))
    write_csv(folder / "test.csv", [Row(one.mr, text) for one in test for text in one.references])
    return folder


def recipe_config(model: str, data: Path, size: Size) -> E2EArguments:
    """The recipe's settings other than those of the training."""
    return E2EArguments(
        model=model,
        data=str(data),
        max_length=256,
        max_eval_rows=size.eval_rows,
        max_test_mrs=size.test_mrs,
        lora_dropout=0.0,
        no_repeat_ngram_size=0,  # also counts what stands in the prompt: no `5 out of 5` in an output
        generation_batch_size=12,
        **size.settings,
    )


def fine_tune(
    optim: str, config: E2EArguments, size: Size, learning_rate: float, folder: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """The recipe's record for one optimizer, and its output for each meaning representation."""
    args = RecipeArguments(
        output_dir=str(folder),
        optim=optim,
        learning_rate=learning_rate,
        warmup_steps=max(1, size.steps // 10),
        max_steps=size.steps,
        per_device_train_batch_size=size.batch,
        per_device_eval_batch_size=8,
        eval_on_start=True,
        logging_steps=max(1, size.steps // 30),
        save_strategy="no",
        seed=1,
        use_cpu=True,
        bf16=True,
        overwrite_output_dir=True,
    )
    record = train(config, args, TrainingProgress())
    with open(folder / "predictions.tsv", encoding="utf-8", newline="") as file:
        return record, {row["MR"]: row["output"] for row in csv.DictReader(file, delimiter="\t")}


def table(records: dict[str, dict[str, Any]]) -> str:
    """One row an optimizer, as Markdown."""
    head = ["optimizer", "loss before", "loss after", *SCORES.values(), "state MB", "step ms", "of it optimizer"]
    rows = [head]
    for name, record in records.items():
        rows.append(
            [
                name,
                f"{record['base_eval_loss']:.3f}",
                f"{record['eval_loss']:.3f}",
                *(f"{record['scores'][score]:.4f}" for score in SCORES),
                f"{record['optimizer_state_bytes'] / 1e6:.3f}",
                f"{record['time'].get('step_ms', float('nan')):.1f}",
                f"{record['time'].get('optimizer_ms', float('nan')):.2f}",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def sentences(
    groups: Sequence[Group], outputs: Mapping[str, Mapping[str, str]], shown: Callable[[str], str] = clean
) -> str:
    """Meaning representations with a human text and each model's output, each text as `shown` gives it."""
    blocks = []
    for one in groups:
        lines = [f"- {name}: {shown(by_mr[one.mr]) or '(nothing)'}" for name, by_mr in outputs.items()]
        blocks.append("\n".join([shown(one.mr), f"- reference: {shown(one.references[0])}", *lines]))
    return "\n\n".join(blocks)


def base_model(demo: DemoArguments, data: E2EData, clock: Clock) -> tuple[str, str]:
    """The name of the base, and what the recipe takes as its model: SmolLM2 where it can be had."""
    if demo.base == "smollm2":
        try:
            smollm2_folder()
            return "smollm2", "smollm2"
        except UserError as error:
            clock.say(f"{error}. The toy base takes its place.")
    rows = pretraining_rows(data, 16 * demo.pretrain_steps)
    tokenizer = train_tokenizer(rows)
    clock.say(f"pretraining a small GPT-2: {len(tokenizer)} tokens, {len(rows)} texts, {demo.pretrain_steps} steps")
    return "toy", str(pretrain(rows, tokenizer, demo.pretrain_steps, Path(demo.output_dir) / "base"))


def tour(demo: DemoArguments) -> None:
    """Everything, from the base model to the report."""
    output, clock = Path(demo.output_dir), Clock()
    check_writable("output_dir", output)
    source = load_e2e(demo.data or str(write_sample(output / "sample")))
    base, model = base_model(demo, source, clock)
    size = BASES[base]
    size = replace(size, steps=demo.steps or size.steps, test_mrs=demo.test_mrs or size.test_mrs)
    config = recipe_config(model, write_part(source, output / "data", size), size)
    name = "SmolLM2-135M-Instruct" if base == "smollm2" else "the toy base"
    data = f"a part of {demo.data}" if demo.data else "generated sentences"

    groups = group(load_e2e(config.data).test)
    groups = groups[:: max(1, len(groups) // SHOWN)][:SHOWN]
    clock.say(f"what {name} writes as it is")
    texts = generate(*load_model(model), groups, config)
    outputs = {BASE: {one.mr: text for one, text in zip(groups, texts, strict=True)}}

    records: dict[str, dict[str, Any]] = {}
    for label, optim in OPTIMIZERS.items():
        clock.say(f"LoRA with {label} on {data}: {size.steps} steps of {size.batch} texts")
        records[label], outputs[label] = fine_tune(optim, config, size, demo.learning_rate, output / label)

    losses = plot_losses({label: record["history"] for label, record in records.items()}, output / "losses.png")
    plots = [losses, *sorted(output.glob("*/gsnr.png"))]
    first = next(iter(records.values()))
    results = (
        f"{table(records)}\n\n"
        f"Both at learning rate {demo.learning_rate:g}, {size.steps} steps of {size.batch} texts. Losses on "
        f"{first['eval_rows']} validation texts, scores on {first['test_mrs']} test MRs. One seed: a tour, no result."
    )
    pictures = "\n".join(f"![{path.stem}]({path.relative_to(output).as_posix()})" for path in plots)
    machine = f"{first['machine']['cpu']}, {torch.get_num_threads()} threads; torch {first['versions']['torch']}"
    report = write_text(
        output / "report.md",
        f"# SGD-SaI demo\n\nLoRA of {name} on {markdown_text(data)}; {machine}.\n\n{results}\n\n"
        f"## Outputs\n\n{sentences(groups, outputs, markdown_text)}\n\n## Plots\n\n{pictures}\n",
    )
    clock.say(
        f"done\n\n{sentences(groups, outputs)}\n\n{results}\n\nreport: {report}\nplots: {', '.join(map(str, plots))}"
    )


def main() -> None:
    (demo,) = parse_config([DemoArguments], description=__doc__)
    with quiet():
        tour(demo)


if __name__ == "__main__":
    run_main(main)
