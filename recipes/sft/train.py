"""Supervised fine-tuning by TRL's SFTTrainer, on E2E as a chat: the user names the attributes, the assistant writes.

    python -m recipes.sft sft_smollm2.yaml --learning_rate 1e-3

TRL's options apply (`--load_in_4bit true` is QLoRA, `--use_dora true` DoRA). The loss counts the assistant's tokens.
"""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

from hf_sai import register
from hf_sai.bench.state_bytes import optimizer_state_bytes
from hf_sai.checkpoints import last_whole_checkpoint
from recipes.common.config import expand_data_folder, find_config
from recipes.common.e2e_data import HUB_NAME, Row, clean, load_e2e, prompt
from recipes.common.errors import UserError, start_logging
from recipes.common.files import write_json
from recipes.common.measure import StepTimer
from recipes.common.models import base_weights, hub_name, resolve_model
from recipes.common.optimizers import cpu_words
from recipes.common.provenance import run_record
from recipes.common.run_folder import OVERWRITE_HELP, run_folder


@dataclass
class SFTArguments(ModelConfig):
    """TRL's `ModelConfig` with the recipes' `model`, and the data; training is `SFTConfig`."""

    model_name_or_path: str | None = field(default=None, init=False)  # no option: `model` takes its place
    model: str = field(default="smollm2", metadata={"help": "Hub name, folder, or smollm2."})
    data: str = field(default=HUB_NAME, metadata={"help": "Hub name, or a folder with the official CSV files."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Train on the first N rows only."})
    max_eval_rows: int | None = field(default=None, metadata={"help": "Evaluate on the first N rows only."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": OVERWRITE_HELP})


class _Parser(TrlParser):
    def error(self, message: str) -> Any:  # argparse would print every option above it
        raise UserError(message)


def chats(rows: Sequence[Row]) -> Dataset:
    """Columns `prompt` and `completion`, each a list of one message; TRL applies the model's chat template."""
    users = [[{"role": "user", "content": prompt(row.mr)}] for row in rows]
    assistants = [[{"role": "assistant", "content": clean(row.reference)}] for row in rows]
    return Dataset.from_dict({"prompt": users, "completion": assistants})


def run(words: Sequence[str] | None = None) -> None:
    """Train, evaluate and save, with the settings of command-line words, by default those of the process."""
    register()
    words = list(sys.argv[1:] if words is None else words)
    words = ["--config", *words] if words and not words[0].startswith("-") else words
    words = [str(find_config(word)) if i and words[i - 1] == "--config" else word for i, word in enumerate(words)]
    words += cpu_words()
    try:
        config, args = _Parser([SFTArguments, SFTConfig], allow_abbrev=False).parse_args_and_config(words)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    last = functools.partial(last_whole_checkpoint, args.output_dir)
    with run_folder(args.output_dir, args.resume_from_checkpoint, last, config.overwrite_output_dir) as checkpoint:
        _train(config, args, checkpoint)


def _train(config: SFTArguments, args: SFTConfig, checkpoint: str | None) -> None:
    expand_data_folder(config)
    data, source, timer = load_e2e(config.data), resolve_model(config.model), StepTimer()
    loading = {"revision": config.model_revision, "attn_implementation": config.attn_implementation}
    args.model_init_kwargs = {"dtype": config.dtype, **loading, **(args.model_init_kwargs or {})}
    train, validation = chats(data.train[: config.max_train_rows]), chats(data.validation[: config.max_eval_rows])
    adapter = {"quantization_config": get_quantization_config(config), "peft_config": get_peft_config(config)}
    try:
        trainer = SFTTrainer(source, args, train_dataset=train, eval_dataset=validation, callbacks=[timer], **adapter)
    except (OSError, ValueError, ImportError) as error:  # of the model, its chat template, the adapter
        raise UserError(f"model {config.model!r}: {error}") from error
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    for p in trained if adapter["quantization_config"] else ():
        p.data = p.data.float()  # TRL makes the adapter bfloat16, a checkpoint that is loaded makes it float32
    train_loss = trainer.train(resume_from_checkpoint=checkpoint).training_loss
    eval_loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    if trainer.is_world_process_zero():
        results = {"steps": trainer.state.global_step, "train_loss": train_loss, "eval_loss": eval_loss}
        results |= {"time": timer.summary(), "eval_rows": len(validation)}
        results |= {"base_model": hub_name(config.model), "base_weights": base_weights(config.model, source)}
        results |= {"train_rows": len(train), "trainable_parameters": sum(p.numel() for p in trained)}
        results |= {"processes": args.world_size, "optimizer_state_bytes": optimizer_state_bytes(trainer.optimizer)}
        results["history"] = [log for log in trainer.state.log_history if "loss" in log or "eval_loss" in log]
        write_json(f"{args.output_dir}/record.json", run_record("sft", (config, args), **results))
        print(f"evaluation loss {eval_loss:.4f}\nmodel and record: {args.output_dir}")


def main() -> None:
    start_logging()
    run()
