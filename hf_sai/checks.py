"""Checks of parameters and state dicts. Each error names the entry, the value, the rule and the remedy."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_sai.momentum import scale_count
from hf_sai.options import check_group, momentum_dtype
from hf_sai.shards import to_local
from hf_sai.state import STATE, scale_shapes


def check_parameters(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a parameter that SGDSaI cannot train."""
    for i, p in enumerate(group["params"]):
        if not p.is_floating_point():
            raise ValueError(
                f"SGDSaI trains real floating-point parameters, but {block_name(group, i)} is {p.dtype}; "
                "train the real view (torch.view_as_real) of a complex parameter"
            )
        check_whole(p, block_name(group, i))


# The alternative to sharding that hides the blocks.
INSTEAD = (
    "use FSDP2 (torch.distributed.fsdp.fully_shard, or fsdp_version: 2 in accelerate's config), or DeepSpeed with ZeRO "
    "stage 0, 1 or 2"
)


def check_whole(p: Tensor, name: str) -> None:
    """Raise ValueError for a parameter that FSDP1 flattened or ZeRO 3 partitioned."""
    if getattr(p, "_fsdp_flattened", False):
        raise ValueError(
            f"{name} is a flat parameter of FSDP1, and its g-SNR would be that of a mixture of blocks; {INSTEAD}"
        )
    if hasattr(p, "ds_id"):
        raise ValueError(f"{name} is partitioned by DeepSpeed ZeRO 3, which hides the blocks; {INSTEAD}")


def check_whole_model(group: Mapping[str, Any]) -> None:
    """Raise ValueError for ``scaling="max"`` if this process holds only some of the parameters.

    The call stack is the only trace of ZeroRedundancyOptimizer on the optimizers that it creates.
    """
    frame = sys._getframe(1) if group["scaling"] == "max" else None
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.optim.zero_redundancy_optimizer":
            raise ValueError(
                "scaling='max' compares all blocks of the model, but ZeroRedundancyOptimizer gives each process only "
                "some of them; use scaling='adamw' or 'raw'"
            )
        frame = frame.f_back


def block_name(group: Mapping[str, Any], index: int) -> str:
    """The parameter's name if the optimizer has names, else its index and shape."""
    names = group.get("param_names", ())
    if index < len(names):
        return str(names[index])
    return f"parameter {index} of its group (shape {tuple(group['params'][index].shape)})"


def check_state_dict(
    groups: list[dict[str, Any]], state_dict: Mapping[str, Any], partitions: Mapping[Tensor, list[torch.Size]]
) -> None:
    """Raise ValueError if this is not a state dict, or if its groups or entries do not fit the parameters.

    Args:
        groups: the param groups of the optimizer.
        state_dict: the state dict to load.
        partitions: for each flat DeepSpeed partition, the shapes of the blocks in it.
    """
    saved_groups, saved_state = _check_structure(state_dict)
    sizes, saved_sizes = [len(g["params"]) for g in groups], [len(g["params"]) for g in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"the param groups of the state dict have {saved_sizes} parameters, those of the optimizer {sizes}: "
            "the state dict belongs to another model, or to other groups"
        )
    for group, saved_group in zip(groups, saved_groups, strict=True):
        merged = {**group, **{k: v for k, v in saved_group.items() if k != "params"}}
        check_group(merged)
        _check_names(group, saved_group)
        for i, (p, key) in enumerate(zip(group["params"], saved_group["params"], strict=True)):
            if key in saved_state:
                _check_entry(saved_state[key], p, block_name(group, i), merged, partitions.get(p))


def _check_structure(state_dict: Mapping[str, Any]) -> tuple[list[Any], Mapping[Any, Any]]:
    groups, state = (state_dict.get(key) for key in ("param_groups", "state"))
    if not isinstance(groups, list) or not isinstance(state, Mapping):
        raise ValueError(
            "a state dict of SGDSaI must have a dict 'state' and a list 'param_groups', "
            f"got the keys {', '.join(map(repr, state_dict)) or 'none'}"
        )
    for number, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
            raise ValueError(f"param group {number} of the state dict has no list 'params': {group!r:.80}")
        if group["params"] and "scaling" not in group:
            raise ValueError(f"param group {number} of the state dict has no 'scaling': it is not from SGDSaI")
    unlisted = state.keys() - {key for group in groups for key in group["params"]}
    if unlisted:
        raise ValueError(
            f"the state dict has state for parameter {min(unlisted, key=str)!r}, but none of its param groups "
            "lists that parameter: the state dict is damaged, or merged from two"
        )
    return groups, state


def _check_names(group: Mapping[str, Any], saved_group: Mapping[str, Any]) -> None:
    """Raise ValueError for the same names in another order, which would mix up the blocks.

    The names themselves may differ, for example under a wrapper.
    """
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


def _check_entry(entry: Any, p: Tensor, name: str, group: Mapping[str, Any], blocks: list[torch.Size] | None) -> None:
    """Check the entries of SGDSaI. Other entries belong to other code, such as an optimizer that wraps this one."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"the state of {name} must be a dict, but the state dict has {entry!r:.80}")
    own = {key: value for key, value in entry.items() if key in STATE}
    if not own:
        return
    number = () if blocks is None else (len(blocks),)
    scales = scale_shapes(p.shape, group, blocks)
    shapes: dict[str, tuple[int, ...]] = {
        "gsnr": number,
        "calibration_step": number,
        **{key: tuple(shape) for key, shape in scales.items()},
        "momentum_buffer": tuple(p.shape),
        "momentum_scale": (scale_count(p.numel()),),
        "rounding_step": (),
    }
    missing = [key for key in ("gsnr", *scales, "calibration_step") if key not in own]
    if missing:
        raise ValueError(f"the state of {name} has no {missing[0]!r}: it is not from this version of SGDSaI")
    for key, value in own.items():
        if not isinstance(value, Tensor) or value.is_complex():
            raise ValueError(f"{key} of {name} must be a real tensor, but the state dict has {value!r:.80}")
        if tuple(value.shape) != shapes.get(key):
            raise ValueError(
                f"{key} of {name} must have the shape {shapes.get(key)}, but the state dict has {tuple(value.shape)}: "
                "it belongs to another model, or to other options"
            )
        if value.is_meta:
            continue
        local = to_local(value)
        if value.is_floating_point() and not local.isfinite().all():
            raise ValueError(
                f"{key} of {name} has NaN or infinite elements in the state dict: the saved run had diverged; "
                "load an earlier checkpoint"
            )
        if key in ("gsnr", *scales, "calibration_step") and (local < 0).any():
            raise ValueError(f"{key} of {name} must not be negative, but the state dict has {local.min().item()}")
    buffer, has_int8 = own.get("momentum_buffer"), momentum_dtype(p, group["momentum_dtype"]) == torch.int8
    if buffer is None or not float(group["momentum"]):
        return
    if (buffer.dtype == torch.int8) != has_int8:
        raise ValueError(
            f"momentum_buffer of {name} must be {'int8' if has_int8 else 'floating-point'} to match momentum_dtype "
            f"of its group, but the state dict has {buffer.dtype}"
        )
    if has_int8 and "momentum_scale" not in own:
        raise ValueError(f"the state of {name} has no 'momentum_scale', but int8 momentum needs it")
