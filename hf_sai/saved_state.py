"""Checks whether the optimizer state that a resumed run loads is from another optimizer or has other settings."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from hf_sai.optimizer import SGDSaI

# The names of optimizers in transformers' `optim`.
_OPTIM_NAMES = {
    "SGDSaI": "sgd_sai",
    "SGD": "sgd",
    "AdamW": "adamw_torch",
    "Adafactor": "adafactor",
    "Adagrad": "adagrad",
    "RMSprop": "rmsprop",
}


def compare_when_loading(optimizer: Optimizer) -> None:
    """Check each state dict before the optimizer loads it.

    A resumed run keeps the settings of its checkpoint. If its arguments have other settings, it warns. SGDSaI and other
    optimizers refuse each other's state.
    """
    optimizer.register_load_state_dict_pre_hook(_compare)


def optimizer_of(group: Mapping[str, Any]) -> str:
    """The name of the optimizer that saved a param group, or its settings if no optimizer of torch has these."""
    if "scaling" in group:
        return SGDSaI.__name__
    keys = group.keys() - {"params", "param_names", "initial_lr"}
    for name in sorted(set(torch.optim.__all__)):
        cls = getattr(torch.optim, name)
        if name != "Optimizer" and isinstance(cls, type) and issubclass(cls, Optimizer):
            own = _default_group(cls)
            if own.keys() == keys and own.get("decoupled_weight_decay") == group.get("decoupled_weight_decay"):
                return name
    if "scale_parameter" in keys:
        return "Adafactor"  # transformers'
    return f"an optimizer with the settings {', '.join(sorted(keys)) or 'none'}"


def _default_group(cls: Any) -> dict[str, Any]:
    group = cls([torch.zeros(1, 1, device="cpu", requires_grad=True)]).param_groups[0]
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _compare(optimizer: Optimizer, state_dict: Any) -> None:
    saved_groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    if not isinstance(saved_groups, list) or not all(isinstance(group, Mapping) for group in saved_groups):
        return  # SGDSaI itself raises the error
    for saved in saved_groups:
        if isinstance(optimizer, SGDSaI) != ("scaling" in saved):
            name = optimizer_of(saved)
            remedy = f"optim={_OPTIM_NAMES[name]!r}" if name in _OPTIM_NAMES else "the optimizer that saved it"
            raise ValueError(
                f"the optimizer state in the checkpoint is from {name}, not from {type(optimizer).__name__}; resume "
                f"with {remedy}, or start from the checkpoint's weights: load them with from_pretrained, without "
                "resume_from_checkpoint"
            )
    changed: dict[str, str] = {}
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=False):
        for key in (name for name in optimizer.defaults if name != "step"):
            # A learning rate that a scheduler has changed is not a setting.
            name = "initial_lr" if key == "lr" else key
            if name in group and name in saved and _plain(group[name]) != _plain(saved[name]):
                changed.setdefault(key, f"{key} {saved[name]} ({group[name]} in this run's arguments)")
    if changed:
        warnings.warn(
            "the resumed run keeps the optimizer settings of its checkpoint, which differ from its arguments: "
            f"{', '.join(changed.values())}. To train with new settings, start from the checkpoint's weights without "
            "resume_from_checkpoint",
            stacklevel=3,
        )


def _plain(setting: Any) -> Any:
    return str(setting).removeprefix("torch.") if isinstance(setting, torch.dtype) else setting
