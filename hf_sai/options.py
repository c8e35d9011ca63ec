"""The hyper-parameters of a param group: their valid values, and the values that are passed to a kernel."""

import math
import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Scalar = float | Tensor

# "adamw" is ours and uses AdamW's units. The others are the paper's and use the paper's units.
SCALINGS = ("adamw", "raw", "max")
MOMENTUM_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}

# Options of earlier versions, and their replacements.
_GONE = {
    "momentum_init": "remove it: momentum starts without a bias under scaling='adamw', and otherwise as in the paper",
    "clip_threshold": "remove it: scaling='adamw' bounds every element of an update",
}
_GONE_SCALINGS = {"floor": "'adamw'"}


class Hyper(NamedTuple):
    """The hyper-parameters of an update.

    Attributes:
        lr: learning rate, a float or a one-element tensor.
        weight: the weight of the new gradient in the momentum, in (0, 1].
        weight_decay: decoupled, in units of 1 / lr.
        limit: the largest magnitude of an element of the scaled gradient, or None for no limit.
        maximize: maximize instead of minimize.
        stochastic_rounding: round all bfloat16 values stochastically.
    """

    lr: Scalar
    weight: float
    weight_decay: float
    limit: float | None
    maximize: bool
    stochastic_rounding: bool


def check_model(model: Any) -> None:
    """Raise ValueError if ``model`` is not a ``torch.nn.Module``."""
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def momentum_dtype(param: Tensor, choice: torch.dtype | str | None) -> torch.dtype:
    """The dtype of a parameter's momentum buffer: ``choice``, or the parameter's own dtype if that is None."""
    if choice is None:
        return param.dtype
    return MOMENTUM_DTYPES[choice] if isinstance(choice, str) else choice


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError for the first hyper-parameter of a param group that is out of range."""
    for name, instead in _GONE.items():
        if name in group:
            raise ValueError(f"{name} no longer exists; {instead}")
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr as a tensor must have one element, got shape {tuple(lr.shape)}")
    check_number("lr", lr)
    check_number("momentum", group["momentum"], below=1.0)
    check_number("eps", group["eps"])
    check_number("weight_decay", group["weight_decay"])
    scaling = group["scaling"]
    if scaling not in SCALINGS:
        word = _GONE_SCALINGS.get(str(scaling))
        successor = f"; {scaling!r} is now {word}" if word else ""
        raise ValueError(f"scaling must be one of {', '.join(map(repr, SCALINGS))}, got {scaling!r}{successor}")
    for name in ("maximize", "stochastic_rounding", "token_rows"):
        if not isinstance(group[name], bool):
            raise ValueError(f"{name} must be True or False, got {group[name]!r}")
    for name in ("foreach", "fused"):
        if group[name] not in (None, True, False):
            raise ValueError(f"{name} must be True, False or None (chosen by the device), got {group[name]!r}")
    if group["foreach"] and group["fused"]:
        raise ValueError("foreach and fused cannot both be True; leave one of them None")
    choice = group["momentum_dtype"]
    if choice not in (None, *MOMENTUM_DTYPES, *MOMENTUM_DTYPES.values()):
        raise ValueError(f"momentum_dtype must be None or one of {', '.join(MOMENTUM_DTYPES)}, got {choice!r}")


def check_number(name: str, value: Any, *, below: float = math.inf) -> None:
    """Raise ValueError if the value is out of range or not a number.

    Python and numpy numbers, one-element tensors and 0-dim arrays are numbers. Booleans are not.
    """
    rule = f"in [0, {below:g})" if below < math.inf else "a finite number >= 0"
    elements = value.numel() if isinstance(value, Tensor) else 1 if getattr(value, "ndim", None) == 0 else 0
    number = value.item() if elements == 1 else value
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise ValueError(f"{name} must be {rule}, got {value!r}")
    if not 0.0 <= float(number) < below:
        raise ValueError(f"{name} must be {rule}, got {float(number)!r}")
