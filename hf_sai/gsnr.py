"""The g-SNR of gradients and the paper's scales, including every edge case.

The g-SNR of a block is ``||g||_2 / (std(g) + eps)`` (equation 11 of arXiv 2412.11768). ``eps`` is added to the standard
deviation, so it does not change the result for small gradients. The statistics of a block are those of its whole
gradient, even if the gradient is a sharded ``DTensor``.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hf_sai.shards import Segment, reduction_groups, to_local

# The number of elements that are processed at once: small enough for a CPU cache, large enough to fill a GPU.
_CPU_CHUNK = 1 << 18
_GPU_CHUNK = 1 << 24
# A float32 standard deviation below this fraction of the root mean square is rounding noise.
_CONSTANT = 8 * torch.finfo(torch.float32).eps
# A mean square outside this range has lost some or all of its digits in float32.
_SAFE_MEAN_SQUARE = (1e-30, 1e30)


class BlockStatistics(NamedTuple):
    """The statistics of one gradient.

    Attributes:
        kind: ``"usable"``, ``"constant"``, ``"zero"`` or ``"nonfinite"``. A constant gradient is usable. Its g-SNR is
            set to sqrt(d), because its standard deviation is only rounding noise. A gradient that is zero or not finite
            does not calibrate a block.
        numel: d, the number of elements of the whole block.
        gsnr: the g-SNR, or 0.0 if the gradient is not usable.
        norm: the Euclidean norm of the gradient.
        std: the unbiased standard deviation of the gradient, 0.0 for one element.
    """

    kind: Literal["usable", "constant", "zero", "nonfinite"]
    numel: int
    gsnr: float
    norm: float
    std: float


# A function that maps the indices of the local gradients that it can measure to (sum, sum of squares about the mean).
Moments = Callable[[Sequence[Tensor | None]], dict[int, tuple[float, float]]]


def measure(
    params: Sequence[Tensor | Segment],
    grads: Sequence[Tensor | None],
    eps: Sequence[float],
    moments: Moments = lambda grads: {},
) -> list[BlockStatistics]:
    """Compute the statistics of each gradient, with two passes in float32 and two host synchronisations in total.

    A sharded ``DTensor`` gradient is reduced over every mesh dimension on which it is split. Each pass needs one
    collective per process group for any number of blocks. So every process must pass the same sharded ``params`` in the
    same order. If the gradient of such a block is ``None``, it counts as zeros on this process.

    Args:
        params: the blocks, real floating-point tensors of any shape. Sharded blocks are a DTensor or a Segment.
        grads: their gradients, each with its block's shape and placements, or ``None``.
        eps: added to each standard deviation, in units of the gradient.
        moments: a faster way to measure gradients, such as the fused path. The other gradients are measured here.

    Returns:
        One :class:`BlockStatistics` per block, the same on every process.
    """
    numels = [p.numel() for p in params]
    locals_ = [None if g is None else dense_view(to_local(g.detach())) for g in grads]

    measured = moments(locals_)

    def sums(
        which: Sequence[int], moment: Callable[[int, Tensor], list[Tensor]], given: dict[int, float]
    ) -> list[float]:
        parts = [[] if (g := locals_[i]) is None or i in given else moment(i, g) for i in which]
        own = [given.get(i, math.fsum(x)) for i, x in zip(which, _to_host(parts), strict=True)]
        return sum_over_processes([params[i] for i in which], own)

    everything = range(len(params))
    totals = sums(everything, lambda i, g: [g.sum(dtype=_accumulator(g))], {i: x for i, (x, _) in measured.items()})
    means = [t / n if n else 0.0 for t, n in zip(totals, numels, strict=True)]
    missing = {i: to_local(p).numel() for i, (p, g) in enumerate(zip(params, locals_, strict=True)) if g is None}
    shifted = {
        i: squares + g.numel() * (total / g.numel() - means[i]) ** 2
        for i, (total, squares) in measured.items()
        if (g := locals_[i]) is not None
    }
    shifted |= {i: n * means[i] ** 2 for i, n in missing.items()}
    centred = sums(everything, lambda i, g: _centred_squares(g, means[i], _accumulator(g)), shifted)

    low, high = _SAFE_MEAN_SQUARE
    doubtful = [i for i in everything if numels[i] and not low < centred[i] / numels[i] + means[i] ** 2 < high]
    # These are exactly zero, not finite, or have overflowed or underflowed. The largest magnitude shows which. Finite
    # nonzero gradients are measured again in float64.
    if doubtful:
        largest = sums(doubtful, lambda i, g: [_largest_magnitude(g)], {})
        again = [i for i, x in zip(doubtful, largest, strict=True) if math.isfinite(x) and x > 0]
        for i, x in zip(doubtful, largest, strict=True):
            totals[i] = centred[i] = 0.0 if x == 0 else math.nan
        for i, total in zip(again, sums(again, lambda i, g: [g.sum(dtype=torch.float64)], {}), strict=True):
            totals[i], means[i] = total, total / numels[i]
        shifted = {i: n * means[i] ** 2 for i, n in missing.items()}
        exact = sums(again, lambda i, g: _centred_squares(g, means[i], torch.float64), shifted)
        for i, squares in zip(again, exact, strict=True):
            centred[i] = squares
    return [_statistics(n, t, c, e) for n, t, c, e in zip(numels, totals, centred, eps, strict=True)]


def measure_stacked(grads: Tensor, eps: float) -> list[BlockStatistics]:
    """Compute the statistics of many small gradients of one shape, in float64, with one host synchronisation.

    Args:
        grads: (blocks, *shape of a block).
        eps: added to each standard deviation, in units of the gradient.
    """
    flat = grads.reshape(len(grads), -1).double()
    totals = flat.sum(1)
    centred = (flat - totals[:, None] / flat.shape[1]).square_().sum(1)
    pairs = torch.stack([totals, centred], dim=1).tolist()
    return [_statistics(flat.shape[1], total, squares, eps) for total, squares in pairs]


def paper_scales(gsnrs: Sequence[float], scaling: str, largest: float = 0.0) -> list[float]:
    """The factor of each block's learning rate under the paper's scalings.

    Args:
        gsnrs: the g-SNRs of usable blocks that are calibrated in the same step.
        scaling: ``"raw"`` (the g-SNR itself) or ``"max"`` (divided by the largest g-SNR, line 14 of Algorithm 1).
        largest: for ``"max"``, the largest g-SNR of the blocks calibrated in earlier steps.
    """
    if scaling == "raw":
        return list(gsnrs)
    largest = max([largest, *gsnrs])
    return [min(1.0, gsnr / largest) for gsnr in gsnrs]


def dense_view(tensor: Tensor) -> Tensor:
    """``tensor`` in one dimension, with its elements in memory order. It is a copy only if ``tensor`` has gaps."""
    if not tensor.is_contiguous():
        tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    return tensor.reshape(-1)


def chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Split a one-dimensional tensor into pieces of a size that suits its device."""
    return iter(torch.split(tensor, _chunk_size(tensor.device)))


