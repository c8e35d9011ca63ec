"""From gradients to g-SNR to scales: the calibration of SGD-SaI, with every edge case it meets.

The g-SNR of a block is ``||g||_2 / (std(g) + eps)`` (equation 11 of arXiv 2412.11768, with ``eps`` beside the
standard deviation, where it does not change the answer for small gradients). The statistics of a block are those of
its whole gradient, also where the gradient is a sharded ``DTensor``.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

# What almost every tensor of a step is; asking for the exact type is ten times faster than isinstance.
_PLAIN = (Tensor, torch.nn.Parameter)
# Elements handled at once: small enough to stay in a CPU cache, large enough to fill a GPU.
_CPU_CHUNK = 1 << 18
_GPU_CHUNK = 1 << 24
# Below this share of its root mean square, a float32 standard deviation is rounding noise.
_CONSTANT = 8 * torch.finfo(torch.float32).eps
# Mean squares outside this range have lost digits (or all of them) in float32.
_SAFE_MEAN_SQUARE = (1e-30, 1e30)
# As in Adam: a gradient below it is rounding noise (that of a key's bias in attention, say) and is not made up for.
_ADAM_EPS = 1e-8


class BlockStatistics(NamedTuple):
    """What one gradient says about its block.

    Attributes:
        kind: ``"usable"``, ``"constant"`` (usable; its g-SNR is sqrt(d), because the standard deviation says nothing),
            ``"zero"`` or ``"nonfinite"`` (neither of them calibrates a block).
        numel: d, the number of elements of the whole block.
        gsnr: the g-SNR, 0.0 where the gradient is not usable.
        norm: the Euclidean norm of the gradient.
        std: its unbiased standard deviation, 0.0 for one element.
        active_rms: sqrt(sum g^4 / (3 sum g^2)): the root mean square for normally distributed elements, and that of
            the active part where most elements are nearly zero; NaN where it was not asked for.
    """

    kind: Literal["usable", "constant", "zero", "nonfinite"]
    numel: int
    gsnr: float
    norm: float
    std: float
    active_rms: float = math.nan


class Segment:
    """A block of which this process holds a part, or nothing, in a flat buffer: DeepSpeed ZeRO 1 and 2.

    Attributes:
        name: what the block is called in messages.
        part: what this process holds of it, one dimension, a view of the buffer.
        group: the processes that hold its parts.
        device: where they talk to each other; the buffer can be in host memory.
    """

    def __init__(self, name: str, part: Tensor, numel: int, group: Any, device: torch.device) -> None:
        self.name, self.part, self.group, self.device = name, part, group, device
        self._numel = numel

    def numel(self) -> int:
        """The number of elements of the whole block."""
        return self._numel


def is_dtensor(tensor: Tensor | Segment) -> bool:
    """Whether ``tensor`` is a ``DTensor``, asked without importing ``torch.distributed.tensor``."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def to_local(tensor: Tensor | Segment) -> Tensor:
    """The part of ``tensor`` that this process holds (the tensor itself if it is not sharded)."""
    if type(tensor) in _PLAIN:
        return tensor  # type: ignore[return-value]
    if isinstance(tensor, Segment):
        return tensor.part
    if not is_dtensor(tensor):
        return tensor
    local = tensor.to_local()  # type: ignore[attr-defined]
    if hasattr(local, "wait"):  # still on its way from the last collective
        local = local.wait()
    assert isinstance(local, Tensor)
    return local


# From local gradients to the sum and the sum of squares about the mean of those that it can measure, by their index.
Moments = Callable[[Sequence[Tensor | None]], dict[int, tuple[float, float]]]


