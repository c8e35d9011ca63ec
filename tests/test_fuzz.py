"""The parsers on anything: never another error than the documented one, and never another value than was written."""

import csv
import gzip
import io
import json
import math
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sai.checkpoints import why_not_whole
from hf_sai.metrics.e2e_nlg.files import read_predictions, read_references
from hf_sai.optim_args import normalize_optim_args, parse_optim_args
from hf_sai.options import check_group
from recipes.common.config import parse_config
from recipes.common.e2e_data import Row, attributes, read_csv
from recipes.common.errors import UserError
from recipes.common.records import markdown_text
from recipes.pretrain.text import Corpus

quick = settings(max_examples=100, deadline=None, derandomize=True)


def in_file(name: str, content: bytes, read: Callable[[Path], Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        return read(path)


# ---------------------------------------------------------------- optim_args

VALUES = st.sampled_from(
    ["0.9", "1e-8", "-1", "nan", "inf", "1e999", "true", "None", "raw", "AdamW", "bfloat16", "", "٣"]
)
KEYS = st.sampled_from(
    ["momentum", "eps", "scaling", "foreach", "maximize", "momentum_dtype", "clip_threshold", "lr", "beta", "Momentum"]
)
PAIRS = st.builds(lambda key, sign, value: f"{key}{sign}{value}", KEYS, st.sampled_from(["=", " = ", "", "=="]), VALUES)
DEFAULTS = {
    "lr": 0.1,
    "momentum": 0.9,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "scaling": "adamw",
    "maximize": False,
    "foreach": None,
    "fused": None,
    "momentum_dtype": None,
    "stochastic_rounding": False,
    "token_rows": False,
}


@quick
@given(st.text(max_size=60) | st.lists(PAIRS, max_size=4).map(",".join))
def test_optim_args_parse_or_name_themselves(text: str) -> None:
    parsed, refusal = None, None
    try:
        parsed = parse_optim_args(text)
    except ValueError as error:
        refusal = error
    if parsed is None:
        assert type(refusal) is ValueError
        assert str(refusal).startswith("optim_args")
    else:
        check_group({**DEFAULTS, **parsed})
        assert len(parsed) == len([pair for pair in text.split(",") if pair])


@quick
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "momentum": st.floats(0, 1, exclude_max=True),
            "eps": st.floats(0, 1e300),
            "scaling": st.sampled_from(["adamw", "raw", "max"]),
            "foreach": st.booleans() | st.none(),
            "maximize": st.booleans(),
        },
    ),
    st.sampled_from(["", " "]),
)
def test_optim_args_give_back_what_was_written(values: dict[str, Any], space: str) -> None:
    text = ",".join(f"{space}{key}{space}={space}{value}{space}" for key, value in values.items())
    assert parse_optim_args(text) == parse_optim_args(values) == values
    assert parse_optim_args(normalize_optim_args(values)) == parse_optim_args(json.dumps(values)) == values


# ---------------------------------------------------------------- tables

# What is no character cannot be written as UTF-8, a byte order mark may start a file, NUL is an error in Python 3.10.
CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=20)
FILLED = CELLS.filter(str.strip)
BYTES = st.binary(max_size=200) | st.lists(
    st.sampled_from(
        [b"mr,ref\n", b"mr\tref\n", b"mr,output\n", b"a,b\n", b'"', b",", b"\n", b"\r", b"\0", b"\xff", b"x[y]"]
    )
).map(b"".join)


