"""Outputs that a scored system may write are text to the scorer, never commands or references."""

import sys
from pathlib import Path

import pytest

from hf_sai import cli
from hf_sai.metrics.e2e_nlg.scoring import _meteor

# Answers METEOR's protocol with the number of texts in each line.
METEOR = """#!{python}
import sys
for line in sys.stdin:
    fields = line.strip().split(" ||| ")
    numbers = fields[1:] if fields[0] == "EVAL" else []
    for number in [*numbers, numbers[-1] if numbers else str(len(fields) - 1)]:
        print(number, flush=True)
"""


@pytest.mark.parametrize("output", ["a bus", "a bus ||| a bus", "a ||||| b", "||| |||", "SCORE ||| a"])
def test_an_output_brings_no_reference_of_its_own(output: str, tmp_path: Path) -> None:
    java = tmp_path / "java"
    java.write_text(METEOR.format(python=sys.executable))
    java.chmod(0o755)
    assert _meteor(str(java), [output], [["a red bus", "one ||| bus"]]) == 3  # two references and the output


def test_the_command_line_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "refs.csv").write_bytes(b"mr,ref\nname[A],A\n")
    (tmp_path / "out.txt").write_bytes(b"\xff")
    for words, says in (
        ([str(tmp_path / "out.txt"), "--references", str(tmp_path / "refs.csv")], "line 1: byte 0xff is not UTF-8"),
        ([str(tmp_path), "--references", str(tmp_path / "refs.csv")], "Is a directory"),
        ([str(tmp_path / "no"), "--references", str(tmp_path / "refs.csv")], "No such file or directory"),
        ([str(tmp_path / "out.txt"), "--references", str(tmp_path / "refs.csv" / "x.csv")], "Not a directory"),
    ):
        assert cli.main(["score", *words, "--metrics", "bleu"]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("hf-sai score: error: ")
        assert says in err
        assert err.count("\n") == 1