def _chunk_size(device: torch.device) -> int:
    return _CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK


def _accumulator(grad: Tensor) -> torch.dtype:
    return torch.float64 if grad.dtype == torch.float64 else torch.float32


def _centred_squares(grad: Tensor, mean: float, dtype: torch.dtype) -> list[Tensor]:
    """The sums of ``(g - mean)^2`` over each chunk of ``grad``, with scratch space for one chunk."""
    sums = []
    scratch = torch.empty(min(grad.numel(), _chunk_size(grad.device)), dtype=dtype, device=grad.device)
    for chunk in chunks(grad):
        deviation = scratch[: chunk.numel()].copy_(chunk).sub_(mean)
        sums.append(deviation.square_().sum())
    return sums


def _largest_magnitude(grad: Tensor) -> Tensor:
    if not grad.numel():
        return torch.zeros((), device=grad.device)
    largest: Tensor = torch.linalg.vector_norm(grad, ord=math.inf)
    return largest


def _to_host(parts: Sequence[Sequence[Tensor]]) -> list[list[float]]:
    """The values of many scalar tensors, with one synchronisation per device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for part in parts:
        for x in part:
            by_device.setdefault(x.device, []).append(x)
    values = {d: iter(torch.stack([x.double() for x in xs]).tolist()) for d, xs in by_device.items()}
    return [[next(values[x.device]) for x in part] for part in parts]


def sum_over_processes(params: Sequence[Tensor | Segment], values: list[float]) -> list[float]:
    """Sum ``values`` over the processes that hold different shards of the same block, with one collective per group."""
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
    # Both terms are positive, so no digits cancel. They would in E[g^2] - E[g]^2.
    norm = math.sqrt(centred + total * total / numel)
    if norm == 0.0:
        return BlockStatistics("zero", numel, 0.0, 0.0, 0.0)
    std = math.sqrt(centred / (numel - 1)) if numel > 1 else 0.0
    if numel > 1 and std > _CONSTANT * norm / math.sqrt(numel):
        return BlockStatistics("usable", numel, norm / (std + eps), norm, std)
    return BlockStatistics("usable" if numel == 1 else "constant", numel, math.sqrt(numel), norm, std)
