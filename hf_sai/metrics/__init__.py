"""Metrics as `evaluate` modules. `evaluate.load(E2E_NLG)` works without a network."""

from pathlib import Path

E2E_NLG: str = str(Path(__file__).parent / "e2e_nlg" / "e2e_nlg.py")
"""The path of the `evaluate` module with the five scores of the E2E NLG challenge.

``compute`` takes ``predictions``, one text for each meaning representation, and ``references``, all human texts of each
meaning representation. The optional ``metrics`` is a list of ``"bleu"``, ``"nist"``, ``"meteor"``, ``"rouge_l"``,
``"cider"``. ``compute`` returns BLEU, METEOR and ROUGE-L in [0, 1], NIST from 0 to about 15 and CIDEr in [0, 10], like
the challenge's scorer (tuetschek/e2e-metrics). METEOR, ROUGE-L and CIDEr need Java. A ``ValueError`` names the entry
that is not text.

Example:
    >>> import evaluate
    >>> metric = evaluate.load(E2E_NLG)
    >>> predictions, references = ["Blue Spice is a pub."], [["Blue Spice is a pub.", "There is a pub, Blue Spice."]]
    >>> scores = metric.compute(predictions=predictions, references=references, metrics=["bleu"])
    >>> round(scores["bleu"], 3)
    1.0
"""

__all__ = ["E2E_NLG"]
