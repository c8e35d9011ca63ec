"""``register()``: makes ``optim="sgd_sai"`` valid in every stock Trainer of a process."""

import functools
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_sai.from_args import OPTIM_NAME, sgd_sai_from_args
from hf_sai.optim_args import normalize_optim_args


def register() -> None:
    """Make ``optim="sgd_sai"`` valid in every Trainer and TrainingArguments of this process.

    This adds a name to transformers' ``OptimizerNames``, makes ``Trainer.get_optimizer_cls_and_kwargs`` return SGDSaI
    for it, and makes ``TrainingArguments`` check ``optim_args``. Stock and third-party trainers, ``HfArgumentParser``
    (command line, YAML, JSON) and ``set_optimizer`` then accept it like any other name. A second call does nothing.

    A ``training_args.bin`` written afterwards contains the name as a plain string. It loads in a process that has not
    called ``register()``. A child process must call it too, unless it is started under :mod:`hf_sai.launch`. A child of
    ``multiprocessing`` is also registered when it receives training arguments with ``sgd_sai``.

    Example:
        >>> register()
        >>> args = TrainingArguments("out", optim="sgd_sai", optim_args={"momentum": 0.95})
        >>> args.optim_args
        'momentum=0.95'
    """
    if OPTIM_NAME in OptimizerNames._value2member_map_:
        return
    stock: Callable[..., tuple[Any, Any]] = Trainer.get_optimizer_cls_and_kwargs

    @functools.wraps(stock)
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        return sgd_sai_from_args(args, model) if args.optim == OPTIM_NAME else stock(args, model)

    Trainer.get_optimizer_cls_and_kwargs = staticmethod(get_optimizer_cls_and_kwargs)  # type: ignore[method-assign]
    for name in ("__post_init__", "set_optimizer"):
        setattr(TrainingArguments, name, _then_check(getattr(TrainingArguments, name)))
    _add_optimizer_name()
    ForkingPickler.register(OptimizerNames, lambda name: (_optimizer_name, (name.value,)))


def _optimizer_name(value: str) -> OptimizerNames:
    """The enum member for a name in the parent's arguments. Children of multiprocessing call this to unpickle it."""
    if value == OPTIM_NAME:
        register()
    return OptimizerNames(value)


def _then_check(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of the arguments so that it also checks ``optim_args``, before the model is loaded."""

    @functools.wraps(stock)
    def method(self: TrainingArguments, *rest: Any, **kwargs: Any) -> Any:
        result = stock(self, *rest, **kwargs)
        if self.optim == OPTIM_NAME:
            self.optim_args = normalize_optim_args(self.optim_args)
        return result

    return method


def _add_optimizer_name() -> None:
    """Append ``SGD_SAI`` to ``OptimizerNames``, as Python's enum code does for a line in the class body."""
    member: Any = str.__new__(OptimizerNames, OPTIM_NAME)
    member._name_ = "SGD_SAI"
    member._value_ = OPTIM_NAME
    member.__objclass__ = OptimizerNames
    # A process that has not called register() has no such member, so this pickles the plain string, which is equal.
    member.__reduce_ex__ = lambda protocol: (str, (OPTIM_NAME,))
    type.__setattr__(OptimizerNames, "SGD_SAI", member)
    OptimizerNames._member_names_.append("SGD_SAI")
    OptimizerNames._member_map_["SGD_SAI"] = member
    OptimizerNames._value2member_map_[OPTIM_NAME] = member
    # Python 3.13 uses this list for `value in OptimizerNames`.
    getattr(OptimizerNames, "_hashable_values_", []).append(OPTIM_NAME)
