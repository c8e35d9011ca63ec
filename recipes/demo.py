"""A tour of a few minutes, offline: LoRA on E2E-style data with SGD-SaI beside AdamW, at one learning rate.

    python -m recipes.demo                      # a small set made by our own grammar
    python -m recipes.demo --data FOLDER        # the real E2E set (official CSV files), bounded steps, same code

It makes text, pretrains a small GPT-2 on it (tokenizer included), fine-tunes that twice with `gpt2_lora_e2e.py`,
generates, scores, and writes `report.md` with a table, sentences and plots.
"""

from recipes.start import run_main

import csv
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import DataCollatorForSeq2Seq, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Trainer, set_seed

from hf_sai.plots import plot_losses
from recipes.common import UserError, check_writable, markdown_text, parse_config, write_text
from recipes.data import E2EData, E2ETokens, Row, clean, load_e2e, prompt
from recipes.gpt2_lora_e2e import E2EArguments, run
from recipes.optimizers import RecipeArguments
from recipes.toy_e2e import general_rows, write_sample

OPTIMIZERS = {"SGD-SaI": "sgd_sai", "AdamW": "adamw_torch"}
END_OF_TEXT = "<|endoftext|>"
SHOWN = 4  # meaning representations whose outputs the report shows


@dataclass
class DemoArguments:
    """How much of everything: the defaults take a few minutes on two cores."""

    data: str | None = field(default=None, metadata={"help": "Folder of E2E CSV files; by default a set of our own."})
    output_dir: str = field(default="outputs/demo", metadata={"help": "Folder for everything that is written."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Of both optimizers: SGD-SaI takes AdamW's units."})
    steps: int = field(default=300, metadata={"help": "Of fine-tuning, 16 texts each."})
    pretrain_steps: int = field(default=1200, metadata={"help": "Of pretraining, 16 texts each."})
    test_mrs: int = field(default=60, metadata={"help": "Meaning representations to generate for and score."})

    def __post_init__(self) -> None:
        for name in ("steps", "pretrain_steps", "test_mrs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.data is not None and not Path(self.data).is_dir():
            raise UserError(f"data: {self.data!r} is not a folder; it must hold the E2E set's CSV files")


class Clock:
    """Headlines with the seconds since the start."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def say(self, text: str) -> None:
        print(f"\n[{time.perf_counter() - self._start:4.0f} s] {text}", flush=True)


def pretraining_rows(data: E2EData, count: int) -> list[Row]:
    """Mostly texts about other things; a tenth are texts of the set itself, without what they describe."""
    rng = random.Random(1)
    own = [Row("", row.reference) for row in rng.sample(data.train, min(len(data.train), count // 10))]
    rows = general_rows(count - len(own)) + own
    rng.shuffle(rows)
    return rows


def train_tokenizer(rows: list[Row]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the texts, GPT-2's kind, with at most 2,048 tokens."""
    bpe = ByteLevelBPETokenizer()
    texts = (f"{prompt(row.mr)} {clean(row.reference)}" for row in rows)
    bpe.train_from_iterator(texts, vocab_size=2048, special_tokens=[END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def pretrain(rows: list[Row], tokenizer: PreTrainedTokenizerFast, steps: int, folder: Path) -> Path:
    """A GPT-2 of two layers from scratch; returns the folder of the model and its tokenizer."""
    set_seed(1)
    end = tokenizer.eos_token_id
    size = {"n_layer": 2, "n_head": 4, "n_embd": 128, "n_positions": 256, "vocab_size": len(tokenizer)}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "loss_type": "ForCausalLM"}
    model = GPT2LMHeadModel(GPT2Config(**size, **no_dropout, **special))
    args = RecipeArguments(
        output_dir=str(folder),
        optim="adamw_torch_fused",
        learning_rate=4e-3,
        weight_decay=0.1,
        adam_beta2=0.98,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        max_steps=steps,
        per_device_train_batch_size=16,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        seed=1,
        use_cpu=True,
    )
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True)
    trainer = Trainer(model, args, train_dataset=E2ETokens(rows, tokenizer, 256), data_collator=collate)
    trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def fine_tune(name: str, base: Path, data: Path, demo: DemoArguments) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The recipe's record and predictions for one optimizer."""
    folder = Path(demo.output_dir) / name
    config = E2EArguments(
        model=str(base),
        data=str(data),
        max_length=256,
        max_train_rows=16 * demo.steps,
        max_eval_rows=400,
        max_test_mrs=demo.test_mrs,
        lora_dropout=0.0,
        num_beams=4,
        generation_batch_size=demo.test_mrs,
    )
    args = RecipeArguments(
        output_dir=str(folder),
        optim=OPTIMIZERS[name],
        learning_rate=demo.learning_rate,
        warmup_steps=max(1, demo.steps // 10),
        max_steps=demo.steps,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=max(1, demo.steps // 6),
        logging_steps=max(1, demo.steps // 30),
        save_strategy="no",
        seed=1,
        use_cpu=True,
        overwrite_output_dir=True,
    )
    record = run(config, args)
    with open(folder / "predictions.tsv", encoding="utf-8", newline="") as file:
        return record, list(csv.DictReader(file, delimiter="\t"))


def table(records: dict[str, dict[str, Any]]) -> str:
    """One row an optimizer, as Markdown."""
    scores = list(next(iter(records.values()))["scores"])
    head = ["optimizer", "validation loss", *scores, "optimizer state MB", "step ms", "of which optimizer ms"]
    rows = [head]
    for name, record in records.items():
        rows.append(
            [
                name,
                f"{record['eval_loss']:.3f}",
                *(f"{record['scores'][score]:.4f}" for score in scores),
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


def sentences(data: E2EData, predictions: dict[str, list[dict[str, str]]], shown: Callable[[str], str] = clean) -> str:
    """Some meaning representations with a human text and each optimizer's output, each text as `shown` gives it."""
    references = {}
    for row in data.test:
        references.setdefault(row.mr, row.reference)
    blocks = []
    for number, first in enumerate(next(iter(predictions.values()))[:SHOWN]):
        outputs = [f"- {name}: {shown(rows[number]['output'])}" for name, rows in predictions.items()]
        blocks.append("\n".join([shown(first["MR"]), f"- reference: {shown(references[first['MR']])}", *outputs]))
    return "\n\n".join(blocks)


def main() -> None:
    # peft reads an attribute that transformers deprecates: nothing a user of the demo could act on
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
    (demo,) = parse_config([DemoArguments], description=__doc__)
    output, clock = Path(demo.output_dir), Clock()
    check_writable("output_dir", output)
    if demo.data:
        folder = Path(demo.data)
        clock.say(f"data: {folder}")
    else:
        folder = write_sample(output / "data")
        clock.say(f"data: made {folder}")
    data = load_e2e(str(folder))

    rows = pretraining_rows(data, 16 * demo.pretrain_steps)
    tokenizer = train_tokenizer(rows)
    clock.say(f"pretraining a small GPT-2: {len(tokenizer)} tokens, {len(rows)} texts, {demo.pretrain_steps} steps")
    base = pretrain(rows, tokenizer, demo.pretrain_steps, output / "base")

    records: dict[str, dict[str, Any]] = {}
    predictions: dict[str, list[dict[str, str]]] = {}
    for name in OPTIMIZERS:
        clock.say(f"LoRA with {name}, learning rate {demo.learning_rate:g}, {demo.steps} steps")
        records[name], predictions[name] = fine_tune(name, base, folder, demo)

    first = next(iter(records.values()))
    losses = plot_losses({name: record["history"] for name, record in records.items()}, output / "losses.png")
    plots = [losses, *sorted(path for path in output.glob("*/gsnr.png"))]
    results = (
        f"{table(records)}\n\n"
        f"Both at learning rate {demo.learning_rate:g}, {demo.steps} steps of 16 texts, {first['test_mrs']} test MRs. "
        f"Validation loss of the base before fine-tuning: {first['base_eval_loss']:.3f}."
    )
    examples = sentences(data, predictions)
    pictures = "\n".join(f"![{path.stem}]({path.relative_to(output).as_posix()})" for path in plots)
    machine = f"{first['machine']['cpu']}, {torch.get_num_threads()} threads; torch {first['versions']['torch']}"
    about = (
        f"LoRA on {'the E2E set' if demo.data else 'a set of our own grammar'}; {machine}. One seed: a tour, no result."
    )
    report = write_text(
        output / "report.md",
        f"# SGD-SaI demo\n\n{about}\n\n{results}\n\n"
        f"## Outputs\n\n{sentences(data, predictions, markdown_text)}\n\n## Plots\n\n{pictures}\n",
    )
    clock.say(f"done\n\n{results}\n\n{examples}\n\nreport: {report}\nplots: {', '.join(map(str, plots))}")


if __name__ == "__main__":
    run_main(main)
