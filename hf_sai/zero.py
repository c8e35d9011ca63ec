"""DeepSpeed ZeRO 1 and 2: the blocks inside a flat partition. ZeRO 3 and other flattening is refused.

ZeRO takes the parameters of a group out of the optimizer and puts one flat tensor in their place: this process's
partition of all of them, ends of blocks and padding included. The g-SNR of that mixture is about the square root of its
length, whatever the blocks are. Here each group's blocks are found again in its partition, by what DeepSpeed notes on
the model's parameters (``_hp_mapping``, ``_dp_group``), so that each has its own g-SNR, reduced over the processes.

ZeRO also steps one group after the other. Scales that depend on all groups (all but "raw") are known at the last one:
blocks of earlier groups that have their first gradient wait for it.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_sai.checks import INSTEAD, block_name, check_whole
from hf_sai.gsnr import Segment, is_dtensor


class Partition:
    """A group's flat partition on this process, and the blocks of the group in it.

    Attributes:
        flat: what the optimizer holds, one dimension.
        params: the model's parameters, which are the blocks of the group, in order.
        segments: what is here of each of them, which can be nothing.
    """

    def __init__(self, flat: Tensor, params: Sequence[Tensor], names: Sequence[str]) -> None:
        self.flat = flat
        self.params = list(params)
        self.places: list[tuple[int, int]] = []
        self.segments = []
        for p, name in zip(params, names, strict=True):
            mapping: Any = p._hp_mapping  # type: ignore[attr-defined]
            address = mapping.get_hp_fragment_address() if mapping is not None else None
            start, length = (address.start, address.numel) if address is not None else (0, 0)
            self.places.append((start, length))
            part = flat.detach()[start : start + length]
            group: Any = p._dp_group  # type: ignore[attr-defined]
            self.segments.append(Segment(name, part, p.numel(), group, p.device))
        self._states: list[dict[str, Tensor]] = []
        self._of: Tensor | None = None

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The parts of a tensor of the partition's shape that belong to each block."""
        return [tensor[start : start + length] for start, length in self.places]

    def states(self, state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Each block's part of the partition's state; the same views as long as the state holds the same tensors."""
        if self._of is not state["scale"]:
            numbers = ("gsnr", "scale")
            views = [{key: state[key][i] for key in numbers} for i in range(len(self.segments))]
            if "momentum_buffer" in state:
                for view, part in zip(views, self.split(state["momentum_buffer"]), strict=True):
                    view["momentum_buffer"] = part
            self._states, self._of = views, state["scale"]
        return self._states

    def publish(self) -> None:
        """Copy the partition into the model's parameters, as DeepSpeed does after it has stepped a group."""
        for p in self.params:
            mapping: Any = p._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                mapping.update_lp()


class Given:
    """The groups that an optimizer was given, to see what a library has put in their place since."""

    def __init__(self) -> None:
        self._groups: list[tuple[dict[str, Any], list[weakref.ref[Tensor]], list[str]]] = []
        self._known: dict[int, weakref.ref[Tensor]] = {}
        self._partitions: dict[Tensor, Partition] = {}

    def add(self, group: dict[str, Any]) -> None:
        names = [block_name(group, i) for i in range(len(group["params"]))]
        refs = [weakref.ref(p) for p in group["params"]]
        self._groups.append((group, refs, names))
        self._known.update((id(p), ref) for p, ref in zip(group["params"], refs, strict=True))

    def replace(self, old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> None:
        """Follow groups whose dicts have been replaced, as ``load_state_dict`` does."""
        by_id = {id(group): replacement for group, replacement in zip(old, new, strict=True)}
        self._groups = [(by_id.get(id(group), group), refs, names) for group, refs, names in self._groups]

    def partition(self, p: Tensor) -> Partition | None:
        """The partition that a parameter of the optimizer is, or None if it is an ordinary parameter."""
        return self._partitions.get(p) if self._partitions else None

    def block_counts(self) -> dict[Tensor, int]:
        """The number of blocks in each partition."""
        return {flat: len(partition.segments) for flat, partition in self._partitions.items()}

    def groups(self) -> list[dict[str, Any]]:
        """All groups, in a step of one of them too."""
        return [group for group, _, _ in self._groups]

    def is_last(self, group: dict[str, Any]) -> bool:
        """Whether no group with parameters comes after this one."""
        return next(g for g in reversed(self.groups()) if g["params"]) is group

    def check(self, group: dict[str, Any], index: int) -> None:
        """Recognise a parameter that this optimizer has no state of yet.

        Raises:
            ValueError: for one that is neither a block nor a partition whose blocks can be found.
        """
        p = group["params"][index]
        name = block_name(group, index)
        check_whole(p, name)
        known = self._known.get(id(p))
        if is_dtensor(p) or p.dim() != 1 or (known is not None and known() is p):
            return
        refs, names = next(((refs, names) for g, refs, names in self._groups if g is group), ([], []))
        params = [q for ref in refs if (q := ref()) is not None]
        linked = [q for q in params if hasattr(q, "_hp_mapping")]
        if not linked:
            # Copies of every parameter, in another dtype say, are blocks as before.
            if [q.shape for q in params] == [q.shape for q in group["params"]]:
                return
            raise ValueError(
                f"{name} has taken the place of {len(refs)} parameters that SGDSaI was given, and the g-SNR of that "
                f"mixture would be that of no block; {INSTEAD}"
            )
        if group["momentum_dtype"] in (torch.int8, "int8") or group["stochastic_rounding"]:
            raise ValueError(
                f"momentum_dtype='int8' and stochastic_rounding are not for DeepSpeed ZeRO, which holds {name} in "
                "float32 flat partitions; leave them out"
            )
        pairs = [(q, n) for ref, n in zip(refs, names, strict=True) if (q := ref()) is not None and q in set(linked)]
        self._partitions[p] = Partition(p, [q for q, _ in pairs], [n for _, n in pairs])
