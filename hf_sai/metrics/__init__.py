"""Metrics as `evaluate` modules: `evaluate.load(E2E_NLG)` works with no network."""

from pathlib import Path

E2E_NLG: str = str(Path(__file__).parent / "e2e_nlg" / "e2e_nlg.py")
"""Path of the `evaluate` module with the five scores of the E2E NLG challenge.

``compute`` takes one text for each meaning representation as ``predictions``, all human texts of each as
``references`` and optionally ``metrics``, a list of ``"bleu"``, ``"nist"``, ``"meteor"``, ``"rouge_l"``, ``"cider"``.
It returns BLEU, METEOR and ROUGE-L in [0, 1], NIST from 0 to about 15 and CIDEr in [0, 10], as the challenge's scorer
(tuetschek/e2e-metrics) counts them. The last three need Java. A ``ValueError`` names the entry that is not text.

Example:
    >>> import evaluate
    >>> metric = evaluate.load(E2E_NLG)
    >>> predictions, references = ["Blue Spice is a pub."], [["Blue Spice is a pub.", "There is a pub, Blue Spice."]]
    >>> scores = metric.compute(predictions=predictions, references=references, metrics=["bleu"])
    >>> round(scores["bleu"], 3)
    1.0
"""

__all__ = ["E2E_NLG"]
