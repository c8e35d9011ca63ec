"""Documents to full blocks of tokens: tokenised once in bounded memory, then packed.

Every document is followed by the end-of-text token, and the tokens of a split follow one another in one file of
the cache, which training maps into memory. A training document that is also a validation document is left out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset, IterableDataset

from recipes.common.errors import UserError
from recipes.common.files import write_json
from recipes.pretrain.encode import encode, encode_in_worker, plain_tokenizer, start_worker
from recipes.pretrain.text import Corpus

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
IGNORED = -100  # the label that transformers' losses leave out
BATCH_CHARACTERS = 1 << 20  # text tokenised as one unit of work: what is lost when the tokenisation is killed
FORMAT = 1  # of the cache: raised when what is written changes


# --- tokenising ------------------------------------------------------------------------------------------------------


def train_tokenizer(corpus: Corpus, vocab_size: int, max_bytes: int) -> Tokenizer:
    """Byte-level BPE of GPT-2's kind from the training documents, the first `max_bytes` of them at most."""
    if vocab_size < 257:
        raise UserError(f"vocab_size must be at least 257 (256 bytes and {END_OF_TEXT}), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def sample() -> Iterator[str]:
        seen = 0
        for document in corpus.documents():
            if not corpus.held_out(corpus.digest(document)):
                yield document
                seen += len(document.encode())
                if seen >= max_bytes:
                    return

    tokenizer.train_from_iterator(sample(), trainer)
    return tokenizer


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass
class TokenFile:
    """The tokens of one split: `path` holds `tokens` numbers of type `dtype`, from `documents` documents."""

    path: Path
    dtype: str
    tokens: int
    documents: int

    def load(self) -> np.ndarray[Any, Any]:
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.tokens,))


