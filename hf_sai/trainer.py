"""``SaITrainer``: a Trainer whose optimizer is SGD-SaI, without patching transformers."""

from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_sai.callbacks import GSNRCallback
from hf_sai.from_args import OPTIM_NAME, class_for, kwargs_from_args, release_if_asked
from hf_sai.optimizer import SGDSaI
from hf_sai.resume import ResumingTrainer
from hf_sai.saved_state import compare_when_loading
from hf_sai.training_args import SaITrainingArguments


class SaITrainer(ResumingTrainer):
    """A ``Trainer`` for :class:`SaITrainingArguments`, whose default optimizer is SGD-SaI.

    It resumes only from a complete checkpoint, on any number of processes. It warns if optimizer settings have changed
    since the checkpoint, and refuses the state of another optimizer.

    Args:
        model: as for ``Trainer``.
        args: the training arguments, by default ``SaITrainingArguments("tmp_trainer")``.
        rest: as for ``Trainer``.
        kwargs: as for ``Trainer``.

    Raises:
        ValueError: for stock ``TrainingArguments`` without ``optim="sgd_sai"``, when the optimizer is created.

    Example:
        >>> trainer = SaITrainer(model, SaITrainingArguments("out", learning_rate=2e-4), train_dataset=data)
        >>> trainer.create_optimizer().param_groups[0]["lr"]
        0.0002
    """

    def __init__(
        self, model: nn.Module | None = None, args: TrainingArguments | None = None, *rest: Any, **kwargs: Any
    ) -> None:
        super().__init__(model, SaITrainingArguments("tmp_trainer") if args is None else args, *rest, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Like ``Trainer.train``. ``resume_from_checkpoint=True`` resumes from the last complete checkpoint.

        Args:
            args: as for ``Trainer.train``. The number of processes may differ from that of the saved run.
            kwargs: as for ``Trainer.train``.

        Returns:
            The ``TrainOutput`` of ``Trainer.train``.

        Raises:
            ValueError: if there is no complete checkpoint, or it lacks the state of the optimizer or the scheduler.

        Example:
            >>> args = SaITrainingArguments("out", learning_rate=2e-4, max_steps=2)
            >>> trainer = SaITrainer(model, args, train_dataset=data)
            >>> result = trainer.train()
            >>> result.global_step
            2
        """
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, GSNRCallback):
                callback.trainer = self
        return super().train(*args, **kwargs)

    def create_optimizer(self, *rest: Any, **kwargs: Any) -> Any:
        """Like ``Trainer.create_optimizer``. ``optim_args="release_gradients=true"`` also enables gradient release."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*rest, **kwargs)
        if is_new and not isinstance(optimizer, SGDSaI):
            compare_when_loading(optimizer)
        if isinstance(optimizer, SGDSaI) and isinstance(self.model, nn.Module) and self.args.optim == OPTIM_NAME:
            release_if_asked(optimizer, self.model, self.args)
        return optimizer

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        released = getattr(getattr(self.optimizer, "optimizer", self.optimizer), "released_norm", None)
        if released is not None:
            return released
        return super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        """The class and arguments of the optimizer that ``args`` selects."""
        if args.optim == OPTIM_NAME:
            return class_for(model), kwargs_from_args(args)
        if not isinstance(args, SaITrainingArguments):
            # Stock arguments have a default and cannot be "sgd_sai", so the user's choice is unknown.
            raise ValueError(
                f"SaITrainer got {type(args).__name__} with optim={OptimizerNames(args.optim).value!r}, "
                "which is not SGD-SaI; use SaITrainingArguments, or call hf_sai.register() and pass optim='sgd_sai'"
            )
        return Trainer.get_optimizer_cls_and_kwargs(args, model)
