"""`python -m recipes.lstm`: the command line of `train.py`."""

from recipes.common.start import run_main

from recipes.lstm.train import main

if __name__ == "__main__":
    run_main(main)