class _Writer:
    """Appends the encoded batches of one split to a file and notes after each how far it came."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, dtype
        self.note = path.with_suffix(".progress.json")
        self.state = (
            json.loads(self.note.read_text()) if self.note.exists() else {"read": 0, "documents": 0, "bytes": 0}
        )
        self.file = open(path, "r+b" if self.note.exists() else "wb")  # noqa: SIM115 (closed by __exit__)
        self.file.truncate(self.state["bytes"])
        self.file.seek(0, os.SEEK_END)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.file.close()

    def append(self, encoded: np.ndarray[Any, Any], documents: int, read: int) -> None:
        self.file.write(encoded.tobytes())
        self.file.flush()
        self.state = {
            "read": read,
            "documents": self.state["documents"] + documents,
            "bytes": self.state["bytes"] + encoded.nbytes,
        }
        write_json(self.note, self.state)

    def result(self) -> TokenFile:
        tokens = self.state["bytes"] // np.dtype(self.dtype).itemsize
        return TokenFile(self.path, self.dtype, tokens, self.state["documents"])


def _write_split(
    writer: _Writer, documents: Iterable[tuple[int, str]], serialised: str, end_of_text: int, processes: int
) -> None:
    """`documents` come with the count of documents read up to them, which is where a killed run resumes."""
    done = writer.state["read"]
    fresh = ((read, text) for read, text in documents if read > done)

    def numbered_batches() -> Iterator[tuple[int, list[str]]]:
        last = done

        def texts() -> Iterator[str]:
            nonlocal last
            for read, text in fresh:
                last = read
                yield text

        for batch in _batches(texts()):
            yield last, batch

    if processes == 1:
        tokenizer = plain_tokenizer(serialised)
        for read, batch in numbered_batches():
            writer.append(encode(tokenizer, batch, end_of_text, writer.dtype), len(batch), read)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), start_worker, (serialised,)) as pool:
        waiting: deque[tuple[int, int, Future[Any]]] = deque()  # in order, and short: memory stays bounded
        for read, batch in numbered_batches():
            waiting.append((read, len(batch), pool.submit(encode_in_worker, batch, end_of_text, writer.dtype)))
            if len(waiting) > 2 * processes:
                read, count, future = waiting.popleft()
                writer.append(future.result(), count, read)
        for read, count, future in waiting:
            writer.append(future.result(), count, read)


def cache_key(corpus: Corpus, *parts: Any) -> str:
    """16 letters that change when the text or one of `parts` (JSON values) does."""
    text = json.dumps([FORMAT, corpus.describe(), *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tokenize_corpus(
    corpus: Corpus, tokenizer: Tokenizer, end_of_text: int, cache_dir: str | Path, processes: int = 1
) -> dict[str, TokenFile]:
    """The token files "train" and "validation" of a corpus, made once and then found in `cache_dir`.

    A killed call resumes where it stopped; several processes at once wait for the one that works. The content does
    not depend on `processes`. Memory: a few MB of text for each process.

    Args:
        end_of_text: the token that follows each document.

    Raises:
        UserError: the text cannot be read, is not UTF-8, or lacks the text column; a split is empty.
    """
    serialised = tokenizer.to_str()
    dtype = "uint16" if tokenizer.get_vocab_size() <= 1 << 16 else "uint32"
    key = cache_key(corpus, end_of_text, hashlib.sha256(serialised.encode()).hexdigest())
    folder = Path(cache_dir) / f"tokens-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "index.json"
    with FileLock(folder / "lock"):
        if not index.exists():
            files = _build(corpus, serialised, end_of_text, dtype, folder, processes)
            write_json(index, {name: {"tokens": f.tokens, "documents": f.documents} for name, f in files.items()})
    counts = json.loads(index.read_text())
    return {name: TokenFile(folder / f"{name}.bin", dtype, **count) for name, count in counts.items()}


def _build(
    corpus: Corpus, serialised: str, end_of_text: int, dtype: str, folder: Path, processes: int
) -> dict[str, TokenFile]:
    validation_digests: set[bytes] = set()
    left_out = 0

    def validation() -> Iterator[tuple[int, str]]:
        source = corpus.validation_documents() if corpus.validation_files else corpus.documents()
        for read, document in enumerate(source, 1):
            digest = corpus.digest(document)
            if corpus.validation_files or corpus.held_out(digest):
                validation_digests.add(digest)
                yield read, document

    def train() -> Iterator[tuple[int, str]]:
        nonlocal left_out
        for read, document in enumerate(corpus.documents(), 1):
            if corpus.digest(document) not in validation_digests:
                yield read, document
            elif corpus.validation_files:
                left_out += 1

    files = {}
    for name, documents in (("validation", validation()), ("train", train())):
        logger.info("tokenising the %s split into %s", name, folder)
        with _Writer(folder / f"{name}.bin", dtype) as writer:
            _write_split(writer, documents, serialised, end_of_text, processes)
        files[name] = writer.result()
        logger.info("%s: %d documents, %d tokens", name, files[name].documents, files[name].tokens)
        if files[name].tokens == 0 and (name == "train" or corpus.validation_files or corpus.validation_fraction > 0):
            raise UserError(
                f"the {name} split has no document: give more text, or another validation_fraction "
                f"(now {corpus.validation_fraction}; 0 trains without validation)"
            )
    if left_out:
        logger.warning("%d training documents are also validation documents and were left out", left_out)
    return files


# --- packing ---------------------------------------------------------------------------------------------------------


def _block(tokens: np.ndarray[Any, Any], block_size: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `labels`, both (block_size,) int64; a short tail is padded, its labels ignored by the loss.

    The first label is ignored too: nothing predicts it, and a Trainer that counts it as a label (those of transformers
    4, and of 5 where it does not recognise the loss) would divide the loss by block_size instead of block_size - 1.
    """
    input_ids = torch.zeros(block_size, dtype=torch.int64)
    input_ids[: len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
    labels = input_ids.clone()
    labels[0] = IGNORED
    labels[len(tokens) :] = IGNORED
    return {"input_ids": input_ids, "labels": labels}


class PackedBlocks(Dataset[dict[str, torch.Tensor]]):
    """A token file as blocks of `block_size`. Each starts with the last token of the one before.

    A causal model predicts all tokens of a block but the first, so with that one token of overlap every token of the
    file except the very first is predicted exactly once in an epoch. Only the last block may be padded.
    """

    def __init__(self, tokens: np.ndarray[Any, Any], block_size: int) -> None:
        if block_size < 2:
            raise UserError(f"block_size must be at least 2, got {block_size}")
        if len(tokens) < 2:
            raise UserError(f"a split must hold at least 2 tokens, got {len(tokens)}")
        self.tokens, self.block_size = tokens, block_size

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // (self.block_size - 1))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        start = index * (self.block_size - 1)
        return _block(self.tokens[start : start + self.block_size], self.block_size)


class Stream:
    """Documents of a corpus, read again by each iteration, less the first `skip` and those in `left_out` (digests)."""

    def __init__(self, corpus: Corpus, skip: int, left_out: set[bytes]) -> None:
        self.corpus, self.skip, self.left_out = corpus, skip, left_out

    def __iter__(self) -> Iterator[str]:
        for document in islice(self.corpus.documents(streaming=True), self.skip, None):
            if self.corpus.digest(document) not in self.left_out:
                yield document


def split_stream(
    corpus: Corpus, tokenizer: Tokenizer, end_of_text: int, validation_documents: int
) -> tuple[Stream, np.ndarray[Any, Any]]:
    """A stream to train on and the validation tokens: of `validation_files`, or of the first documents."""
    skip = 0 if corpus.validation_files else validation_documents
    held_out = corpus.validation_documents() if corpus.validation_files else corpus.documents(streaming=True)
    documents = list(islice(held_out, None if corpus.validation_files else validation_documents))
    tokens = encode(plain_tokenizer(tokenizer.to_str()), documents, end_of_text, "uint32")
    return Stream(corpus, skip, {corpus.digest(document) for document in documents}), tokens


class StreamedBlocks(IterableDataset[dict[str, torch.Tensor]]):
    """The blocks of `PackedBlocks`, tokenised on the way from a stream of documents; nothing is written to disk."""

    def __init__(self, documents: Iterable[str], tokenizer: Tokenizer, end_of_text: int, block_size: int) -> None:
        self.documents, self.serialised = documents, tokenizer.to_str()
        self.end_of_text, self.block_size = end_of_text, block_size

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if torch.utils.data.get_worker_info() is not None:
            raise UserError("dataloader_num_workers must be 0 with streaming: each worker would read every document")
        tokenizer = plain_tokenizer(self.serialised)
        stride = self.block_size - 1
        carried = np.empty(0, dtype=np.uint32)
        for batch in _batches(self.documents):
            carried = np.concatenate([carried, encode(tokenizer, batch, self.end_of_text, "uint32")])
            blocks = max(len(carried) - 1, 0) // stride
            for start in range(0, blocks * stride, stride):
                yield _block(carried[start : start + self.block_size], self.block_size)
            carried = carried[blocks * stride :]
        if len(carried) > 1:
            yield _block(carried, self.block_size)
