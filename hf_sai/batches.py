"""Groups blocks of the same shape into batches, so that LoRA's hundreds of small tensors need few operations per step.

A batch is a cache of a group's parameters and state. It is rebuilt when either has been replaced, and it never affects
the result. On a CPU, the momentum and the scales of small blocks of the same shape are views of two batch tensors.
"""

from collections.abc import Iterable, Iterator, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from hf_sai.channels import Channels, channel_index, channels, column_channels, matrix_layout
from hf_sai.kernels import Blocks
from hf_sai.shards import Segment, is_sharded, reduction_groups, to_local

# State entries whose tensors the batches refer to.
_HELD = ("momentum_buffer", "momentum_scale", "scale", "column_scale", "rounding_step")
# The state of blocks with at most this number of elements is stacked.
_SMALL = 1 << 16
# The largest number of elements in a batch of several blocks.
_STACK = 1 << 18
# The number of elements that are processed at once on a CPU if a temporary is needed.
_CPU_PIECE = 1 << 20

State = dict[str, Any]


class Member:
    """One block of the current group.

    Attributes:
        param: the optimizer's parameter, or a segment of a flat one.
        name: the name for messages.
        state: its state.
        index: the index of the parameter in its group.
        count: the capped number of usable gradients so far, a copy of ``calibration_step`` on the host.
        starts: whether its momentum starts with the next gradient.
        seed: the seed of its random bits.
    """

    __slots__ = ("count", "index", "name", "param", "seed", "starts", "state")

    def __init__(self, param: Tensor | Segment, name: str, state: State, index: int, seed: int, starts: bool) -> None:
        self.param, self.name, self.state, self.index, self.seed = param, name, state, index, seed
        self.count = int(state["calibration_step"])
        self.starts = starts


