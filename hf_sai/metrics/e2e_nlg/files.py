"""Read E2E references and outputs. Every error names the file and the line.

References are in the official CSV schema, with one row per reference. There is one output per meaning representation
(MR). Files are UTF-8, optionally with a byte order mark, and optionally gzipped (`.gz`).
"""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

# The official name first, then the name in the Hub's dataset or another common name. Case does not matter.
_MR_COLUMNS = ("mr", "meaning_representation")
_REFERENCE_COLUMNS = ("ref", "human_reference")
_OUTPUT_COLUMNS = ("output", "prediction")
# U+D800 to U+DFFF, as written by a program that does not join surrogate pairs.
_HALF_A_PAIR = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_references(path: Path) -> dict[str, list[str]]:
    """Group a `.csv` or `.tsv` of MRs and references by MR.

    Returns:
        A dict from each MR to its references, in the order in which the MRs first appear, without blank references.

    Raises:
        ValueError: if the file is not UTF-8 or not a table with these columns, or if an MR has no reference.
        OSError: if the file cannot be read.
    """
    references: dict[str, list[str]] = {}
    first_line: dict[str, int] = {}
    for line, mr, reference in _read_table(path, _MR_COLUMNS, _REFERENCE_COLUMNS):
        if not mr:
            raise ValueError(f"{path}, line {line}: the MR is blank")
        first_line.setdefault(mr, line)
        references.setdefault(mr, []).extend([reference] if reference else [])
    if not references:
        raise ValueError(f"{path}, line 2: no references below the header")
    for mr, texts in references.items():
        if not texts:
            raise ValueError(f"{path}, line {first_line[mr]}: every reference is blank for MR {mr!r}")
    return references


def read_predictions(path: Path, mrs: list[str]) -> list[str]:
    """Read one output per MR.

    Args:
        path: a `.csv` or `.tsv` file with the columns `mr` and `output` and rows in any order. Any other file is text
            with one output per line, in the order of `mrs`. If a text has one line per MR, a blank line is an empty
            output. If it has more lines, blank lines are ignored.
        mrs: the distinct MRs of the references.

    Returns:
        The outputs, in the order of `mrs`.

    Raises:
        ValueError: if the file is not UTF-8, or if an MR has no output, has two different outputs, or is unknown.
        OSError: if the file cannot be read.
    """
    if _delimiter(path):
        return _read_output_table(path, mrs)
    return _read_output_lines(path, mrs)


def _read_output_table(path: Path, mrs: list[str]) -> list[str]:
    expected = set(mrs)
    outputs: dict[str, str] = {}
    first_line: dict[str, int] = {}
    for line, mr, output in _read_table(path, _MR_COLUMNS, _OUTPUT_COLUMNS):
        if mr not in expected:
            raise ValueError(f"{path}, line {line}: MR {mr!r} is not among the {len(mrs)} MRs of the references")
        if outputs.setdefault(mr, output) != output:
            raise ValueError(
                f"{path}, line {line}: another output for MR {mr!r}, which has one on line {first_line[mr]}; "
                "keep one output per MR"
            )
        first_line.setdefault(mr, line)
        last = line
    if not outputs:
        raise ValueError(f"{path}, line 2: no outputs below the header")
    missing = [mr for mr in mrs if mr not in outputs]
    if missing:
        hint = _if_first(len(outputs)) if missing == mrs[len(outputs) :] else ""
        raise ValueError(
            f"{path}, line {last + 1}: the table ends, and {len(missing)} of the {len(mrs)} MRs of the references have "
            f"no output, the first of them {missing[0]!r}{hint}"
        )
    return [outputs[mr] for mr in mrs]


def _read_output_lines(path: Path, mrs: list[str]) -> list[str]:
    lines = [_clean(line) for line in _read_text(path).removesuffix("\n").split("\n")]
    filled = [i for i, line in enumerate(lines) if line]
    if not filled:
        raise ValueError(f"{path}, line 1: the file is empty; expected {len(mrs)} outputs, one per line")
    up_to_last = lines[: filled[-1] + 1]
    for outputs in (lines, up_to_last, [lines[i] for i in filled]):
        if len(outputs) == len(mrs):
            return outputs
    if len(filled) > len(mrs):
        raise ValueError(
            f"{path}, line {filled[len(mrs)] + 1}: too many outputs; the file has {len(filled)} for the "
            f"{len(mrs)} MRs of the references"
        )
    raise ValueError(
        f"{path}, line {len(up_to_last) + 1}: an output is missing; the file has {len(filled)} for the {len(mrs)} MRs "
        f"of the references{_if_first(len(up_to_last))}"
    )


def _if_first(count: int) -> str:
    return f"; if these are the outputs for the first {count} MRs, score them with --max-mrs {count}"


def _read_table(
    path: Path, key_columns: tuple[str, ...], value_columns: tuple[str, ...]
) -> Iterator[tuple[int, str, str]]:
    """The line number, key and value of each row that is not blank. Any run of whitespace counts as one space."""
    delimiter = _delimiter(path)
    if delimiter is None:
        raise ValueError(f"{path} must be a .csv or .tsv file, optionally followed by .gz")
    # StringIO splits lines only at newlines. str.splitlines would also split at U+2028 and similar characters.
    reader = csv.reader(io.StringIO(_read_text(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for row in reader:
            cells = [_clean(cell) for cell in row]
            if any(cells):
                if header is None:
                    header = [cell.lower() for cell in cells]
                    key = _column(path, line, header, key_columns)
                    value = _column(path, line, header, value_columns)
                elif len(cells) != len(header):
                    raise ValueError(f"{path}, line {line}: {len(cells)} cells, but the header has {len(header)}")
                else:
                    yield line, cells[key], cells[value]
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {line}: {error}; a cell with a quotation mark must be quoted and the mark doubled, as "
            "Python's csv module and pandas write it"
        ) from None
    if header is None:
        raise ValueError(
            f"{path}, line 1: the file is empty; expected a header with the columns {key_columns[0]} and "
            f"{value_columns[0]}"
        )


def _column(path: Path, line: int, header: list[str], names: tuple[str, ...]) -> int:
    for name in names:
        if name in header:
            return header.index(name)
    raise ValueError(f"{path}, line {line}: the header must have a column {' or '.join(names)}, got {header}")


def _read_text(path: Path) -> str:
    """Read the whole file, with newlines as line ends. Any other carriage return becomes a space."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} must be a complete gzip file: {error}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        if _HALF_A_PAIR.match(raw, error.start):
            raise ValueError(
                f"{path}, line {line}: half of a surrogate pair (byte 0xed) is not UTF-8; write the text without "
                'it, for example with text.encode("utf-8", "replace")'
            ) from None
        raise ValueError(
            f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8, for example "
            f"with `iconv -f latin1 -t utf-8`"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", " ")


def _delimiter(path: Path) -> str | None:
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    return _DELIMITERS.get(plain.suffix.lower())


def _clean(text: str) -> str:
    return " ".join(text.split())
