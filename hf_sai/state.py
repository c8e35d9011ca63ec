"""What SGDSaI keeps of a parameter, and how it is allocated and restored.

- ``momentum_buffer``: the parameter's shape; absent when momentum is 0.
- ``gsnr``: 0-dim float32; 0 until the block is calibrated.
- ``scale``: float32, the block's shape with the dimensions of a channel reduced to 1 (see :mod:`hf_sai.channels`).
- ``column_scale``: float32, (1, columns); of matrices only.
- ``calibration_step``: 0-dim int64 on the CPU; the usable gradients that the scale was made from, capped.
- ``momentum_scale``: one dimension, float32; with int8 momentum only.
- ``rounding_step``: 0-dim int64; updates so far, where something is rounded stochastically.

For a flat partition of DeepSpeed's, ``gsnr`` and ``calibration_step`` have one number for each block in it, and
``scale`` and ``column_scale`` those of all blocks one after the other. Nothing else but the groups' options and
``step`` affects training.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_sai.channels import channels, column_channels
from hf_sai.momentum import scale_count
from hf_sai.options import momentum_dtype
from hf_sai.shards import is_dtensor, sharded_like, to_local

# The entries that keep their dtype whatever the parameter's is.
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
    """Add to a parameter's state, as zeros, what its group asks for and it lacks.

    Args:
        state: of the parameter; what is there stays.
        p: the parameter.
        group: its param group.
        name: of the parameter, for messages.
        blocks: for a partition of DeepSpeed's, the shapes of the blocks in it.

    Raises:
        ValueError: for int8 momentum of a sharded parameter; nothing is allocated then.
    """
    dtype = momentum_dtype(p, group["momentum_dtype"]) if float(group["momentum"]) else p.dtype
    if dtype == torch.int8 and is_dtensor(p):
        raise ValueError(
            f"momentum_dtype='int8' does not support sharded parameters, and {name} is a DTensor: elements that share "
            "a scale may be on two processes; use 'bfloat16'"
        )
    if not float(group["momentum"]):
        state.pop("momentum_buffer", None)
        state.pop("momentum_scale", None)
    elif "momentum_buffer" not in state:
        # int8 codes are in row-major order, whatever the parameter's memory format is.
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
        shape: of the parameter.
        group: its param group.
        blocks: for a partition of DeepSpeed's, the shapes of the blocks in it.
    """
    scaling = group["scaling"]
    if blocks is None:
        columns = column_channels(shape, scaling)
        shapes = {"scale": channels(shape, scaling).shape}
        return shapes if columns is None else {**shapes, "column_scale": columns.shape}
    shapes = {"scale": torch.Size([sum(channels(b, scaling).shape.numel() for b in blocks)])}
    of_columns = [found.shape.numel() for b in blocks if (found := column_channels(b, scaling)) is not None]
    return {**shapes, "column_scale": torch.Size([sum(of_columns)])} if of_columns else shapes


def _zero_scales(p: Tensor, shape: torch.Size, flat: bool) -> Tensor:
    if flat:
        return torch.zeros(shape, dtype=torch.float32, device=p.device)
    local = to_local(p.detach())
    sizes = [1 if n == 1 else m for n, m in zip(shape, local.shape, strict=True)]
    return sharded_like(torch.zeros(sizes, dtype=torch.float32, device=local.device), shape, p)


def restore(state: MutableMapping[str, Any], saved: dict[str, Any], p: Tensor, group: dict[str, Any]) -> None:
    """Overwrite a parameter's state with copies of the saved tensors: torch has cast them to the parameter's dtype."""
    for name in saved.keys() & set(STATE):
        dtype = DTYPES.get(name) or momentum_dtype(p, group["momentum_dtype"])
        device = torch.device("cpu") if name == "calibration_step" else p.device
        state[name] = saved[name].to(device, dtype, copy=True)
