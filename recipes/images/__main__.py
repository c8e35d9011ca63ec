"""`python -m recipes.images`: the command line of `train.py`."""

from recipes.common.start import run_main

from recipes.images.train import main

if __name__ == "__main__":
    run_main(main)
