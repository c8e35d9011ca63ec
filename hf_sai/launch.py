"""Run an unchanged training script in a process where `optim="sgd_sai"` is valid.

    python -m hf_sai.launch SCRIPT ARGS...
    python -m hf_sai.launch -m MODULE ARGS...
    accelerate launch -m hf_sai.launch sft.py --optim sgd_sai

The script sees what `python SCRIPT ARGS...` would show it. Processes that it spawns itself start without the
registration: they call `hf_sai.register()` where they build training arguments.
"""

import os
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from types import ModuleType

USAGE = "usage: python -m hf_sai.launch SCRIPT [ARGS...]\n       python -m hf_sai.launch -m MODULE [ARGS...]"


def main(argv: Sequence[str] | None = None) -> None:
    """Register SGD-SaI with transformers, then run the script or module that ``argv`` names as ``__main__``.

    Args:
        argv: the script and its arguments, by default those of this process.

    Raises:
        SystemExit: the script's own, or status 2 if there is no script to run.
    """
    target = list(sys.argv[1:] if argv is None else argv)
    if target[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    module = target[:1] == ["-m"]
    if module:
        del target[0]
    if not target or (target[0].startswith("-") and not os.path.exists(target[0])):
        raise _refusal(USAGE)
    if not (module or os.path.isfile(target[0])):
        raise _refusal(f"hf_sai.launch: cannot open script {target[0]!r}: there is no such file\n{USAGE}")

    from hf_sai.registration import register

    register()
    sys.argv[:] = target
    if module:
        runpy.run_module(target[0], run_name="__main__", alter_sys=True)
    else:
        run_script(target[0])


def run_script(path: str) -> None:
    """Execute a file as the interpreter would: as ``__main__``, with its folder first on ``sys.path``.

    `runpy.run_path` is no substitute: it takes its ``__main__`` out of ``sys.modules`` when the script ends, while
    exit handlers and threads still pickle by it, and leaves ``sys.path`` alone.
    """
    path = os.path.abspath(path)
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    loader = SourceFileLoader("__main__", path)
    main_module = ModuleType("__main__")
    # `__file__` and a `__spec__` of None are also what tells multiprocessing's children which script to import.
    vars(main_module).update(
        __file__=path, __loader__=loader, __spec__=None, __cached__=None, __builtins__=__builtins__
    )
    sys.modules["__main__"] = main_module
    exec(loader.source_to_code(loader.get_data(path), path), vars(main_module))


def _refusal(message: str) -> SystemExit:
    print(message, file=sys.stderr)
    return SystemExit(2)


if __name__ == "__main__":
    main()
