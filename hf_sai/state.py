"""The state that SGDSaI keeps for each parameter: its entries, allocation and restoring.

- ``momentum_buffer``: the parameter's shape; absent if momentum is 0.
- ``gsnr``: 0-dim float32; 0 until the block is calibrated.
- ``scale``: float32, the block's shape with the dimensions of a channel reduced to 1 (see :mod:`hf_sai.channels`).
- ``column_scale``: float32, (1, columns); for matrices only.
- ``calibration_step``: 0-dim int64 on the CPU; the capped number of usable gradients in the scale.
- ``momentum_scale``: one dimension, float32; for int8 momentum only.
- ``rounding_step``: 0-dim int64; the number of updates so far; for stochastic rounding only.

For a flat DeepSpeed partition, ``gsnr`` and ``calibration_step`` have one number for each block in the partition.
``scale`` and ``column_scale`` are the concatenated scales of all blocks. Besides these entries, only the groups'
options and ``step`` affect training.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_sai.channels import channels, column_channels
from hf_sai.momentum import scale_count
from hf_sai.options import momentum_dtype
from hf_sai.shards import is_dtensor, sharded_like, to_local

# These entries have a fixed dtype that does not depend on the parameter's.
DTYPES = {
    "gsnr": torch.float32,
    "scale": torch.float32,
    "column_scale": torch.float32,
    "calibration_step": torch.int64,
    "momentum_scale": torch.float32,
    "rounding_step": torch.int64,
}
STATE = ("momentum_buffer", *DTYPES)


def allocate(
    state: MutableMapping[str, Any],
    p: Tensor,
    group: dict[str, Any],
    name: str,
    blocks: Sequence[torch.Size] | None = None,
) -> None:
    """Add the entries that the group requires and the parameter's state lacks. They are zeros.

    Args:
        state: the state of the parameter. Existing entries are kept.
        p: the parameter.
        group: its param group.
        name: the name of the parameter, for messages.
        blocks: the shapes of the blocks in a DeepSpeed partition.

    Raises:
        ValueError: for int8 momentum of a sharded parameter. Nothing is allocated then.
    """
    dtype = momentum_dtype(p, group["momentum_dtype"]) if float(group["momentum"]) else p.dtype
    if dtype == torch.int8 and is_dtensor(p):
        raise ValueError(
            f"momentum_dtype='int8' does not support sharded parameters, but {name} is a DTensor. Elements that share "
            "a scale may be on two processes; use 'bfloat16'"
        )
    if not float(group["momentum"]):
        state.pop("momentum_buffer", None)
        state.pop("momentum_scale", None)
    elif "momentum_buffer" not in state:
        # int8 codes are always in row-major order, for any memory format of the parameter.
        layout = torch.contiguous_format if dtype == torch.int8 else torch.preserve_format
        state["momentum_buffer"] = torch.zeros_like(p, dtype=dtype, memory_format=layout, requires_grad=False)
    if dtype == torch.int8 and "momentum_scale" not in state:
        state["momentum_scale"] = torch.zeros(scale_count(p.numel()), dtype=torch.float32, device=p.device)
    number = () if blocks is None else (len(blocks),)
    if "gsnr" not in state:
        state["gsnr"] = torch.zeros(number, dtype=torch.float32, device=p.device)
    for key, size in scale_shapes(p.shape, group, blocks).items():
        if key not in state:
            state[key] = _zero_scales(p, size, blocks is not None)
    if "calibration_step" not in state:
        state["calibration_step"] = torch.zeros(number, dtype=torch.int64, device="cpu")
    stochastic = dtype == torch.int8 or (group["stochastic_rounding"] and torch.bfloat16 in (p.dtype, dtype))
    if stochastic and "rounding_step" not in state:
        state["rounding_step"] = torch.zeros((), dtype=torch.int64, device=p.device)


def scale_shapes(
    shape: torch.Size, group: Mapping[str, Any], blocks: Sequence[torch.Size] | None = None
) -> dict[str, torch.Size]:
    """The shapes of ``scale`` and, for a matrix, ``column_scale``.

    Args:
        shape: the shape of the parameter.
        group: its param group.
        blocks: the shapes of the blocks in a DeepSpeed partition.
    """
    scaling = group["scaling"]
    if blocks is None:
        columns = column_channels(shape, scaling)
        shapes = {"scale": channels(shape, scaling).shape}
        return shapes if columns is None else {**shapes, "column_scale": columns.shape}
    shapes = {"scale": torch.Size([sum(channels(b, scaling).shape.numel() for b in blocks)])}
    counts = [columns.shape.numel() for b in blocks if (columns := column_channels(b, scaling)) is not None]
    return {**shapes, "column_scale": torch.Size([sum(counts)])} if counts else shapes


def _zero_scales(p: Tensor, shape: torch.Size, flat: bool) -> Tensor:
    if flat:
        return torch.zeros(shape, dtype=torch.float32, device=p.device)
    local = to_local(p.detach())
    sizes = [1 if n == 1 else m for n, m in zip(shape, local.shape, strict=True)]
    return sharded_like(torch.zeros(sizes, dtype=torch.float32, device=local.device), shape, p)


def restore(state: MutableMapping[str, Any], saved: dict[str, Any], p: Tensor, group: dict[str, Any]) -> None:
    """Overwrite a parameter's state, which torch cast to the parameter's dtype, with copies of the saved tensors."""
    for name in saved.keys() & set(STATE):
        dtype = DTYPES.get(name) or momentum_dtype(p, group["momentum_dtype"])
        device = torch.device("cpu") if name == "calibration_step" else p.device
        state[name] = saved[name].to(device, dtype, copy=True)
