"""Checkpoints that a killed run has left half-written are never resumed from, and never take a whole one's place.

transformers' Trainer writes a checkpoint file by file into its final folder, ``trainer_state.json`` last. Killed in
between, it leaves a ``checkpoint-N`` that ``get_last_checkpoint`` picks up all the same.
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

logger = logging.getLogger("transformers.hf_sai")  # which shows warnings as transformers' own does

TRAINER_STATE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_RANDOM_STATE = re.compile(r"rng_state(?:_(\d+))?\.pth")
# What the Trainer writes and resumes from. Any other file in the folder is the user's.
_FILES = re.compile(
    r"(optimizer|pytorch_model_fsdp)(_\d+)?\.(pt|bin)|(scheduler|scaler)\.pt|training_args\.bin|"
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)|adapter_model\.(safetensors|bin)|" + _RANDOM_STATE.pattern
)
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def last_whole_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest ``checkpoint-N`` of a Trainer's output folder that was written to its end.

    Each newer one that is passed over is logged as a warning, with what is wrong with it. How many processes wrote a
    checkpoint, and how many are to resume from it, does not matter.

    Args:
        folder: the ``output_dir`` of a Trainer; it need not exist.

    Returns:
        Its path, or None where there is none.

    Example:
        >>> trainer.train(resume_from_checkpoint=last_whole_checkpoint("out"))
    """
    found = {int(m[1]): path for path in Path(folder).glob("checkpoint-*") if (m := _CHECKPOINT.fullmatch(path.name))}
    for step in sorted(found, reverse=True):
        reason = why_not_whole(found[step])
        if reason is None:
            return str(found[step])
        if _is_first():
            logger.warning("%s is not whole and is not resumed from: %s", found[step], reason)
    return None


def why_not_whole(checkpoint: str | os.PathLike[str]) -> str | None:
    """What shows that a Trainer's checkpoint was not written to its end; None where nothing does.

    Only files that the Trainer itself writes are looked at.
    """
    checkpoint = Path(checkpoint)
    try:
        step = json.loads((checkpoint / TRAINER_STATE).read_bytes())["global_step"]
    except FileNotFoundError:
        return f"{TRAINER_STATE}, which is written last, is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{TRAINER_STATE} is cut off"
    if checkpoint.name != f"checkpoint-{step}":
        return f"{TRAINER_STATE} is of step {step}"
    names = {path.name for path in checkpoint.iterdir() if path.is_file()}
    for name in sorted(name for name in names if _FILES.fullmatch(name)):
        if not _is_uncut(checkpoint / name):
            return f"{name} is cut off"
    missing = sorted(_shards(checkpoint) - names) + _missing_random_states(names)
    return f"{missing[0]} is missing" if missing else None


def remove_random_states(checkpoint: str | os.PathLike[str], *, world_size: int) -> None:
    """Remove the random states that a run of another number of processes has left in a checkpoint's folder."""
    own = {f"rng_state_{rank}.pth" for rank in range(world_size)} if world_size > 1 else {"rng_state.pth"}
    for path in Path(checkpoint).glob("rng_state*.pth"):
        if _RANDOM_STATE.fullmatch(path.name) and path.name not in own:
            path.unlink(missing_ok=True)


def _missing_random_states(names: set[str]) -> list[str]:
    """Those that processes between others have not written, and that of the second where only the first has."""
    ranks = {int(m[1]) for name in names if (m := _RANDOM_STATE.fullmatch(name)) and m[1]}
    # A run of one process does not number its file. On a second machine with a separate disk the lowest rank is not 0.
    expected = {1} if ranks == {0} else set(range(min(ranks, default=0), max(ranks, default=0)))
    return [f"rng_state_{rank}.pth" for rank in sorted(expected - ranks)]


def _shards(checkpoint: Path) -> set[str]:
    """The files that the index of a model in several files names."""
    shards: set[str] = set()
    for index in _INDICES:
        if (checkpoint / index).is_file():
            try:
                shards.update(json.loads((checkpoint / index).read_bytes())["weight_map"].values())
            except (ValueError, KeyError, AttributeError, TypeError):
                shards.add(f"what {index}, which is cut off, names")
    return shards


def _is_uncut(path: Path) -> bool:
    if path.suffix in (".pt", ".pth", ".bin"):
        return zipfile.is_zipfile(path)  # the directory of a zip file stands at its end
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
        except (ValueError, AttributeError, KeyError, IndexError, TypeError):  # as after a power cut: all zeros
            return False
    return True


@contextmanager
def atomic_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A scratch folder to save into, which becomes ``folder`` in one step when everything is in it.

    For bare loops: ``with atomic_folder("out/step-100") as scratch: accelerator.save_state(scratch)``. All processes
    of the default group enter and leave together. What is killed or fails inside leaves no ``folder``.

    Raises:
        FileExistsError: if there is a ``folder`` already; give each checkpoint a different name.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; give each checkpoint a different name")
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
