"""SGD-SaI in transformers: by name after `register()`, by `SaITrainer`, or by hand with `create_sgd_sai`."""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from hf_sai.checkpoints import TRAINER_STATE, last_whole_checkpoint
from hf_sai.checks import ADAMW_UNITS, MOMENTUM_DTYPES, MOMENTUM_INITS, SCALINGS, check_group
from hf_sai.optimizer import SGDSaI
from hf_sai.param_groups import param_groups, split_token_rows

OPTIM_NAME = "sgd_sai"


def register() -> None:
    """Make ``optim="sgd_sai"`` valid in every Trainer and TrainingArguments of this process.

    Adds a name to transformers' ``OptimizerNames`` and teaches ``Trainer.get_optimizer_cls_and_kwargs`` what it means,
    so that stock and third-party trainers, ``HfArgumentParser`` (command line, YAML, JSON) and ``set_optimizer`` take
    it like any other. A second call does nothing. A ``training_args.bin`` written afterwards holds the name as a plain
    string and loads in a process that has not called this.
    """
    if OPTIM_NAME in OptimizerNames._value2member_map_:
        return
    stock: Callable[..., tuple[Any, Any]] = Trainer.get_optimizer_cls_and_kwargs

    @functools.wraps(stock)
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        return sgd_sai_from_args(args, model) if args.optim == OPTIM_NAME else stock(args, model)

    Trainer.get_optimizer_cls_and_kwargs = staticmethod(get_optimizer_cls_and_kwargs)  # type: ignore[method-assign]
    _add_optimizer_name()


def _add_optimizer_name() -> None:
    """Append ``SGD_SAI`` to ``OptimizerNames``, as Python's enum machinery would do for a line of the class body."""
    member: Any = str.__new__(OptimizerNames, OPTIM_NAME)
    member._name_ = "SGD_SAI"
    member._value_ = OPTIM_NAME
    member.__objclass__ = OptimizerNames
    # A process that has not called register() has no such member: pickle the plain string, which compares equal.
    member.__reduce_ex__ = lambda protocol: (str, (OPTIM_NAME,))
    type.__setattr__(OptimizerNames, "SGD_SAI", member)
    OptimizerNames._member_names_.append("SGD_SAI")
    OptimizerNames._member_map_["SGD_SAI"] = member
    OptimizerNames._value2member_map_[OPTIM_NAME] = member
    # Python 3.13 looks here to answer `value in OptimizerNames`.
    getattr(OptimizerNames, "_hashable_values_", []).append(OPTIM_NAME)


@dataclass
class SaITrainingArguments(TrainingArguments):
    """``TrainingArguments`` that know ``optim="sgd_sai"``, which is the default, without patching transformers.

    ``learning_rate`` and ``weight_decay`` are in AdamW's units unless ``optim_args`` says ``scaling=raw`` or
    ``scaling=max``. Any stock optimizer can be named as well. For the keys of ``optim_args`` see
    :func:`sgd_sai_from_args`; they are checked here already.
    """

    optim: str = field(
        default=OPTIM_NAME, metadata={"help": "The optimizer: sgd_sai, or any that transformers.OptimizerNames lists."}
    )

    def __post_init__(self) -> None:
        chosen = self.optim
        if chosen == OPTIM_NAME:
            parse_optim_args(self.optim_args)
            # transformers accepts only names of its enum here.
            self.optim = OptimizerNames.SGD.value
        super().__post_init__()  # type: ignore[no-untyped-call]
        if chosen == OPTIM_NAME:
            self.optim = OPTIM_NAME

    def set_optimizer(self, name: str = OPTIM_NAME, *rest: Any, **kwargs: Any) -> "SaITrainingArguments":
        """As ``TrainingArguments.set_optimizer``, with ``"sgd_sai"`` as the default name."""
        super().set_optimizer(OptimizerNames.SGD.value if name == OPTIM_NAME else name, *rest, **kwargs)
        if name == OPTIM_NAME:
            parse_optim_args(self.optim_args)
            self.optim = OPTIM_NAME
        return self


