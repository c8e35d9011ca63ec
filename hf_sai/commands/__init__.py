"""The subcommands of `hf-sai`, one module each; `hf_sai/cli.py` lists them and says what a module must have."""
