"""Chooses the update path for each block: Triton on CUDA, else foreach on CUDA, else plain torch operations."""

import importlib
import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hf_sai.kernels import Blocks, update_foreach, update_plain
from hf_sai.options import Hyper


def update_blocks(many: Sequence[Blocks], hyper: Hyper, foreach: bool | None, fused: bool | None) -> None:
    """Update each block by the path that ``foreach``, ``fused`` and the block's tensors allow.

    If both are None, the path is fused on CUDA if Triton is installed, else foreach on CUDA, else plain. With
    ``fused=True``, only blocks that are not contiguous use the other paths.
    """
    by_triton: list[Blocks] = []
    rest: list[Blocks] = []
    for b in many:
        p = b.params[0]
        requested = fused if fused is not None else not foreach and p.is_cuda
        able = requested and why_not_fused(p) is None and _triton_path().fits_fused(b)
        (by_triton if able else rest).append(b)
    if by_triton:
        _triton_path().update_fused(by_triton, hyper)
    by_foreach = [b for b in rest if foreach or (foreach is None and b.params[0].is_cuda)]
    if by_foreach:
        update_foreach(by_foreach, hyper)
    if len(by_foreach) < len(rest):
        update_plain([b for b in rest if not (foreach or (foreach is None and b.params[0].is_cuda))], hyper)
    counters = [b.counter for b in many if b.counter is not None]
    if counters:
        torch._foreach_add_(counters, 1)


def prepare(many: Sequence[Blocks], fused: bool | None) -> Any:
    """Prepare the blocks for many steps of the fused path. Return None if it cannot update all of them."""
    for b in many:
        p = b.params[0]
        if not (fused or p.is_cuda) or why_not_fused(p) is not None or not _triton_path().fits_fused(b):
            return None
    return _triton_path().FusedBlocks(many) if many else None


def fused_moments(grads: Sequence[Tensor | None]) -> dict[int, tuple[float, float]]:
    """The sum and the sum of squares about the mean, for each flat gradient that the fused path can measure."""
    able = {i: g for i, g in enumerate(grads) if g is not None and g.numel() and why_not_fused(g) is None}
    if not able:
        return {}
    return dict(zip(able, _triton_path().gradient_moments(list(able.values())), strict=True))


def why_not_fused(param: Tensor) -> str | None:
    """The reason why the fused path cannot update a parameter, or None if it can."""
    if not param.is_cuda and not (param.is_cpu and triton_is_interpreted()):
        return f"it is on {param.device.type}, but the fused path needs CUDA"
    if not _has_triton():
        return "Triton is not installed"
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its dtype is {param.dtype}, but the fused path computes in float32"
    return None


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _triton_path() -> ModuleType:
    """The module of the fused path, imported on first use: Triton is optional and takes a second to load."""
    return importlib.import_module("hf_sai.fused")


@cache
def triton_is_interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU, for debugging and in this package's tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