class SaITrainer(Trainer):
    """A ``Trainer`` that trains with SGD-SaI when its :class:`SaITrainingArguments` say so, as they do by default."""

    def __init__(
        self, model: nn.Module | None = None, args: TrainingArguments | None = None, *rest: Any, **kwargs: Any
    ) -> None:
        super().__init__(model, SaITrainingArguments("tmp_trainer") if args is None else args, *rest, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *rest: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``; ``True`` resumes from the last checkpoint that was written to its end."""
        if resume_from_checkpoint is True:
            folder = str(self.args.output_dir)
            resume_from_checkpoint = last_whole_checkpoint(folder, self.args.world_size)
            if resume_from_checkpoint is None:
                raise ValueError(f"resume_from_checkpoint=True found no whole checkpoint in {folder!r}")
        if resume_from_checkpoint and not self.is_deepspeed_enabled:
            # transformers would start the optimizer anew without a word.
            for what in ("optimizer", "scheduler"):
                if not any(Path(resume_from_checkpoint).glob(f"*{what}*")):
                    raise ValueError(
                        f"resume_from_checkpoint {str(resume_from_checkpoint)!r} holds no {what} state; to train on "
                        "from its weights alone load them with from_pretrained and leave resume_from_checkpoint out"
                    )
        return super().train(resume_from_checkpoint, *rest, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As ``Trainer``'s, with every weight accounted for.

        transformers 5 saves some models (ViT) under their old names and looks for the new ones on resuming; it then
        only logs that weights are missing, and trains on from fresh ones. ``from_pretrained`` knows both names.

        Raises:
            ValueError: weights are missing and the model has no ``from_pretrained``.
        """
        self._missing_weights: list[str] = []
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        if not self._missing_weights:
            return
        if self.is_fsdp_enabled or not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"checkpoint {str(resume_from_checkpoint)!r} lacks weights of this model: "
                f"{', '.join(self._missing_weights[:3])}; resume with the model that was saved"
            )
        model.load_state_dict(type(model).from_pretrained(resume_from_checkpoint).state_dict())

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if hasattr(self.model, "_keys_to_ignore_on_save"):  # else the Trainer's own stops with an AttributeError
            super()._issue_warnings_after_load(load_result)
        left_out = getattr(self.model, "_keys_to_ignore_on_save", None) or ()
        self._missing_weights = [key for key in load_result.missing_keys if key not in left_out]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            # A checkpoint written over an older one must not pass for whole while it is a mixture of both.
            (folder / TRAINER_STATE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def create_optimizer(self, *rest: Any, **kwargs: Any) -> Any:
        """As ``Trainer.create_optimizer``; with ``optim_args="release_gradients=true"`` gradients are then released."""
        optimizer = super().create_optimizer(*rest, **kwargs)
        if isinstance(optimizer, SGDSaI) and isinstance(self.model, nn.Module) and self.args.optim == OPTIM_NAME:
            _release_if_asked(optimizer, self.model, self.args)
        return optimizer

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        released = getattr(getattr(self.optimizer, "optimizer", self.optimizer), "released_norm", None)
        if released is not None:
            return released
        return super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        """The optimizer's class and arguments that ``args`` ask for."""
        if args.optim == OPTIM_NAME:
            return _class_for(model), _kwargs_from_args(args)[0]
        if not isinstance(args, SaITrainingArguments):
            # Stock arguments cannot say "sgd_sai" and have a default: nobody knows what this user has chosen.
            raise ValueError(
                f"SaITrainer got {type(args).__name__} with optim={OptimizerNames(args.optim).value!r}, "
                "which is not SGD-SaI; use SaITrainingArguments, or call hf_sai.register() and pass optim='sgd_sai'"
            )
        return Trainer.get_optimizer_cls_and_kwargs(args, model)


def sgd_sai_from_args(args: TrainingArguments, model: nn.Module | None = None) -> tuple[type[SGDSaI], dict[str, Any]]:
    """The optimizer that training arguments describe, for ``Trainer(optimizer_cls_and_kwargs=...)``.

    Args:
        args: ``learning_rate``, ``weight_decay`` and ``optim_args`` are read, nothing else: the Adam betas do not
            apply. ``optim_args`` is a string such as ``"momentum=0.9,clip_threshold=1,momentum_dtype=bfloat16"`` whose
            keys are the other hyper-parameters of :class:`SGDSaI`. ``scaling`` is ``"floor"`` by default, because
            ``learning_rate`` and ``weight_decay`` are in AdamW's units here, and ``momentum_init`` is ``"zero"`` with
            ``"floor"`` and ``"adamw"``, ``"gradient"`` with the paper's scalings: what measured best, see the README.
        model: the model that is trained. With it the class names the parameters of the groups that a Trainer gives it,
            and finds the token rows among them, see :func:`hf_sai.param_groups`. Without it they stay unknown.

    Returns:
        :class:`SGDSaI`, or with ``model`` a class whose instances are plain ``SGDSaI``, and its keyword arguments.

    Raises:
        ValueError: for an unknown key or a bad value in ``optim_args``, naming it and listing what is valid; for
            ``release_gradients=true``, which needs the model.
    """
    kwargs, release = _kwargs_from_args(args)
    if release:
        raise ValueError(
            "optim_args: release_gradients=true needs the model: use SaITrainer or create_sgd_sai, "
            "or call optimizer.release_gradients(model)"
        )
    return _class_for(model), kwargs


def _class_for(model: nn.Module | None) -> type[SGDSaI]:
    """``SGDSaI``; for a model, a class that makes one whose groups have names and the model's token rows.

    transformers takes nothing but a class here. Groups of our own in the kwargs (``"params"``, as for GaLore) would
    take the place of those that a subclass of Trainer has built by its own rules; so whatever groups come are kept.
    """
    if model is None:
        return SGDSaI

    def make(_: type, params: Iterable[Any], *rest: Any, **kwargs: Any) -> SGDSaI:
        return SGDSaI(split_token_rows(params, model), *rest, **kwargs)

    return type("SGDSaI", (SGDSaI,), {"__new__": make, "__doc__": SGDSaI.__doc__})


def _kwargs_from_args(args: TrainingArguments) -> tuple[dict[str, Any], bool]:
    """The keyword arguments of :class:`SGDSaI`, and whether gradients are to be released."""
    kwargs = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        **_with_defaults(parse_optim_args(args.optim_args)),
    }
    release = kwargs.pop("release_gradients", False)
    check_group({**_DEFAULTS, **kwargs})
    _warn_if_nothing_will_train(args, kwargs["scaling"])
    return kwargs, release


