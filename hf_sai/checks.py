"""What SGDSaI refuses, each with the name, the value, the rule and the remedy. Checks change nothing."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_sai.gsnr import to_local
from hf_sai.momentum import scale_count

SCALINGS = ("raw", "max", "adamw", "floor")
ADAMW_UNITS = ("adamw", "floor")  # of lr and weight_decay; the others speak the paper's
MOMENTUM_INITS = ("gradient", "zero")
STATE = ("momentum_buffer", "momentum_scale", "gsnr", "scale", "rounding_step")
MOMENTUM_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def momentum_dtype(param: Tensor, choice: torch.dtype | str | None) -> torch.dtype:
    """The dtype of a parameter's momentum buffer: the chosen one, else the parameter's own."""
    if choice is None:
        return param.dtype
    return MOMENTUM_DTYPES[choice] if isinstance(choice, str) else choice


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError for the first hyper-parameter of a param group that is out of range."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr as a tensor must have one element, got shape {tuple(lr.shape)}")
    _check_number("lr", lr, low=0.0)
    _check_number("momentum", group["momentum"], low=0.0, below=1.0)
    _check_number("eps", group["eps"], low=0.0)
    _check_number("weight_decay", group["weight_decay"], low=0.0)
    if group["scaling"] not in SCALINGS:
        raise ValueError(f"scaling must be one of {', '.join(map(repr, SCALINGS))}, got {group['scaling']!r}")
    if group["momentum_init"] not in MOMENTUM_INITS:
        valid = ", ".join(map(repr, MOMENTUM_INITS))
        raise ValueError(f"momentum_init must be one of {valid}, got {group['momentum_init']!r}")
    if (threshold := group["clip_threshold"]) is not None:
        _check_number("clip_threshold", threshold, low=0.0)
        if not threshold:
            raise ValueError("clip_threshold must be above 0, or None for no clipping, got 0")
        if group["scaling"] not in ADAMW_UNITS:
            raise ValueError(
                f"clip_threshold is in units of AdamW's update, which scaling={group['scaling']!r} does not know; "
                f"use scaling={' or '.join(map(repr, ADAMW_UNITS))}, or leave clip_threshold out"
            )
    for name in ("maximize", "stochastic_rounding"):
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


def _check_number(name: str, value: Any, *, low: float, below: float = math.inf) -> None:
    rule = f"in [{low:g}, {below:g})" if below < math.inf else f"a finite number >= {low:g}"
    is_number = isinstance(value, (int, float)) or (
        isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    )
    if isinstance(value, bool) or not is_number:
        raise ValueError(f"{name} must be {rule}, got {value!r}")
    if not low <= float(value) < below:
        raise ValueError(f"{name} must be {rule}, got {float(value)!r}")


def check_parameters(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a parameter that SGDSaI cannot train."""
    for i, p in enumerate(group["params"]):
        if not p.is_floating_point():
            raise ValueError(
                f"SGDSaI trains real floating-point parameters, {block_name(group, i)} is {p.dtype}; "
                "train the real view (torch.view_as_real) of a complex parameter"
            )
        check_whole(p, block_name(group, i))


# What to use where parameters are sharded in a way that hides the blocks.
INSTEAD = (
    "use FSDP2 (torch.distributed.fsdp.fully_shard, or fsdp_version: 2 in accelerate's config), or DeepSpeed with ZeRO "
    "stage 0, 1 or 2"
)


def check_whole(p: Tensor, name: str) -> None:
    """Raise ValueError for a parameter that FSDP1 has flattened or ZeRO 3 has partitioned."""
    if getattr(p, "_fsdp_flattened", False):
        raise ValueError(
            f"{name} is a flat parameter of FSDP1, whose g-SNR would be that of a mixture of blocks; {INSTEAD}"
        )
    if hasattr(p, "ds_id"):
        raise ValueError(f"{name} is partitioned by DeepSpeed ZeRO 3, which hides what a block is; {INSTEAD}")


def block_name(group: Mapping[str, Any], index: int) -> str:
    """The parameter's name where the optimizer was given names, else its place and shape."""
    if "param_names" in group:
        return str(group["param_names"][index])
    return f"parameter {index} of its group, of shape {tuple(group['params'][index].shape)},"


def check_state_dict(
    groups: list[dict[str, Any]], state_dict: Mapping[str, Any], block_counts: Mapping[Tensor, int]
) -> None:
    """Raise ValueError for a state dict that is none, or whose groups or entries do not fit the parameters.

    Args:
        block_counts: for a parameter that holds other than one block, how many.
    """
    saved_groups, saved_state = _check_structure(state_dict)
    sizes, saved_sizes = [len(g["params"]) for g in groups], [len(g["params"]) for g in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"the param groups of the state dict have {saved_sizes} parameters, those of the optimizer {sizes}: "
            "it belongs to another model, or to other groups"
        )
    for group, saved_group in zip(groups, saved_groups, strict=True):
        check_group({**group, **{k: v for k, v in saved_group.items() if k != "params"}})
        _check_names(group, saved_group)
        for i, (p, key) in enumerate(zip(group["params"], saved_group["params"], strict=True)):
            if key in saved_state:
                merged = {**group, **saved_group}
                has_int8 = bool(merged["momentum"]) and momentum_dtype(p, merged["momentum_dtype"]) == torch.int8
                name, count = block_name(group, i), block_counts.get(p, 1)
                _check_entry(saved_state[key], p, name, bool(merged["momentum"]), has_int8, count)


