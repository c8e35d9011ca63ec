"""What a pretraining run reports: its record, the yardsticks in it, and the figures."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from hf_sai.bench.state_bytes import optimizer_state_bytes
from hf_sai.gsnr_plots import plot_drift, plot_kinds, plot_over_time
from recipes.common.measure import peak_memory_bytes
from recipes.common.provenance import run_record
from recipes.common.records import label

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


def _flops_per_token(model: Any, block_size: int) -> int:
    """`model_flops_per_token` of a GPT-2; the same count from the weights of any other model."""
    config = model.config
    if config.model_type == "gpt2":
        return model_flops_per_token(config, block_size)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)  # tied embeddings once: as the output
    if not config.tie_word_embeddings:
        matrices -= model.get_input_embeddings().weight.numel()
    return 6 * matrices + 12 * config.num_hidden_layers * config.hidden_size * block_size


def summary(record: Mapping[str, Any]) -> str:
    """One line for the end of a run on the command line."""
    final, seconds = record["final"], record["train_seconds"]
    parts = [f"{name.replace('_', ' ')} {final[name]:.4f}" for name in ("eval_loss", "train_loss") if final.get(name)]
    parts += [f"{record['steps']} steps, {record['tokens']:,} tokens, {seconds} s"]
    return f"{label(record)}: {', '.join(parts).replace('eval', 'validation')}{', DIVERGED' * record['diverged']}"


def diverged(loss: float, limit: float = math.inf) -> bool:
    """Whether a loss is not a number, infinite or above `limit`."""
    return not math.isfinite(loss) or loss > limit


def build_record(trainer: Any, corpus: Any, options: Any, data: dict[str, Any]) -> dict[str, Any]:
    """The results of a finished run, for `record.json`.

    Args:
        trainer: a `PretrainTrainer` after training.
        corpus, options: the other two groups of settings.
        data: what the run was trained on.
    """
    model, args, history = trainer.accelerator.unwrap_model(trainer.model), trainer.args, trainer.state.log_history

    def curve(key: str) -> list[dict[str, Any]]:
        return [
            {"step": row["step"], "tokens": row["tokens"], "seconds": row["train_seconds"], "loss": row[key]}
            for row in history
            if key in row
        ]

    train, validation = curve("loss"), curve("eval_loss")
    final = {"train_loss": train[-1]["loss"] if train else None}
    if validation:
        final |= {"eval_loss": validation[-1]["loss"], "eval_perplexity": math.exp(min(validation[-1]["loss"], 700.0))}
        final["best_eval_loss"] = min((row["loss"] for row in validation if math.isfinite(row["loss"])), default=None)
    timing = trainer.timer.summary()
    speed: dict[str, Any] = {"tokens_per_step": trainer.tokens_per_step, **timing}
    if timing["steps_timed"]:
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        peak, source = matmul_peak(args.device, dtype)
        flops = _flops_per_token(model, options.block_size)
        rate = 1000 * trainer.tokens_per_step / timing["step_ms"]
        speed |= {
            "tokens_per_second": round(rate, 1),
            "model_flops_per_token": flops,
            "model_flops_utilisation": round(rate * flops / (peak * args.world_size), 4),
            "peak_flops": peak,
            "peak_flops_source": source,
        }
    record = run_record(
        "pretrain",
        (corpus, options, args),
        trainer.began,
        model={
            "parameters": model.num_parameters(),
            "parameters_without_embeddings": model.num_parameters(exclude_embeddings=True),
        },
        data=data,
        processes=args.world_size,
        steps=trainer.state.global_step,
        tokens=trainer.state.global_step * trainer.tokens_per_step,
        train_seconds=round(max((row.get("train_seconds", 0.0) for row in history), default=0.0), 1),
        final=final,
        diverged=any(diverged(row["loss"], args.max_loss) for row in train + validation),
        speed=speed,
        optimizer_state_bytes=optimizer_state_bytes(trainer.optimizer),
        peak_memory_bytes=peak_memory_bytes(args.device),
        curves={"train": train, "validation": validation},
    )
    for files in ("train_files", "validation_files"):  # a record holds no path of the machine it was made on
        record["config"][files] = [Path(name).name for name in record["config"][files]]
    return record


def draw_gsnr(record: Mapping[str, Any], folder: Path) -> None:
    """The figures of a `gsnr.json`, beside it: by kind of block at first, over time, drift of the scales.

    Those that would show nothing are left out: all of them where no gradient was finite.
    """
    if not record["blocks"]:
        return
    first = [{**b, "gsnr": next(x for x in b["gsnr_now"] if x is not None)} for b in record["blocks"]]
    plot_kinds(first, folder / "gsnr_kinds.png", "g-SNR by kind of block, each block's first gradient")
    plot_over_time(record, folder / "gsnr_time.png")
    if any(block["drift"] for block in record["blocks"]):
        plot_drift(record, folder / "gsnr_drift.png")


def _figure(panels: int, sharey: bool = False) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * panels, 4.4), layout="constrained")
    FigureCanvasAgg(figure)  # no global state, no display
    return figure, figure.subplots(1, panels, squeeze=False, sharey=sharey)[0]


def _plain(text: str) -> str:
    """Labels are shown as they are: no mathematics between dollars, none hidden for a leading underscore; cut at 60."""
    text = " ".join(text.split())
    return " " + (text if len(text) <= 60 else f"{text[:59]}…").replace("$", r"\$")


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
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, format="png", dpi=110)


def draw_costs(
    records: Sequence[Mapping[str, Any]], path: Path | BinaryIO, labels: Sequence[str] | None = None
) -> None:
    """Bars of the optimizer's median time in a step and of its state, as a PNG."""
    figure, panels = _figure(2, sharey=True)
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
        panel.margins(x=0.2)
        panel.set_xlabel(title)
    panels[0].invert_yaxis()  # of both: they share it
    figure.savefig(path, format="png", dpi=110)