def _release_if_asked(optimizer: SGDSaI, model: nn.Module, args: TrainingArguments) -> None:
    """Release gradients where ``optim_args`` asks for it; ValueError where the other arguments exclude it."""
    if not parse_optim_args(args.optim_args).get("release_gradients") or optimizer.releases_gradients:
        return
    reasons = {
        f"gradient_accumulation_steps={args.gradient_accumulation_steps}: parameters would move between micro-batches; "
        "set it to 1": args.gradient_accumulation_steps > 1,
        f"max_grad_norm={args.max_grad_norm}: the norm is known only after the last gradient; set it to 0, and "
        "clip block by block with clip_threshold=1 in optim_args": ((args.max_grad_norm or 0) > 0),
        "fp16=True: an overflow is known only after the last gradient; use bf16": args.fp16,
        f"{args.world_size} processes, whose gradients are reduced later; train on one": args.world_size > 1,
        f"{args.n_gpu} GPUs in one process; set CUDA_VISIBLE_DEVICES to one": args.n_gpu > 1,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"optim_args: release_gradients=true updates inside backward and excludes {reason}")
    optimizer.release_gradients(model, track_norm=True)


def create_sgd_sai(model: nn.Module, args: TrainingArguments, num_training_steps: int) -> tuple[SGDSaI, LRScheduler]:
    """The optimizer and the scheduler that a Trainer would make, for ``Trainer(optimizers=...)`` and bare loops.

    Args:
        model: its parameters with ``requires_grad`` are trained; biases and normalisation weights are not decayed.
        args: read as by :func:`sgd_sai_from_args`, and for the scheduler ``lr_scheduler_type``, its kwargs, warm-up.
        num_training_steps: how often the scheduler will be stepped in all, at least 1.

    Returns:
        The optimizer and the scheduler.
    """
    if num_training_steps < 1:
        raise ValueError(f"num_training_steps must be at least 1, got {num_training_steps}")
    kwargs, _ = _kwargs_from_args(args)
    # An instance method that reads nothing of its instance.
    decayed = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    groups = param_groups(model, args.weight_decay, decay_parameters=decayed)
    optimizer = SGDSaI(groups, **kwargs)
    _release_if_asked(optimizer, model, args)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(num_training_steps),
        num_training_steps=num_training_steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,  # type: ignore[arg-type]
    )
    return optimizer, scheduler


