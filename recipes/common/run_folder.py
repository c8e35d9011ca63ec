"""The folder of a run: one run at a time, never an earlier run's by accident, and how a run resumes.

Every recipe takes `--resume_from_checkpoint`: `true` or `last` for the last whole checkpoint of its `output_dir`,
`auto` for the same or the start where there is none, or a checkpoint's folder. A folder that holds an earlier run is
refused unless the run resumes from it or `--overwrite_output_dir true` removes it.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from recipes.common.errors import UserError
from recipes.common.files import check_writable
from recipes.common.interrupt import resumable

HELP = "`last` or `true` (the last checkpoint of output_dir), `auto` (the same, or the start), or a folder."
OVERWRITE_HELP = "Start over in an output_dir that holds an earlier run: its record and checkpoints are removed."
LOCK = ".running"
RECORD = "record.json"
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_LAST = ("last", "true")
_NOT = ("", "false", "none")


def _word(wanted: Any) -> str:
    return "" if wanted is None else str(wanted)


def checkpoint_to_resume(
    wanted: Any, folder: str | os.PathLike[str], last: Callable[[], str | None], overwrite: bool = False
) -> str | None:
    """The checkpoint that a run resumes from, None for the start.

    Args:
        wanted: the value of `resume_from_checkpoint`.
        folder: the run's `output_dir`.
        last: finds the last whole checkpoint in it.
        overwrite: whether an earlier run in it may be removed.

    Raises:
        UserError: there is no such checkpoint, or `folder` holds an earlier run and nothing says what to do.
    """
    word, folder = _word(wanted), Path(folder)
    lower = word.lower()
    if lower not in _NOT and lower not in (*_LAST, "auto"):
        if not Path(word).expanduser().is_dir():
            raise UserError(
                f"resume_from_checkpoint: there is no folder {word!r}; "
                "`last` finds the last checkpoint of output_dir, `auto` also begins where there is none"
            )
        return str(Path(word).expanduser())
    found = last() if lower not in _NOT else None
    if found is not None:
        return found
    if lower in _LAST:
        raise UserError(
            f"resume_from_checkpoint: there is no whole checkpoint in output_dir {str(folder)!r}; "
            "`auto` begins at the start then"
        )
    earlier = earlier_run(folder)
    if earlier is not None and not overwrite:
        resume = "resume it with --resume_from_checkpoint last, " if lower in _NOT and last() is not None else ""
        raise UserError(
            f"output_dir {str(folder)!r} holds {earlier} of an earlier run: {resume}"
            "start over with --overwrite_output_dir true, or give another output_dir"
        )
    return None


def earlier_run(folder: Path) -> str | None:
    """The name of what an earlier run left in a folder: its last checkpoint or its record; None where there is none."""
    found = [path.name for path in folder.glob("checkpoint-*") if path.is_dir() and _CHECKPOINT.fullmatch(path.name)]
    if found:
        return max(found, key=lambda name: int(name.partition("-")[2]))
    return RECORD if (folder / RECORD).is_file() else None


@contextlib.contextmanager
def run_folder(
    folder: str | os.PathLike[str],
    wanted: Any,
    last: Callable[[], str | None],
    overwrite: bool = False,
) -> Iterator[str | None]:
    """Hold a run's `output_dir`; yields the checkpoint to resume from, or None.

    The arguments are those of `checkpoint_to_resume`. Of several processes the first one locks the folder. A run that
    fails before it has written anything takes the folder away again.

    Raises:
        UserError: as `checkpoint_to_resume`; the folder is not writable; another run holds it.
    """
    folder = Path(folder)
    first = os.environ.get("RANK", "0") == "0"
    checkpoint = checkpoint_to_resume(wanted, folder, last, overwrite)
    check_writable("output_dir", folder)
    made = _missing(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _lock(folder) if first else contextlib.nullcontext():
            if first and checkpoint is None and overwrite:
                _remove_earlier(folder)
            # Of a run that this one's first checkpoint follows: nothing in the folder says more than `last` does.
            with resumable(lambda: "last" if last() is not None else None):
                yield checkpoint
    except BaseException:
        for path in made if first else ():  # the deepest first
            with contextlib.suppress(OSError):  # not empty, or another run's
                path.rmdir()
        raise


def _missing(folder: Path) -> list[Path]:
    """The folder and those above it that do not exist yet, the deepest first."""
    found = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        found.append(path)
    return found


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    path = folder / LOCK
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"output_dir {str(folder)!r} is in use by another run; wait for it, or give another output_dir"
        ) from error
    except (NotImplementedError, OSError):  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the release: afterwards it may be another run's
        lock.release()


def _remove_earlier(folder: Path) -> None:
    for path in folder.glob("checkpoint-*"):
        if path.is_dir() and _CHECKPOINT.fullmatch(path.name):
            shutil.rmtree(path)
    (folder / RECORD).unlink(missing_ok=True)
