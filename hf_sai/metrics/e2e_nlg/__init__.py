"""The five scores of the E2E NLG challenge: `scoring.py` computes them, `e2e_nlg.py` is their `evaluate` module."""