def written(rows: list[tuple[str, ...]], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    return text.getvalue().encode()


@quick
@given(st.lists(st.tuples(FILLED, FILLED), min_size=1, max_size=6), st.booleans())
def test_training_tables_give_back_what_was_written(rows: list[tuple[str, str]], packed: bool) -> None:
    content = written([("mr", "ref"), *rows])
    name, content = ("a.csv.gz", gzip.compress(content)) if packed else ("a.csv", content)
    assert in_file(name, content, read_csv) == [Row(*row) for row in rows]


@quick
@given(BYTES, st.sampled_from(["a.csv", "a.csv.gz"]))
def test_training_tables_of_anything(content: bytes, name: str) -> None:
    with suppress(UserError):
        rows = in_file(name, content, read_csv)
        assert rows
        assert all(row.mr.strip() and row.reference.strip() for row in rows)


@quick
@given(st.data())
def test_a_damaged_training_table(data: st.DataObject) -> None:
    """A byte changed or the end cut off: an error, or as many rows as there are lines to read."""
    packed = data.draw(st.booleans())
    content = written([("mr", "ref"), *[(f"name[{i}]", f"{i} is, here") for i in range(5)]])
    content = gzip.compress(content) if packed else content
    at = data.draw(st.integers(0, len(content) - 1))
    change = data.draw(st.binary(max_size=2))
    hurt = content[:at] + change + (content[at + 1 :] if data.draw(st.booleans()) else b"")
    with suppress(UserError):
        assert 1 <= len(in_file("a.csv.gz" if packed else "a.csv", hurt, read_csv)) <= 6


@quick
@given(BYTES, st.sampled_from(["a.csv", "a.tsv", "a.csv.gz", "a.txt", "a.txt.gz", "a"]))
def test_scored_files_of_anything(content: bytes, name: str) -> None:
    with suppress(ValueError):
        references = in_file(name, content, read_references)
        assert all(mr and texts for mr, texts in references.items())
    with suppress(ValueError):
        assert len(in_file(name, content, lambda path: read_predictions(path, ["x[y]", "b"]))) == 2


@quick
@given(st.text(max_size=60) | st.lists(st.tuples(FILLED, CELLS)).map(lambda x: ", ".join(f"{a}[{b}]" for a, b in x)))
def test_meaning_representations_of_anything(mr: str) -> None:
    with suppress(UserError):
        assert all("[" not in name and "]" not in value for name, value in attributes(mr))


@quick
@given(st.binary(max_size=120), st.sampled_from(["a.txt", "a.jsonl", "a.csv", "a.parquet", "a.txt.gz", "a.jsonl.gz"]))
def test_pretraining_text_of_anything(content: bytes, name: str) -> None:
    def read(path: Path) -> list[str]:
        return list(Corpus(train_files=[str(path)]).documents())

    with suppress(UserError):
        documents = in_file(name, content, read)
        assert all(document and not document.isspace() for document in documents)
        "".join(documents).encode()


@quick
@given(st.lists(FILLED, min_size=1, max_size=5))
def test_jsonl_gives_back_what_was_written(documents: list[str]) -> None:
    content = "".join(json.dumps({"text": document}) + "\n" for document in documents).encode()
    assert in_file("a.jsonl", content, lambda path: list(Corpus([str(path)]).documents())) == documents


# ---------------------------------------------------------------- YAML


@dataclass
class Settings:
    """One of each kind."""

    rows: int = 3
    rate: float = 0.5
    flag: bool = False
    name: str = "x"
    limit: int | None = 7
    words: list[str] = field(default_factory=lambda: ["a"])
    extra: dict[str, Any] | str | None = field(default=None)


def parse(content: bytes) -> Settings:
    (found,) = in_file("run.yaml", content, lambda path: parse_config(Settings, ["--config", str(path)]))
    assert isinstance(found, Settings)
    return found


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=15)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.dates() | st.binary(max_size=5)
ANYTHING = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
NAMES = st.sampled_from([*Settings.__dataclass_fields__, "rowz", "config", "help"])


@quick
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "rows": st.integers(-(10**30), 10**30),
            "rate": st.floats(allow_nan=False) | st.integers(-(10**15), 10**15),
            "flag": st.booleans(),
            "name": TEXT,
            "limit": st.integers() | st.none(),
            "words": st.lists(TEXT.filter(lambda word: not word.startswith("-")), min_size=1, max_size=4),
        },
    )
)
def test_settings_are_what_was_written(values: dict[str, Any]) -> None:
    found = parse(yaml.safe_dump(values, allow_unicode=True).encode())
    expected = {**vars(Settings()), **values}
    assert vars(found) == expected


@quick
@given(st.dictionaries(NAMES, ANYTHING, max_size=4))
def test_settings_of_any_values(values: dict[str, Any]) -> None:
    with suppress(UserError):
        found = parse(yaml.safe_dump(values, allow_unicode=True).encode())
        assert (type(found.rows), type(found.rate), type(found.flag), type(found.name)) == (int, float, bool, str)
        assert all(type(word) is str for word in found.words)
        assert isinstance(found.rate, float)
        if isinstance(values.get("rate"), float) and not math.isnan(values["rate"]):
            assert found.rate == values["rate"]


@quick
@given(st.binary(max_size=60) | st.text("rows: -[]{}&*!|>'\"#%@\n\t,1a", max_size=40).map(str.encode))
def test_settings_of_any_bytes(content: bytes) -> None:
    with suppress(UserError):
        parse(content)


# ---------------------------------------------------------------- checkpoints and reports


@quick
@given(
    st.binary(max_size=40),
    st.sampled_from(["model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"]),
)
def test_any_file_in_a_checkpoint_is_whole_or_not(content: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint-1"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text('{"global_step": 1}')
        assert why_not_whole(checkpoint) is None
        (checkpoint / name).write_bytes(content)
        assert why_not_whole(checkpoint) is not None


@quick
@given(TEXT | st.text("[](){}<>!`*_~|$&;#-+=.: \n\r\tab/\\", max_size=30))
def test_text_in_markdown_is_text(text: str) -> None:
    from markdown_it import MarkdownIt

    cell = markdown_text(text)
    assert "\n" not in cell
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parseInline(f"x {cell} x")
    kinds = {child.type for token in tokens for child in token.children or []}
    assert kinds <= {"text", "text_special", "em_open", "em_close", "strong_open", "strong_close"}
