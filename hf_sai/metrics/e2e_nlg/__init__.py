"""The five scores of the E2E NLG challenge. `scoring.py` computes them, and `e2e_nlg.py` is the `evaluate` module."""
