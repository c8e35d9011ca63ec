"""Text to full blocks of tokens, for pretraining: read, split by document, tokenise once in bounded memory, pack.

A corpus is a list of local files (parquet, jsonl, csv or text) or a data set of the hub. Every document is followed by
the end-of-text token, and the tokens of a split lie one after the other in one file of the cache, which training maps
into memory. The validation split is whole documents: files of its own, or the documents whose hash falls below
`validation_fraction`. A training document that is also a validation document is left out.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset, IterableDataset

from recipes.common import UserError, write_json

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
IGNORED = -100  # the label that transformers' losses leave out
BATCH_CHARACTERS = 1 << 20  # text tokenised as one unit of work: what is lost when the tokenisation is killed
TEXT_DOCUMENT_CHARACTERS = 1 << 14
FORMAT = 1  # of the cache: raised when what is written changes


@dataclass
class Corpus:
    """Where the text comes from and how it is split.

    Either `train_files` (paths or glob patterns; .parquet, .jsonl, .csv, .txt, the last three also with .gz) or
    `dataset` (a name on the hub). A text file has no document marks of its own: a line that equals
    `document_separator` ends a document; without one the file is cut at empty lines into documents of about 16,000
    characters.
    """

    train_files: list[str] = field(default_factory=list)
    validation_files: list[str] = field(default_factory=list)
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    dataset_revision: str | None = None
    text_column: str = "text"
    document_separator: str | None = None
    validation_fraction: float = 0.005
    split_seed: int = 0
    max_documents: int | None = None

    def __post_init__(self) -> None:
        if bool(self.train_files) == bool(self.dataset):
            raise UserError("exactly one of train_files (local) and dataset (on the hub) must be given")
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"validation_fraction must be in [0, 1), got {self.validation_fraction}")

    def documents(self, *, streaming: bool = False) -> Iterator[str]:
        """Every document of the training source in its order, those to be held out included.

        `streaming`: read the hub's data set over the network while iterating, instead of downloading it first.
        """
        if self.dataset:
            return islice(_hub_documents(self, streaming), self.max_documents)
        return islice(_file_documents(self.train_files, self, "train_files"), self.max_documents)

    def validation_documents(self) -> Iterator[str]:
        """The documents of `validation_files`."""
        return _file_documents(self.validation_files, self, "validation_files")

    def held_out(self, digest: bytes) -> bool:
        """Whether the document with this digest belongs to validation; equal documents are on the same side."""
        if self.validation_files:
            return False
        return int.from_bytes(digest[:8], "big") < self.validation_fraction * 2**64

    def digest(self, document: str) -> bytes:
        return hashlib.blake2b(document.encode(), digest_size=16, salt=self.split_seed.to_bytes(8, "big")).digest()

    def describe(self) -> dict[str, Any]:
        """What decides the text: a changed file, split or option gives another cache entry."""
        described: dict[str, Any] = {key: value for key, value in vars(self).items() if not key.endswith("_files")}
        for option in ("train_files", "validation_files"):
            paths = [Path(path).resolve() for path in _expand(getattr(self, option), option)]
            described[option] = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        return described


# --- reading ---------------------------------------------------------------------------------------------------------


def _expand(patterns: Sequence[str], option: str) -> list[str]:
    paths: list[str] = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        if not found or not all(os.path.isfile(path) for path in found):
            raise UserError(f"{option}: no file at {pattern!r}")
        paths += found
    return paths


def _file_documents(patterns: Sequence[str], corpus: Corpus, option: str) -> Iterator[str]:
    for path in _expand(patterns, option):
        suffix = Path(path.removesuffix(".gz")).suffix
        if suffix not in READERS:
            raise UserError(f"{option}: {path} must end in one of {', '.join(READERS)}, got {suffix!r}")
        empty = True
        for document in READERS[suffix](path, corpus):
            if document and not document.isspace():
                empty = False
                yield document
        if empty:
            raise UserError(f"{option}: {path} holds no text")


def _open_text(path: str) -> TextIO:
    opener: Any = gzip.open if path.endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8", newline="")


def _lines(path: str, limit: int = BATCH_CHARACTERS) -> Iterator[tuple[int, str]]:
    """Numbered lines, those over `limit` characters in parts: memory stays bounded where a file is one endless line."""
    number = 0
    with _open_text(path) as handle:
        try:
            while line := handle.readline(limit):
                number += 1
                yield number, line
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} must be UTF-8, but soon after line {number} there is byte {error.object[error.start]:#04x} "
                f"({error.reason}): convert it, for example with iconv"
            ) from error


def _read_text(path: str, corpus: Corpus) -> Iterator[str]:
    pieces: list[str] = []
    length = 0
    for _, line in _lines(path):
        if line.strip() == corpus.document_separator:
            yield "".join(pieces)
            pieces, length = [], 0
            continue
        pieces.append(line)
        length += len(line)
        # Without marks: at the first empty line after 16,000 characters; text without empty lines at any line later.
        enough = TEXT_DOCUMENT_CHARACTERS * (1 if line.isspace() else 8)
        if corpus.document_separator is None and length >= enough:
            yield "".join(pieces)
            pieces, length = [], 0
    yield "".join(pieces)


def _read_jsonl(path: str, corpus: Corpus) -> Iterator[str]:
    for number, line in _lines(path, limit=-1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get(corpus.text_column), str):
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{path}, line {number}: no string {corpus.text_column!r} (text_column) in {found}")
        yield row[corpus.text_column]


def _column(path: str, names: Sequence[str], corpus: Corpus) -> str:
    if corpus.text_column not in names:
        raise UserError(f"{path}: text_column must be one of {list(names)}, got {corpus.text_column!r}")
    return corpus.text_column


def _read_parquet(path: str, corpus: Corpus) -> Iterator[str]:
    with pa.parquet.ParquetFile(path) as file:
        column = _column(path, file.schema_arrow.names, corpus)
        for batch in file.iter_batches(batch_size=256, columns=[column]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _read_csv(path: str, corpus: Corpus) -> Iterator[str]:
    if os.path.getsize(path) == 0:
        return
    try:
        reader = pa.csv.open_csv(
            path,
            read_options=pa.csv.ReadOptions(block_size=1 << 24),
            parse_options=pa.csv.ParseOptions(newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(column_types={corpus.text_column: pa.string()}),
        )
        column = _column(path, reader.schema.names, corpus)
        for batch in reader:
            yield from (text for text in batch.column(column).to_pylist() if text is not None)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} must be CSV in UTF-8: {error}") from error


READERS = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".csv": _read_csv, ".txt": _read_text}


def _hub_documents(corpus: Corpus, streaming: bool) -> Iterator[str]:
    import datasets

    column = corpus.text_column
    try:
        loaded = datasets.load_dataset(
            corpus.dataset,
            corpus.dataset_config,
            split=corpus.dataset_split,
            revision=corpus.dataset_revision,
            streaming=streaming,
        )
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:  # a ConnectionError is an OSError
        raise UserError(
            f"dataset: {corpus.dataset!r} could not be read from the hub ({error}): "
            "check the name and the network, or give local text with train_files"
        ) from error
    if loaded.column_names is not None:
        _column(f"dataset {corpus.dataset}", loaded.column_names, corpus)
    for row in loaded.select_columns([column]):
        if row[column] and not row[column].isspace():
            yield row[column]


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


def _start_worker(serialised: str) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_tokenizer = plain_tokenizer(serialised)


def _encode_in_worker(documents: list[str], end_of_text: int, dtype: str) -> np.ndarray[Any, Any]:
    return encode(_worker_tokenizer, documents, end_of_text, dtype)


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
        self.file = open(path, "r+b" if self.note.exists() else "wb")  # noqa: SIM115 (closed in finish)
        self.file.truncate(self.state["bytes"])
        self.file.seek(0, os.SEEK_END)

    def append(self, encoded: np.ndarray[Any, Any], documents: int, read: int) -> None:
        self.file.write(encoded.tobytes())
        self.file.flush()
        self.state = {
            "read": read,
            "documents": self.state["documents"] + documents,
            "bytes": self.state["bytes"] + encoded.nbytes,
        }
        write_json(self.note, self.state)

    def finish(self) -> TokenFile:
        self.file.close()
        tokens = self.state["bytes"] // np.dtype(self.dtype).itemsize
        return TokenFile(self.path, self.dtype, tokens, self.state["documents"])


def _write_split(
    writer: _Writer, documents: Iterable[tuple[int, str]], serialised: str, end_of_text: int, processes: int
) -> None:
    """`documents` come with the count of documents read up to them, which is where a killed run goes on from."""
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
    with ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, (serialised,)) as pool:
        waiting: deque[tuple[int, int, Future[Any]]] = deque()  # in order, and short: memory stays bounded
        for read, batch in numbered_batches():
            waiting.append((read, len(batch), pool.submit(_encode_in_worker, batch, end_of_text, writer.dtype)))
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

    A killed call goes on where it stopped, several processes at once wait for the one that works. The content does
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
        writer = _Writer(folder / f"{name}.bin", dtype)
        logger.info("tokenising the %s split into %s", name, folder)
        _write_split(writer, documents, serialised, end_of_text, processes)
        files[name] = writer.finish()
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
    """`input_ids` and `labels`, both (block_size,) int64; a short tail is padded, its labels ignored by the loss."""
    input_ids = torch.from_numpy(tokens.astype(np.int64))
    missing = block_size - len(input_ids)
    if missing == 0:
        return {"input_ids": input_ids, "labels": input_ids}
    padding = torch.zeros(missing, dtype=torch.int64)
    return {"input_ids": torch.cat([input_ids, padding]), "labels": torch.cat([input_ids, padding + IGNORED])}


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
    """Documents of a corpus, read anew by each iteration, less the first `skip` and those in `left_out` (digests)."""

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
