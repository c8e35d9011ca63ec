"""A small GPT-2 with its tokenizer, pretrained on the spot: the demo's base model where SmolLM2 is out of reach."""

import random
from pathlib import Path
from typing import Any

from tokenizers import ByteLevelBPETokenizer
from transformers import (
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    set_seed,
)

from recipes.common.e2e_data import E2EData, E2ETokens, Row, clean, prompt
from recipes.common.optimizers import RecipeArguments
from recipes.common.progress import TrainingProgress
from recipes.e2e.toy_data import general_rows

END_OF_TEXT = "<|endoftext|>"


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
    size: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 128, "n_positions": 256, "vocab_size": len(tokenizer)}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    special: dict[str, Any] = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "loss_type": "ForCausalLM",
    }
    model = GPT2LMHeadModel(GPT2Config(**{**size, **no_dropout, **special}))
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
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        seed=1,
        use_cpu=True,
    )
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True)
    trainer = Trainer(model, args, train_dataset=E2ETokens(rows, tokenizer, 256), data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(TrainingProgress())
    trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
