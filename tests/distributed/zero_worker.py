"""Runs on two ranks under torchrun: DeepSpeed on the CPU, every stage; rank 0 writes the numbers as JSON.

torchrun --nproc-per-node 2 zero_worker.py OUTPUT.json CHECKPOINTS
"""

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported

import deepspeed
import torch.distributed as dist
from cases import batch, build, scales_of, settings, weights
from torch import nn

from hf_sai import SGDSaI, gsnr_table
from hf_sai.table import unwrap_sgd_sai

# DeepSpeed would compile a shared-memory collective here, for a minute, that these tests have no use for.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]

STEPS, SAVED_AT, CLIP = 20, 10, 0.05


def make(model: nn.Module, scaling: str) -> SGDSaI:
    """Three groups (one under "max"), one of them of token rows; blocks straddle the two ranks' partitions.

    The late block is not decayed: DeepSpeed gives an unused block zeros for a gradient, one process gives it none.
    """
    named = list(model.named_parameters())
    if scaling == "max":
        return SGDSaI(named, **settings(scaling), weight_decay=0.0)
    tokens = [(name, p) for name, p in named if name == "embed.weight"]
    rest = [(name, p) for name, p in named if name != "embed.weight"]
    groups = [{"params": tokens, "token_rows": scaling == "adamw"}, {"params": rest[:5]}]
    return SGDSaI([*groups, {"params": rest[5:], "weight_decay": 0.0}], **settings(scaling))


def start(scaling: str, seed: int = 0, **config: Any) -> tuple[Any, SGDSaI]:
    model = build(seed=seed)
    return start_with(model, make(model, scaling), **config)


def start_with(model: nn.Module, optimizer: SGDSaI, **config: Any) -> tuple[Any, SGDSaI]:
    settings = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": CLIP, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={**settings, **config})
    return engine, optimizer


def go(engine: Any, steps: range) -> None:
    rows = slice(dist.get_rank() * 4, dist.get_rank() * 4 + 4)
    for step in steps:
        tokens, targets = batch(step)
        output = engine(tokens[rows], use_late=step >= 12)
        engine.backward((output.float() - targets[rows]).square().mean())
        engine.step()


def report(engine: Any, optimizer: SGDSaI) -> dict[str, Any]:
    rows = gsnr_table(engine.optimizer, engine)
    names = {p: name for name, p in engine.module.named_parameters()}
    states = [(names.get(p, place), state) for place, p, state in unwrap_sgd_sai(engine.optimizer).block_states()]
    scale = {key: x for name, state in states for key, x in scales_of(name, state).items()}
    return {"gsnr": {row.name: row.gsnr for row in rows}, "scale": scale, "weights": weights(engine.module)}


def trained(scaling: str, **config: Any) -> dict[str, Any]:
    engine, optimizer = start(scaling, **config)
    go(engine, range(STEPS))
    return report(engine, optimizer)


def resumed(number: int, folder: Path) -> dict[str, Any]:
    """Saved after ten steps, loaded into a new engine, trained on: the same bits as without."""
    engine, optimizer = start("adamw", zero_optimization={"stage": number})
    go(engine, range(SAVED_AT))
    engine.save_checkpoint(str(folder))
    go(engine, range(SAVED_AT, STEPS))
    whole = report(engine, optimizer)
    engine, optimizer = start("adamw", seed=99, zero_optimization={"stage": number})
    engine.load_checkpoint(str(folder))
    go(engine, range(SAVED_AT, STEPS))
    return {"whole": whole, "resumed": report(engine, optimizer)}


def refused(scaling: str = "raw", **config: Any) -> dict[str, Any]:
    model = build()
    named = list(model.named_parameters())
    try:
        optimizer = SGDSaI([{"params": named[:5]}, {"params": named[5:]}], scaling=scaling)
        engine, _ = start_with(model, optimizer, **config)
        go(engine, range(1))
    except ValueError as problem:
        return {"error": str(problem)}
    return {"error": None}


def main() -> None:
    output, folder = Path(sys.argv[1]), Path(sys.argv[2])
    logging.disable(logging.ERROR)
    warnings.filterwarnings("ignore")
    deepspeed.init_distributed("gloo")
    bf16 = {"bf16": {"enabled": True}}
    stages = {number: {"zero_optimization": {"stage": number}} for number in range(4)}
    results = {
        **{f"{n}_{scaling}": trained(scaling, **stages[n]) for n in (0, 1, 2) for scaling in ("adamw", "raw", "max")},
        **{f"{n}_bf16": trained("adamw", **stages[n], **bf16) for n in (0, 1, 2)},
        # Another optimizer of DeepSpeed's, which steps all groups at once.
        "1_bf16_sums_in_float32": trained("adamw", **stages[1], **bf16, data_types={"grad_accum_dtype": "fp32"}),
        **{f"{n}_resumed": resumed(n, folder / str(n)) for n in (1, 2)},
        "3": refused(**stages[3]),
        "max_in_groups": refused("max", **stages[1]),
    }
    everywhere: list[Any] = [None, None]
    dist.all_gather_object(everywhere, results)
    if dist.get_rank() == 0:
        scratch = output.with_suffix(".tmp")
        scratch.write_text(json.dumps(everywhere))
        os.replace(scratch, output)


if __name__ == "__main__":
    main()
