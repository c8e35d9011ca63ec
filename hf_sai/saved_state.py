"""Checks of the optimizer state that a resumed run loads: whether it is another optimizer's or has other settings."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from hf_sai.optimizer import SGDSaI

# What transformers calls them in `optim`.
_OPTIM_NAMES = {
    "SGDSaI": "sgd_sai",
    "SGD": "sgd",
    "AdamW": "adamw_torch",
    "Adafactor": "adafactor",
    "Adagrad": "adagrad",
    "RMSprop": "rmsprop",
}


def compare_when_loading(optimizer: Optimizer) -> None:
    """Look at each state dict before the optimizer loads it.

    A run that resumes keeps the settings of its checkpoint. The optimizer then warns of those that its arguments have
    changed. Between SGDSaI and other optimizers state is refused.
    """
    optimizer.register_load_state_dict_pre_hook(_compare)


def optimizer_of(group: Mapping[str, Any]) -> str:
    """The optimizer that a saved param group is of: its name, or its settings where none of torch has these."""
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
        return  # SGDSaI itself says what is wrong
    for saved in saved_groups:
        if isinstance(optimizer, SGDSaI) != ("scaling" in saved):
            name = optimizer_of(saved)
            remedy = f"optim={_OPTIM_NAMES[name]!r}" if name in _OPTIM_NAMES else "the optimizer that saved it"
            raise ValueError(
                f"the optimizer state in the checkpoint is that of {name}, not of {type(optimizer).__name__}; resume "
                f"with {remedy}, or start from the checkpoint's weights: load them with from_pretrained, without "
                "resume_from_checkpoint"
            )
    changed: dict[str, str] = {}
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=False):
        for key in (name for name in optimizer.defaults if name != "step"):
            # What a scheduler has made of the learning rate is no setting.
            place = "initial_lr" if key == "lr" else key
            if place in group and place in saved and _plain(group[place]) != _plain(saved[place]):
                changed.setdefault(key, f"{key} {saved[place]} ({group[place]} in this run's arguments)")
    if changed:
        warnings.warn(
            "the resumed run keeps the optimizer settings of its checkpoint, which differ: "
            f"{', '.join(changed.values())}. To train with new ones, start from the checkpoint's weights without "
            "resume_from_checkpoint",
            stacklevel=3,
        )


def _plain(setting: Any) -> Any:
    return str(setting).removeprefix("torch.") if isinstance(setting, torch.dtype) else setting
