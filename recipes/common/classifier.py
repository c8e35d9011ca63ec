"""Training any classifier by the Trainer: what `recipes.images` and `recipes.lstm` have in common.

The model maps a batch to logits, one row of classes for each label; the loss is cross entropy. A run gives a record:
losses, top-1 and top-5 accuracy, their curves, optimizer state, step time, and whether it diverged.
"""

from __future__ import annotations

import functools
import io
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy, SaveStrategy

from hf_sai.bench.state_bytes import optimizer_state_bytes
from hf_sai.checkpoints import last_whole_checkpoint
from recipes.common.config import config_words, parse_config
from recipes.common.errors import UserError
from recipes.common.files import write_bytes, write_json
from recipes.common.measure import Clock, StepTimer, peak_memory_bytes
from recipes.common.optimizers import RecipeArguments, trainer_optimizer
from recipes.common.provenance import Began, run_record
from recipes.common.records import label
from recipes.common.run_folder import run_folder

logger = logging.getLogger(__name__)


@dataclass
class ClassifierArguments(RecipeArguments):
    """The Trainer's arguments, with defaults for short runs; without `output_dir` nothing is kept but the record."""

    output_dir: str | None = field(default=None, metadata={"help": "Model, checkpoints, record, curves."})
    save_model: bool = field(default=True, metadata={"help": "Into output_dir, where one is given."})
    warmup_fraction: float = field(default=0.0, metadata={"help": "Of all steps, where warmup_steps is 0."})
    lr_decay_epochs: float | None = field(
        default=None, metadata={"help": "Instead of lr_scheduler_type: lower the rate every N epochs."}
    )
    lr_decay_factor: float = field(default=0.1, metadata={"help": "With lr_decay_epochs."})
    eval_strategy: IntervalStrategy | str = "epoch"
    save_strategy: SaveStrategy | str = "no"
    logging_steps: float = 20
    logging_nan_inf_filter: bool = False
    per_device_eval_batch_size: int = 250
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)

    def __post_init__(self) -> None:
        self.keep = self.output_dir is not None
        self.output_dir = self.output_dir or tempfile.gettempdir()  # replaced by a new folder when it trains
        super().__post_init__()
        if not 0 <= self.warmup_fraction < 1:
            raise UserError(f"warmup_fraction must be in [0, 1), got {self.warmup_fraction}")
        if self.lr_decay_epochs is not None and self.lr_decay_epochs <= 0:
            raise UserError(f"lr_decay_epochs must be above 0, or left out, got {self.lr_decay_epochs}")
        if not 0 < self.lr_decay_factor <= 1:
            raise UserError(f"lr_decay_factor must be in (0, 1], got {self.lr_decay_factor}")
        if self.resume_from_checkpoint is not None and not self.keep:
            raise UserError("resume_from_checkpoint needs output_dir")
        if self.dataloader_persistent_workers:
            raise UserError("dataloader_persistent_workers must be false: workers that stay miss the epoch's changes")


def read_config(
    types: Sequence[type], config: str | Path | Mapping[str, Any] | Sequence[str], description: str | None
) -> tuple[Any, ...]:
    """Dataclasses from a YAML file, a mapping, or command-line words (`run.yaml --seed 1`)."""
    return parse_config(types, config_words(config), description)


# --- training --------------------------------------------------------------------------------------------------------


