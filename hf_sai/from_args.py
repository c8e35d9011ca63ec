"""Makes the optimizer from training arguments: either its class and kwargs, or the optimizer and its scheduler."""

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainingArguments, get_scheduler

from hf_sai.optim_args import check_kwargs, parse_optim_args
from hf_sai.optimizer import SGDSaI
from hf_sai.options import check_model
from hf_sai.param_groups import param_groups, split_token_rows
from hf_sai.release import release_gradients
from hf_sai.saved_state import compare_when_loading

OPTIM_NAME = "sgd_sai"


def sgd_sai_from_args(args: TrainingArguments, model: nn.Module | None = None) -> tuple[type[SGDSaI], dict[str, Any]]:
    """Make the optimizer's class and kwargs from training arguments, for ``Trainer(optimizer_cls_and_kwargs=...)``.

    Args:
        args: only ``learning_rate``, ``weight_decay`` and ``optim_args`` are used. The Adam betas do not apply.
            ``optim_args`` is a string such as ``"momentum=0.9,momentum_dtype=bfloat16"`` or a mapping. Its keys are the
            other hyper-parameters of :class:`SGDSaI`, with the same defaults.
        model: the model to train. With it, the class names the parameters in the Trainer's groups, marks their token
            rows (see :func:`hf_sai.param_groups`) and compares a resumed run with its checkpoint. Without it, the class
            does none of this.

    Returns:
        The class and its keyword arguments. The class is :class:`SGDSaI`, or with ``model`` a class that makes plain
        ``SGDSaI``.

    Raises:
        ValueError: for an unknown key or an invalid value in ``optim_args``. The message names it and lists the valid
            ones. Also for ``release_gradients=true``, which needs the model: use :func:`create_sgd_sai` or
            ``SaITrainer``.

    Example:
        >>> sgd_sai_from_args(TrainingArguments("out", learning_rate=2e-4, optim_args="momentum=0.95"))
        (<class 'hf_sai.optimizer.SGDSaI'>, {'lr': 0.0002, 'weight_decay': 0.0, 'momentum': 0.95})
        >>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=sgd_sai_from_args(args, model))
    """
    kwargs = kwargs_from_args(args)
    if parse_optim_args(args.optim_args).get("release_gradients"):
        raise ValueError(
            "optim_args: release_gradients=true needs the model: use SaITrainer or create_sgd_sai, "
            "or call hf_sai.release_gradients(optimizer, model)"
        )
    return class_for(model), kwargs


def create_sgd_sai(model: nn.Module, args: TrainingArguments, num_training_steps: int) -> tuple[SGDSaI, LRScheduler]:
    """Make the optimizer and scheduler that a Trainer would make, for ``Trainer(optimizers=...)`` and bare loops.

    In a loop with an ``Accelerator``, build the arguments first, because they reset accelerate's state. In a loop
    without training arguments, use :func:`hf_sai.param_groups`.

    Args:
        model: the model to train. Its parameters with ``requires_grad`` are trained. Biases and normalisation weights
            have no weight decay.
        args: used as in :func:`sgd_sai_from_args`. The scheduler also uses ``lr_scheduler_type``, its kwargs and the
            warm-up.
        num_training_steps: the number of optimizer steps in the whole run, at least 1.

    Returns:
        The optimizer and the scheduler. The scheduler takes one step after each optimizer step.

    Raises:
        ValueError: as in :func:`sgd_sai_from_args`. Also for ``num_training_steps`` below 1, and for arguments that
            do not work with ``release_gradients=true``.

    Example:
        >>> trainer = Trainer(model, args, optimizers=create_sgd_sai(model, args, num_training_steps=1000))
    """
    check_model(model)
    _check_args(args)
    if num_training_steps < 1:
        raise ValueError(f"num_training_steps must be at least 1, got {num_training_steps}")
    # This instance method does not use its instance.
    decayed = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    groups = param_groups(model, args.weight_decay, decay_parameters=decayed)
    optimizer = class_for(model)(groups, **kwargs_from_args(args))
    release_if_asked(optimizer, model, args)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(num_training_steps),
        num_training_steps=num_training_steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,  # type: ignore[arg-type]
    )
    return optimizer, scheduler