def _check_structure(state_dict: Mapping[str, Any]) -> tuple[list[Any], Mapping[Any, Any]]:
    groups, state = (state_dict.get(key) for key in ("param_groups", "state"))
    if not isinstance(groups, list) or not isinstance(state, Mapping):
        raise ValueError(
            "a state dict of SGDSaI has a dict 'state' and a list 'param_groups', "
            f"got the keys {', '.join(map(repr, state_dict)) or 'none'}"
        )
    for number, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
            raise ValueError(f"param group {number} of the state dict has no list 'params': {group!r:.80}")
    strangers = state.keys() - {key for group in groups for key in group["params"]}
    if strangers:
        raise ValueError(
            f"the state dict has state for parameter {min(strangers, key=str)!r}, which none of its param groups "
            "lists: it is damaged, or put together from two"
        )
    return groups, state


def _check_names(group: Mapping[str, Any], saved_group: Mapping[str, Any]) -> None:
    """Names may differ, as they do under a wrapper; the same names in another order would mix up the blocks."""
    names, saved_names = group.get("param_names"), saved_group.get("param_names")
    if names is None or saved_names is None:
        return
    if not isinstance(saved_names, list) or len(saved_names) != len(names):
        raise ValueError(f"param_names of the state dict must be a list of {len(names)} names, got {saved_names!r:.80}")
    differing = [(name, saved) for name, saved in zip(names, saved_names, strict=True) if name != saved]
    if differing and set(names) == set(map(str, saved_names)):
        raise ValueError(
            f"the state dict has {differing[0][1]!r} where the optimizer has {differing[0][0]!r}: "
            "build the optimizer with the parameters in the order in which they were saved"
        )


def _check_entry(entry: Any, p: Tensor, name: str, has_momentum: bool, has_int8: bool, count: int) -> None:
    if not isinstance(entry, Mapping):
        raise ValueError(f"the state of {name} must be a dict, the state dict has {entry!r:.80}")
    for key in ("gsnr", "scale"):
        value = entry.get(key)
        if not isinstance(value, Tensor) or value.numel() != count or value.is_complex():
            raise ValueError(f"the state of {name} has no number {key!r}: this is not a state dict of SGDSaI")
    for gsnr, scale in zip(entry["gsnr"].flatten().tolist(), entry["scale"].flatten().tolist(), strict=True):
        # Both can be negative while a block waits for its first gradient: see calibration.wait.
        if not (math.isfinite(gsnr) and gsnr >= (0 if scale > 0 else -1)):
            raise ValueError(f"gsnr of {name} must be finite and >= 0, the state dict has {gsnr}")
        if not math.isfinite(scale):
            raise ValueError(f"scale of {name} must be finite, the state dict has {scale}")
    for key, value in entry.items():
        if key not in STATE:
            raise ValueError(f"the state of {name} has an entry {key!r}; that of SGDSaI has only {', '.join(STATE)}")
        if not isinstance(value, Tensor) or value.is_complex():
            raise ValueError(f"{key} of {name} must be a real tensor, the state dict has {value!r:.80}")
        if value.is_floating_point() and not value.is_meta and not to_local(value).isfinite().all():
            raise ValueError(
                f"{key} of {name} has NaN or infinite elements in the state dict: the run that saved it had diverged; "
                "load an earlier checkpoint"
            )
    buffer: Any = entry.get("momentum_buffer")
    if has_momentum and buffer is None:
        raise ValueError(f"the state of {name} has no momentum_buffer although momentum is not 0")
    if buffer is not None and buffer.shape != p.shape:
        raise ValueError(
            f"momentum_buffer of {name} must have the parameter's shape {tuple(p.shape)}, "
            f"the state dict has {tuple(buffer.shape)}: it belongs to another model"
        )
    if has_momentum and buffer is not None and (buffer.dtype == torch.int8) != has_int8:
        raise ValueError(
            f"momentum_buffer of {name} must be {'int8' if has_int8 else 'floating-point'}, as momentum_dtype "
            f"of its group says, the state dict has {buffer.dtype}"
        )
    momentum_scales = entry.get("momentum_scale")
    if has_int8 and (momentum_scales is None or momentum_scales.shape != (scale_count(p.numel()),)):
        raise ValueError(
            f"momentum_scale of {name} must have one number for every 128 elements, {scale_count(p.numel())}, "
            f"the state dict has {None if momentum_scales is None else tuple(momentum_scales.shape)}"
        )
