"""Optimizers by name, for recipes that use the Trainer and for those with a bare loop.

A recipe's `optim` takes transformers' own names (`adamw_torch`, `sgd`, ...) and those of `OWN_OPTIMIZERS`: ours, and
the rivals of the paper's tables, from the packages that publish them.
"""

import ast
import importlib
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_sai import SGDSaI, calibration
from hf_sai.from_args import sgd_sai_from_args
from hf_sai.optim_args import normalize_optim_args, parse_optim_args
from recipes.common.errors import UserError, did_you_mean
from recipes.common.partitioned import Partitioned
from recipes.common.run_folder import HELP as RESUME_HELP
from recipes.common.run_folder import OVERWRITE_HELP

logger = logging.getLogger(__name__)

# The names a recipe's `optim` takes besides transformers' own.
OWN_OPTIMIZERS = (
    "sgd_sai",
    "sgd_sai_authors",
    "sgdm",
    "adam_mini",
    "prodigy",
    "muon",
    "scaled_adamw",
    "scaled_sgd",
    "partitioned",
)

# Short names of transformers' own.
_SHORT_NAMES = {"adamw": "adamw_torch", "adamw8bit": "adamw_8bit"}

# What a rival gets that no option of a recipe says.
FIXED: dict[str, dict[str, Any]] = {
    "sgdm": {"momentum": 0.9},
    "muon": {"adjust_lr_fn": "match_rms_adamw"},
    "partitioned": {"momentum": 0.9, "window": 60, "bound": 30.0},
}
# The options of Adam, and the optimizers that have no use for them.
ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
_WITHOUT_ADAM = ("sgdm", "scaled_sgd", "sgd_sai_authors", "sgd", "adafactor", "partitioned")


