"""Complete runs of the paper's experiments, one a file: `python -m recipes.NAME` in the clone, or the file's path.

The recipes are part of the clone, not of the wheel. They need more packages than `hf_sai` itself.
"""

import signal
import sys

if sys.argv[:1] == ["-m"]:  # until `interrupt.py` is loaded Ctrl-C ends the process without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import multiprocessing
import re
from importlib.util import find_spec
from pathlib import Path

from recipes.interrupt import while_importing

# Import name -> package, of the extra `recipes` in pyproject.toml; what single recipes need besides, they name, but for
# what they import first of all.
_BASE = {"torch": "torch", "transformers": "transformers", "accelerate": "accelerate", "yaml": "pyyaml"}
_TRAINING = {
    "peft": "peft",
    "datasets": "datasets",
    "evaluate": "evaluate",
    "matplotlib": "matplotlib",
    "safetensors": "safetensors",
    "tqdm": "tqdm",
}
_SINGLE = {"sft": {"trl": "trl"}}


def _is_program() -> bool:
    """Whether a recipe is being started, as a module (argv is not set yet then) or as a file."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    return sys.argv[:1] == ["-m"] or (main is not None and Path(main).resolve().parent == Path(__file__).parent)


def _check_packages() -> None:
    # Benchmarks run with less, and so does what imports one part.
    trains = _is_program() and not any("bench_" in word for word in sys.orig_argv)
    needed = _BASE | (_TRAINING if trains else {})
    if _is_program():
        for word in sys.orig_argv:
            needed |= _SINGLE.get(re.split(r"[./\\]", word.removesuffix(".py"))[-1], {})
    missing = [package for name, package in needed.items() if find_spec(name) is None]
    if not missing:
        return
    message = f"the recipes need {', '.join(missing)}: python -m pip install {' '.join(missing)}"
    if _is_program():
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    raise ModuleNotFoundError(message)


if _is_program() or multiprocessing.parent_process() is not None:
    while_importing()
_check_packages()
