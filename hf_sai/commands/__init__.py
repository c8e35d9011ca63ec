"""The subcommands of `hf-sai`, one module each. `hf_sai/cli.py` lists them and defines their interface."""
