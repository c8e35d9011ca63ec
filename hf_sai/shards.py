"""Parameters that are split over processes: DTensor (FSDP2, HSDP, TP) and the partitions of DeepSpeed ZeRO."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# The types for an exact check. It is ten times faster than isinstance and succeeds for almost every tensor.
_PLAIN = (Tensor, torch.nn.Parameter)


class Segment:
    """This process's part of a block in a flat buffer of DeepSpeed ZeRO 1 or 2. The part is contiguous or empty.

    Attributes:
        name: the name of the block in messages.
        part: the part of the block on this process, one dimension, a view of the buffer.
        start: the index in the flattened block at which ``part`` begins.
        shape: the shape of the whole block.
        group: the processes that hold the parts of the block.
        device: the device on which these processes communicate. The buffer can be in host memory.
    """

    def __init__(
        self, name: str, part: Tensor, start: int, shape: torch.Size, group: Any, device: torch.device
    ) -> None:
        self.name, self.part, self.start, self.shape = name, part, start, shape
        self.group, self.device = group, device

    def numel(self) -> int:
        """The number of elements of the whole block."""
        return self.shape.numel()


def is_dtensor(tensor: Tensor | Segment) -> bool:
    """Whether ``tensor`` is a ``DTensor``. This does not import ``torch.distributed.tensor``."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(tensor: Tensor | Segment) -> bool:
    """Whether other processes hold other parts of ``tensor``."""
    if isinstance(tensor, Segment):
        return True
    return is_dtensor(tensor) and not all(p.is_replicate() for p in tensor.placements)  # type: ignore[attr-defined]


def to_local(tensor: Tensor | Segment) -> Tensor:
    """The part of ``tensor`` on this process, or ``tensor`` itself if it is not sharded."""
    if type(tensor) in _PLAIN:
        return tensor  # type: ignore[return-value]
    if isinstance(tensor, Segment):
        return tensor.part
    if not is_dtensor(tensor):
        return tensor
    local = tensor.to_local()  # type: ignore[attr-defined]
    if hasattr(local, "wait"):  # the last collective has not finished
        local = local.wait()
    assert isinstance(local, Tensor)
    return local


def gradient(p: Tensor) -> Tensor | None:
    """The gradient of ``p``, with the placements of ``p``."""
    grad = p.grad
    if grad is not None and type(grad) not in _PLAIN and is_dtensor(p) and grad.placements != p.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=p.placements)  # type: ignore[attr-defined]
    return grad


def sharded_like(values: Tensor, shape: torch.Size, p: Tensor) -> Tensor:
    """``values`` as a DTensor of ``shape`` that is split like ``p``. If no dimension is split, ``values`` itself.

    Args:
        values: the local values.
        shape: the shape of ``p``, in which some dimensions may be reduced to 1. Every process holds these whole.
        p: the parameter.
    """
    if not is_dtensor(p):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    placements = [
        q if not q.is_replicate() and shape[q.dim] == p.shape[q.dim] and p.shape[q.dim] > 1 else Replicate()
        for q in p.placements  # type: ignore[attr-defined]
    ]
    if all(q.is_replicate() for q in placements):
        return values
    stride = torch.empty(shape, device="meta").stride()
    mesh = p.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(values, mesh, placements, run_check=False, shape=shape, stride=stride)


def reduction_groups(
    params: Sequence[Tensor | Segment], reduced: Sequence[Sequence[int]] | None = None
) -> dict[Any, tuple[list[int], str | torch.device]]:
    """The process groups over which local sums must be added to get sums over whole blocks.

    Args:
        params: the blocks, in the same order on every process.
        reduced: the dimensions of each block that are summed, by default all.

    Returns:
        For each process group, the indices of the blocks that are split over it, and the device on which it
        communicates. All processes must use the groups in this order.
    """
    groups: dict[Any, tuple[list[int], str | torch.device]] = {}
    for i, p in enumerate(params):
        if isinstance(p, Segment):
            groups.setdefault(p.group, ([], p.device))[0].append(i)
        elif is_dtensor(p):
            mesh = p.device_mesh  # type: ignore[attr-defined]
            for dim, placement in enumerate(p.placements):  # type: ignore[attr-defined]
                # `is_shard()` is False for the strided shards of FSDP2 with tensor parallelism.
                if placement.is_replicate():
                    continue
                if reduced is None or placement.dim in reduced[i] or p.shape[placement.dim] == 1:
                    groups.setdefault(mesh.get_group(dim), ([], mesh.device_type))[0].append(i)
    return groups


def shard_number(p: Tensor) -> int:
    """The number of the parameter's shard on this process, or 0 if the parameter is not sharded."""
    number = 0
    if is_dtensor(p):
        mesh: Any = p.device_mesh  # type: ignore[attr-defined]
        for dim, placement in enumerate(p.placements):  # type: ignore[attr-defined]
            if not placement.is_replicate():
                number = number * mesh.size(dim) + mesh.get_local_rank(dim)
    return number
