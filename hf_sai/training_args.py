"""``SaITrainingArguments``: training arguments that know ``optim="sgd_sai"``."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from hf_sai.from_args import OPTIM_NAME
from hf_sai.optim_args import normalize_optim_args


@dataclass
class SaITrainingArguments(TrainingArguments):
    """``TrainingArguments`` that know ``optim="sgd_sai"``, which is the default, without patching transformers.

    ``learning_rate`` and ``weight_decay`` are in AdamW's units unless ``optim_args`` says ``scaling=raw`` or
    ``scaling=max``. Any stock optimizer can be named as well. For the keys of ``optim_args`` see
    :func:`sgd_sai_from_args`; they are checked here already, and a mapping is kept as ``key=value`` pairs.

    Raises:
        ValueError: for what ``optim_args`` cannot be.

    Example:
        >>> args = SaITrainingArguments("out", learning_rate=2e-4, optim_args={"momentum": 0.95})
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
        """As ``TrainingArguments.set_optimizer``, with ``"sgd_sai"`` as the default name."""
        super().set_optimizer(OptimizerNames.SGD.value if name == OPTIM_NAME else name, *rest, **kwargs)
        if name == OPTIM_NAME:
            self.optim_args = normalize_optim_args(self.optim_args)
            self.optim = OPTIM_NAME
        return self