def measure(
    params: Sequence[Tensor | Segment],
    grads: Sequence[Tensor | None],
    eps: Sequence[float],
    moments: Moments = lambda grads: {},
    active: Sequence[bool] | None = None,
) -> list[BlockStatistics]:
    """The statistics of each gradient, two passes in float32, two host synchronisations for all of them together.

    One more of each for the ``active_rms``.

    A gradient that is a sharded ``DTensor`` is reduced over every mesh dimension it is split on, one collective a pass
    and group of processes, however many blocks there are. Every process must therefore pass the same sharded
    ``params`` in the same order; ``None`` as the gradient of one stands for "no gradient on this process".

    Args:
        params: the blocks, any shape, real floating point; sharded ones as DTensor or Segment.
        grads: their gradients, each with its block's shape and placements, or ``None``.
        eps: what is added to each standard deviation, in units of the gradient.
        moments: measures gradients in a faster way, as the fused path does; those that it leaves out are measured here.
        active: of which gradients to measure the ``active_rms`` too, the same on every process; none by default.

    Returns:
        One :class:`BlockStatistics` a block, the same on every process.
    """
    numels = [p.numel() for p in params]
    locals_ = [None if g is None else dense_view(to_local(g.detach())) for g in grads]

    known = moments(locals_)

    def sums(
        which: Sequence[int], moment: Callable[[int, Tensor], list[Tensor]], given: dict[int, float]
    ) -> list[float]:
        parts = [[] if (g := locals_[i]) is None or i in given else moment(i, g) for i in which]
        own = [given.get(i, math.fsum(x)) for i, x in zip(which, _to_host(parts), strict=True)]
        return _all_reduce([params[i] for i in which], own)

    everything = range(len(params))
    totals = sums(everything, lambda i, g: [g.sum(dtype=_accumulator(g))], {i: x for i, (x, _) in known.items()})
    means = [t / n if n else 0.0 for t, n in zip(totals, numels, strict=True)]
    shifted = {
        i: squares + g.numel() * (total / g.numel() - means[i]) ** 2
        for i, (total, squares) in known.items()
        if (g := locals_[i]) is not None
    }
    centred = sums(everything, lambda i, g: _centred_squares(g, means[i], _accumulator(g)), shifted)

    low, high = _SAFE_MEAN_SQUARE
    doubtful = [i for i in everything if numels[i] and not low < centred[i] / numels[i] + means[i] ** 2 < high]
    # Exactly zero, overflown, underflown or not finite: the largest magnitude tells, then float64 measures.
    if doubtful:
        largest = sums(doubtful, lambda i, g: [_largest_magnitude(g)], {})
        again = [i for i, x in zip(doubtful, largest, strict=True) if math.isfinite(x) and x > 0]
        for i, x in zip(doubtful, largest, strict=True):
            totals[i] = centred[i] = 0.0 if x == 0 else math.nan
        for i, total in zip(again, sums(again, lambda i, g: [g.sum(dtype=torch.float64)], {}), strict=True):
            totals[i], means[i] = total, total / numels[i]
        for i, squares in zip(
            again, sums(again, lambda i, g: _centred_squares(g, means[i], torch.float64), {}), strict=True
        ):
            centred[i] = squares
    found = [_statistics(n, t, c, e) for n, t, c, e in zip(numels, totals, centred, eps, strict=True)]
    # The fourth powers of a gradient do not fit in float32, those of its elements in units of their RMS do.
    wanted = [i for i in everything if active and active[i] and found[i].kind in ("usable", "constant")]
    rms = {i: found[i].norm / math.sqrt(numels[i]) for i in wanted}
    if wanted:
        fourth = sums(wanted, lambda i, g: _fourth_powers(g, rms[i]), {})
        for i, powers in zip(wanted, fourth, strict=True):
            found[i] = found[i]._replace(active_rms=rms[i] * math.sqrt(powers / numels[i] / 3.0))
    return found


def scales(blocks: Sequence[BlockStatistics], scaling: str, largest_gsnr: float = 0.0) -> list[float]:
    """The constant that multiplies the learning rate of each block, for blocks calibrated in the same step.

    Args:
        blocks: usable blocks.
        scaling: ``"raw"`` (the g-SNR itself), ``"max"`` (divided by the largest g-SNR, line 14 of Algorithm 1),
            ``"adamw"`` (times one constant, so that the first update of ``blocks`` has the root mean square that
            AdamW's first update has, which is the learning rate) or ``"floor"`` (that, and at least what gives the
            first update of the block's own active part this root mean square; needs the ``active_rms``, and takes the
            block's RMS where that is larger).
        largest_gsnr: for ``"max"``, the largest g-SNR of the blocks calibrated in earlier steps.
    """
    if scaling == "raw":
        return [b.gsnr for b in blocks]
    if scaling == "max":
        largest = max([largest_gsnr, *(b.gsnr for b in blocks)])
        return [min(1.0, b.gsnr / largest) for b in blocks]
    update_norm = math.hypot(*(b.gsnr * b.norm for b in blocks))
    factor = math.sqrt(sum(b.numel for b in blocks)) / update_norm
    shared = [b.gsnr * factor for b in blocks]
    if scaling == "adamw":
        return shared
    rms = [max(b.active_rms, b.norm / math.sqrt(b.numel)) for b in blocks]
    return [max(s, 1.0 / (r + _ADAM_EPS)) for s, r in zip(shared, rms, strict=True)]