class Epochs(TrainerCallback):
    """Tells the training set which epoch it is: accelerate does not where it has wrapped the sampler twice."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.dataset.set_epoch(math.floor((state.epoch or 0) + 1e-6))


class ClassifierTrainer(Trainer):
    """Trainer for logits and labels; evaluates loss and accuracies, and stops at a loss that is not finite."""

    args: ClassifierArguments
    train_dataset: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss below is a mean over the batch
        self.clock, self.timer, self.began = Clock(), StepTimer(), Began()
        self.add_callback(self.began)
        self.add_callback(self.clock)
        self.add_callback(self.timer)
        if hasattr(self.train_dataset, "set_epoch"):
            self.add_callback(Epochs(self.train_dataset))
        if self.args.disable_tqdm:
            self.remove_callback(PrinterCallback)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices and filters; not biases, norms and layer scales. The Trainer itself would decay batch norms."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        args = self.args
        if not args.warmup_steps:
            args.warmup_steps = round(args.warmup_fraction * num_training_steps)
        if args.lr_decay_epochs is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        per_batch = args.train_batch_size * args.world_size
        whole, rest = divmod(len(self.train_dataset), per_batch)
        batches = whole + (1 if rest and not args.dataloader_drop_last else 0)
        steps = args.lr_decay_epochs * math.ceil(batches / args.gradient_accumulation_steps)
        warmup, factor = args.warmup_steps, args.lr_decay_factor

        def rate(step: int) -> float:
            return step / warmup if step < warmup else factor ** math.floor(step / steps)

        chosen: Any = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = LambdaLR(chosen, rate)
        return self.lr_scheduler

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The mean cross entropy of a batch, with label smoothing and mixup where they are asked for."""
        labels = inputs.pop("labels")
        others, share = inputs.pop("other_labels", None), inputs.pop("share", None)
        logits = model(**inputs)["logits"].flatten(0, -2).float()
        smoothing = self.args.label_smoothing_factor
        loss = cross_entropy(logits, labels.flatten(), label_smoothing=smoothing)
        if others is None:
            return loss
        assert share is not None
        return share[0] * loss + (1 - share[0]) * cross_entropy(logits, others, label_smoothing=smoothing)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As `from_pretrained` does it, with every weight accounted for.

        transformers 5 saves a ViT under its old names and loads a checkpoint under the new ones: the Trainer would
        only log that the layers are missing, and train fresh ones.
        """
        model = self.model if model is None else model
        if self.is_fsdp_enabled or not isinstance(model, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            model.load_state_dict(type(model).from_pretrained(resume_from_checkpoint).state_dict())

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        running = self.clock.since is not None
        self.clock.on_train_end(self.args, self.state, self.control)
        metrics = super().evaluate(*args, **kwargs)
        self.clock.since = time.perf_counter() if running else None
        return metrics

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean loss (without label smoothing), top-1 and top-5 accuracy, each label counted once.

        Logits that are not finite are wrong answers. With fewer than six classes top-5 says nothing and is 1.
        """
        model = self.model_wrapped.eval()
        total, samples = torch.zeros(4, dtype=torch.float64), 0
        for inputs in dataloader:
            labels = inputs.pop("labels")
            with torch.no_grad(), self.compute_loss_context_manager():
                logits = model(**inputs)["logits"].float()
            rows = _counts(logits.flatten(0, -2), labels.flatten()).view(len(labels), -1, 4).sum(1)
            rows = self.accelerator.gather_for_metrics(rows)
            total += rows.cpu().double().sum(0)
            samples += len(rows)
        means = (total[:3] / total[3]).tolist()
        named = zip(("loss", "top1", "top5"), means, strict=True)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in named}
        return EvalLoopOutput(None, None, metrics, samples)  # type: ignore[arg-type]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        logs["train_seconds"] = round(self.clock.seconds(), 3)
        losses = {key: logs[key] for key in ("loss", "eval_loss") if key in logs}
        super().log(logs, *args, **kwargs)
        if not all(math.isfinite(loss) for loss in losses.values()):
            logger.warning("the loss is %s at step %d: stopping", losses, self.state.global_step)
            self.control.should_training_stop = True


def _counts(logits: Tensor, labels: Tensor) -> Tensor:
    """(rows, 4): loss, whether the label is first, whether it is among the first five, and one."""
    finite = logits.isfinite().all(1, keepdim=True)
    hits = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]) & finite
    loss = cross_entropy(logits, labels, reduction="none")
    return torch.stack([loss, hits[:, 0].float(), hits.any(1).float(), torch.ones_like(loss)], dim=1)


