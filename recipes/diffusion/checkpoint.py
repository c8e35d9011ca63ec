"""Checkpoints of a diffusion LoRA run: all that decides the rest of the run, and only what trains of the model.

A checkpoint appears under its name in one piece: a run killed while it saves leaves a folder that is never resumed.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file

from recipes.common.errors import UserError
from recipes.common.files import write_json
from recipes.diffusion.model import trained_state

_OPTION = "resume_from_checkpoint"
_PROGRESS = "progress.json"
_WEIGHTS = "trained.safetensors"


def save_only_what_trains(accelerator: Any) -> None:
    """Make `save_state` and `load_state` leave the frozen weights out (FSDP has its own format, with all)."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            for model in models:
                save_file(trained_state(accelerator.unwrap_model(model)), Path(folder) / _WEIGHTS)

    def load(models: list[Any], folder: str) -> None:
        while models:
            model = accelerator.unwrap_model(models.pop())
            saved = load_file(Path(folder) / _WEIGHTS)
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            if {n: p.shape for n, p in trained.items()} != {n: t.shape for n, t in saved.items()}:
                raise UserError(f"{_OPTION}: {folder} is of a run with another LoRA or other concept tokens")
            for name, p in trained.items():
                p.data.copy_(saved[name])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(accelerator: Any, output_dir: Path, progress: dict[str, Any], kept: int) -> Path:
    """Save everything to `checkpoint-STEP` and delete all but the newest `kept`; called on every process.

    Args:
        accelerator: with the model, the optimizer and the schedule.
        output_dir: holds the checkpoints.
        progress: JSON; holds `step`, and comes back from `load_checkpoint`.
        kept: at least 1.
    """
    folder = output_dir / f"checkpoint-{progress['step']:06d}"
    temporary = output_dir / f".{folder.name}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(temporary / _PROGRESS, progress)
        shutil.rmtree(folder, ignore_errors=True)  # of a run resumed from an earlier checkpoint
        temporary.rename(folder)
        for old in _checkpoints(output_dir)[:-kept]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def _checkpoints(output_dir: Path) -> list[Path]:
    return sorted(folder for folder in output_dir.glob("checkpoint-*") if (folder / _PROGRESS).is_file())


def last_checkpoint(output_dir: Path) -> str | None:
    """The newest whole checkpoint of `output_dir`."""
    found = _checkpoints(output_dir)
    return str(found[-1]) if found else None


def load_checkpoint(accelerator: Any, folder: Path, samples_per_step: int) -> dict[str, Any]:
    """Put everything back; returns the `progress` that was saved.

    Args:
        accelerator: as when it was saved.
        folder: a checkpoint.
        samples_per_step: over all processes; with another number the data would resume at another row.
    """
    if not (folder / _PROGRESS).is_file():
        raise UserError(f"{_OPTION}: {folder} is not a checkpoint of this recipe: it has no {_PROGRESS}")
    try:
        progress: dict[str, Any] = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
        saved = progress["samples_per_step"]
        if not isinstance(progress["step"], int) or not isinstance(progress["history"], list):
            raise TypeError("step must be a number and history a list")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{_OPTION}: {folder / _PROGRESS} is damaged: {error!r}; resume from another one") from error
    if saved != samples_per_step:
        raise UserError(
            f"{_OPTION}: {folder} was saved at {saved} samples a step, this run has "
            f"{samples_per_step}; keep processes x per_device_train_batch_size x gradient_accumulation_steps"
        )
    try:
        accelerator.load_state(str(folder))
    except UserError:
        raise
    except Exception as error:  # each of the files has its own kinds
        raise UserError(
            f"{_OPTION}: {folder} is damaged or of another run: {error}; resume from another one"
        ) from error
    return progress