class Batch:
    """Blocks of one shape, dtype and device.

    Attributes:
        members: the blocks. There is more than one only if their state is stacked.
        channels: the channels of each block.
        momentum: (members, *local shape), or None if momentum is 0.
        scale: (members, *local shape of the scales), float32.
        counts: (members,) int64, their ``calibration_step``.
        column_channels: the columns of matrices, or None for other blocks.
        column_scale: (members, *local shape of the column scales), float32.
        column_factor: ``column_scale`` relative to the mean over the columns, for the update.
    """

    def __init__(
        self, members: list[Member], layout: Channels, momentum: Tensor | None, scale: Tensor, counts: Tensor
    ) -> None:
        self.members, self.channels = members, layout
        self.momentum, self.scale, self.counts = momentum, scale, counts
        self._singles: list[Batch] | None = None
        first = members[0].param
        self.dtype, self.sharded = to_local(first).dtype, is_sharded(first)
        self.is_plain = type(first) in (Parameter, Tensor)
        self.column_channels: Channels | None = None
        self.column_scale: Tensor | None = None
        self.column_factor: Tensor | None = None
        if isinstance(first, Segment):
            self.columns, self.rows = 1, 0
        else:
            self.columns, self.rows = matrix_layout(to_local(first).shape, layout.dims)

    def add_columns(self, layout: Channels, column_scale: Tensor) -> None:
        """Make the columns of the matrices channels as well."""
        self.column_channels, self.column_scale = layout, column_scale
        self.column_factor = torch.zeros_like(column_scale)
        self.refresh_columns()

    def refresh_columns(self) -> None:
        """Compute ``column_factor`` from the scales. All processes that hold columns of a matrix must call this."""
        if self.column_scale is None or self.column_factor is None or self.column_channels is None:
            return
        scale, first = self.column_scale, self.members[0]
        squares = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale)).square()
        total = squares.reshape(len(self.members), -1).sum(1)
        if not isinstance(first.param, Segment):  # every process holds all column scales of a segment
            for group, (_, device) in reduction_groups([first.param], [(1,)]).items():
                own = total.to(device)
                torch.distributed.all_reduce(own, group=group)
                total = own.to(total.device)
        mean = total / self.column_channels.shape.numel()
        torch.mul(scale, mean.sqrt().view(-1, *[1] * (scale.dim() - 1)), out=self.column_factor)

    def is_early(self, window: int) -> bool:
        """Whether a block has had fewer usable gradients than ``window``."""
        return any(m.count < window for m in self.members)

    def store_counts(self) -> None:
        """Write the counts of the members to the state."""
        if self.is_uniform():
            self.counts.fill_(self.members[0].count)
        else:
            self.counts.copy_(torch.tensor([m.count for m in self.members], device=self.counts.device))

    def is_uniform(self) -> bool:
        """Whether all blocks have the same count."""
        first = self.members[0]
        return len(self.members) == 1 or all(m.count == first.count and m.starts == first.starts for m in self.members)

    def singles(self) -> "list[Batch]":
        """The same blocks, each as a batch of one."""
        if self._singles is None:
            self._singles = [self] if len(self.members) == 1 else [self._single(i) for i in range(len(self.members))]
        return self._singles

    def _single(self, i: int) -> "Batch":
        momentum = None if self.momentum is None else self.momentum[i : i + 1]
        single = Batch([self.members[i]], self.channels, momentum, self.scale[i : i + 1], self.counts[i : i + 1])
        if self.column_scale is not None and self.column_factor is not None:
            single.column_channels = self.column_channels
            single.column_scale, single.column_factor = self.column_scale[i : i + 1], self.column_factor[i : i + 1]
        return single

    def blocks(self, grads: Sequence[Tensor]) -> Blocks:
        """The input of an update path, made from the local gradients of all members."""
        first = self.members[0]
        scale = self.scale
        if isinstance(first.param, Segment):
            s = first.param
            size, device = s.part.numel(), scale.device
            scale = scale[0, channel_index(s.start, size, s.shape, self.channels.dims, device)]
            if self.column_channels is not None and self.column_factor is not None:
                index = channel_index(s.start, size, s.shape, self.column_channels.dims, device)
                scale = scale * self.column_factor[0, index]
            scale = scale[None]
        momentum_scale, counter = first.state.get("momentum_scale"), first.state.get("rounding_step")
        params = [to_local(m.param) for m in self.members]
        columns = None if isinstance(first.param, Segment) else self.column_factor
        return Blocks(
            params, grads, self.momentum, scale, self.columns, self.rows, momentum_scale, counter, first.seed, columns
        )  # fmt: skip

    def mean_squares(self, grads: Sequence[Tensor | None], layout: Channels, scale: Tensor) -> Tensor:
        """This process's share of the mean of g^2 over each channel, in the shape of ``scale``, float32 or float64.

        Args:
            grads: local gradients. None means zeros, on a process without a gradient for a sharded block.
            layout: ``channels`` or ``column_channels``.
            scale: the scales of these channels.
        """
        first, dims = self.members[0].param, layout.dims
        present = [g for g in grads if g is not None]
        if not present:
            return torch.zeros_like(scale)
        wide = torch.float64 if present[0].dtype == torch.float64 else torch.float32
        if isinstance(first, Segment):
            sums = torch.zeros(scale.shape[1], dtype=wide, device=scale.device)
            for start in range(0, present[0].numel(), _CPU_PIECE):
                piece = present[0][start : start + _CPU_PIECE].to(wide)
                index = channel_index(first.start + start, piece.numel(), first.shape, dims, piece.device)
                sums.index_add_(0, index, piece.square())
            return (sums / layout.size)[None]
        stacked = torch.stack(present) if len(present) > 1 else present[0].unsqueeze(0)
        return _sum_of_squares(stacked, tuple(d + 1 for d in dims), wide) / layout.size


