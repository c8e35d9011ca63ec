"""Trains a small float64 model with SaITrainer, on one process or several, from step to step of one long run.

torchrun --nproc-per-node N resume_worker.py FOLDER STOP
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import logging

from hf_sai import SaITrainer, SaITrainingArguments

STEPS, BATCH = 8, 4


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).double()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layers(x) - y).square().mean()}


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def train(folder: Path, stop: int, processes: int) -> SaITrainer:
    """Resume, if there is something, and train to step ``stop``, in batches of 4 over all processes."""
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = [{"x": row, "y": row.sum(0, keepdim=True)} for row in x]
    settings = {
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
    args = SaITrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // processes,
        learning_rate=1e-2,
        use_cpu=True,
        **settings,
    )
    trainer = SaITrainer(Regression(), args, train_dataset=rows, callbacks=[StopAt(stop)])
    trainer.train(resume_from_checkpoint=True if any(folder.glob("checkpoint-*")) else None)
    return trainer


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    folder, stop = Path(sys.argv[1]), int(sys.argv[2])
    trainer = train(folder, stop, int(os.environ["WORLD_SIZE"]))
    if trainer.is_world_process_zero():
        (folder / "steps.json").write_text(json.dumps([entry["step"] for entry in trainer.state.log_history]))


if __name__ == "__main__":
    main()
