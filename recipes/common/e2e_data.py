"""The E2E set: from the hub or a local folder, as rows, prompts, groups of references and token sequences.

A meaning representation (MR) is `name[Blue Spice], eatType[coffee shop], area[city centre]`; several references
describe one MR, and scores are taken per MR against all of them.
"""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from recipes.common.errors import UserError
from recipes.common.files import write_text

HUB_NAME = "tuetschek/e2e_nlg"
# The hub's copy has a loading script, which `datasets` no longer runs; this revision holds the same rows as parquet.
HUB_REVISION = "refs/convert/parquet"

# Split -> file stems: short names, then those of the official release.
FILE_STEMS = {
    "train": ("train", "trainset"),
    "validation": ("dev", "devset", "validation"),
    "test": ("test", "testset_w_refs"),
}
# Column names: those of the official CSV files, then those of the hub's copy.
COLUMNS = (("mr", "ref"), ("meaning_representation", "human_reference"))

_ATTRIBUTE = re.compile(r"\s*([^\[\],]+)\[([^\]]*)\]\s*(?:,|$)")
_PROMPT_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}


class Row(NamedTuple):
    """One meaning representation with one of its references."""

    mr: str
    reference: str


class Group(NamedTuple):
    """One meaning representation with all its references, in the order of the file."""

    mr: str
    references: list[str]


@dataclass
class E2EData:
    """The three splits."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]


def load_e2e(source: str, revision: str | None = None) -> E2EData:
    """Read the three splits from a local folder of CSV files or from the hub.

    Args:
        source: a folder with `train`, `dev` and `test` (or the official `trainset`, `devset`, `testset_w_refs`) as
            `.csv` or `.csv.gz`; else a data set's name on the hub.
        revision: of the hub's data set; for `tuetschek/e2e_nlg` the parquet branch unless said otherwise.
    """
    folder = Path(source)
    if folder.is_dir():
        return E2EData(**{split: read_csv(_find_file(folder, split)) for split in FILE_STEMS})
    if source.count("/") != 1 or source.startswith((".", "~", "/")):
        raise UserError(f"data: {source!r} is not a folder, and not a name on the hub (owner/name)")
    from datasets import load_dataset

    try:
        splits = load_dataset(source, revision=revision or (HUB_REVISION if source == HUB_NAME else None))
    except (OSError, RuntimeError) as error:
        raise UserError(f"data: could not load {source} from the hub ({error}); a local folder also does") from error
    missing = [split for split in FILE_STEMS if split not in splits]
    if missing:
        raise UserError(f"data: {source} has no split {missing[0]!r}, only {', '.join(splits)}")
    rows = {}
    for split in FILE_STEMS:
        mr, reference = _columns(splits[split].column_names, f"{source}, split {split}")
        rows[split] = [Row(*pair) for pair in zip(splits[split][mr], splits[split][reference], strict=True)]
        for i, row in enumerate(rows[split]):
            for column, text in zip((mr, reference), row, strict=True):
                if not (text or "").strip():
                    raise UserError(f"data: {source}, split {split}, row {i}: empty {column}")
    return E2EData(**rows)


def _find_file(folder: Path, split: str) -> Path:
    names = [stem + suffix for stem in FILE_STEMS[split] for suffix in (".csv", ".csv.gz")]
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise UserError(f"data: no file for the {split} split in {folder}; looked for {', '.join(names)}")
    return found[0]


def _columns(found: Iterable[str] | None, where: str) -> tuple[str, str]:
    names = list(found or [])
    for pair in COLUMNS:
        if all(column in names for column in pair):
            return pair
    raise UserError(f"{where}: no columns {' or '.join('/'.join(pair) for pair in COLUMNS)}, only {names}")


def read_csv(path: Path) -> list[Row]:
    """The rows of one file in the official schema, plain or gzipped; errors name the line."""
    rows = []
    line = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as raw:
            # strict: a quotation mark that is never closed would make one reference of the rest of the file
            reader = csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8-sig", newline=""), strict=True)
            mr, reference = _columns(reader.fieldnames, str(path))
            for row in reader:
                line = reader.line_num
                if None in row or None in row.values():
                    raise UserError(f"{path}, line {line}: other cells than the header has; quote one with a comma")
                if not (row[mr] or "").strip() or not (row[reference] or "").strip():
                    empty = reference if (row[mr] or "").strip() else mr
                    raise UserError(f"{path}, line {reader.line_num}: empty {empty}")
                rows.append(Row(row[mr], row[reference]))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, after line {line}: not UTF-8 ({error}); convert it, for example by iconv") from error
    except csv.Error as error:
        raise UserError(f"{path}, after line {line}: {error}; double each quotation mark in a quoted cell") from error
    if not rows:
        raise UserError(f"{path}: holds no rows")
    return rows


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """A file in the official schema, as `read_csv` reads it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([COLUMNS[0], *rows])
    write_text(path, text.getvalue())


def group(rows: Sequence[Row]) -> list[Group]:
    """Rows with one MR, wherever they stand, as one group; groups in order of first appearance."""
    references: dict[str, list[str]] = {}
    for row in rows:
        references.setdefault(row.mr, []).append(row.reference)
    return [Group(mr, texts) for mr, texts in references.items()]


def attributes(mr: str) -> list[tuple[str, str]]:
    """`name[Blue Spice], area[riverside]` as `[("name", "Blue Spice"), ("area", "riverside")]`."""
    found, end = [], 0
    while end < len(mr):
        match = _ATTRIBUTE.match(mr, end)
        if not match:
            where = f"meaning representation {mr!r}, at {mr[end : end + 20]!r}"
            raise UserError(f"{where}: must be `attribute[value], attribute[value], ...`")
        found.append((match[1].strip(), match[2].strip()))
        end = match.end()
    return found


def prompt(mr: str) -> str:
    """The text the model is given: `name : Blue Spice | Type : coffee shop | area : city centre`."""
    return " | ".join(f"{_PROMPT_NAMES.get(name, name)} : {value}" for name, value in attributes(mr))


def prompt_ids(tokenizer: Any, mrs: Sequence[str]) -> list[list[int]]:
    """Each prompt's tokens and the separator: the tokenizer's beginning-of-text token, which is also GPT-2's end."""
    separator = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    tokens = tokenizer([prompt(mr) for mr in mrs], add_special_tokens=False)["input_ids"]
    return [[*ids, separator] for ids in tokens]


class E2ETokens:
    """Training sequences: prompt, separator, reference, end of text; the loss counts the reference and the end.

    Args:
        rows: the split.
        tokenizer: any with an end-of-text token.
        max_length: in tokens; what is longer is cut at the end.
    """

    def __init__(self, rows: Sequence[Row], tokenizer: Any, max_length: int):
        distinct = list(dict.fromkeys(row.mr for row in rows))
        prompts = dict(zip(distinct, prompt_ids(tokenizer, distinct), strict=True))
        texts = [" " + clean(row.reference) for row in rows]
        self.examples = []
        for row, text in zip(rows, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
            given, target = prompts[row.mr], [*text, tokenizer.eos_token_id]
            if len(given) >= max_length:
                raise UserError(f"max_length: {max_length} tokens leave no room for the text after {row.mr!r}")
            ids = (given + target)[:max_length]
            # -100: the label transformers' losses leave out
            labels = ([-100] * len(given) + target)[:max_length]
            self.examples.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.examples[index]


def clean(text: str) -> str:
    """One line, single blanks: the form in which references are learned and outputs are scored."""
    return " ".join(text.split())