def _sum_of_squares(x: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The sum of x^2 over ``dims``. These dimensions are kept with size 1."""
    if not dims:
        return x.to(dtype).square()
    if not x.is_cpu or dims[-1] == x.dim() - 1:
        norm: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=dtype)
        return norm.square()
    # On a CPU, a norm over columns is fifty times slower than a sum.
    if x.numel() <= _CPU_PIECE:
        return x.to(dtype).square().sum(dims, keepdim=True)
    if dims[0] == 2:  # a stack of matrices
        return torch.stack([_sum_of_squares(matrix[None], (1,), dtype)[0] for matrix in x[0]])[None]
    rows = max(1, _CPU_PIECE * x.shape[1] // x.numel())
    total = torch.zeros(1, 1, *x.shape[2:], dtype=dtype, device=x.device)
    for i in range(0, x.shape[1], rows):
        total += x[:, i : i + rows].to(dtype).square().sum(1, keepdim=True)
    return total


class GroupBatches:
    """The batches of one param group, and the parameters and state from which they were made.

    Attributes:
        batches: the batches of all parameters with state.
        at: maps the index of a parameter with state to its blocks, as batches of one. A partition has several blocks.
        members: the members of all batches, in order.
        is_plain: whether no batch is sharded.
        fused: the batches prepared for the fused path (see :class:`hf_sai.fused.FusedBlocks`).
    """

    def __init__(self, group: dict[str, Any], members: Iterable[Member], idle: list[Tensor]) -> None:
        stacks: dict[tuple[Any, ...], list[Member]] = {}
        for m in members:
            key: tuple[Any, ...] = (m.index, m.name)
            if _stacks(m):
                buffer = m.state.get("momentum_buffer")
                key = (m.param.shape, m.param.dtype, None if buffer is None else buffer.dtype)  # type: ignore[union-attr]
            stacks.setdefault(key, []).append(m)
        self.batches = [_batch(part, group) for same in stacks.values() for part in _in_cache(same)]
        self.at: dict[int, list[Batch]] = {}
        for batch in self.batches:
            for m, single in zip(batch.members, batch.singles(), strict=True):
                self.at.setdefault(m.index, []).append(single)
        self.members = [m for b in self.batches for m in b.members]
        self.is_plain = all(b.is_plain for b in self.batches)
        self.fused: Any = None
        self._settled = False
        self._params, self._idle, self._options = list(group["params"]), idle, layout_options(group)
        self._plain = [(m.param, b.dtype) for b in self.batches for m in b.members if isinstance(m.param, Parameter)]
        own = [m for b in self.batches for m in b.members if not isinstance(m.param, Segment)]
        self._states = [(m.param, m.state) for m in own]
        self._held = [(m.state.get, key, m.state.get(key)) for m in own for key in _HELD if key in m.state]

    def is_settled(self, window: int) -> bool:
        """Whether every block has left the window."""
        self._settled = self._settled or not any(b.is_early(window) for b in self.batches)
        return self._settled

    def is_current(self, group: dict[str, Any], states: Any) -> bool:
        """Whether the parameters, options and state are still those from which the batches were made."""
        params = group["params"]
        return (
            len(params) == len(self._params)
            and all(map(is_, params, self._params))
            and self._options == layout_options(group)
            and all(p.grad is None for p in self._idle)
            and all(states.get(p) is state for p, state in self._states)
            and all(get(key) is tensor for get, key, tensor in self._held)
            and all(p.dtype is dtype for p, dtype in self._plain)
        )


def layout_options(group: dict[str, Any]) -> tuple[Any, ...]:
    """The options that determine the layout of a parameter's state."""
    names = ("scaling", "token_rows", "momentum_dtype", "stochastic_rounding")
    return (float(group["momentum"]) > 0, *(group[name] for name in names))


def _in_cache(same: list[Member]) -> Iterator[list[Member]]:
    """Split a stack into parts whose temporaries fit in the cache of a core."""
    size = max(1, _STACK // max(1, same[0].param.numel()))
    for i in range(0, len(same), size):
        yield same[i : i + size]


def _stacks(m: Member) -> bool:
    """Whether the state of a block may be a view of the tensors of a batch."""
    p = m.param
    if isinstance(p, Segment) or type(p) not in (Parameter, Tensor) or not p.is_cpu or p.numel() > _SMALL:
        return False
    buffer = m.state.get("momentum_buffer")
    return "rounding_step" not in m.state and (buffer is None or buffer.dtype != torch.int8)


def _batch(same: list[Member], group: dict[str, Any]) -> Batch:
    shape = same[0].param.shape
    layout, columns = channels(shape, group["scaling"]), column_channels(shape, group["scaling"])
    together = {key: _together(same, key) for key in ("momentum_buffer", "scale", "column_scale", "calibration_step")}
    scale, counts = together["scale"], together["calibration_step"]
    assert scale is not None
    assert counts is not None
    batch = Batch(same, layout, together["momentum_buffer"], scale, counts)
    if columns is not None and (column_scale := together["column_scale"]) is not None:
        batch.add_columns(columns, column_scale)
    return batch


def _together(same: list[Member], key: str) -> Tensor | None:
    """Stack one state entry of several blocks into one tensor. The entries become views of it."""
    own = [to_local(m.state[key]) for m in same if key in m.state]
    if len(own) < 2:
        return own[0].unsqueeze(0) if own else None
    stacked = torch.stack(own)
    for i, m in enumerate(same):
        m.state[key] = stacked[i]
    return stacked