def train_classifier(
    recipe: str,
    build: Callable[[], nn.Module],
    train: Any,
    validation: Any,
    args: ClassifierArguments,
    configs: Sequence[Any],
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """Train, evaluate, and return the record; with `output_dir` also write record, curves and model there.

    Args:
        recipe: its name in the record.
        build: makes the model, with the random state of `args.seed`.
        train, validation: data sets of `labels` and what the model takes; whole batches by `__getitems__`.
        args: of the Trainer.
        configs: the recipe's other settings, for the record.
        data: what the record says of the data.

    Raises:
        UserError: bad input; the message names the option, the rule and the remedy.
    """
    with _folder(args) as (folder, checkpoint):
        args.output_dir = folder
        set_seed(args.seed)
        model = build()
        trainer = ClassifierTrainer(
            model,
            args,
            train_dataset=train,
            eval_dataset=validation,
            data_collator=lambda batch: batch,  # the data sets give whole batches
            **trainer_optimizer(model, args),
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        evaluated = max((row["step"] for row in trainer.state.log_history if "eval_loss" in row), default=-1)
        if evaluated != trainer.state.global_step:
            trainer.evaluate()
        if args.keep and args.save_model:
            trainer.save_model()
        record = build_record(recipe, trainer, configs, data)
        if args.keep and trainer.is_world_process_zero():
            write_json(Path(folder) / "record.json", record)
            figure = io.BytesIO()
            draw_curves([record], figure)
            write_bytes(Path(folder) / "curves.png", figure.getvalue())
        trainer.accelerator.wait_for_everyone()
    return record


@contextmanager
def _folder(args: ClassifierArguments) -> Iterator[tuple[str, str | None]]:
    """The folder of a run and the checkpoint to resume from; a temporary folder where nothing is kept."""
    if not args.keep:
        with tempfile.TemporaryDirectory() as folder:
            yield folder, None
        return
    folder = str(args.output_dir)
    last = functools.partial(last_whole_checkpoint, folder)
    with run_folder(folder, args.resume_from_checkpoint, last, args.overwrite_output_dir) as checkpoint:
        yield folder, checkpoint


# --- report ----------------------------------------------------------------------------------------------------------


def build_record(
    recipe: str, trainer: ClassifierTrainer, configs: Sequence[Any], data: Mapping[str, Any]
) -> dict[str, Any]:
    """The results of a finished run.

    Accuracies are shares of 1. `best` is over the evaluations of the run, so slightly above what the same model would
    reach on images kept for that purpose; compare `final` where that matters.
    """
    args, history = trainer.args, trainer.state.log_history
    train = [_point(row) | {"loss": row["loss"]} for row in history if "loss" in row]
    validation = [
        _point(row) | {"loss": row["eval_loss"], "top1": row["eval_top1"], "top5": row["eval_top5"]}
        for row in history
        if "eval_loss" in row
    ]
    last, best = validation[-1], max(validation, key=lambda row: row["top1"])
    timing = trainer.timer.summary()
    if timing["steps_timed"]:
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        timing["samples_per_second"] = round(1000 * batch / timing["step_ms"], 1)
    model = trainer.accelerator.unwrap_model(trainer.model)
    return run_record(
        recipe,
        (*configs, args),
        trainer.began,
        model={"parameters": sum(parameter.numel() for parameter in model.parameters())},
        data=dict(data),
        processes=args.world_size,
        steps=trainer.state.global_step,
        epochs=trainer.state.epoch,
        train_seconds=round(max((row["train_seconds"] for row in history), default=0.0), 1),
        final={
            "train_loss": train[-1]["loss"] if train else None,
            **{f"eval_{key}": last[key] for key in ("loss", "top1", "top5")},
        },
        best={
            "eval_loss": min((row["loss"] for row in validation if math.isfinite(row["loss"])), default=None),
            "eval_top1": best["top1"],
            "epoch": best["epoch"],
        },
        diverged=any(not math.isfinite(row["loss"]) for row in train + validation),
        speed=timing,
        optimizer_state_bytes=optimizer_state_bytes(trainer.optimizer),
        peak_memory_bytes=peak_memory_bytes(args.device),
        curves={"train": train, "validation": validation},
    )


def _point(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": row["step"], "epoch": row["epoch"], "seconds": row["train_seconds"]}


def draw_curves(records: Sequence[Mapping[str, Any]], path: str | Path | BinaryIO) -> None:
    """Loss (thin: training, dots: validation) and validation accuracy of each record over epochs, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.8, 4.4), layout="constrained")
    FigureCanvasAgg(figure)  # no global state, no display
    losses, accuracies = figure.subplots(1, 2)
    for number, record in enumerate(records):
        color, curves = f"C{number % 10}", record["curves"]
        epochs = [row["epoch"] for row in curves["validation"]]
        dots = {"color": color, "marker": "o", "ms": 3}
        losses.plot(
            [row["epoch"] for row in curves["train"]],
            [row["loss"] for row in curves["train"]],
            color=color,
            lw=0.8,
            alpha=0.5,
        )
        losses.plot(epochs, [row["loss"] for row in curves["validation"]], **dots, label=label(record))
        accuracies.plot(epochs, [100 * row["top1"] for row in curves["validation"]], **dots, label=label(record))
    losses.set_ylabel("loss (thin: training, dots: validation)")
    accuracies.set_ylabel("validation accuracy, top 1, %")
    for panel in (losses, accuracies):
        panel.set_xlabel("epoch")
        panel.grid(alpha=0.3)
    figure.legend(*losses.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, format="png", dpi=110)


def summary(record: Mapping[str, Any]) -> str:
    """One line for the end of a run on the command line."""
    final, best = record["final"], record["best"]
    return (
        f"{label(record)}: validation loss {final['eval_loss']:.4f}, top-1 {100 * final['eval_top1']:.2f} % "
        f"(best {100 * best['eval_top1']:.2f} %), top-5 {100 * final['eval_top5']:.2f} %, "
        f"{record['train_seconds']} s{', DIVERGED' if record['diverged'] else ''}"
    )
