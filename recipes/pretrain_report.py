"""Figures and yardsticks of a pretraining run: loss curves, the peak of the machine, the cost of a token."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

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


def _figure(panels: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * panels, 4.4), layout="constrained")
    FigureCanvasAgg(figure)  # no global state, no display
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _plain(text: str) -> str:
    """Labels are shown as they are: no mathematics between dollars, none hidden for a leading underscore."""
    return " " + text.replace("$", r"\$")


def draw_curves(
    records: Sequence[Mapping[str, Any]], path: Path | BinaryIO, labels: Sequence[str] | None = None
) -> None:
    """Training (thin) and validation (dotted) loss of each record over tokens and over seconds, as a PNG."""
    figure, panels = _figure(2)
    for panel, axis in zip(panels, ("tokens", "seconds"), strict=True):
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
                label=_plain(labels[number] if labels else label(record)),
            )
        panel.set_xlabel("tokens" if axis == "tokens" else "seconds of training")
        panel.set_ylabel("loss (thin: training, dots: validation)")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    figure.savefig(path, format="png", dpi=110)


def draw_costs(
    records: Sequence[Mapping[str, Any]], path: Path | BinaryIO, labels: Sequence[str] | None = None
) -> None:
    """Bars of the optimizer's median time in a step and of its state, as a PNG."""
    figure, panels = _figure(2)
    names = [_plain(labels[number] if labels else label(record)) for number, record in enumerate(records)]
    times = [record["speed"].get("optimizer_ms", 0.0) for record in records]
    sizes = [record["optimizer_state_bytes"] / 2**20 for record in records]
    for panel, values, title in (
        (panels[0], times, "optimizer step, ms"),
        (panels[1], sizes, "optimizer state, MiB"),
    ):
        places = range(len(values))
        bars = panel.barh(places, values, color=[f"C{place % 10}" for place in places])
        panel.bar_label(bars, fmt="%.3g", padding=3)
        panel.set_yticks(places, names)
        panel.invert_yaxis()
        panel.margins(x=0.15)
        panel.set_xlabel(title)
    figure.savefig(path, format="png", dpi=110)
