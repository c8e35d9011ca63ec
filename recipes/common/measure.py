"""Time and memory of a run."""

import resource
import statistics
import sys
import time
from typing import Any

import torch
from transformers import TrainerCallback


class StepTimer(TrainerCallback):
    """Times each training step (forward, backward, update; not data loading) and the optimizer's part of it.

    The first `skip` steps are kept apart: they hold allocation, warm-up of the kernels, and calibration. In a bare loop
    call `start`, `before_update`, `after_update` and `stop` around the same places.
    """

    def __init__(self, skip: int = 2):
        self.skip = skip
        self.steps: list[float] = []
        self.updates: list[float] = []

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self) -> None:
        self._start = self._now()

    def before_update(self) -> None:
        self._update = self._now()

    def after_update(self) -> None:
        self.updates.append(self._now() - self._update)

    def stop(self) -> None:
        self.steps.append(self._now() - self._start)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before_update()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def summary(self) -> dict[str, Any]:
        """Milliseconds over the steps after the first `skip`: median, quartiles, and the optimizer's median share."""
        steps = [1000 * t for t in self.steps[self.skip :]]
        updates = [1000 * t for t in self.updates[self.skip :]]
        if not steps or len(steps) != len(updates):
            return {"steps_timed": 0}
        quartiles = statistics.quantiles(steps, n=4, method="inclusive") if len(steps) > 1 else [steps[0]] * 3
        return {
            "steps_timed": len(steps),
            "step_ms": round(quartiles[1], 3),
            "step_ms_quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
            "optimizer_ms": round(statistics.median(updates), 3),
            "optimizer_share": round(statistics.median(u / s for u, s in zip(updates, steps, strict=True)), 4),
            "first_step_ms": round(1000 * self.steps[0], 3),
        }


class Clock(TrainerCallback):
    """Seconds of training: evaluation left out, the runs before a resume counted."""

    def __init__(self) -> None:
        self.total = 0.0
        self.since: float | None = None  # None while the clock is stopped

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.total = max((row.get("train_seconds", 0.0) for row in state.log_history), default=0.0)
        self.since = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.total, self.since = self.seconds(), None

    def seconds(self) -> float:
        return self.total + (time.perf_counter() - self.since if self.since is not None else 0.0)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process held: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
