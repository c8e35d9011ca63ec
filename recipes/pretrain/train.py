"""Pretrain a GPT-2 from scratch on any text: `python -m recipes.pretrain CONFIG.yaml [--option value ...]`.

`--model smollm2`, or any causal language model, trains all weights of that on instead.

Runs alone or under `accelerate launch --config_file accelerate_configs/NAME.yaml`. Text, split, tokens and blocks are
those of `data.py`; training, resume and trackers are the Trainer's. In `output_dir` it leaves the model and
its tokenizer, `record.json` (curves, speed, memory, versions) and `curves.png`; with `gsnr_every` also `gsnr.json`, the
g-SNR of every block over time, and figures of it. `recipes/pretrain/compare.py` puts several records side by side.
"""

from __future__ import annotations

import functools
import io
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch.nn.functional import cross_entropy
from torch.utils.data import Subset
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    Trainer,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy

from hf_sai import GSNRCallback
from hf_sai.checkpoints import last_whole_checkpoint
from hf_sai.initialisation import SCHEMES, initialise
from hf_sai.monitor import read_record
from hf_sai.probe import GPT2_SIZES
from recipes.common.config import config_words, parse_config
from recipes.common.errors import UserError, start_logging
from recipes.common.files import write_bytes, write_json
from recipes.common.measure import Clock, StepTimer
from recipes.common.models import base_weights, check_model, hub_name, load_model
from recipes.common.optimizers import RecipeArguments, trainer_optimizer
from recipes.common.provenance import Began
from recipes.common.run_folder import run_folder
from recipes.pretrain.data import (
    IGNORED,
    PackedBlocks,
    StreamedBlocks,
    cache_key,
    split_stream,
    tokenize_corpus,
    train_tokenizer,
)
from recipes.pretrain.report import build_record, diverged, draw_curves, draw_gsnr, summary
from recipes.pretrain.text import Corpus

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """The model, its tokenizer, and how the text is packed for it."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "Train on from this model, with its tokenizer, instead of fresh weights: smollm2, folder, hub name."
        },
    )
    model_size: str = field(default="small", metadata={"help": f"One of {', '.join(GPT2_SIZES)}."})
    n_layer: int | None = field(default=None, metadata={"help": "Instead of the size's."})
    n_head: int | None = field(default=None, metadata={"help": "Instead of the size's."})
    n_embd: int | None = field(default=None, metadata={"help": "Instead of the size's."})
    n_positions: int = 1024
    model_vocab_size: int | None = field(
        default=None, metadata={"help": "The tokenizer's by default; a multiple of 64 above it is faster on GPUs."}
    )
    dropout: float = 0.0
    init_scheme: str = field(
        default="default",
        metadata={"help": f"Of the linear layers, one of {', '.join(SCHEMES)}; default is GPT-2's own."},
    )
    attn_implementation: str = "sdpa"
    tokenizer: str = field(
        default="gpt2",
        metadata={"help": "A folder, a name on the hub, or `train`: byte-level BPE of the training text."},
    )
    vocab_size: int = field(default=8192, metadata={"help": "Of `--tokenizer train`."})
    tokenizer_train_bytes: int = field(
        default=100_000_000, metadata={"help": "`--tokenizer train` reads no more text than this."}
    )
    block_size: int = 1024
    cache_dir: str = field(default="outputs/token_cache", metadata={"help": "Tokens are kept here for the next run."})
    tokenizer_processes: int = 1
    streaming: bool = field(default=False, metadata={"help": "Read the hub's data set while training; no cache."})
    stream_validation_documents: int = field(
        default=1000, metadata={"help": "With streaming, the first documents are the validation split."}
    )
    max_eval_blocks: int | None = field(default=None, metadata={"help": "Validate on the first blocks only."})

    def __post_init__(self) -> None:
        if self.model is not None:
            check_model(self.model)
            own = ("n_layer", "n_head", "n_embd", "model_vocab_size", "dropout", "init_scheme", "tokenizer")
            defaults = {spec.name: spec.default for spec in fields(self)}
            if changed := [name for name in own if getattr(self, name) != defaults[name]]:
                raise UserError(f"{changed[0]} is for fresh weights; leave it out with `model`, which has its own")
        if self.model_size not in GPT2_SIZES:
            raise UserError(f"model_size must be one of {', '.join(GPT2_SIZES)}, got {self.model_size!r}")
        if self.init_scheme not in SCHEMES:
            raise UserError(f"init_scheme must be one of {', '.join(SCHEMES)}, got {self.init_scheme!r}")
        for name in ("n_layer", "n_head", "n_embd", "max_eval_blocks", "tokenizer_processes", "tokenizer_train_bytes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.stream_validation_documents < 0:
            raise UserError(f"stream_validation_documents must be at least 0, got {self.stream_validation_documents}")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout must be in [0, 1), got {self.dropout}")
        _, heads, width = GPT2_SIZES[self.model_size]
        if (self.n_embd or width) % (self.n_head or heads):
            raise UserError(
                f"n_embd must be a multiple of n_head, got {self.n_embd or width} and {self.n_head or heads}"
            )
        if not 2 <= self.block_size <= self.n_positions:
            raise UserError(
                f"block_size must be from 2 to n_positions ({self.n_positions}), got {self.block_size}: "
                "raise n_positions or lower block_size"
            )


@dataclass
class PretrainArguments(RecipeArguments):
    """The Trainer's arguments, with the length of the run and the warm-up also in tokens and as a fraction."""

    output_dir: str = field(default="outputs/gpt2_pretrain", metadata={"help": "Model, checkpoints, record, curves."})
    max_tokens: int | None = field(default=None, metadata={"help": "Sets max_steps; a last step is not cut."})
    warmup_fraction: float = field(default=0.01, metadata={"help": "Of all steps, where warmup_steps is 0."})
    gsnr_every: int | None = field(
        default=None, metadata={"help": "Measure every block's g-SNR every N steps: gsnr.json and figures of it."}
    )
    logging_nan_inf_filter: bool = False
    max_loss: float = field(
        default=math.inf, metadata={"help": "A logged loss above it, or a loss of NaN, ends the run as diverged."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.warmup_fraction < 1:
            raise UserError(f"warmup_fraction must be in [0, 1), got {self.warmup_fraction}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, or left out, got {self.max_tokens}")
        if self.gsnr_every is not None and self.gsnr_every < 1:
            raise UserError(f"gsnr_every must be at least 1, or left out, got {self.gsnr_every}")
        if not self.max_loss > 0:
            raise UserError(f"max_loss must be above 0, or left out, got {self.max_loss}")


CONFIG_TYPES = (Corpus, ModelArguments, PretrainArguments)


def read_config(
    config: str | Path | Mapping[str, Any] | Sequence[str],
) -> tuple[Corpus, ModelArguments, PretrainArguments]:
    """The three groups of options from a YAML file, a mapping, or command-line words (`run.yaml --seed 1`)."""
    corpus, model, training = parse_config(CONFIG_TYPES, config_words(config), __doc__)
    return corpus, model, training


# --- data ------------------------------------------------------------------------------------------------------------


def load_tokenizer(corpus: Corpus, options: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer named by `options.tokenizer`, or one trained on the corpus and kept in the cache."""
    folder = Path(options.tokenizer)
    if options.tokenizer == "train":
        key = cache_key(corpus, options.vocab_size, options.tokenizer_train_bytes)
        folder = Path(options.cache_dir) / f"tokenizer-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not (folder / "tokenizer_config.json").exists():
                logger.warning("training a byte-level BPE tokenizer of %d tokens", options.vocab_size)
                train_tokenizer(corpus, options.vocab_size, options.tokenizer_train_bytes).model.save(str(folder))
                special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
                settings = {**special, "add_prefix_space": False, "tokenizer_class": "GPT2Tokenizer"}
                write_json(folder / "tokenizer_config.json", settings)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer: {options.tokenizer!r} is neither a tokenizer's folder nor within reach on the hub; "
            "give a folder, or `train` to make one from the text"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer: {options.tokenizer!r} has no fast version (tokenizer.json), which this needs")
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer: {options.tokenizer!r} has no end-of-text token to put between documents")
    return tokenizer


def load_blocks(corpus: Corpus, options: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Any]:
    """Training and validation blocks (None without a validation split)."""
    backend, end_of_text = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    if options.streaming:
        validation_tokens: Any
        train_documents, validation_tokens = split_stream(
            corpus, backend, end_of_text, options.stream_validation_documents
        )
        train: Any = StreamedBlocks(train_documents, backend, end_of_text, options.block_size)
    else:
        files = tokenize_corpus(corpus, backend, end_of_text, options.cache_dir, options.tokenizer_processes)
        train = PackedBlocks(files["train"].load(), options.block_size)
        validation_tokens = files["validation"].load() if files["validation"].tokens else None
    if validation_tokens is None:
        return train, None
    validation: Any = PackedBlocks(validation_tokens, options.block_size)
    if options.max_eval_blocks is not None and options.max_eval_blocks < len(validation):
        validation = Subset(validation, range(options.max_eval_blocks))
    return train, validation


# --- model -----------------------------------------------------------------------------------------------------------


def build_model(options: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> GPT2LMHeadModel:
    """A GPT-2 with fresh weights."""
    layers, heads, width = GPT2_SIZES[options.model_size]
    vocab_size = options.model_vocab_size or len(tokenizer)
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"model_vocab_size must be at least the tokenizer's {len(tokenizer)} tokens, got {vocab_size}: "
            "leave it out, or take another tokenizer"
        )
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=options.n_positions,
        n_layer=options.n_layer or layers,
        n_head=options.n_head or heads,
        n_embd=options.n_embd or width,
        resid_pdrop=options.dropout,
        embd_pdrop=options.dropout,
        attn_pdrop=options.dropout,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation=options.attn_implementation,  # type: ignore[call-arg]
    )
    model = GPT2LMHeadModel(config)
    initialise(model, options.init_scheme)
    model.loss_type = "ForCausalLM"  # transformers guesses it from the class's name, and fails to for GPT-2's
    return model


# --- training --------------------------------------------------------------------------------------------------------


class PretrainTrainer(Trainer):
    """Trainer whose log lines also hold tokens, seconds of training and perplexity, and that stops when it diverges."""

    args: PretrainArguments

    def __init__(self, *args: Any, block_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokens_per_step = tokens_per_step(self.args, block_size)
        self.clock = Clock()
        self.timer = StepTimer()
        self.began = Began()
        self.add_callback(self.began)
        self.add_callback(self.clock)
        self.add_callback(self.timer)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        running = self.clock.since is not None
        self.clock.on_train_end(self.args, self.state, self.control)
        metrics = super().evaluate(*args, **kwargs)
        self.clock.since = time.perf_counter() if running else None
        return metrics

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The mean loss over tokens, each counted once, whatever the batch size and the number of processes.

        The Trainer's own loop averages batch means, in which a padded block weighs as much as a full one, and where
        the processes' batches do not come out even, some blocks twice.
        """
        model = self.model_wrapped.eval()
        total, samples = torch.zeros(2, dtype=torch.float64), 0
        for inputs in dataloader:
            labels = inputs["labels"][:, 1:]
            with torch.no_grad(), self.compute_loss_context_manager():
                logits = model(input_ids=inputs["input_ids"]).logits[:, :-1].float()
            losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
            sums = torch.stack([losses.view_as(labels).sum(1), (labels != IGNORED).sum(1)], dim=1)  # (batch, 2)
            rows = self.accelerator.gather_for_metrics(sums)
            total += rows.cpu().double().sum(0)
            samples += len(rows)
        loss = (total[0] / total[1]).item()
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": loss}, samples)  # type: ignore[arg-type]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        logs["tokens"] = self.state.global_step * self.tokens_per_step
        logs["train_seconds"] = round(self.clock.seconds(), 3)
        losses = {key: logs[key] for key in ("loss", "eval_loss") if key in logs}
        for key, loss in losses.items():
            logs[key.replace("loss", "perplexity")] = math.exp(min(loss, 700.0))
        super().log(logs, *args, **kwargs)
        if any(diverged(loss, self.args.max_loss) for loss in losses.values()):
            logger.error("the loss is %s at step %d: stopping", losses, self.state.global_step)
            self.control.should_training_stop = True


def tokens_per_step(args: PretrainArguments, block_size: int) -> int:
    """Tokens of one update over all processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size * block_size


def set_length(args: PretrainArguments, options: ModelArguments, train_blocks: int | None) -> None:
    """`max_tokens` and `warmup_fraction` into steps; both depend on the number of processes, known only here."""
    per_step = tokens_per_step(args, options.block_size)
    if args.max_tokens is not None:
        args.max_steps = math.ceil(args.max_tokens / per_step)
    if args.max_steps <= 0 and train_blocks is None:
        raise UserError("streaming needs the length of the run: give max_tokens or max_steps")
    if not args.warmup_steps:
        steps = args.max_steps
        if steps <= 0:
            steps = math.ceil(args.num_train_epochs * (train_blocks or 0) * options.block_size / per_step)
        args.warmup_steps = round(args.warmup_fraction * steps)


def run(config: str | Path | Mapping[str, Any] | Sequence[str]) -> Path:
    """Train as `config` says and return the folder that holds the model and its tokenizer (`output_dir`).

    Args:
        config: a YAML file, a mapping of options, or command-line words.

    Raises:
        UserError: bad input; the message names the option, the rule and the remedy.
    """
    corpus, options, args = read_config(config)
    last = functools.partial(last_whole_checkpoint, args.output_dir)
    with run_folder(args.output_dir, args.resume_from_checkpoint, last, args.overwrite_output_dir) as checkpoint:
        return _run(corpus, options, args, checkpoint)


def _run(corpus: Corpus, options: ModelArguments, args: PretrainArguments, checkpoint: str | None) -> Path:
    corpus.check_files()  # before the hub is asked for a tokenizer
    set_seed(args.seed)
    if options.model is None:
        tokenizer = load_tokenizer(corpus, options)
        model: Any = build_model(options, tokenizer)
    else:
        model, tokenizer = load_model(options.model)
        positions = getattr(model.config, "max_position_embeddings", None) or options.block_size
        if options.block_size > positions:
            raise UserError(f"block_size must be at most the model's {positions} positions, got {options.block_size}")
    train, validation = load_blocks(corpus, options, tokenizer)
    set_length(args, options, None if options.streaming else len(train))
    if validation is None:
        args.eval_strategy = IntervalStrategy.NO
    model.config.use_cache = False  # nothing is generated here, and a cache would cost memory

    trainer = PretrainTrainer(
        model,
        args,
        block_size=options.block_size,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        **trainer_optimizer(model, args),
    )
    if args.gsnr_every:
        trainer.add_callback(GSNRCallback(args.gsnr_every, trainer=trainer))
    trainer.train(resume_from_checkpoint=checkpoint)
    if validation is not None and args.eval_strategy != IntervalStrategy.NO:
        last_evaluated = max((row["step"] for row in trainer.state.log_history if "eval_loss" in row), default=-1)
        if last_evaluated != trainer.state.global_step:
            trainer.evaluate()

    model.config.use_cache = True
    trainer.save_model()
    folder = Path(args.output_dir)
    if trainer.is_world_process_zero():
        data: dict[str, Any] = {
            "vocabulary": len(tokenizer),
            "block_size": options.block_size,
            "validation_blocks": len(validation) if validation else 0,
        }
        if not options.streaming:
            data |= {"train_tokens": len(train.tokens), "train_blocks": len(train)}
        if options.model is not None:
            data["base_model"] = hub_name(options.model)
            data["base_weights"] = base_weights(options.model, model.config.name_or_path)
        record = build_record(trainer, corpus, options, data)
        write_json(folder / "record.json", record)
        figure = io.BytesIO()
        draw_curves([record], figure)
        write_bytes(folder / "curves.png", figure.getvalue())
        if args.gsnr_every:
            draw_gsnr(read_record(folder / "gsnr.json"), folder)
        print(f"{summary(record)}\nmodel, record and curves: {folder}")
    trainer.accelerator.wait_for_everyone()
    return folder


def main() -> None:
    start_logging()
    run(sys.argv[1:])
