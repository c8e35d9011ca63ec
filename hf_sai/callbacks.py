"""GSNRCallback: what SGDSaI measured, in the Trainer's own logs."""

import inspect
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, PrinterCallback, ProgressCallback

from hf_sai.table import GSNRRow, gsnr_table, unwrap_sgd_sai

__all__ = ["GSNRCallback", "gsnr_table"]


class GSNRCallback(TrainerCallback):
    """Logs the g-SNR and the scale of every block, once, when the block is calibrated.

    The values go through ``report_to`` (as ``gsnr/<parameter name>`` and ``scale/<parameter name>``) and into the
    Trainer's ``log_history``, at the first logging step after the calibration; not to the console, where hundreds of
    numbers would drown the loss.

    Raises:
        TypeError: when training begins with an optimizer other than SGDSaI.
    """

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        unwrap_sgd_sai(kwargs["optimizer"])
        self._logged.clear()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Trainer.evaluate logs too, before training there is nothing to tell.
        if kwargs["optimizer"] is not None:
            self._log_new_blocks(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._log_new_blocks(args, state, control, **kwargs)

    def _log_new_blocks(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        rows = gsnr_table(kwargs["optimizer"], kwargs["model"])
        new = [row for row in rows if row.calibrated and row.name not in self._logged]
        if new:
            self._logged.update(row.name for row in new)
            _log(_as_logs(new), args, state, control, **kwargs)


def _as_logs(rows: list[GSNRRow]) -> dict[str, float]:
    return {f"gsnr/{r.name}": r.gsnr for r in rows} | {f"scale/{r.name}": r.scale for r in rows}


def _log(
    values: dict[str, float], args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
) -> None:
    """Do what ``Trainer.log`` does, for a callback, which has no Trainer: keep the values and tell the reporters."""
    if state.epoch is not None:
        values["epoch"] = state.epoch
    state.log_history.append({**values, "step": state.global_step})
    for callback in _calling_handler().callbacks:
        if not isinstance(callback, GSNRCallback | PrinterCallback | ProgressCallback):
            callback.on_log(args, state, control, **{**kwargs, "logs": dict(values)})


def _calling_handler() -> CallbackHandler:
    """The handler whose event is being answered.

    A callback is handed neither the Trainer nor the reporters, and those stand before it in the handler's list, so
    that what it adds to ``logs`` would come too late. The handler is always on the call stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
        frame = frame.f_back
    raise RuntimeError("GSNRCallback logs only from the events of a transformers Trainer")