def dense_view(tensor: Tensor) -> Tensor:
    """``tensor`` as one dimension, its elements in the order of memory; a copy only where it has holes."""
    if not tensor.is_contiguous():
        tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    return tensor.reshape(-1)


def chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Pieces of a one-dimensional tensor of the size that suits its device."""
    return iter(torch.split(tensor, _chunk_size(tensor.device)))


def _chunk_size(device: torch.device) -> int:
    return _CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK


def _accumulator(grad: Tensor) -> torch.dtype:
    return torch.float64 if grad.dtype == torch.float64 else torch.float32


def _centred_squares(grad: Tensor, mean: float, dtype: torch.dtype) -> list[Tensor]:
    """The sums of ``(g - mean)^2`` over the chunks of ``grad``, with scratch space of one chunk."""
    sums = []
    scratch = torch.empty(min(grad.numel(), _chunk_size(grad.device)), dtype=dtype, device=grad.device)
    for chunk in chunks(grad):
        deviation = scratch[: chunk.numel()].copy_(chunk).sub_(mean)
        sums.append(deviation.square_().sum())
    return sums


def _fourth_powers(grad: Tensor, unit: float) -> list[Tensor]:
    """The sums of ``(g / unit)^4`` over the chunks of ``grad``, with scratch space of one chunk."""
    sums = []
    low, high = _SAFE_MEAN_SQUARE
    dtype = _accumulator(grad) if low < unit * unit < high else torch.float64
    scratch = torch.empty(min(grad.numel(), _chunk_size(grad.device)), dtype=dtype, device=grad.device)
    for chunk in chunks(grad):
        sums.append(scratch[: chunk.numel()].copy_(chunk).div_(unit).square_().square_().sum())
    return sums


def _largest_magnitude(grad: Tensor) -> Tensor:
    if not grad.numel():
        return torch.zeros((), device=grad.device)
    largest: Tensor = torch.linalg.vector_norm(grad, ord=math.inf)
    return largest


def _to_host(parts: Sequence[Sequence[Tensor]]) -> list[list[float]]:
    """The values of many scalar tensors, with one synchronisation a device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for part in parts:
        for x in part:
            by_device.setdefault(x.device, []).append(x)
    values = {d: iter(torch.stack([x.double() for x in xs]).tolist()) for d, xs in by_device.items()}
    return [[next(values[x.device]) for x in part] for part in parts]


def reduction_groups(params: Sequence[Tensor | Segment]) -> dict[Any, tuple[list[int], str | torch.device]]:
    """The groups of processes that hold different shards of the same blocks: which blocks, and the device they talk on.

    Collectives over these groups, in this order, make sums over local elements sums over whole blocks.
    """
    groups: dict[Any, tuple[list[int], str | torch.device]] = {}
    for i, p in enumerate(params):
        if isinstance(p, Segment):
            groups.setdefault(p.group, ([], p.device))[0].append(i)
        elif is_dtensor(p):
            mesh = p.device_mesh  # type: ignore[attr-defined]
            for dim, placement in enumerate(p.placements):  # type: ignore[attr-defined]
                # Not `is_shard()`: the strided shards of FSDP2 with tensor parallelism answer False to it.
                if not placement.is_replicate():
                    groups.setdefault(mesh.get_group(dim), ([], mesh.device_type))[0].append(i)
    return groups


def _all_reduce(params: Sequence[Tensor | Segment], values: list[float]) -> list[float]:
    """``values`` summed over the processes that hold different shards of the same block, one collective a group."""
    for group, (members, device) in reduction_groups(params).items():
        vector = torch.tensor([values[i] for i in members], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(vector, group=group)
        for i, value in zip(members, vector.tolist(), strict=True):
            values[i] = value
    return values


def _statistics(numel: int, total: float, centred: float, eps: float) -> BlockStatistics:
    if not numel:
        return BlockStatistics("zero", 0, 0.0, 0.0, 0.0)
    if not (math.isfinite(total) and math.isfinite(centred)):
        return BlockStatistics("nonfinite", numel, 0.0, math.nan, math.nan)
    # Both terms are positive: no digits cancel, unlike in E[g^2] - E[g]^2.
    norm = math.sqrt(centred + total * total / numel)
    if norm == 0.0:
        return BlockStatistics("zero", numel, 0.0, 0.0, 0.0)
    std = math.sqrt(centred / (numel - 1)) if numel > 1 else 0.0
    if numel > 1 and std > _CONSTANT * norm / math.sqrt(numel):
        return BlockStatistics("usable", numel, norm / (std + eps), norm, std)
    return BlockStatistics("usable" if numel == 1 else "constant", numel, math.sqrt(numel), norm, std)
