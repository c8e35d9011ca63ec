"""DeepSpeed ZeRO 1 and 2: finds the blocks inside a flat partition. ZeRO 3 and other flattening is refused.

ZeRO replaces the parameters of a group in the optimizer with one flat tensor: this process's partition of all of them.
It contains padding, and it may begin or end in the middle of a block. This module finds the blocks by the attributes
that DeepSpeed sets on the model's parameters (``_hp_mapping``, ``_dp_group``). So the optimizer sees blocks instead of
a mixture of them. ZeRO steps one group after the other, so ``scaling="max"``, which compares all blocks, is refused.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_sai.batches import Member, State
from hf_sai.checks import INSTEAD, block_name, check_whole
from hf_sai.shards import Segment, is_dtensor
from hf_sai.state import scale_shapes


class Partition:
    """A group's flat partition on this process, and the group's blocks in it.

    Attributes:
        flat: the optimizer's tensor, one dimension.
        params: the model's parameters, which are the blocks of the group, in order.
        segments: the part of each block on this process, which may be empty.
        shapes: the shapes of the blocks.
    """

    def __init__(self, flat: Tensor, params: Sequence[Tensor], names: Sequence[str], group: dict[str, Any]) -> None:
        self.flat, self.params = flat, list(params)
        self._spans: list[tuple[int, int]] = []
        self.segments: list[Segment] = []
        for p, name in zip(params, names, strict=True):
            mapping: Any = p._hp_mapping  # type: ignore[attr-defined]
            start, length, begins = 0, 0, 0
            if mapping is not None:
                address = mapping.get_hp_fragment_address()
                start, length, begins = address.start, address.numel, mapping.lp_fragment_address.start
            self._spans.append((start, length))
            process_group: Any = p._dp_group  # type: ignore[attr-defined]
            part = flat.detach()[start : start + length]
            self.segments.append(Segment(name, part, begins, p.shape, process_group, p.device))
        self.shapes = [p.shape for p in params]
        scales = [scale_shapes(shape, group) for shape in self.shapes]
        self._sizes = [{key: size.numel() for key, size in sizes.items()} for sizes in scales]

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Split a tensor of the partition's shape into the part of each block."""
        return [tensor[start : start + length] for start, length in self._spans]

    def states(self, state: State) -> list[State]:
        """The state of each block, as views of the partition's state."""
        views: list[State] = [
            {"gsnr": state["gsnr"][i], "calibration_step": state["calibration_step"][i]}
            for i in range(len(self.segments))
        ]
        for key in ("scale", "column_scale"):
            start = 0
            for view, sizes in zip(views, self._sizes, strict=True):
                if key in sizes:
                    view[key] = state[key][start : start + sizes[key]]
                    start += sizes[key]
        if "momentum_buffer" in state:
            for view, part in zip(views, self.split(state["momentum_buffer"]), strict=True):
                view["momentum_buffer"] = part
        return views

    def members(self, state: State, index: int, starts: bool) -> list[Member]:
        """The blocks of the partition. ``index`` is the partition's index in its group."""
        pairs = zip(self.segments, self.states(state), strict=True)
        return [Member(segment, segment.name, own, index, 0, starts) for segment, own in pairs]


class Partitions:
    """Recognises the parameters of an optimizer that are partitions.

    It keeps the original parameters of each group until the first step, because DeepSpeed may take them out of the
    group. Nothing else connects a partition with the parameters in it.
    """

    def __init__(self) -> None:
        self._groups: list[tuple[dict[str, Any], list[Tensor] | None, list[str]]] = []
        self._partitions: dict[Tensor, Partition] = {}

    def add(self, group: dict[str, Any]) -> None:
        """Register a new param group."""
        names = [block_name(group, i) for i in range(len(group["params"]))]
        self._groups.append((group, list(group["params"]) if _deepspeed_may_follow() else None, names))

    def replace(self, old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> None:
        """Update the references to groups whose dicts have been replaced, as ``load_state_dict`` does."""
        by_id = {id(group): replacement for group, replacement in zip(old, new, strict=True)}
        self._groups = [(by_id.get(id(group), group), params, names) for group, params, names in self._groups]

    def forget(self) -> None:
        """Release the references to parameters that are not in a partition."""
        if not self._partitions:
            self._groups = [(group, None, names) for group, _, names in self._groups]

    def of(self, p: Tensor) -> Partition | None:
        """The partition for a parameter of the optimizer, or None for an ordinary parameter."""
        return self._partitions.get(p) if self._partitions else None

    def shapes(self) -> dict[Tensor, list[torch.Size]]:
        """For each partition, the shapes of the blocks in it."""
        return {flat: partition.shapes for flat, partition in self._partitions.items()}

    def all_groups(self, current: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """All groups, even while DeepSpeed steps only one of them."""
        return [group for group, _, _ in self._groups] if self._partitions else current

    def recognise(self, group: dict[str, Any], index: int) -> None:
        """Check whether a parameter without state is a partition.

        Raises:
            ValueError: if it is neither a block nor a partition whose blocks can be found.
        """
        p, name = group["params"][index], block_name(group, index)
        check_whole(p, name)
        if is_dtensor(p) or p.dim() != 1 or isinstance(p, torch.nn.Parameter) or p in self._partitions:
            return
        params, names = next(((params, names) for g, params, names in self._groups if g is group), (None, []))
        if params is not None and any(p is q for q in params):
            return
        linked = [(q, n) for q, n in zip(params or [], names, strict=False) if hasattr(q, "_hp_mapping")]
        if not linked:
            if len(group["params"]) >= len(names):  # a tensor that the user has added
                return
            raise ValueError(
                f"{name} has replaced {len(names)} parameters of SGDSaI, and one scale for this mixture fits none of "
                f"them; {INSTEAD}"
            )
        if group["momentum_dtype"] in (torch.int8, "int8") or group["stochastic_rounding"]:
            raise ValueError(
                f"momentum_dtype='int8' and stochastic_rounding do not support DeepSpeed ZeRO, which keeps {name} in "
                "float32 flat partitions; remove them"
            )
        if group["scaling"] == "max" and len(self._groups) > 1:
            raise ValueError(
                "scaling='max' compares the blocks of all groups, but DeepSpeed ZeRO steps one group after the other; "
                "use one param group, or scaling='raw'"
            )
        self._partitions[p] = Partition(p, [q for q, _ in linked], [n for _, n in linked], group)


def _deepspeed_may_follow() -> bool:
    """Whether DeepSpeed may replace parameters. False under FSDP, where whole parameters must not be kept alive."""
    return "deepspeed" in sys.modules and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true"
