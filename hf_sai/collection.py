"""Collects the blocks of a step: finds those with a gradient, allocates their state and groups them into batches."""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_sai.batches import Batch, GroupBatches, Member, State
from hf_sai.calibration import LIMIT, TOKEN_LIMIT, WINDOW, Work, measures
from hf_sai.checks import block_name, check_parameters, check_whole_model
from hf_sai.kernels import Blocks
from hf_sai.options import Hyper
from hf_sai.shards import gradient, is_sharded, shard_number, to_local
from hf_sai.state import allocate
from hf_sai.update import prepare, update_blocks, why_not_fused
from hf_sai.zero import Partitions

States = MutableMapping[Tensor, State]


class Collector:
    """The batches of an optimizer's groups. They are rebuilt when parameters or state have been replaced."""

    def __init__(self, partitions: Partitions) -> None:
        self.partitions = partitions
        self._batches: dict[int, GroupBatches] = {}

    def work(
        self, group: dict[str, Any], groups: Sequence[dict[str, Any]], states: States
    ) -> "Iterator[Work | Prepared]":
        """Yield the batches of a group with their gradients. Blocks without a gradient are skipped.

        Raises:
            ValueError: for a parameter or a gradient that SGDSaI cannot train with.
        """
        held = self.batches(group, groups, states)
        prepared = self._prepared(group, held)
        if prepared is not None:
            yield prepared
            return
        for batch in held.batches:
            grads = self._gradients(group, batch)
            if all(g is not None for g in grads) and batch.is_uniform():
                yield Work(group, batch, grads)
                continue
            for single, g in zip(batch.singles(), grads, strict=True):
                # A process without a gradient must still take part in the collectives of a sharded block.
                if g is not None or single.sharded:
                    yield Work(group, single, [g])

    def _prepared(self, group: dict[str, Any], held: GroupBatches) -> "Prepared | None":
        """The group prepared for the fused path and a step that measures nothing, or None if that is impossible."""
        window = WINDOW if group["scaling"] == "adamw" else 1
        if group["foreach"] or group["fused"] is False or not held.is_plain or not held.is_settled(window):
            return None
        if group["scaling"] == "adamw" and measures(group):
            return None
        grads: list[Any] = [m.param.grad for m in held.members]  # type: ignore[union-attr]
        if any(g is None or g.layout is not torch.strided for g in grads):
            return None
        if held.fused is None or not held.fused.takes(grads):
            own = iter(grads)
            held.fused = prepare([b.blocks([next(own) for _ in b.members]) for b in held.batches], group["fused"])
        return None if held.fused is None else Prepared(group, held.fused, grads)

    def work_of(
        self, group: dict[str, Any], index: int, groups: Sequence[dict[str, Any]], states: States
    ) -> list[Work]:
        """The work for one parameter of a group."""
        singles = self.batches(group, groups, states).at.get(index, [])
        return [Work(group, single, self._gradients(group, single)) for single in singles]

    def batches(self, group: dict[str, Any], groups: Sequence[dict[str, Any]], states: States) -> GroupBatches:
        """The batches of a group. Every parameter with a gradient has a state afterwards."""
        held = self._batches.get(id(group))
        if held is None or not held.is_current(group, states):
            held = self._batches[id(group)] = self._make(group, groups, states)
        return held

    def has_calibrated(self, group: dict[str, Any]) -> bool:
        """Whether a block of the group is calibrated."""
        held = self._batches.get(id(group))
        return held is not None and any(m.count for batch in held.batches for m in batch.members)

    def _gradients(self, group: dict[str, Any], batch: Batch) -> "list[Tensor | None]":
        if batch.is_plain:
            grads = [m.param.grad for m in batch.members]  # type: ignore[union-attr]
        else:
            grads = [self._local_gradient(group, m) for m in batch.members]
        for m, g in zip(batch.members, grads, strict=True):
            _check_dense(g, m.name)
        return grads

    def _local_gradient(self, group: dict[str, Any], m: Member) -> Tensor | None:
        p = group["params"][m.index]
        g = gradient(p)
        partition = self.partitions.of(p)
        if g is None or partition is None:
            return None if g is None else to_local(g)
        parts = zip(partition.segments, partition.split(g), strict=True)
        return next(part for segment, part in parts if segment is m.param)

    def _make(self, group: dict[str, Any], groups: Sequence[dict[str, Any]], states: States) -> GroupBatches:
        check_group_params(group)
        for i, p in enumerate(group["params"]):
            _check_dense(p.grad, block_name(group, i))
        first = 0
        for other in self.partitions.all_groups(groups):
            if other is group:
                break
            first += len(other["params"])
        members: list[Member] = []
        idle = []
        for i, p in enumerate(group["params"]):
            if not p.numel():
                continue
            if p.grad is None and "scale" not in states.get(p, {}) and not (p.requires_grad and is_sharded(p)):
                idle.append(p)
                continue
            # Everything that can fail does so before the state changes.
            state = states.get(p, {})
            begun = "momentum_buffer" in state
            self.allocate(state, group, i)
            states[p] = state
            starts = not begun and "momentum_buffer" in state
            partition = self.partitions.of(p)
            if partition is not None:
                members += partition.members(state, i, starts)
            else:
                members.append(Member(p, block_name(group, i), state, i, first + i + (shard_number(p) << 16), starts))
        return GroupBatches(group, members, idle)

    def allocate(self, state: State, group: dict[str, Any], index: int) -> None:
        """Add the missing entries to the state of a parameter."""
        p = group["params"][index]
        if "scale" not in state:
            self.partitions.recognise(group, index)
        partition = self.partitions.of(p)
        allocate(state, p, group, block_name(group, index), partition.shapes if partition else None)


