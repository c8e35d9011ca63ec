"""Complete runs of the paper's experiments, one a file: `python -m recipes.NAME` in the clone, or the file's path.

The recipes are part of the clone, not of the wheel. They need more packages than `hf_sai` itself.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from recipes.interrupt import while_importing

# Import name -> package, of the extra `recipes` in pyproject.toml; what single recipes need besides, they name.
_NEEDED = {
    "torch": "torch",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "peft": "peft",
    "datasets": "datasets",
    "evaluate": "evaluate",
    "matplotlib": "matplotlib",
    "safetensors": "safetensors",
    "yaml": "pyyaml",
    "tqdm": "tqdm",
}


def _is_program() -> bool:
    """Whether a recipe is being started, as a module (argv is not set then yet) or as a file."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    return sys.argv[:1] == ["-m"] or (main is not None and Path(main).resolve().parent == Path(__file__).parent)


def _check_packages() -> None:
    missing = [package for name, package in _NEEDED.items() if find_spec(name) is None]
    if not missing:
        return
    message = f"the recipes need {', '.join(missing)}: python -m pip install {' '.join(missing)}"
    if _is_program():
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    raise ModuleNotFoundError(message)


if sys.argv[:1] == ["-m"]:
    while_importing()
_check_packages()
