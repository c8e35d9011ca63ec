"""Figures and yardsticks of a pretraining run: loss curves, the peak of the machine, the cost of a token."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

# Dense bf16 and fp16 tensor-core peaks in FLOP/s from the makers' data sheets; the first name that fits wins.
GPU_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def matmul_peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that `device` can reach and where the number comes from.

    A data sheet where the GPU is known and `dtype` uses its tensor cores; else the fastest of some square products
    with the threads in use now.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for model, peak in GPU_PEAKS.items():
            if model in name:
                return peak, f"data sheet, {name}, {dtype}"
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    fastest = float("inf")
    until = time.perf_counter() + 1.0  # the first products warm the threads and the kernels
    while time.perf_counter() < until:
        began = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * size**3 / fastest, f"measured, {size}x{size} {dtype} products"


def model_flops_per_token(config: Any, block_size: int) -> int:
    """FLOPs of forward and backward per token of a GPT-2: 6 per matrix parameter, plus attention.

    The matrices are the layers' (12 width^2 each) and the output projection; attention adds 12 layers width block_size,
    not halved for the causal mask (PaLM, arXiv 2204.02311, appendix B).
    """
    matrices = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    return int(6 * matrices + 12 * config.n_layer * config.n_embd * block_size)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process held: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def label(record: Mapping[str, Any]) -> str:
    """What names a run in a legend: optimizer, its options, learning rate."""
    config = record["config"]
    parts = [str(config.get("optim")), str(config.get("optim_args") or ""), f"lr {config.get('learning_rate'):g}"]
    return ", ".join(filter(None, parts))


def draw_curves(
    records: Sequence[Mapping[str, Any]], path: Path | Any, axes: Sequence[str] = ("tokens", "seconds")
) -> None:
    """Training (thin) and validation (marked) loss of each record over each of `axes`, as a PNG.

    Args:
        path: a file name or a binary stream.
        axes: `step`, `tokens` or `seconds`, a panel for each.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(axes), 4.4), layout="constrained")
    FigureCanvasAgg(figure)  # no global state, no display
    names = {"step": "step", "tokens": "tokens", "seconds": "seconds of training"}
    for panel, axis in zip(figure.subplots(1, len(axes), sharey=True, squeeze=False)[0], axes, strict=True):
        for number, record in enumerate(records):
            color = f"C{number % 10}"
            train, validation = (record["curves"][split] for split in ("train", "validation"))
            panel.plot([row[axis] for row in train], [row["loss"] for row in train], color=color, lw=0.8, alpha=0.5)
            panel.plot(
                [row[axis] for row in validation],
                [row["loss"] for row in validation],
                color=color,
                marker="o",
                ms=3,
                label=label(record),
            )
        panel.set_xlabel(names[axis])
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("loss (line: training, dots: validation)")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, format="png", dpi=110)
