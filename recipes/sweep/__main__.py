"""`python -m recipes.sweep`: the command line of `run.py`."""

from recipes.common.start import run_main

from recipes.sweep.run import main

if __name__ == "__main__":
    run_main(main)
