"""Trains a small model with SaITrainer in processes that are killed and resumed; writes what happened as JSON.

    python kill_run.py FOLDER KILLS SEED

One process imports everything once and forks each run. Half of the kills come at a random time, the others at a random
one of the moments at which the run opens a file of a checkpoint for writing, when that file is empty.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging
from transformers.utils.logging import disable_progress_bar

from hf_sai import SaITrainer, SaITrainingArguments
from hf_sai.checkpoints import last_whole_checkpoint

STEPS_PER_KILL = 3


class WaitBeforeTheEnd(TrainerCallback):
    """A run that waits to be killed does not end first, however fast the machine has become."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == args.max_steps - 1:
            time.sleep(3600)


def train(folder: Path, steps: int, waits: bool) -> None:
    """Train from the last whole checkpoint, or from the start, to the end; then write the final state."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    rows = torch.randint(1, 32, (64, 8), generator=torch.Generator().manual_seed(1))
    args = SaITrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=1,
        save_total_limit=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        warmup_steps=2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = SaITrainer(GPT2LMHeadModel(config), args, train_dataset=[{"input_ids": r, "labels": r} for r in rows])
    if waits:
        trainer.add_callback(WaitBeforeTheEnd())
    trainer.train(resume_from_checkpoint=True if last_whole_checkpoint(folder) else None)
    final = {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    torch.save(final, folder / "final.tmp")
    os.replace(folder / "final.tmp", folder / "final.pt")


def kill_when_opening(folder: Path, count: int) -> None:
    """Kill this process when it opens a file below a checkpoint for writing for the ``count``-th time."""
    left = count

    def audit(event: str, args: Any) -> None:
        nonlocal left
        if event == "open" and "checkpoint-" in str(args[0]) and isinstance(args[2], int) and args[2] & os.O_CREAT:
            left -= 1
            if left == 0:
                os.close(os.open(args[0], os.O_CREAT | os.O_TRUNC | os.O_WRONLY))
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def run(folder: Path, steps: int, kill_at_open: int = 0, kill_after: float = 0.0) -> int:
    """The run in a process of its own; its exit code, negative if a signal ended it."""
    child = os.fork()
    if child == 0:
        try:
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 1)
            if kill_at_open:
                kill_when_opening(folder, kill_at_open)
            train(folder, steps, waits=kill_after > 0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if kill_after:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    warnings.filterwarnings("ignore")
    disable_progress_bar()
    logging.set_verbosity_error()
    dice = random.Random(seed)
    steps = STEPS_PER_KILL * (kills + 4)
    began = time.monotonic()
    if code := run(folder / "whole", steps):
        raise SystemExit(f"the run that is never killed ended with {code}")
    seconds_a_step = (time.monotonic() - began) / steps
    killed = folder / "killed"
    lives = []
    for number in range(kills):
        how: dict[str, Any] = {"kill_after": dice.uniform(0.2, 2 * STEPS_PER_KILL) * seconds_a_step}
        last = last_whole_checkpoint(killed)
        if last and int(last.rpartition("-")[2]) > steps - 3 * STEPS_PER_KILL:
            how = {"kill_at_open": 1}  # so near the end, no later kill is certain to come in time
        elif number % 2:
            how = {"kill_at_open": dice.randint(1, 8 * STEPS_PER_KILL)}
        code = run(killed, steps, **how)
        if code not in (0, -signal.SIGKILL):
            raise SystemExit(f"life {number} ended with {code}")
        whole, newest = last_whole_checkpoint(killed), get_last_checkpoint(killed) if killed.exists() else None
        lives.append({**how, "killed": code != 0, "whole": whole, "newest": newest})
    if code := run(killed, steps):
        raise SystemExit(f"the last life ended with {code}")
    (folder / "lives.json").write_text(json.dumps(lives))


if __name__ == "__main__":
    main()
