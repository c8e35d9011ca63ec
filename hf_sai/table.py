"""The measured g-SNR and scale of each block, as rows to print, log or plot."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_sai.blocks import block_names
from hf_sai.optimizer import SGDSaI
from hf_sai.options import check_model
from hf_sai.shards import is_dtensor


class GSNRRow(NamedTuple):
    """One block of a model, as listed by :func:`gsnr_table`.

    Attributes:
        name: the parameter's name in the model.
        shape: its shape, or the global shape if the parameter is a sharded ``DTensor``.
        numel: d, its number of elements.
        gsnr: its g-SNR (a ratio, without a unit), 0.0 until it is calibrated.
        scale: the factor of the learning rate, 0.0 until it is calibrated. If each channel has a scale, this is the
            root of the harmonic mean of their squares.
        calibrated: whether it has had a usable gradient.

    Example:
        >>> GSNRRow("weight", (2, 4), 8, gsnr=2.9, scale=1.5, calibrated=True).shape
        (2, 4)
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    gsnr: float
    scale: float
    calibrated: bool


def gsnr_table(optimizer: Any, model: nn.Module) -> list[GSNRRow]:
    """The g-SNR and scale of every block that the optimizer trains, in the model's order.

    Equation 11 of the paper (arXiv 2412.11768) defines g-SNR. The call costs one host synchronisation. It gathers
    sharded scales (FSDP2, TP), so all processes must call it together.

    Args:
        optimizer: an :class:`SGDSaI`, or a wrapper with it as ``.optimizer`` (accelerate's).
        model: the model that the optimizer trains. It may be compiled or wrapped for data parallelism.

    Returns:
        One row for each trained parameter. Tied parameters are one block. Parameters of the optimizer that are not in
        the model come last, named by their index in the param groups.

    Raises:
        TypeError: if the optimizer is not an SGDSaI.
        ValueError: if the model is not a ``torch.nn.Module``.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> optimizer = SGDSaI(model.parameters(), lr=1e-3)
        >>> model(torch.ones(3, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> [(row.name, row.numel, row.calibrated) for row in gsnr_table(optimizer, model)]
        [('weight', 8, True), ('bias', 2, True)]
    """
    sgd_sai = unwrap_sgd_sai(optimizer)
    check_model(model)
    blocks = sgd_sai.block_states()
    states = {p: state for _, p, state in blocks}
    named = {p: block.name for p, block in block_names(model).items() if p in states}
    names: dict[Tensor, str] = {**named, **{p: index for index, p, _ in blocks if p not in named}}
    measured = _to_host([states[p] for p in names])
    return [
        GSNRRow(name, tuple(p.shape), p.numel(), gsnr, scale, gsnr > 0.0)
        for (p, name), (gsnr, scale) in zip(names.items(), measured, strict=True)
    ]


def scale_of_block(scale: Tensor) -> Tensor:
    """One scale, 0-dim float32, that summarizes the scales of a block's channels; 0 for a block without a scale.

    If the scales are sharded, all processes must call this, because it gathers them.
    """
    whole: Tensor = scale.full_tensor() if is_dtensor(scale) else scale  # type: ignore[attr-defined]
    if whole.numel() == 1:
        return whole.reshape(())
    mean = torch.where(whole > 0, whole, torch.inf).pow(-2).mean()
    return torch.where(mean > 0, mean.rsqrt(), torch.zeros_like(mean))


def unwrap_sgd_sai(optimizer: Any) -> SGDSaI:
    """Return the SGDSaI that ``optimizer`` is or wraps. Raise TypeError if there is none."""
    inner = optimizer
    while not isinstance(inner, SGDSaI):
        if not hasattr(inner, "optimizer"):
            raise TypeError(f"optimizer must be an SGDSaI, got {type(inner).__name__}; only SGDSaI measures g-SNR")
        inner = inner.optimizer
    return inner


def _to_host(states: Sequence[Mapping[str, Tensor]]) -> list[tuple[float, float]]:
    """(gsnr, scale) of each state, with one synchronisation. They are zeros for a block without state."""
    pairs = [(s["gsnr"], scale_of_block(s["scale"])) for s in states if s]
    if not pairs:
        return [(0.0, 0.0)] * len(states)
    device = pairs[0][0].device
    values = iter(torch.stack([x.to(device) for pair in pairs for x in pair]).tolist())
    return [(next(values), next(values)) if s else (0.0, 0.0) for s in states]
