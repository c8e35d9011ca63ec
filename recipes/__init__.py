"""Complete runs of the paper's experiments, one job a folder: `python -m recipes.JOB CONFIG [--option value]`.

The recipes are part of the clone, not of the wheel. They need more packages than `hf_sai` itself.
"""

import signal
import sys

if sys.argv[:1] == ["-m"]:  # until `common/interrupt.py` is loaded Ctrl-C ends the process without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import multiprocessing
from importlib.util import find_spec

from recipes.common.interrupt import while_importing

# Import name -> package, of the extra `recipes` in pyproject.toml; a recipe names what else it needs, except for
# what it imports first.
_BASE = {"torch": "torch", "transformers": "transformers", "accelerate": "accelerate", "yaml": "pyyaml"}
_TRAINING = {
    "peft": "peft",
    "datasets": "datasets",
    "evaluate": "evaluate",
    "matplotlib": "matplotlib",
    "safetensors": "safetensors",
    "tqdm": "tqdm",
}
_SINGLE = {"recipes.sft": {"trl": "trl"}}
_IS_PROGRAM = sys.argv[:1] == ["-m"]  # Python sets argv after it has imported the package of a module that it runs


def _check_packages() -> None:
    # Benchmarks run with less, and so does what imports one part.
    trains = _IS_PROGRAM and not any(word.startswith("recipes.bench") for word in sys.orig_argv)
    needed = _BASE | (_TRAINING if trains else {})
    for word in sys.orig_argv if _IS_PROGRAM else ():
        needed |= _SINGLE.get(word, {})
    missing = [package for name, package in needed.items() if find_spec(name) is None]
    if not missing:
        return
    message = f"the recipes need {', '.join(missing)}: python -m pip install {' '.join(missing)}"
    if _IS_PROGRAM:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    raise ModuleNotFoundError(message)


if _IS_PROGRAM or multiprocessing.parent_process() is not None:
    while_importing()
_check_packages()
