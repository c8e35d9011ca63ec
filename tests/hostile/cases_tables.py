"""Hostile files: E2E tables, outputs to score, pretraining text, folders of images."""

import gzip
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from hostile_table import Attempt, Case
from PIL import Image

from hf_sai.metrics.e2e_nlg.files import read_predictions, read_references
from hf_sai.metrics.e2e_nlg.scoring import score
from recipes.common.e2e_data import attributes, load_e2e, read_csv
from recipes.common.errors import UserError
from recipes.diffusion.data import load_examples
from recipes.pretrain.text import Corpus

WIDE = b"x" * 10_000_000  # one line of 10 MB
ROWS = b"mr,ref\nname[A],A is here.\n"
SCATTERED = gzip.compress(ROWS * 200)


def damage(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


def tables(
    read: Callable[[Path], Any], error: type[Exception], given: dict[str, tuple[str, bytes, str]]
) -> Iterable[Case]:
    """Cases of one reader: what is wrong -> (file name, content, message)."""
    for what, (name, content, says) in given.items():

        def prepare(folder: Path, name: str = name, content: bytes = content) -> Attempt:
            (folder / name).write_bytes(content)
            return Attempt(lambda: read(folder / name))

        yield Case(what, prepare, error, says)


TRAINING_TABLES = {
    "csv: other columns": ("a.csv", b"input,output\n1,2\n", r"a\.csv: no columns mr/ref or .*, only \['input', 'out"),
    "csv: tabs": ("a.csv", ROWS.replace(b",", b"\t"), r"a\.csv: no columns mr/ref .*, only \['mr\\tref'\]"),
    "csv: empty": ("a.csv", b"", r"a\.csv: no columns mr/ref .*, only \[\]"),
    "csv: only a header": ("a.csv", b"mr,ref\n", r"a\.csv: holds no rows"),
    "csv: Latin-1": ("a.csv", ROWS + b"name[Caf\xe9],B\n", r"a\.csv, after line \d: not UTF-8 .*0xe9.*iconv"),
    "csv: UTF-16": ("a.csv", ROWS.decode().encode("utf-16"), r"a\.csv, after line 0: not UTF-8 .*0xff"),
    "csv: a picture": ("a.csv", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"a\.csv, after line 0: not UTF-8 .*0x89"),
    "csv: an unclosed quotation mark": (
        "a.csv",
        ROWS + b'name[B],"B is\nname[C],C is.\n',
        r"a\.csv, after line 2: unexpected end of data; double each quotation mark",
    ),
    "csv: an unquoted comma": ("a.csv", ROWS + b"name[B], area[C],B.\n", r"line 3: other cells than the header has; q"),
    "csv: a cell too few": ("a.csv", ROWS + b"name[B]\n", "line 3: other cells than the header has"),
    "csv: a blank reference": ("a.csv", ROWS + b"name[B],  \n", "line 3: empty ref"),
    "csv: a blank MR": ("a.csv", ROWS + b" ,B\n", "line 3: empty mr"),
    "csv: a cell of 10 MB": (
        "a.csv",
        ROWS + b"name[B]," + WIDE + b"\n",
        r"after line 2: field larger than field limit",
    ),
    "csv: a header of 10 MB": ("a.csv", WIDE, r"a\.csv, after line 0: field larger than field limit"),
    "csv.gz: not compressed": ("a.csv.gz", ROWS, r"a\.csv\.gz cannot be read: Not a gzipped file"),
    "csv.gz: cut": ("a.csv.gz", SCATTERED[:-9], r"a\.csv\.gz cannot be read: .*end-of-stream"),
    "csv.gz: a byte flipped": ("a.csv.gz", damage(SCATTERED, 30), r"a\.csv\.gz cannot be read: "),
}
REFERENCES = {
    "references: other columns": ("a.csv", b"a,b\n1,2\n", r"a\.csv, line 1: the header must have a column mr or"),
    "references: Latin-1": (
        "a.csv",
        ROWS + b"name[\xe9],B\n",
        r"a\.csv, line 3: byte 0xe9 is not UTF-8; save the file",
    ),
    "references: half a surrogate pair": (
        "a.csv",
        ROWS + b"name[B],\xed\xa0\x80\n",
        r"a\.csv, line 3: half of a surrogate pair \(byte 0xed\) is not UTF-8; write the text without it",
    ),
    "references: a cell too many": ("a.csv", ROWS + b"a,b,c\n", r"a\.csv, line 3: 3 cells, but the header has 2"),
    "references: an unclosed quotation mark": ("a.csv", ROWS + b'name[B],"B\n', r"a\.csv, line 3: unexpected end of d"),
    "references: an MR without text": (
        "a.csv",
        ROWS + b"name[B],\n",
        r"a\.csv, line 3: every reference is blank for MR 'name\[B\]'",
    ),
    "references: a line of 10 MB": ("a.csv", ROWS + WIDE, r"a\.csv, line 3: field larger than field limit"),
    "references: cut gzip": ("a.csv.gz", SCATTERED[:-9], r"a\.csv\.gz must be a complete gzip file"),
    "references: damaged gzip": ("a.csv.gz", damage(SCATTERED, 30), r"a\.csv\.gz must be a complete gzip file"),
    "references: a text file": ("a.txt", ROWS, r"a\.txt must be a \.csv or \.tsv file"),
}
MRS = ["name[A]", "name[B]"]
PREDICTIONS = {
    "outputs: one too few": ("a.txt", b"one\n", r"a\.txt, line 2: an output is missing; the file has 1 for the 2 MRs"),
    "outputs: one too many": ("a.txt", b"1\n2\n3\n", r"a\.txt, line 3: too many outputs; the file has 3 for the 2"),
    "outputs: none": ("a.txt", b"\n\n", r"a\.txt, line 1: the file is empty; expected 2 outputs, one per line"),
    "outputs: a strange MR": ("a.tsv", b"mr\toutput\nname[X]\tX\n", r"line 2: MR 'name\[X\]' is not among the 2 MRs"),
    "outputs: two for one MR": (
        "a.csv",
        b"mr,output\nname[A],1\nname[A],2\n",
        r"line 3: another output for MR .* keep one",
    ),
    "outputs: none for an MR": ("a.csv", b"mr,output\nname[A],1\n", r"1 of the 2 MRs .* have no output.*'name\[B\]'"),
    "outputs: half a surrogate pair": ("a.txt", b"a\n\xed\xbf\xbf\n", r"a\.txt, line 2: half of a surrogate pair"),
    "outputs: no text": ("a.txt", b"a\n\xff\xfe\n", r"a\.txt, line 2: byte 0xff is not UTF-8"),
}


def corpus(**settings: Any) -> Callable[[Path], list[str]]:
    return lambda path: list(Corpus(train_files=[str(path)], **settings).documents())


def parquet(column: str, values: list[Any]) -> bytes:
    stream = io.BytesIO()
    pa.parquet.write_table(pa.table({column: values}), stream)
    return stream.getvalue()


TEXTS = {
    "text: Latin-1": ("a.txt", b"caf\xe9\n" * 9, r"a\.txt must be UTF-8, .* byte 0xe9 .*: convert it"),
    "text: blank": ("a.txt", b" \n\n", r"train_files: .*a\.txt holds no text"),
    "text: cut gzip": ("a.txt.gz", SCATTERED[:-9], r"a\.txt\.gz cannot be read beyond line \d+: .*; is it whole\?"),
    "text: damaged gzip": ("a.txt.gz", damage(SCATTERED, 30), r"a\.txt\.gz cannot be read beyond line \d+"),
    "text: another suffix": (
        "a.docx",
        b"PK",
        r"a\.docx must end in one of \.parquet, \.jsonl, \.csv, \.txt, got '\.docx'",
    ),
    "jsonl: no JSON": ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
    "jsonl: a number": ("a.jsonl", b'{"text": 3}\n', r"line 1: no string 'text' \(text_column\) in \['text'\]"),
    "jsonl: a list": ("a.jsonl", b"[1]\n", r"line 1: no string 'text' \(text_column\) in list"),
    "jsonl: half a surrogate pair": (
        "a.jsonl",
        b'{"text": "\\ud800"}\n',
        "line 1: text holds half of a surrogate pair",
    ),
    "jsonl: a thousand brackets": ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: not JSON"),
    "jsonl: 10 MB and no end": ("a.jsonl", b'{"text": "' + WIDE, r"a\.jsonl, line 1: not JSON: Unterminated string"),
    "parquet: no Parquet": ("a.parquet", b"PAR1" + bytes(40), r"a\.parquet must be a whole Parquet file"),
    "parquet: cut": ("a.parquet", parquet("text", ["a" * 999])[:-20], r"a\.parquet must be a whole Parquet file"),
    "parquet: numbers": ("a.parquet", parquet("text", [1, 2]), "text_column 'text' must hold text, it holds int64"),
    "parquet: another column": (
        "a.parquet",
        parquet("body", ["a"]),
        r"text_column must be one of \['body'\], got 'text'",
    ),
    "csv text: another column": ("a.csv", b"body\nabc\n", r"a\.csv: text_column must be one of \['body'\], got 'text'"),
    "csv text: Latin-1": ("a.csv", b"text\ncaf\xe9\n", r"a\.csv must be whole CSV in UTF-8"),
    "csv text: cut gzip": ("a.csv.gz", gzip.compress(b"text\n" + WIDE)[:-99], r"a\.csv\.gz must be whole CSV in UTF-8"),
}


def picture(kind: str = "PNG", size: tuple[int, int] = (24, 24)) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(stream, kind)
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG of 57 bytes that says it is 100,000 pixels a side."""
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


def images(files: dict[str, bytes], **options: Any) -> Callable[[Path], Attempt]:
    def prepare(folder: Path) -> Attempt:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return Attempt(lambda: load_examples(str(folder), **options))

    return prepare


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


GOOD = {"a.png": picture(), "b.jpg": picture("JPEG")}
STOP: dict[str, Any] = {"caption": "a dog", "on_bad_image": "stop"}
_STOPS = r"; --on_bad_image skip trains on the others$"
FOLDERS: dict[str, tuple[dict[str, bytes], dict[str, Any], str]] = {
    "no images": ({"notes.txt": b"hello"}, {}, r"no images in .*; expected files ending in \.bmp"),
    "no captions": (GOOD, {}, r"has no captions; add metadata\.jsonl .*, a \.txt beside each image, or set --caption"),
    "a caption missing": ({**GOOD, "a.txt": b"a dog"}, {}, r"no caption file for b\.jpg in"),
    "a caption in Latin-1": ({"a.png": picture(), "a.txt": b"caf\xe9"}, {}, r"a\.txt must be UTF-8 .*iconv"),
    "metadata.csv in Latin-1": (
        {**GOOD, "metadata.csv": b"file_name,text\na.png,\xe9\n"},
        {},
        "metadata.csv must be UTF-8",
    ),
    "metadata.csv unclosed": ({**GOOD, "metadata.csv": b'file_name,text\na.png,"a\n'}, {}, r"metadata\.csv: not CSV"),
    "metadata.csv other columns": (
        {**GOOD, "metadata.csv": b"image,caption\na.png,x\n"},
        {},
        "entry 1: expected file_name",
    ),
    "metadata.jsonl no JSON": ({**GOOD, "metadata.jsonl": b"{"}, {}, r"metadata\.jsonl, line 1: not JSON"),
    "metadata.jsonl a list": ({**GOOD, "metadata.jsonl": b"[1]"}, {}, r"line 1: expected an object .* got '\[1\]'"),
    "metadata.jsonl name a list": (
        {**GOOD, "metadata.jsonl": lines({"file_name": [], "text": "x"})},
        {},
        "entry 1: expected",
    ),
    "metadata.jsonl name a number": (
        {**GOOD, "metadata.jsonl": lines({"file_name": 3, "text": "x"})},
        {},
        "entry 1: expected",
    ),
    "metadata.jsonl listed twice": (
        {**GOOD, "metadata.jsonl": lines(*[{"file_name": "a.png", "text": "x"}] * 2)},
        {},
        r"metadata\.jsonl: a\.png is listed twice",
    ),
    "metadata.jsonl out of the folder": (
        {**GOOD, "metadata.jsonl": lines({"file_name": "../../etc/passwd.png", "text": "x"})},
        {},
        r"metadata\.jsonl lists \.\./\.\./etc/passwd\.png, not in",
    ),
    "metadata.jsonl an image missing": (
        {**GOOD, "metadata.jsonl": lines({"file_name": "a.png", "text": "x"})},
        {},
        r"has no caption for b\.jpg; add a line, or move the image away",
    ),
    "none usable": ({"a.png": b"", "b.jpg": b"\xff\xd8"}, {"caption": "a dog"}, "none of 2 images is usable"),
    "a cut JPEG": ({**GOOD, "c.jpg": picture("JPEG")[:-200]}, STOP, rf"bad image c\.jpg: .*truncated.*{_STOPS}"),
    "text named PNG": ({**GOOD, "c.png": b"hello"}, STOP, rf"bad image c\.png: cannot identify image file.*{_STOPS}"),
    "a decompression bomb": (
        {**GOOD, "c.png": bomb()},
        STOP,
        rf"bad image c\.png: Image size \(10000000000 pixels\).*{_STOPS}",
    ),
    "too many pixels": (
        {"c.png": picture()},
        {**STOP, "max_image_pixels": 500},
        r"24x24 has more than max_image_pixels \(500\)",
    ),
    "a thread": (
        {**GOOD, "c.png": picture(size=(1, 400))},
        STOP,
        rf"1x400 is over 20 times as long as wide; crop it{_STOPS}",
    ),
}


def missing_split(folder: Path) -> Attempt:
    (folder / "train.csv").write_bytes(ROWS)
    return Attempt(lambda: load_e2e(str(folder)))


CASES: list[Case] = [
    *tables(read_csv, UserError, TRAINING_TABLES),
    *tables(read_references, ValueError, REFERENCES),
    *tables(lambda path: read_predictions(path, MRS), ValueError, PREDICTIONS),
    *tables(corpus(), UserError, TEXTS),
    *(
        Case(f"images: {name}", images(files, **options), UserError, says)
        for name, (files, options, says) in FOLDERS.items()
    ),
    Case(
        "images: no folder", lambda folder: Attempt(lambda: load_examples(str(folder / "no"))), UserError, "cannot read"
    ),
    Case(
        "E2E: a split missing", missing_split, UserError, r"no file for the validation split in .*; looked for dev\.csv"
    ),
    Case(
        "E2E: no folder",
        lambda folder: Attempt(lambda: load_e2e(str(folder / "no"))),
        UserError,
        "is not a folder, and not a name on the hub",
    ),
    Case(
        "E2E: a broken MR",
        lambda _: Attempt(lambda: attributes("name[A] area[B]")),
        UserError,
        r"meaning representation 'name\[A\] area\[B\]', at .*: must be `attribute\[value\]",
    ),
    Case(
        "score: unknown metric",
        lambda _: Attempt(lambda: score(["a"], [["a"]], ["blue"])),
        ValueError,
        "metrics must be names from .*'bleu', .*, got 'blue'",
    ),
    Case(
        "score: other lengths",
        lambda _: Attempt(lambda: score(["a", "b"], [["a"]])),
        ValueError,
        "references must have one list per prediction, got 1 for 2 predictions",
    ),
    Case(
        "score: texts for lists",
        lambda _: Attempt(lambda: score(["a"], ["a"])),
        ValueError,
        r"references\[0\] must be a list of texts, got the text 'a'",
    ),
    Case(
        "score: blank references",
        lambda _: Attempt(lambda: score(["a"], [[" "]])),
        ValueError,
        r"references\[0\] must have at least one text that is not blank, got \[' '\]",
    ),
    Case(
        "text: no file",
        lambda folder: Attempt(lambda: corpus()(folder / "no.txt")),
        UserError,
        r"train_files: no file at '.*no\.txt'",
    ),
]
