"""Ctrl-C in a recipe: one line with the command that resumes, exit status 130, no traceback, within two seconds.

`guarded` runs a program's main function. A call into C++ that takes long does not see an interrupt; a thread that
waits for the signal then ends the process. `worker_start` is for worker processes, which end with their parent.
"""

import contextlib
import multiprocessing
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

EXIT_STATUS = 130  # 128 + SIGINT, as a shell has it
_SECONDS = 1.5  # for context managers, trackers and worker processes to end

# What a running recipe says of its checkpoints: the word for `--resume_from_checkpoint`, or None where there is none.
_hints: list[Callable[[], str | None]] = []
_said = threading.Lock()  # held once the line is out
_ended = threading.Event()  # the program has done its work and only has to exit


@contextlib.contextmanager
def resumable(hint: Callable[[], str | None]) -> Iterator[None]:
    """While this runs, an interrupt's line names the value of `--resume_from_checkpoint` that `hint` returns.

    It returns None where nothing is saved yet, and an empty string where the same command resumes.
    """
    _hints.append(hint)
    try:
        yield
        _hints.remove(hint)
    except KeyboardInterrupt:  # kept: the line is written further up
        raise
    except BaseException:
        _hints.remove(hint)
        raise


def command(extra: str = "") -> str:
    """This process's command line as a person types it; `extra` replaces what it says of resuming."""
    words = list(sys.orig_argv[1:])
    if os.path.isabs(words[0] if words else ""):
        with contextlib.suppress(ValueError):  # on another drive
            words[0] = min(words[0], os.path.relpath(words[0]), key=len)
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif extra and word == "--resume_from_checkpoint":
            skip = True
        elif not (extra and word.startswith("--resume_from_checkpoint=")):
            kept.append(word)
    return " ".join(["python", *(shlex.quote(word) for word in kept), *([extra] if extra else [])])


def line() -> str:
    """What an interrupt prints."""
    if _ended.is_set():
        return "interrupted on the way out; the work is done"
    word = _hints[0]() if _hints else None  # the outermost: a demo's, not that of its parts
    if "LOCAL_RANK" in os.environ:  # this process's command is the launcher's, which is not known here
        again = f"with --resume_from_checkpoint {word}" if word else "again"
        return f"interrupted; start the same command {again}"
    if word is None:
        return f"interrupted; nothing is saved yet, start it again with: {command()}"
    return f"interrupted; resume with: {command(f'--resume_from_checkpoint {word}' if word else '')}"


def _say() -> None:
    if not _said.acquire(blocking=False) or os.environ.get("RANK", "0") != "0":
        return
    with contextlib.suppress(OSError, ValueError):  # a closed terminal
        print(f"\n{line()}", file=sys.stderr, flush=True)


def guarded(main: Callable[[], Any]) -> Any:
    """Call `main`; an interrupt ends the process with one line and exit status 130."""
    if threading.current_thread() is not threading.main_thread():
        return main()
    owner, signalled, done, seconds = os.getpid(), threading.Event(), threading.Event(), _SECONDS
    _hints.clear()
    _ended.clear()
    if _said.locked():
        _said.release()

    def interrupt(number: int, frame: Any) -> None:
        # A worker that was forked leaves it to its parent; a second Ctrl-C does not cut the first one's end short.
        if os.getpid() == owner and not signalled.is_set():
            signalled.set()
            raise KeyboardInterrupt

    reads, writes = os.pipe()
    os.set_blocking(writes, False)

    def watch() -> None:
        while byte := os.read(reads, 1):
            if byte[0] == signal.SIGINT and not done.wait(seconds):
                _say()
                for child in multiprocessing.active_children():
                    child.kill()
                os._exit(EXIT_STATUS)
        os.close(reads)

    before = signal.getsignal(signal.SIGINT)
    # C code writes to it at once, also while the main thread computes; a Python handler waits for that to end.
    wakeup = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        signal.signal(signal.SIGINT, interrupt)
        result = main()
        _ended.set()
        return result
    except BaseException as error:
        if not signalled.is_set() and not isinstance(error, KeyboardInterrupt):
            raise
        # Also for another error that follows the signal, as of a worker that it ended.
        _say()
        sys.exit(EXIT_STATUS)
    finally:
        # After a signal the thread stays: the process ends in time even where a tracker or a thread waits at exit.
        if not signalled.is_set():
            signal.signal(signal.SIGINT, before)
            done.set()
            signal.set_wakeup_fd(wakeup)
            os.close(writes)


def while_importing() -> None:
    """Until `guarded` runs: Ctrl-C ends a program that still imports its libraries, in one line.

    A worker process that imports leaves it to its parent.
    """

    def interrupt(number: int, frame: Any) -> None:
        _say()
        os._exit(EXIT_STATUS)

    if threading.current_thread() is threading.main_thread():
        worker = multiprocessing.parent_process() is not None
        signal.signal(signal.SIGINT, signal.SIG_IGN if worker else interrupt)


def worker_start() -> None:
    """In a new worker process: leave Ctrl-C to the parent, and end when the parent is gone, which may be killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end_with(process: Any) -> None:
        process.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()
