"""`python -m recipes.bench`: the command line of `step.py`."""

from recipes.common.start import run_main

from recipes.bench.step import main

if __name__ == "__main__":
    run_main(main)
