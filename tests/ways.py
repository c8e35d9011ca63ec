"""Every way of plugging SGD-SaI in: each trains `model` on `rows` for one epoch and returns the optimizer."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_sai import SaITrainer, SaITrainingArguments, SGDSaI, create_sgd_sai, sgd_sai_from_args

BATCH = 4
# What keeps a Trainer quiet and on the CPU.
QUIET = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}


class InOrder(IterableDataset):  # type: ignore[type-arg]
    """Rows that no trainer shuffles, so that all ways see the same batches."""

    def __init__(self, rows: list[dict[str, Tensor]]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def _settings(rows: list[dict[str, Tensor]], settings: dict[str, Any]) -> dict[str, Any]:
    steps = len(rows) // BATCH
    return {**QUIET, "per_device_train_batch_size": BATCH, "max_steps": steps, "warmup_steps": 2, **settings}


def stock_trainer(path: str, model: nn.Module, rows: list[dict[str, Tensor]], **settings: Any) -> SGDSaI:
    args = TrainingArguments(path, optim="sgd_sai", **_settings(rows, settings))
    return _train(Trainer(model, args, train_dataset=InOrder(rows)))


def seq2seq_trainer(path: str, model: nn.Module, rows: list[dict[str, Tensor]], **settings: Any) -> SGDSaI:
    args = Seq2SeqTrainingArguments(path, optim="sgd_sai", **_settings(rows, settings))
    return _train(Seq2SeqTrainer(model, args, train_dataset=InOrder(rows)))


def sai_trainer(path: str, model: nn.Module, rows: list[dict[str, Tensor]], **settings: Any) -> SGDSaI:
    args = SaITrainingArguments(path, **_settings(rows, settings))
    return _train(SaITrainer(model, args, train_dataset=InOrder(rows)))


def class_and_kwargs(path: str, model: nn.Module, rows: list[dict[str, Tensor]], **settings: Any) -> SGDSaI:
    args = TrainingArguments(path, **_settings(rows, settings))
    return _train(Trainer(model, args, train_dataset=InOrder(rows), optimizer_cls_and_kwargs=sgd_sai_from_args(args)))


def optimizers(path: str, model: nn.Module, rows: list[dict[str, Tensor]], **settings: Any) -> SGDSaI:
    args = TrainingArguments(path, **_settings(rows, settings))
    pair = create_sgd_sai(model, args, args.max_steps)
    return _train(Trainer(model, args, train_dataset=InOrder(rows), optimizers=pair))


def accelerate_loop(path: str, model: nn.Module, rows: list[dict[str, Tensor]], **settings: Any) -> SGDSaI:
    # TrainingArguments reset accelerate's state: they come before the Accelerator.
    args = TrainingArguments(path, **_settings(rows, settings))
    accelerator = Accelerator(cpu=True)
    optimizer, scheduler = create_sgd_sai(model, args, args.max_steps)
    loader = DataLoader(InOrder(rows), batch_size=BATCH)
    prepared, wrapper, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for batch in loader:
        accelerator.backward(prepared(**batch)["loss"])
        accelerator.clip_grad_norm_(prepared.parameters(), args.max_grad_norm)
        wrapper.step()
        scheduler.step()
        wrapper.zero_grad()
    return optimizer


def _train(trainer: Trainer) -> SGDSaI:
    trainer.train()
    wrapper: Any = trainer.optimizer
    optimizer = getattr(wrapper, "optimizer", wrapper)
    assert type(optimizer) is SGDSaI
    return optimizer


Way = Callable[..., SGDSaI]
# The first two need `register()`; the others must do without.
REGISTERED: list[Way] = [stock_trainer, seq2seq_trainer]
UNREGISTERED: list[Way] = [sai_trainer, class_and_kwargs, optimizers, accelerate_loop]
