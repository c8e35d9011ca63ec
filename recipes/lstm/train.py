"""An LSTM language model over characters, from scratch: `python -m recipes.lstm CONFIG.yaml [--option value ...]`.

The check that SGD-SaI's scaling holds for recurrent networks. The Trainer's part, the record and `run` are those of
`recipes.images`; accuracies are those of the next character.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from recipes.common.classifier import ClassifierArguments, read_config, summary, train_classifier
from recipes.common.errors import UserError, start_logging
from recipes.common.sample_text import NAME as SAMPLE
from recipes.common.sample_text import sample_file


@dataclass
class LSTMArguments:
    """The text and the model."""

    text: str = field(metadata={"help": "A UTF-8 text file; `sample` is a made text (sample_text.py)."})
    validation_fraction: float = field(default=0.1, metadata={"help": "The last part of the text."})
    sequence_length: int = field(default=128, metadata={"help": "In characters; the state starts at zero in each."})
    embedding_size: int = 64
    hidden_size: int = 128
    layers: int = 2
    dropout: float = field(default=0.0, metadata={"help": "Between layers."})

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction must be in (0, 1), got {self.validation_fraction}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be in [0, 1), got {self.dropout}")
        for name in ("sequence_length", "embedding_size", "hidden_size", "layers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")


CONFIG_TYPES = (LSTMArguments, ClassifierArguments)


class Sequences(Dataset[dict[str, Tensor]]):
    """A text cut into sequences; a batch is `input_ids` and `labels`, (batch, length) int64, one character apart.

    Args:
        ids: (characters,) int64.
        length: of a sequence; what is left over at the end of the text is dropped.
    """

    def __init__(self, ids: Tensor, length: int):
        count = (len(ids) - 1) // length
        self.inputs = ids[: count * length].view(count, length)
        self.labels = ids[1 : count * length + 1].view(count, length)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {"input_ids": self.inputs[indices], "labels": self.labels[indices]}


class CharacterLSTM(nn.Module):
    """Embedding, `torch.nn.LSTM` and a linear layer; logits are (batch, length, characters)."""

    def __init__(self, characters: int, options: LSTMArguments):
        super().__init__()
        self.embedding = nn.Embedding(characters, options.embedding_size)
        self.lstm = nn.LSTM(
            options.embedding_size, options.hidden_size, options.layers, batch_first=True, dropout=options.dropout
        )
        self.head = nn.Linear(options.hidden_size, characters)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.lstm(self.embedding(input_ids))[0])}


def load_text(options: LSTMArguments) -> tuple[Sequences, Sequences, int]:
    """Training and validation sequences, and the number of distinct characters in the whole text."""
    try:
        path = sample_file() if options.text == SAMPLE else Path(options.text)
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"text: {options.text} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"text: {options.text} must be UTF-8: {error}") from error
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([numbers[character] for character in text])
    cut = round(len(ids) * (1 - options.validation_fraction))
    train, validation = (Sequences(part, options.sequence_length) for part in (ids[:cut], ids[cut:]))
    if not len(train) or not len(validation):
        raise UserError(
            f"text: {len(ids)} characters are too few for a training and a validation sequence of "
            f"{options.sequence_length}; give a longer text or a shorter sequence_length"
        )
    return train, validation, len(numbers)


def run(config: str | Path | Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """Train as `config` says and return the run's record; as `recipes.images.train.run`."""
    options, args = read_config(CONFIG_TYPES, config, __doc__)
    train, validation, characters = load_text(options)
    return train_classifier(
        "lstm",
        lambda: CharacterLSTM(characters, options),
        train,
        validation,
        args,
        (options,),
        {"train_sequences": len(train), "validation_sequences": len(validation), "classes": characters},
    )


def main() -> None:
    start_logging()
    record = run(sys.argv[1:])
    if int(os.environ.get("RANK", "0")) == 0:  # one line, not one of each process
        print(summary(record))
