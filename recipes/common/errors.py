"""Errors that a person reads, and the log."""

import difflib
import logging
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input that the message explains fully: `run_main` prints it without a traceback."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'learning_rate'?` for the nearest of `known`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def start_logging(level: int = logging.INFO) -> None:
    """Log to stderr. The hub's own handler writes its lines already: they do not come a second time."""
    logging.basicConfig(level=level, format="%(name)s: %(message)s")
    logging.getLogger("huggingface_hub").propagate = False