def kwargs_from_args(args: TrainingArguments) -> dict[str, Any]:
    """The keyword arguments of :class:`SGDSaI`, without ``release_gradients``."""
    _check_args(args)
    parsed = parse_optim_args(args.optim_args)
    parsed.pop("release_gradients", None)
    _warn_if_nothing_will_train(args, parsed.get("scaling"))
    kwargs = {"lr": args.learning_rate, "weight_decay": args.weight_decay, **parsed}
    check_kwargs(kwargs)
    return kwargs


def _check_args(args: Any) -> None:
    if not all(hasattr(args, name) for name in ("learning_rate", "weight_decay", "optim_args")):
        raise ValueError(
            f"args must be transformers.TrainingArguments, got {type(args).__name__}; "
            "without them use hf_sai.param_groups and hf_sai.SGDSaI"
        )


def class_for(model: nn.Module | None) -> type[SGDSaI]:
    """Return ``SGDSaI``, or for a model a class that makes an SGDSaI with parameter names and token rows.

    transformers requires a class here. Groups in the kwargs (``"params"``, as for GaLore) would replace those that a
    subclass of Trainer builds by its own rules, so this class keeps the groups that it receives.
    """
    if model is None:
        return SGDSaI
    check_model(model)

    def make(_: type, params: Iterable[Any], *rest: Any, **kwargs: Any) -> SGDSaI:
        optimizer = SGDSaI(split_token_rows(params, model), *rest, **kwargs)
        compare_when_loading(optimizer)
        return optimizer

    return type("SGDSaI", (SGDSaI,), {"__new__": make, "__doc__": SGDSaI.__doc__})


def release_if_asked(optimizer: SGDSaI, model: nn.Module, args: TrainingArguments) -> None:
    """Release gradients if ``optim_args`` requests it. Raise ValueError if the other arguments exclude it."""
    if not parse_optim_args(args.optim_args).get("release_gradients") or optimizer.releases_gradients:
        return
    reasons = {
        f"gradient_accumulation_steps={args.gradient_accumulation_steps}: parameters change between micro-batches; "
        "set it to 1": args.gradient_accumulation_steps > 1,
        f"max_grad_norm={args.max_grad_norm}: the norm is known only after the last gradient; set it to 0": (
            (args.max_grad_norm or 0) > 0
        ),
        "fp16=True: an overflow is known only after the last gradient; use bf16": args.fp16,
        f"{args.world_size} processes: gradients are reduced later; train on one": args.world_size > 1,
        f"{args.n_gpu} GPUs in one process; set CUDA_VISIBLE_DEVICES to one GPU": args.n_gpu > 1,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"optim_args: release_gradients=true updates inside backward and excludes {reason}")
    release_gradients(optimizer, model, track_norm=True)


def _warn_if_nothing_will_train(args: TrainingArguments, scaling: str | None) -> None:
    """Warn if the learning rate is still the default, which is in AdamW's units, but the scaling has the paper's."""
    remedies = {"raw": "1e-2 for full fine-tuning, 1e-3 to 3e-2 for LoRA", "max": "1.0"}
    defaults = {5e-5, type(args).__dataclass_fields__["learning_rate"].default}
    if scaling not in remedies or args.learning_rate not in defaults:
        return
    warnings.warn(
        f"learning_rate is still at its default of {args.learning_rate:g}, which is in AdamW's units; "
        f"scaling={scaling} uses the paper's units, in which the model would not train at that rate. "
        f"Set learning_rate (start from {remedies[scaling]}), or remove scaling from optim_args to use AdamW's units.",
        stacklevel=4,
    )