def check_optimizer_name(name: str) -> str | OptimizerNames:
    """The name itself for one of `OWN_OPTIMIZERS`, the enum member for one of transformers'."""
    name = getattr(name, "value", name)
    name = _SHORT_NAMES.get(name, name)
    if name in OWN_OPTIMIZERS:
        return name
    stock = [member.value for member in OptimizerNames]
    if name not in stock:
        known = sorted({*OWN_OPTIMIZERS, *stock})
        raise UserError(f"optim: unknown optimizer {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    return OptimizerNames(name)


def meaning(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe's options mean for the optimizer in this version of the code.

    A changed default or constant of SGD-SaI changes it, and so does a constant of ours in a rival. The learning rate
    and the weight decay are options of their own and not part of it.

    Args:
        chosen: every option of the recipe, defaults included.
    """
    optim, optim_args = getattr(chosen["optim"], "value", chosen["optim"]), chosen.get("optim_args")
    if optim != "sgd_sai":
        own = {} if optim in _WITHOUT_ADAM else {name: chosen[name] for name in ADAM}
        return {"optim": optim, "optim_args": optim_args, **own, **FIXED.get(optim, {})}
    defaults = {
        name: p.default
        for name, p in inspect.signature(SGDSaI).parameters.items()
        if p.default is not p.empty and name not in ("lr", "weight_decay")
    }
    hyper = {name: str(value) for name, value in (defaults | parse_optim_args(optim_args)).items()}
    rule = {name: getattr(calibration, name) for name in ("WINDOW", "INTERVAL", "LIMIT", "TOKEN_LIMIT")}
    return {"optim": optim, **hyper, **(rule if hyper["scaling"] == "adamw" else {})}


def multiplies_bf16() -> bool:
    """Whether the CPU has instructions for bfloat16; without them it is several times slower than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def cpu_words() -> list[str]:
    """The options with which a parser of transformers' arguments computes on the CPU, where there is no accelerator."""
    if torch.accelerator.is_available():
        return []
    return ["--use_cpu", "true", *([] if multiplies_bf16() else ["--bf16", "false"])]


def _or_user_error(function: Callable[..., Any], *values: Any) -> Any:
    try:
        return function(*values)
    except ValueError as error:
        raise UserError(str(error)) from error


@dataclass
class RecipeArguments(TrainingArguments):
    """`TrainingArguments` whose `optim` also takes the optimizers of `OWN_OPTIMIZERS`."""

    optim: str = field(
        default="sgd_sai",
        metadata={"help": f"One of {', '.join(OWN_OPTIMIZERS)}, or any optimizer of transformers' Trainer."},
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036 (HfArgumentParser takes the second as the type)
        default="none", metadata={"help": "Trackers to log to (wandb, tensorboard, ...), or none."}
    )
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": RESUME_HELP})
    overwrite_output_dir: bool = field(default=False, metadata={"help": OVERWRITE_HELP})

    def __post_init__(self) -> None:
        optim = check_optimizer_name(self.optim)
        if optim == "sgd_sai":
            self.optim_args = _or_user_error(normalize_optim_args, self.optim_args)
        # The parent accepts its own names only; the recipes hand the optimizer to the Trainer themselves.
        self.optim = optim if isinstance(optim, OptimizerNames) else OptimizerNames.ADAMW_TORCH
        # Without this transformers refuses bf16 where there is no accelerator, though a CPU computes it.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 and not self.fp16 and self.use_cpu and not multiplies_bf16():
            logger.info("bf16: this CPU has no bfloat16 instructions; it computes in float32, which is faster")
            self.bf16 = False
        super().__post_init__()
        self.optim = optim


@dataclass
class OptimizerArguments:
    """The optimizer's part of the configuration, for recipes with their own training loop."""

    optim: str = field(
        default="sgd_sai",
        metadata={"help": f"One of {', '.join(OWN_OPTIMIZERS)}, or any optimizer of transformers' Trainer."},
    )
    optim_args: str | None = field(default=None, metadata={"help": "Comma-separated key=value pairs."})
    learning_rate: float = field(
        default=3e-4, metadata={"help": "In AdamW's units, for sgd_sai too unless optim_args says scaling=raw."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Not applied to biases and norms."})
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        self.optim = check_optimizer_name(self.optim)
        if self.optim == "sgd_sai":
            self.optim_args = _or_user_error(normalize_optim_args, self.optim_args)


def _own_optim_args(cls: Callable[..., Any], text: str | None, extra: Iterable[str] = ()) -> dict[str, Any]:
    """`momentum=0.95,nesterov=true` as keyword arguments of `cls`, each a Python literal or a word."""
    # the learning rate and the weight decay are settings of their own
    valid = {*inspect.signature(cls).parameters, *extra} - {"params", "named_parameters", "model", "lr", "weight_decay"}
    parsed: dict[str, Any] = {}
    for pair in filter(None, (text or "").replace(" ", "").split(",")):
        key, separator, value = pair.partition("=")
        if not separator or key not in valid:
            raise UserError(f"optim_args: {pair!r} must be key=value with a key of {', '.join(sorted(valid))}")
        try:
            parsed[key] = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(value.lower(), value))
        except (ValueError, SyntaxError):
            parsed[key] = value
    return parsed


def _import(module: str, name: str, requirement: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"optim: this optimizer needs {requirement}: pip install '{requirement}'") from error


def _class_and_kwargs(args: Any, model: nn.Module) -> tuple[type[Optimizer], dict[str, Any]] | None:
    """Optimizers that are a class with keyword arguments; None for those that need the model."""
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optim == "sgd_sai":
        return _or_user_error(sgd_sai_from_args, args, model)
    if args.optim == "sgdm":
        return torch.optim.SGD, {
            "lr": args.learning_rate,
            **FIXED["sgdm"],
            **_own_optim_args(torch.optim.SGD, args.optim_args),
        }
    if args.optim == "sgd_sai_authors":
        cls = _import("sgd_sai", "SGD_sai", "sgd-sai==1.0.3")
        return cls, {"lr": args.learning_rate, **_own_optim_args(cls, args.optim_args)}
    if args.optim == "prodigy":
        cls = _import("prodigyopt", "Prodigy", "prodigyopt")
        return cls, {"lr": args.learning_rate, **adam, **_own_optim_args(cls, args.optim_args)}
    return None


def _from_model(model: nn.Module, args: Any) -> Optimizer:
    """Optimizers that need the model: adam_mini, muon, partitioned, scaled_adamw, scaled_sgd."""
    if args.optim == "partitioned":
        given = FIXED["partitioned"] | _own_optim_args(Partitioned, args.optim_args, extra=())
        return Partitioned(model, args.learning_rate, args.weight_decay, **given)
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optim == "muon":
        return _muon(model, args, adam)
    if args.optim == "adam_mini":
        adam_mini = _import("adam_mini", "Adam_mini", "adam-mini")
        config = getattr(model, "config", None)
        heads = {
            "dim": getattr(config, "hidden_size", None),
            "n_heads": getattr(config, "num_attention_heads", None),
            "n_kv_heads": getattr(config, "num_key_value_heads", None),
        }
        return adam_mini(
            [(_adam_mini_name(name, p), p) for name, p in model.named_parameters() if p.requires_grad],
            lr=args.learning_rate,
            weight_decay=args.weight_decay,
            verbose=False,
            **{key: value for key, value in heads.items() if value is not None},
            **{**adam, **_own_optim_args(adam_mini, args.optim_args)},
        )
    create_riemannian_optimizer = _import("peft.optimizers", "create_riemannian_optimizer", "peft>=0.21")
    cls = torch.optim.AdamW if args.optim == "scaled_adamw" else torch.optim.SGD
    kwargs = adam if args.optim == "scaled_adamw" else {}
    return create_riemannian_optimizer(
        model,
        cls,
        lr=args.learning_rate,
        **{"weight_decay": args.weight_decay, **kwargs, **_own_optim_args(cls, args.optim_args, extra=("reg",))},
    )


_QUERY_OR_KEY = re.compile(r"[qk]_proj|w[qk]|query|key")


def _adam_mini_name(name: str, parameter: nn.Parameter) -> str:
    """The name that Adam-mini is given, from which it chooses a parameter's blocks.

    It takes whatever is called an embedding for a matrix with a row for each token, and fails on a ViT's class token,
    positions and patch filters, and on a norm among a ResNet's embeddings. All that is no matrix gets the rule it has
    for the rest, one rate for the tensor, by a name that holds none of its words; a bias stays one, and what is a
    vector is called a norm, so that it does not decay. It cuts queries and keys into heads, which fails on LoRA's
    matrices: they get one rate for the tensor, too.
    """
    if parameter.ndim == 2 and not ("lora_" in name and _QUERY_OR_KEY.search(name)):
        return name
    return "bias" if "bias" in name else "norm" if parameter.ndim < 2 else "block"


class Together(Optimizer):
    """Several optimizers of one model as one: its param groups are theirs, so that a scheduler reaches all of them."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})
        self.param_groups = [group for part in parts for group in part.param_groups]

    @property
    def state(self) -> Any:
        return {p: entry for part in self.parts for p, entry in part.state.items()}

    @state.setter
    def state(self, value: Any) -> None:
        """Each part holds its own; the base class sets an empty one."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, saved in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(saved)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def _muon(model: nn.Module, args: Any, adam: dict[str, Any]) -> Optimizer:
    """Muon for the matrices of hidden layers, AdamW for embeddings, the head and vectors, as Muon's authors advise.

    Muon's update is scaled to AdamW's root mean square, so that both take one learning rate.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if head is not None:
        embeddings.add(id(head.weight))
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() == 2 and id(p) not in embeddings]
    others = [p for p in trained if p.dim() != 2 or id(p) in embeddings]
    shared = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    own = _own_optim_args(torch.optim.Muon, args.optim_args)
    parts: list[Optimizer] = [torch.optim.Muon(matrices, **FIXED["muon"], **shared, **own)] if matrices else []
    if others:
        spared: dict[str, Any] = {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0}
        groups: list[dict[str, Any]] = [{"params": [p for p in others if p.dim() >= 2]}, spared]
        parts.append(torch.optim.AdamW([group for group in groups if group["params"]], **shared, **adam))
    return Together(*parts)


def trainer_optimizer(model: nn.Module, args: Any) -> dict[str, Any]:
    """The keyword arguments that make a stock `Trainer` use `args.optim`: `Trainer(model, args, **this)`.

    Empty for the Trainer's own optimizers; `optimizer_cls_and_kwargs` for a class, which also works when the Trainer
    shards the model first; `optimizers` for those built from the model.
    """
    if isinstance(args.optim, OptimizerNames):
        return {}
    by_class = _class_and_kwargs(args, model)
    return {"optimizer_cls_and_kwargs": by_class} if by_class else {"optimizers": (_from_model(model, args), None)}


def build_optimizer(model: nn.Module, args: Any) -> Optimizer:
    """The optimizer `args.optim` for a bare loop, with the Trainer's two groups (no decay on biases and norms)."""
    if isinstance(args.optim, OptimizerNames):
        by_class: Any = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
    else:
        by_class = _class_and_kwargs(args, model)
    if by_class is None:
        return _from_model(model, args)
    cls, kwargs = by_class
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if name in decayed], "weight_decay": args.weight_decay},
        {"params": [p for name, p in trainable if name not in decayed], "weight_decay": 0.0},
    ]
    return cls([group for group in groups if group["params"]], **kwargs)