def block_states(
    groups: Sequence[dict[str, Any]], states: Mapping[Tensor, State], partitions: Partitions
) -> list[tuple[str, Tensor, State]]:
    """Every block as (index in the param groups, parameter of the model, state). A state may be empty."""
    rows: list[tuple[str, Tensor, State]] = []
    for i, group in enumerate(groups):
        for j, p in enumerate(group["params"]):
            index, partition = f"param_groups[{i}].params[{j}]", partitions.of(p)
            state = states.get(p, {})
            if partition is None:
                rows.append((index, p, state if "scale" in state else {}))
            else:
                rows += [(index, q, own) for q, own in zip(partition.params, partition.states(state), strict=True)]
    return rows


def _check_dense(grad: Tensor | None, name: str) -> None:
    if grad is not None and grad.layout is not torch.strided:
        raise ValueError(
            f"SGDSaI needs dense gradients, but {name} has a sparse one; build its layer with sparse=False"
        )


def check_group_params(group: dict[str, Any]) -> None:
    """Raise ValueError for a parameter that cannot be trained, or cannot be trained with the options of its group."""
    check_parameters(group)
    check_whole_model(group)
    for i, p in enumerate(group["params"]):
        if group["fused"] and (reason := why_not_fused(p)):
            raise ValueError(f"fused=True is impossible for {block_name(group, i)}: {reason}; set it to None")


def largest_gsnr(groups: Sequence[dict[str, Any]], states: Mapping[Tensor, State]) -> float:
    """The largest g-SNR of the calibrated blocks with ``scaling="max"``, or 0.0 if there are none."""
    params = [p for group in groups if group["scaling"] == "max" for p in group["params"]]
    return max((float(states[p]["gsnr"].max()) for p in params if "gsnr" in states.get(p, {})), default=0.0)


class Prepared(NamedTuple):
    """A group in a step that measures nothing.

    Attributes:
        group: the param group.
        blocks: all its blocks, prepared for the fused path.
        grads: their gradients.
    """

    group: dict[str, Any]
    blocks: Any
    grads: list[Any]


def update(work: Sequence[Work | Prepared]) -> None:
    """Update every calibrated block that has a gradient. An uncalibrated block with a zero gradient only decays."""
    batches: dict[tuple[int, Hyper], list[Blocks]] = {}
    groups = {id(w.group): w.group for w in work}
    for w in work:
        if isinstance(w, Prepared):
            w.blocks.update(w.grads, _hyper(w.group, 1.0 - float(w.group["momentum"])))
            if w.blocks.counters:
                torch._foreach_add_(w.blocks.counters, 1)
            continue
        for part in _in_phase(w):
            grads = [g for g in part.grads if g is not None]
            # With a learning rate of 0, as in the dummy step of torch.distributed.checkpoint, nothing can change.
            waits = not part.batch.members[0].count and (part.kinds[0] == "nonfinite" or not float(w.group["lr"]))
            if grads and grads[0].numel() and not waits:
                batches.setdefault((id(w.group), _hyper(w.group, part.weight())), []).append(part.batch.blocks(grads))
            for m in part.batch.members:
                m.starts = False
    for (group_id, hyper), blocks in batches.items():
        group = groups[group_id]
        update_blocks(blocks, hyper, group["foreach"], group["fused"])


def _in_phase(w: Work) -> Sequence[Work]:
    """The same blocks, split into batches whose gradients all have the same weight in the momentum."""
    if len(w.kinds) == 1 or (w.batch.is_uniform() and len(set(w.kinds)) == 1):
        return (w,)
    parts = [Work(w.group, single, [g]) for single, g in zip(w.batch.singles(), w.grads, strict=True)]
    for part, kind in zip(parts, w.kinds, strict=True):
        part.kinds = [kind]
    return parts


def _hyper(group: dict[str, Any], weight: float) -> Hyper:
    """The hyper-parameters of an update."""
    limit = TOKEN_LIMIT if group["token_rows"] else LIMIT
    return Hyper(
        lr=group["lr"] if isinstance(group["lr"], Tensor) else float(group["lr"]),
        weight=weight,
        weight_decay=float(group["weight_decay"]),
        limit=limit if group["scaling"] == "adamw" else None,
        maximize=group["maximize"],
        stochastic_rounding=group["stochastic_rounding"],
    )
