"""Run an unmodified training script or command in processes where `optim="sgd_sai"` is valid.

    hf-sai launch SCRIPT ARGS...                  or python -m hf_sai.launch SCRIPT ARGS...
    hf-sai launch -m MODULE ARGS...
    hf-sai launch COMMAND ARGS...                 trl sft --config sft.yaml, torchrun train.py, accelerate launch ...
    accelerate launch -m hf_sai.launch sft.py --optim sgd_sai

The program runs as under the plain interpreter, except for `sys.executable`. The Python processes that it starts are
also registered: through multiprocessing's spawn, torchrun, accelerate and other launchers, `sys.executable`, and
`python` on PATH. Processes that it starts by the full path of an interpreter are not registered. On Windows, no child
process is registered.
"""

import os
import runpy
import shutil
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from types import CodeType, ModuleType

USAGE = """usage: python -m hf_sai.launch SCRIPT [ARGS...]
       python -m hf_sai.launch COMMAND [ARGS...]
       python -m hf_sai.launch -m MODULE [ARGS...]
`hf-sai launch` is the same."""


def main(argv: Sequence[str] | None = None) -> None:
    """Register SGD-SaI with transformers, here and in children, then run the program in ``argv`` as ``__main__``.

    Args:
        argv: a script, a command on ``PATH``, ``-m`` and a module, ``-c`` and code, or ``-`` for code from standard
            input, followed by its arguments. The default is this process's own arguments. A command that is not written
            in Python replaces this process.

    Raises:
        SystemExit: the script's own exit, or status 2 if there is nothing to run.

    Example:
        >>> main(["sft.py", "--optim", "sgd_sai"])
    """
    target = list(sys.argv[1:] if argv is None else argv)
    while target[:2] == ["-m", "hf_sai.launch"]:
        del target[:2]
    if target[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    option = target.pop(0) if target[:1] in (["-m"], ["-c"]) else ""
    if not target:
        raise _refusal(USAGE)
    name = target[0]
    path = name if option or name == "-" or os.path.isfile(name) else shutil.which(name)
    if path is None:
        reason = f"hf_sai.launch: cannot open script {name!r}: there is no such file, and no such command on PATH\n"
        raise _refusal(USAGE if name.startswith("-") else reason + USAGE)

    from hf_sai.children import registered_children
    from hf_sai.registration import register

    with registered_children():
        if not (option or name == "-" or _is_python(path, installed=path != name)):
            os.execv(path, target)
        register()
        if option == "-m":
            sys.argv[:] = target
            _set_first_path(os.getcwd())
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        elif option == "-c" or name == "-":
            sys.argv[:] = [option or name, *target[1:]]
            _set_first_path("")
            _run(compile(name if option else sys.stdin.read(), "<string>" if option else "<stdin>", "exec"))
        else:
            sys.argv[:] = [path, *target[1:]]
            run_script(path)


def _is_python(path: str, *, installed: bool) -> bool:
    """Whether a file is a Python script. An ``installed`` file without a Python shebang is another program."""
    with open(path, "rb") as file:
        first, second = file.readline(), file.readline()
    if not first.startswith(b"#!"):
        return not installed
    # pip uses the second line if the path of the interpreter is too long for the first.
    return b"python" in first or second.startswith(b"'''exec'")


def run_script(path: str) -> None:
    """Execute a file like the interpreter: as ``__main__``, with its folder first on ``sys.path``.

    `runpy.run_path` is not enough. It removes its ``__main__`` from ``sys.modules`` when the script ends, although exit
    handlers and threads may still need it for pickling. It also does not change ``sys.path``.
    """
    path = os.path.abspath(path)
    _set_first_path(os.path.dirname(os.path.realpath(path)))
    loader = SourceFileLoader("__main__", path)
    # multiprocessing's children use `__file__` and a `__spec__` of None to find the script to import.
    _run(loader.source_to_code(loader.get_data(path), path), __file__=path, __loader__=loader, __cached__=None)


def _run(code: CodeType, **names: object) -> None:
    main_module = ModuleType("__main__")
    vars(main_module).update(__spec__=None, __builtins__=__builtins__, **names)
    sys.modules["__main__"] = main_module
    exec(code, vars(main_module))


def _set_first_path(folder: str) -> None:
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = folder


def _refusal(message: str) -> SystemExit:
    print(message, file=sys.stderr)
    return SystemExit(2)


if __name__ == "__main__":
    main()
