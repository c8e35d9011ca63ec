"""GSNRCallback: logs the g-SNR that SGDSaI measured, and the g-SNR of later gradients, in the Trainer's logs."""

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging

from hf_sai.monitor import DRIFT, NOW, Measured, build_record, measure_gradients, recalibrated, usable, write_json
from hf_sai.optimizer import SGDSaI
from hf_sai.table import GSNRRow, gsnr_table, unwrap_sgd_sai

logger = logging.get_logger("transformers.hf_sai")
# A common factor of all gradients does not change the scales of these scalings.
_SCALE_FREE = ("raw", "max")


class GSNRCallback(TrainerCallback):
    """Log the g-SNR and the scale of every block after its calibration, and with ``every`` also its later g-SNR.

    The values are in the Trainer's ``log_history``, and the Trainer sends them to ``report_to``. They are not printed
    to the console, because hundreds of numbers would hide the loss. :class:`hf_sai.SaITrainer` passes itself to the
    callback. For any other Trainer, call ``trainer.add_callback(GSNRCallback(trainer=trainer))``. The values have no
    units:

    - ``gsnr/<parameter name>`` and ``scale/<parameter name>``: logged once, at the first logging step after the
      calibration.
    - ``gsnr_now/<parameter name>``, with ``every``: the g-SNR of the gradient that the optimizer uses in this step. The
      gradient is accumulated over micro-batches and processes and clipped. Clipping does not change g-SNR.
    - ``gsnr_drift/<parameter name>``, with ``every``: the scale that the block would get if all blocks were calibrated
      on this step's gradients, divided by its current scale. It is not logged without SGDSaI or before the block is
      calibrated. It is also not logged in AdamW's units with float16 and no clipping, because a changing loss scale
      multiplies the gradients then.

    With ``every``, the measurements are also written to ``file`` in ``output_dir`` at the end of training, in the
    format of :func:`hf_sai.monitor.build_record`. ``log_history`` and every checkpoint contain them, so the record of a
    resumed run is complete. A measurement reads each gradient twice and costs two host synchronisations. Equation 11 of
    the paper (arXiv 2412.11768) defines g-SNR.

    Args:
        every: measure at optimizer steps 1, 1 + every, 1 + 2 * every and so on, or never if ``None``. With ``every``,
            any optimizer works.
        file: the file name of the record.
        trainer: the Trainer whose reporters receive the values. Not needed with ``SaITrainer``. Without it, a stock
            Trainer keeps the values only in ``log_history``, and logs a warning if it has reporters.

    Raises:
        ValueError: for ``every`` below 1. Also at the first measurement if the gradients are not available, under
            DeepSpeed, FSDP1 or ``release_gradients``.
        TypeError: without ``every``, if training begins with an optimizer other than SGDSaI.

    Example:
        >>> trainer = SaITrainer(model, args, train_dataset=data, callbacks=[GSNRCallback(every=100)])
        >>> trainer.train()  # writes gsnr.json into the output folder
    """

    def __init__(self, every: int | None = None, file: str = "gsnr.json", trainer: Trainer | None = None) -> None:
        if every is not None and not (isinstance(every, int) and every >= 1):
            raise ValueError(
                f"every must be a whole number of at least 1 optimizer step, or None for no measurements, got {every!r}"
            )
        if not isinstance(file, str) or not file:
            raise ValueError(f"file must be a file name for the record in output_dir, got {file!r}")
        if trainer is not None and not isinstance(trainer, Trainer):
            raise ValueError(f"trainer must be a transformers.Trainer, or None, got {type(trainer).__name__}")
        self.every, self.file, self.trainer = every, file, trainer
        self._logged: set[str] = set()
        self._has_scales = True
        self._measured: list[Measured] = []  # in the current step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.every is None:
            unwrap_sgd_sai(kwargs["optimizer"])
        if self.trainer is None and args.report_to and state.is_world_process_zero:
            logger.warning(
                "GSNRCallback has no Trainer, so its values are only in log_history and not sent to %s; add it with "
                "trainer.add_callback(GSNRCallback(trainer=trainer)), or use SaITrainer",
                ", ".join(args.report_to),
            )
        self._has_scales = _holds_sgd_sai(kwargs["optimizer"])
        self._logged.clear()
        self._measured.clear()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.every is not None and state.global_step % self.every == 0:
            self._measured = measure_gradients(kwargs["optimizer"], kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._measured:
            return
        measured, self._measured = self._measured, []
        values = {NOW + m.name: m.statistics.gsnr for m in usable(measured)}
        if self._has_scales:
            loss_scaled = args.fp16 and not args.max_grad_norm
            now = recalibrated([m for m in measured if not (loss_scaled and m.scaling not in _SCALE_FREE)])
            kept = {row.name: row.scale for row in gsnr_table(kwargs["optimizer"], kwargs["model"]) if row.calibrated}
            values |= {DRIFT + name: scale / kept[name] for name, scale in now.items() if name in kept}
        if values:
            self._log(values, args, state, control, **kwargs)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Trainer.evaluate also logs, but before training there is nothing to log here.
        if kwargs["optimizer"] is not None:
            self._log_new_blocks(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._log_new_blocks(args, state, control, **kwargs)
        if self.every is not None and state.is_world_process_zero:
            rows = gsnr_table(kwargs["optimizer"], kwargs["model"]) if self._has_scales else []
            calibrated = {row.name: (row.gsnr, row.scale) for row in rows if row.calibrated}
            record = build_record(state.log_history, kwargs["model"], calibrated, self.every)
            write_json(Path(str(args.output_dir)) / self.file, record)

    def _log_new_blocks(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        rows = gsnr_table(kwargs["optimizer"], kwargs["model"]) if self._has_scales else []
        new = [row for row in rows if row.calibrated and row.name not in self._logged]
        if new:
            self._logged.update(row.name for row in new)
            self._log(_as_logs(new), args, state, control, **kwargs)

    def _log(
        self,
        values: dict[str, float],
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Store the values like ``Trainer.log``, and send them to the Trainer's reporters."""
        if state.epoch is not None:
            values["epoch"] = state.epoch
        state.log_history.append({**values, "step": state.global_step})
        for callback in self.trainer.callback_handler.callbacks if self.trainer else ():
            if not isinstance(callback, GSNRCallback | PrinterCallback | ProgressCallback):
                callback.on_log(args, state, control, **{**kwargs, "logs": dict(values)})


def _holds_sgd_sai(optimizer: Any) -> bool:
    while hasattr(optimizer, "optimizer") and not isinstance(optimizer, SGDSaI):
        optimizer = optimizer.optimizer
    return isinstance(optimizer, SGDSaI)


def _as_logs(rows: list[GSNRRow]) -> dict[str, float]:
    return {f"gsnr/{r.name}": r.gsnr for r in rows} | {f"scale/{r.name}": r.scale for r in rows}