def parse_optim_args(optim_args: str | None) -> dict[str, Any]:
    """The keyword arguments of :class:`SGDSaI` in an ``optim_args`` string, each cast to its type.

    Args:
        optim_args: ``key=value`` pairs separated by commas, or nothing; spaces do not matter.

    Raises:
        ValueError: for what is not a pair, an unknown or repeated key, or a value that its key cannot take.
    """
    if not optim_args:
        return {}
    if not isinstance(optim_args, str):
        raise ValueError(f"optim_args must be a string of key=value pairs, got {optim_args!r}")
    parsed: dict[str, Any] = {}
    for pair in optim_args.split(","):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (key and equals and value):
            raise ValueError(f"optim_args must be key=value pairs separated by commas, got {pair!r} in {optim_args!r}")
        if key in _ELSEWHERE:
            raise ValueError(f"optim_args cannot set {key}: set {_ELSEWHERE[key]} of the training arguments instead")
        if key not in _CASTS:
            raise ValueError(
                f"optim_args has no key {key!r}{_did_you_mean(key, _CASTS)}; valid keys: {', '.join(_CASTS)}"
            )
        if key in parsed:
            raise ValueError(f"optim_args sets {key} twice in {optim_args!r}; leave one of them out")
        parsed[key] = _CASTS[key](key, value)
    check_group({**_DEFAULTS, **_with_defaults(parsed)})
    return parsed


def _number(key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"optim_args: {key} must be a number, got {value!r}") from None


def _number_or_none(key: str, value: str) -> float | None:
    return None if value.lower() == "none" else _number(key, value)


def _one_of(choices: dict[str, Any]) -> Callable[[str, str], Any]:
    def cast(key: str, value: str) -> Any:
        if value.lower() in choices:
            return choices[value.lower()]
        valid = ", ".join(choices)
        raise ValueError(f"optim_args: {key} must be one of {valid}, got {value!r}{_did_you_mean(value, choices)}")

    return cast


def _did_you_mean(word: str, choices: dict[str, Any]) -> str:
    close = get_close_matches(word.lower(), choices, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


_BOOL = {"true": True, "false": False}
_CASTS: dict[str, Callable[[str, str], Any]] = {
    "momentum": _number,
    "eps": _number,
    "scaling": _one_of({name: name for name in SCALINGS}),
    "maximize": _one_of(_BOOL),
    "foreach": _one_of({**_BOOL, "none": None}),
    "fused": _one_of({**_BOOL, "none": None}),
    "momentum_dtype": _one_of({**MOMENTUM_DTYPES, "none": None}),
    "stochastic_rounding": _one_of(_BOOL),
    "momentum_init": _one_of({name: name for name in MOMENTUM_INITS}),
    "clip_threshold": _number_or_none,
    "release_gradients": _one_of(_BOOL),
}
# Param groups take these two from the training arguments: a second value here would be lost without a word.
_ELSEWHERE = {"lr": "learning_rate", "learning_rate": "learning_rate", "weight_decay": "weight_decay"}
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(SGDSaI).parameters.items()
    if parameter.default is not parameter.empty
}


def _with_defaults(parsed: dict[str, Any]) -> dict[str, Any]:
    """What was asked for, and the rest as training arguments have it: AdamW's units, or all of the paper's method."""
    scaling = parsed.get("scaling", "floor")
    return {"scaling": scaling, "momentum_init": "zero" if scaling in ADAMW_UNITS else "gradient", **parsed}


def _warn_if_nothing_will_train(args: TrainingArguments, scaling: str) -> None:
    """Warn of a learning rate left at its default, which is in AdamW's units, where the units are the paper's."""
    defaults = {5e-5, type(args).__dataclass_fields__["learning_rate"].default}
    if scaling in ADAMW_UNITS or args.learning_rate not in defaults:
        return
    remedy = {"raw": "1e-2 for full fine-tuning, 1e-3 to 3e-2 for LoRA", "max": "1.0"}[scaling]
    warnings.warn(
        f"learning_rate is still at its default of {args.learning_rate:g}, which is in AdamW's units; "
        f"scaling={scaling} has the paper's, in which nothing will train at that rate. "
        f"Set learning_rate (start from {remedy}), or leave scaling out of optim_args to keep AdamW's units.",
        stacklevel=3,
    )
