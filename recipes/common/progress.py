"""Progress that a person reads: a bar with the time left on a terminal, elsewhere a line every ten seconds at most."""

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

SECONDS = 10.0  # between two lines


class Lines:
    """The part of tqdm that the recipes use, for a file or a pipe: `generate: 16 of 60 MRs, about 20 s left`."""

    def __init__(self, total: int, desc: str, unit: str) -> None:
        self._total, self._desc, self._unit = total, desc, unit
        self._done = 0
        self._start = self._said = time.monotonic()

    def update(self, count: int = 1) -> None:
        self._done += count
        now = time.monotonic()
        if self._done < self._total and now - self._said >= SECONDS:
            self._said = now
            left = (now - self._start) / self._done * (self._total - self._done)
            text = f"{self._desc}: {self._done} of {self._total} {self._unit}, about {left:.0f} s left"
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing to end."""


def progress(total: int, desc: str, unit: str) -> Any:
    """Something with `update` and `close` that shows on stderr how far `total` units are."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=desc, unit=f" {unit}", dynamic_ncols=True, leave=False)
    return Lines(total, desc, unit)


class TrainingProgress(TrainerCallback):
    """The progress of a Trainer's steps and evaluations, in place of the Trainer's, which also print its logs."""

    def __init__(self) -> None:
        self._training: Any = None
        self._evaluation: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._training is None:  # not at the start of the training, where an evaluation may come first
            self._training = progress(state.max_steps - state.global_step, "train", "steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._training is not None:
            self._training.close()
        self._training = None

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self._evaluation is None:
            self._evaluation = progress(len(eval_dataloader), "validate", "batches")
        self._evaluation.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
        self._evaluation = None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and warnings of libraries, about which a user of the demo can do nothing; ours are shown."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # where it is installed, DeepSpeed says that it finds no GPU
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warns of the fork that starts Java
    libraries = (transformers_logging, hub_logging)
    verbosity, bars = [one.get_verbosity() for one in libraries], transformers_logging.is_progress_bar_enabled()
    for one in libraries:
        one.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not sys.stderr.isatty():  # on a terminal the hub shows how far a download is
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", message="SGDSaI")
            yield
    finally:
        for one, level in zip(libraries, verbosity, strict=True):
            one.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
        enable_progress_bars()
