"""Checkpoints that a killed run has left half-written are never resumed from, and never take a whole one's place.

transformers' Trainer writes a checkpoint file by file into its final folder, ``trainer_state.json`` last. Killed in
between, it leaves a ``checkpoint-N`` that ``get_last_checkpoint`` picks up all the same.
"""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

TRAINER_STATE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def last_whole_checkpoint(folder: str | os.PathLike[str], world_size: int = 1) -> str | None:
    """The newest ``checkpoint-N`` of a Trainer's output folder that was written to its end.

    Args:
        folder: the ``output_dir`` of a Trainer; it need not exist.
        world_size: how many processes wrote it, each its own random state.

    Returns:
        Its path, or None where there is none.
    """
    folder = Path(folder)
    found = {int(m[1]): path for path in folder.glob("checkpoint-*") if (m := _CHECKPOINT.fullmatch(path.name))}
    for step in sorted(found, reverse=True):
        if is_whole(found[step], world_size):
            return str(found[step])
    return None


def is_whole(checkpoint: str | os.PathLike[str], world_size: int = 1) -> bool:
    """Whether a Trainer's checkpoint was written to its end: its last file is there, and no file is cut off."""
    checkpoint = Path(checkpoint)
    try:
        step = json.loads((checkpoint / TRAINER_STATE).read_bytes())["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    # Other processes than the one that wrote the last file may have been slower.
    ranks_missing = world_size > 1 and any(
        not (checkpoint / f"rng_state_{rank}.pth").exists() for rank in range(world_size)
    )
    return (
        checkpoint.name == f"checkpoint-{step}"
        and not ranks_missing
        and all(_is_uncut(path) for path in checkpoint.iterdir() if path.is_file())
    )


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
        FileExistsError: if there is a ``folder`` already; give each checkpoint a name of its own.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; give each checkpoint a name of its own")
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
