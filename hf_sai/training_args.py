"""``SaITrainingArguments``: training arguments that accept ``optim="sgd_sai"``."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from hf_sai.from_args import OPTIM_NAME
from hf_sai.optim_args import normalize_optim_args


@dataclass
class SaITrainingArguments(TrainingArguments):
    """``TrainingArguments`` with ``optim="sgd_sai"`` as the default, without patching transformers.

    ``learning_rate`` and ``weight_decay`` are in AdamW's units unless ``optim_args`` contains ``scaling=raw`` or
    ``scaling=max``. ``optim`` may also be any stock optimizer. :func:`sgd_sai_from_args` describes the keys of
    ``optim_args``. This class checks them, and converts a mapping to ``key=value`` pairs.

    Args:
        optim: ``"sgd_sai"`` or any of ``transformers.OptimizerNames``. The other fields are those of
            ``TrainingArguments``.

    Raises:
        ValueError: for an unknown key or an invalid value in ``optim_args``.

    Example:
        >>> args = SaITrainingArguments("out", learning_rate=2e-4, optim_args={"momentum": 0.95})
        >>> args.optim, args.optim_args
        ('sgd_sai', 'momentum=0.95')
    """

    optim: str = field(
        default=OPTIM_NAME, metadata={"help": "The optimizer: sgd_sai, or any that transformers.OptimizerNames lists."}
    )

    def __post_init__(self) -> None:
        chosen = self.optim
        if chosen == OPTIM_NAME:
            self.optim_args = normalize_optim_args(self.optim_args)
            # transformers accepts only names of its enum here.
            self.optim = OptimizerNames.SGD.value
        super().__post_init__()  # type: ignore[no-untyped-call]
        if chosen == OPTIM_NAME:
            self.optim = OPTIM_NAME

    def set_optimizer(self, name: str = OPTIM_NAME, *rest: Any, **kwargs: Any) -> "SaITrainingArguments":
        """Like ``TrainingArguments.set_optimizer``, with ``"sgd_sai"`` as the default name.

        Args:
            name: ``"sgd_sai"`` or any of ``transformers.OptimizerNames``.
            rest: as for ``TrainingArguments.set_optimizer``.
            kwargs: as for ``TrainingArguments.set_optimizer``: ``learning_rate``, ``weight_decay`` and others.

        Returns:
            These arguments.

        Raises:
            ValueError: for an unknown key or an invalid value in ``optim_args``.

        Example:
            >>> SaITrainingArguments("out").set_optimizer(learning_rate=2e-4).learning_rate
            0.0002
        """
        super().set_optimizer(OptimizerNames.SGD.value if name == OPTIM_NAME else name, *rest, **kwargs)
        if name == OPTIM_NAME:
            self.optim_args = normalize_optim_args(self.optim_args)
            self.optim = OPTIM_NAME
        return self
