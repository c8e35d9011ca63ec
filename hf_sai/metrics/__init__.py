"""Metrics as `evaluate` modules: `evaluate.load(E2E_NLG)` works with no network."""

from pathlib import Path

E2E_NLG: str = str(Path(__file__).parent / "e2e_nlg" / "e2e_nlg.py")
"""Path of the `evaluate` module with the five scores of the E2E NLG challenge."""

__all__ = ["E2E_NLG"]
