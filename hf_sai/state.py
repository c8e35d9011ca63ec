"""What SGDSaI keeps of a parameter: allocated when it first has a gradient, loaded without a change of dtype.

``momentum_buffer`` (absent when momentum is 0), ``gsnr`` and ``scale`` (0-dim float32; until calibrated, ``gsnr`` is 0
and ``scale`` not positive); with int8 momentum ``momentum_scale`` (one dimension, float32); where something is rounded
stochastically ``rounding_step`` (0-dim int64). Nothing else decides the trajectory.
"""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from hf_sai.checks import block_name, momentum_dtype
from hf_sai.gsnr import is_dtensor
from hf_sai.momentum import scale_count

# The entries that keep their dtype whatever the parameter's is.
_DTYPES = {
    "gsnr": torch.float32,
    "scale": torch.float32,
    "momentum_scale": torch.float32,
    "rounding_step": torch.int64,
}


def allocate(
    state: MutableMapping[str, Tensor], p: Tensor, group: dict[str, Any], blocks: tuple[int, ...] = ()
) -> None:
    """Add to a parameter's state what its group asks for and it does not have yet, all of it zero.

    Args:
        blocks: the shape of ``gsnr`` and ``scale``; ``(n,)`` for a partition of DeepSpeed's with n blocks.

    Raises:
        ValueError: for int8 momentum of a sharded parameter.
    """
    stored = {p.dtype}
    if group["momentum"]:
        dtype = momentum_dtype(p, group["momentum_dtype"])
        stored.add(dtype)
        if dtype == torch.int8 and is_dtensor(p):
            index = next(i for i, q in enumerate(group["params"]) if q is p)
            raise ValueError(
                f"momentum_dtype='int8' is not for sharded parameters, {block_name(group, index)} is a DTensor: "
                "elements that share a scale may lie on two processes; use 'bfloat16'"
            )
        if "momentum_buffer" not in state:
            # The codes of int8 are in row-major order, whatever the parameter's memory format is.
            layout = torch.contiguous_format if dtype == torch.int8 else torch.preserve_format
            state["momentum_buffer"] = torch.zeros_like(p, dtype=dtype, memory_format=layout)
        if dtype == torch.int8 and "momentum_scale" not in state:
            state["momentum_scale"] = torch.zeros(scale_count(p.numel()), dtype=torch.float32, device=p.device)
    for key in ("gsnr", "scale"):
        if key not in state:
            state[key] = torch.zeros(blocks, dtype=torch.float32, device=p.device)
    stochastic = torch.int8 in stored or (group["stochastic_rounding"] and torch.bfloat16 in stored)
    if stochastic and "rounding_step" not in state:
        state["rounding_step"] = torch.zeros((), dtype=torch.int64, device=p.device)


def restore(state: MutableMapping[str, Tensor], saved: dict[str, Any], p: Tensor, group: dict[str, Any]) -> None:
    """Overwrite a parameter's state with copies of the saved tensors: torch has cast them to the parameter's dtype."""
    dtypes = {**_DTYPES, "momentum_buffer": momentum_dtype(p, group["momentum_dtype"])}
    for name in saved.keys() & dtypes.keys():
        state[name] = saved[name].to(p.device, dtypes[name], copy=True)


def shard_number(p: Tensor) -> int:
    """Which of a parameter's shards this process holds; 0 for a parameter that is not sharded."""
    number = 0
    if is_dtensor(p):
        mesh: Any = p.device_mesh  # type: ignore[attr-defined]
        for dim, placement in enumerate(p.placements):  # type: ignore[attr-defined]
            if not placement.is_replicate():
                number = number * mesh.size(dim) + mesh.get_local_rank(dim)
    return number
