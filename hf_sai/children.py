"""Makes the Python child processes of a process start with ``hf_sai.launch``.

There are no hooks in Python's start-up or imports. Instead, a shell script replaces the Python executable. It calls
this interpreter with ``-m hf_sai.launch`` before the script, module or code. It replaces ``sys.executable``, the
executable of multiprocessing and of torchrun (``PYTHON_EXEC``), and on ``PATH`` this environment's ``python`` and
launchers. Each child does the same for its own children.
"""

import hashlib
import multiprocessing.spawn
import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Programs of an environment that start another Python through the `sys.executable` of their own interpreter.
LAUNCHERS = ("accelerate", "deepspeed", "trl", "llamafactory-cli", "axolotl")

# The prefix of the name of the script's folder.
_FOLDER = "hf_sai-launch-"

# Interpreter options stay first. multiprocessing's resource tracker is not registered, which saves time.
_SCRIPT = """#!/bin/sh
# Runs Python under hf_sai.launch, see hf_sai/children.py. This file can be deleted; hf_sai writes it again.
case ${{0##*/}} in
python*) ;;
*) set -- {scripts}/"${{0##*/}}" "$@" ;;
esac
left=$# target='' value=''
while [ "$left" -gt 0 ]; do
    word=$1
    shift
    left=$((left - 1))
    if [ -n "$target" ]; then :
    elif [ -n "$value" ]; then value=''
    else
        case $word in
        -[WX] | --check-hash-based-pycs) value=1 ;;
        -[WX]* | --*) ;;
        -[cm]?*) target=1; set -- "$@" -m hf_sai.launch "${{word%"${{word#-?}}"}}"; word=${{word#-?}} ;;
        -*[cm])
            target=1
            case ${{1-}} in
            *multiprocessing.resource_tracker*) ;;
            *)
                [ "${{#word}}" -eq 2 ] || set -- "$@" "${{word%?}}"
                word=-${{word#"${{word%?}}"}}
                set -- "$@" -m hf_sai.launch
                ;;
            esac
            ;;
        - | [!-]*) target=1; set -- "$@" -m hf_sai.launch ;;
        esac
    fi
    set -- "$@" "$word"
done
exec {python} "$@"
"""


@contextmanager
def registered_children() -> Iterator[None]:
    """Make every Python process that this process starts in the block begin with :mod:`hf_sai.launch`. Not on Windows.

    This changes ``sys.executable``, the executable of ``multiprocessing`` and the variables ``PATH`` and
    ``PYTHON_EXEC``, which children inherit. It restores them at the end.
    """
    if os.name != "posix" or not sys.executable or _FOLDER in sys.executable:
        yield
        return
    python, spawned = sys.executable, multiprocessing.spawn.get_executable()
    variables = {name: os.environ.get(name) for name in ("PATH", "PYTHON_EXEC")}
    folder, path = _folder(), variables["PATH"] or os.defpath
    sys.executable = str(folder / "python")
    multiprocessing.set_executable(sys.executable)
    if _FOLDER in (variables["PYTHON_EXEC"] or _FOLDER):  # not set by the user
        os.environ["PYTHON_EXEC"] = sys.executable
    if str(folder / "bin") not in path.split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([str(folder / "bin"), path])
    try:
        yield
    finally:
        sys.executable = python
        multiprocessing.set_executable(spawned)
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _folder() -> Path:
    """The folder of the script, created if it does not exist. Its name contains a hash of its content."""
    python, scripts = sys.executable, sysconfig.get_path("scripts")
    text = _SCRIPT.format(python=shlex.quote(python), scripts=shlex.quote(scripts))
    names = [name for name in ("python", "python3", *LAUNCHERS) if _belongs(name, {os.path.dirname(python), scripts})]
    name = _FOLDER + hashlib.sha256("\n".join([text, *names]).encode()).hexdigest()[:16]
    inherited = Path(os.environ.get("PYTHON_EXEC", ""))
    if inherited.parent.name == name and inherited.is_file():
        return inherited.parent
    try:
        return _write(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute(), name, text, names)
    except (OSError, RuntimeError):  # there is no home, or files in it cannot be written or executed
        return _write(Path(tempfile.mkdtemp(prefix="hf_sai-")), name, text, names)


def _belongs(name: str, folders: set[str]) -> bool:
    """Whether the program of this name on PATH belongs to this environment."""
    elsewhere = [part for part in os.environ.get("PATH", os.defpath).split(os.pathsep) if _FOLDER not in part]
    program = shutil.which(name, path=os.pathsep.join(elsewhere))
    return program is not None and os.path.dirname(program) in folders


def _write(cache: Path, name: str, text: str, names: list[str]) -> Path:
    folder = cache / name
    if not (folder / "python").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{_FOLDER}", dir=cache))
        (scratch / "bin").mkdir()
        (scratch / "python").write_text(text)
        (scratch / "python").chmod(0o755)
        for link in names:
            (scratch / "bin" / link).symlink_to(Path("..", "python"))
        with suppress(OSError):  # another process was faster
            scratch.rename(folder)
        shutil.rmtree(scratch, ignore_errors=True)
    if not os.access(folder / "python", os.X_OK):
        raise PermissionError(f"{folder / 'python'} is not executable")
    return folder
