"""The first import of every recipe, before any library: from here on Ctrl-C is one line and exit status 130.

To import this is to import the package, which sets the handler for the time in which libraries are loaded;
`run_main` takes over from it. See `interrupt.py`.
"""

import gc
import os
import sys
from collections.abc import Callable
from typing import Any

from recipes.common.interrupt import guarded


def run_main(main: Callable[[], Any]) -> None:
    """Call a recipe's main function; a `UserError` becomes one line on stderr and exit status 2, Ctrl-C one and 130."""
    import torch

    from recipes.common.errors import UserError

    if "LOCAL_RANK" in os.environ and not torch.accelerator.is_available():
        # accelerate's launcher of several processes does not pass `use_cpu: true` on: each would train alone
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    try:
        guarded(main)
        if torch.distributed.is_initialized():
            gc.collect()  # a model's reducer holds the group, whose threads must not outlive the interpreter
            torch.distributed.destroy_process_group()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
