"""Recognises incomplete checkpoints of a killed run, so that no run resumes from them.

transformers' Trainer writes the files of a checkpoint one by one into the final folder, with ``trainer_state.json``
last. If it is killed in between, it leaves an incomplete ``checkpoint-N`` that ``get_last_checkpoint`` still returns.
"""

import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

logger = logging.getLogger("transformers.hf_sai")  # shows warnings like transformers' own logger

TRAINER_STATE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_RANDOM_STATE = re.compile(r"rng_state(?:_(\d+))?\.pth")
# The files that the Trainer writes and resumes from. Any other file in the folder belongs to the user.
_FILES = re.compile(
    r"(optimizer|pytorch_model_fsdp)(_\d+)?\.(pt|bin)|(scheduler|scaler)\.pt|training_args\.bin|"
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)|adapter_model\.(safetensors|bin)|" + _RANDOM_STATE.pattern
)
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def last_whole_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest complete ``checkpoint-N`` in a Trainer's output folder.

    For each newer checkpoint that is skipped, a warning with the reason is logged. The numbers of processes that wrote
    the checkpoint and that resume from it do not matter.

    Args:
        folder: the ``output_dir`` of a Trainer; it need not exist.

    Returns:
        Its path, or None if there is none.

    Example:
        >>> trainer.train(resume_from_checkpoint=last_whole_checkpoint("out"))
    """
    paths = {int(m[1]): path for path in Path(folder).glob("checkpoint-*") if (m := _CHECKPOINT.fullmatch(path.name))}
    for step in sorted(paths, reverse=True):
        reason = why_not_whole(paths[step])
        if reason is None:
            return str(paths[step])
        if _is_first():
            logger.warning("skipping the incomplete checkpoint %s: %s", paths[step], reason)
    return None


def why_not_whole(checkpoint: str | os.PathLike[str]) -> str | None:
    """The reason why a Trainer's checkpoint is incomplete, or None if it is complete.

    Only files that the Trainer itself writes are checked.
    """
    checkpoint = Path(checkpoint)
    try:
        step = json.loads((checkpoint / TRAINER_STATE).read_bytes())["global_step"]
    except FileNotFoundError:
        return f"{TRAINER_STATE}, which is written last, is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{TRAINER_STATE} is truncated"
    if checkpoint.name != f"checkpoint-{step}":
        return f"{TRAINER_STATE} is from step {step}"
    names = {path.name for path in checkpoint.iterdir() if path.is_file()}
    for name in sorted(name for name in names if _FILES.fullmatch(name)):
        if not _is_uncut(checkpoint / name):
            return f"{name} is truncated"
    missing = sorted(_shards(checkpoint) - names) + _missing_random_states(names)
    return f"{missing[0]} is missing" if missing else None


def remove_random_states(checkpoint: str | os.PathLike[str], *, world_size: int) -> None:
    """Remove the random states that a run with another number of processes left in a checkpoint's folder."""
    own = {f"rng_state_{rank}.pth" for rank in range(world_size)} if world_size > 1 else {"rng_state.pth"}
    for path in Path(checkpoint).glob("rng_state*.pth"):
        if _RANDOM_STATE.fullmatch(path.name) and path.name not in own:
            path.unlink(missing_ok=True)


def _missing_random_states(names: set[str]) -> list[str]:
    """The missing random states: gaps in the ranks, and that of rank 1 if only rank 0 has written one."""
    ranks = {int(m[1]) for name in names if (m := _RANDOM_STATE.fullmatch(name)) and m[1]}
    # A run with one process does not number its file. On a second machine with its own disk, the lowest rank is not 0.
    expected = {1} if ranks == {0} else set(range(min(ranks, default=0), max(ranks, default=0)))
    return [f"rng_state_{rank}.pth" for rank in sorted(expected - ranks)]


def _shards(checkpoint: Path) -> set[str]:
    """The files that are listed in the index of a sharded model."""
    shards: set[str] = set()
    for index in _INDICES:
        if (checkpoint / index).is_file():
            try:
                shards.update(json.loads((checkpoint / index).read_bytes())["weight_map"].values())
            except (ValueError, KeyError, AttributeError, TypeError):
                shards.add(f"a file listed in {index}, which is truncated,")
    return shards


def _is_uncut(path: Path) -> bool:
    if path.suffix in (".pt", ".pth", ".bin"):
        return zipfile.is_zipfile(path)  # the directory of a zip file is at its end
    if path.suffix == ".safetensors":
        size = path.stat().st_size
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            if size < 8 + header_size:
                return False
            header = file.read(header_size)
        try:
            ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
            return bool(size == 8 + header_size + max(ends, default=0))
        except (
            ValueError,
            AttributeError,
            KeyError,
            IndexError,
            TypeError,
        ):  # for example, all zeros after a power failure
            return False
    return True


@contextmanager
def atomic_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Provide a temporary folder to save into, which is renamed to ``folder`` at the end.

    For bare loops: ``with atomic_folder("out/step-100") as scratch: accelerator.save_state(scratch)``. All processes
    of the default group must enter and leave together. If a process is killed or fails inside, no ``folder`` exists.

    Raises:
        FileExistsError: if ``folder`` already exists. Each checkpoint needs a different name.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} already exists; give each checkpoint a different name")
    scratch = folder.with_name(f".{folder.name}.unfinished")
    _wait()
    if _is_first():
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    _wait()
    yield scratch
    _wait()
    if _is_first():
        scratch.rename(folder)
    _wait()


def _is_first() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _wait() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
