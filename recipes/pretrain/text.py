"""The text of a pretraining run: documents from local files or the hub, and which of them validate.

The validation split is whole documents: separate files, or the documents whose hash falls below
`validation_fraction`, whatever their order.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from recipes.common.errors import UserError
from recipes.common.sample_text import NAME as SAMPLE
from recipes.common.sample_text import sample_file

LINE_CHARACTERS = 1 << 20  # longer lines of a text file are read in parts
TEXT_DOCUMENT_CHARACTERS = 1 << 14
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Corpus:
    """Where the text comes from and how it is split.

    Either `train_files` (paths or glob patterns; .parquet, .jsonl, .csv, .txt, the last three also with .gz; `sample`
    is the text of `sample_text.py`) or
    `dataset` (a name on the hub). A text file has no document marks: a line that equals
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
        if not 0 <= self.split_seed < 2**64:
            raise UserError(f"split_seed must be in [0, 2**64), got {self.split_seed}")
        if self.max_documents is not None and self.max_documents < 1:
            raise UserError(f"max_documents must be at least 1, or left out for all, got {self.max_documents}")

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

    def check_files(self) -> None:
        """Raise `UserError` for a file that is not there."""
        for option in ("train_files", "validation_files"):
            _expand(getattr(self, option), option)

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


def _expand(patterns: Sequence[str], option: str) -> list[str]:
    paths: list[str] = []
    for pattern in patterns:
        if pattern == SAMPLE:
            paths.append(str(sample_file()))
            continue
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


def _lines(path: str, limit: int = LINE_CHARACTERS) -> Iterator[tuple[int, str]]:
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
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} cannot be read beyond line {number}: {error}; is it whole?") from error


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
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get(corpus.text_column), str):
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{path}, line {number}: no string {corpus.text_column!r} (text_column) in {found}")
        text = row[corpus.text_column]
        if _SURROGATE.search(text):
            raise UserError(
                f"{path}, line {number}: {corpus.text_column} holds half of a surrogate pair, which is no text; "
                "leave the line out, or write the character whole"
            )
        yield text


def _column(path: str, names: Sequence[str], corpus: Corpus) -> str:
    if corpus.text_column not in names:
        raise UserError(f"{path}: text_column must be one of {list(names)}, got {corpus.text_column!r}")
    return corpus.text_column


def _read_parquet(path: str, corpus: Corpus) -> Iterator[str]:
    try:
        with pa.parquet.ParquetFile(path) as file:
            column = _column(path, file.schema_arrow.names, corpus)
            kind = file.schema_arrow.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise UserError(f"{path}: text_column {column!r} must hold text, it holds {kind}")
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} must be a whole Parquet file: {error}") from error


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
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} must be whole CSV in UTF-8: {error}") from error


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
    except (OSError, RuntimeError, ValueError) as error:  # no network; a loading script; an unknown config or split
        raise UserError(
            f"dataset: {corpus.dataset!r} could not be read from the hub ({error}): "
            "check the network, dataset_config, dataset_split and dataset_revision (a data set made by a script is at "
            "refs/convert/parquet, sometimes in part), or give local text with train_files"
        ) from error
    if loaded.column_names is not None:
        _column(f"dataset {corpus.dataset}", loaded.column_names, corpus)
    for row in loaded.select_columns([column]):
        if row[column] and not row[column].isspace():
            yield row[column]
