"""`python -m recipes.e2e`: the command line of `train.py`."""

from recipes.common.start import run_main

from recipes.e2e.train import main

if __name__ == "__main__":
    run_main(main)
