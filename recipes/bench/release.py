"""Full fine-tuning of Llama-2 7B's shapes: peak memory and tokens per second with gradient release, and of rivals.

Random weights and tokens, bfloat16, activation checkpointing, sequence 1024, batch 1: what is measured is memory and
speed, not learning. Each optimizer trains a new model, one after the other.

    python -m recipes.bench.release --out recipes/results/bench_release.json
"""

from recipes.common.start import run_main

import argparse
import gc
import importlib
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_sai import SGDSaI
from hf_sai.bench.state_bytes import optimizer_state_bytes
from hf_sai.release import release_gradients
from recipes.common.files import write_json
from recipes.common.records import machine, versions

LLAMA_2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}
TINY = {**LLAMA_2_7B, "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY["num_attention_heads"] = 4


def _sgd_sai(model: torch.nn.Module) -> Any:
    optimizer = SGDSaI(model.parameters(), lr=1e-5, scaling="adamw", momentum_dtype="int8", stochastic_rounding=True)
    release_gradients(optimizer, model)
    return optimizer


def _adamw_8bit(model: torch.nn.Module) -> Any:
    try:
        package: Any = importlib.import_module("bitsandbytes.optim")
    except ModuleNotFoundError:
        package = importlib.import_module("torchao.optim")
    return package.AdamW8bit(model.parameters(), lr=1e-5)


RUNS: dict[str, Callable[[torch.nn.Module], Any]] = {
    "SGD-SaI, int8 momentum, gradient release": _sgd_sai,
    "AdamW 8-bit": _adamw_8bit,
    "Adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-5),
}


def make_model(config: dict[str, Any], device: str) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(LlamaConfig(**{**config, "use_cache": False, "loss_type": "ForCausalLM"}))
        finally:
            torch.set_default_dtype(previous)
    # transformers 6 keeps the first name only.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return model.train()


def train(name: str, config: dict[str, int], device: str, steps: int, length: int) -> dict[str, Any]:
    """`steps` training steps; peak memory of all of them, tokens per second of those after the first two."""
    cuda = device == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = make_model(config, device)
    optimizer = RUNS[name](model)
    generator = torch.Generator().manual_seed(1)
    batches = torch.randint(0, config["vocab_size"], (steps, 1, length), generator=generator).to(device)
    losses, times = [], []
    for batch in batches:
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(time.perf_counter() - begin)
    later = sorted(times[2:])
    return {
        "optimizer": name,
        "steps": steps,
        "tokens_per_step": length,
        "tokens_per_s": round(length / later[len(later) // 2], 1),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if cuda else None,
        "state_bytes": optimizer_state_bytes(optimizer),
        "first_step_s": round(times[0], 3),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "all_losses_finite": all(map(math.isfinite, losses)),
    }


def run_all(config: dict[str, int], device: str, steps: int, length: int, deadline: float) -> list[dict[str, Any]]:
    rows = []
    for name in RUNS:
        print(f"  {name}: {steps} training steps", file=sys.stderr, flush=True)
        if time.monotonic() > deadline:
            rows.append({"optimizer": name, "error": "not measured: out of time"})
            continue
        try:
            rows.append(train(name, config, device, steps, length))
        except ModuleNotFoundError as error:
            rows.append({"optimizer": name, "error": f"not installed: {error.name}"})
        except torch.OutOfMemoryError as error:
            rows.append({"optimizer": name, "error": str(error).splitlines()[0]})
    return rows


def as_table(rows: list[dict[str, Any]]) -> str:
    head = ("full fine-tuning, batch 1", "peak GiB", "tokens/s", "state GB", "first loss", "last")
    lines = ["{:<44}{:>10}{:>10}{:>10}{:>12}{:>8}".format(*head)]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['optimizer']:<44}{row['error']}")
            continue
        peak = "-" if row["peak_allocated_gib"] is None else f"{row['peak_allocated_gib']:.2f}"
        lines.append(
            f"{row['optimizer']:<44}{peak:>10}{row['tokens_per_s']:>10.0f}{row['state_bytes'] / 1e9:>10.2f}"
            f"{row['first_loss']:>12.3f}{row['last_loss']:>8.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model of 0.1 M parameters, to try the script")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=1024, help="tokens in a sequence")
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    args = parser.parse_args()
    if args.steps < 3:
        parser.error(f"--steps must be at least 3, got {args.steps}: the first two are not timed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        parser.error("a 7B model needs a CUDA device; --tiny tries the script without one")
    config = TINY if args.tiny else LLAMA_2_7B
    rows = run_all(config, device, args.steps, args.length, math.inf)
    print(as_table(rows))
    if args.out:
        write_json(args.out, {"recipe": "bench_release", "model": config, "rows": rows,
                              "machine": machine(), "versions": versions()})  # fmt: skip


if __name__ == "__main__":
    run_main(main)
