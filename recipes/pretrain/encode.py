"""Documents to tokens. A separate module, so that the processes that do it start without torch and transformers."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from recipes.common.interrupt import worker_start


def plain_tokenizer(serialised: str) -> Tokenizer:
    """A copy to which "<|endoftext|>" inside a document is text, not a mark, and which cuts nothing off."""
    tokenizer = Tokenizer.from_str(serialised)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str], end_of_text: int, dtype: str) -> np.ndarray[Any, Any]:
    """The tokens of the documents, shape (tokens,), each document followed by `end_of_text`."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch_fast(documents, add_special_tokens=False):
        ids += encoding.ids
        ids.append(end_of_text)
    return np.asarray(ids, dtype=dtype)


_worker_tokenizer: Tokenizer


def start_worker(serialised: str) -> None:
    global _worker_tokenizer
    worker_start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_tokenizer = plain_tokenizer(serialised)


def encode_in_worker(documents: list[str], end_of_text: int, dtype: str) -> np.ndarray[Any, Any]:
    return encode(_worker_tokenizer, documents, end_of_text, dtype)
