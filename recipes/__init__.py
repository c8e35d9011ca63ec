"""Complete runs of the paper's experiments, one a file: `python recipes/NAME.py --config recipes/configs/RUN.yaml`."""
