"""Runs on every rank under torchrun: each function trains in one way and returns numbers; rank 0 writes them as JSON.

    torchrun --nproc-per-node 2 worker.py OUTPUT.json CHECKPOINTS

Every check runs with SGDSaI and, where it can finish, with the authors' release as a known-bad control.
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from cases import LATE_STEP, Recorder, TwoLayers, batch, build, groups, gsnrs, local, scales, settings, train, weights
from sgd_sai import SGD_sai
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from hf_sai import SGDSaI, gsnr_table
from hf_sai.calibration import INTERVAL, WINDOW
from hf_sai.gsnr import measure
from hf_sai.monitor import measure_gradients

STEPS = 20
LONG = WINDOW + 2 * INTERVAL + 1
SAVED_AT = 10


class Subject(NamedTuple):
    """An optimizer under test, the step from which the model uses its late block, and the blocks not trained."""

    make: Callable[..., torch.optim.Optimizer]
    late_step: int
    frozen: tuple[str, ...]


def make_hf_sai(model: nn.Module, scaling: str = "adamw", **options: Any) -> torch.optim.Optimizer:
    return SGDSaI(groups(model, scaling), **{**settings(scaling), **options})


def make_authors(model: nn.Module, scaling: str = "raw") -> torch.optim.Optimizer:
    return SGD_sai(model.parameters(), lr=1e-3)


# Blocks calibrated late stop the authors' release, one-element and constant blocks make it diverge at once: to learn
# what else fails, it is tested without them.
SUBJECTS = {"hf_sai": Subject(make_hf_sai, LATE_STEP, ()), "authors": Subject(make_authors, 0, ("gain", "shift"))}


def rows(group: Any = None) -> slice:
    """This rank's part of every batch."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return slice(rank * 8 // size, (rank + 1) * 8 // size)


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """FSDP2 with two units: one for `up`, one for all the rest."""
    fully_shard(model.up, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def report(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What the optimizer has measured and made of the model; also as the table that a user looks at."""
    table = gsnr_table(optimizer, model) if isinstance(optimizer, SGDSaI) else []
    return {
        "gsnr": gsnrs(model, optimizer),
        "scale": scales(model, optimizer),
        "table": {row.name: row.scale for row in table},
        "weights": weights(model),
    }


# Two processes.


def ddp(subject: Subject, _: Path) -> dict[str, Any]:
    model = build(frozen=subject.frozen)
    optimizer = subject.make(model, "adamw")
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    train(model, optimizer, range(STEPS), rows(), forward=wrapped, late_step=subject.late_step)
    return report(model, optimizer)


def zero_redundancy(subject: Subject, _: Path) -> dict[str, Any]:
    return zero_redundancy_by(subject, "adamw")


def zero_redundancy_max(subject: Subject, _: Path) -> dict[str, Any]:
    return zero_redundancy_by(subject, "max")


def zero_redundancy_by(subject: Subject, scaling: str) -> dict[str, Any]:
    """Every process steps some of the parameters: it knows the scales of no other."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # importing it warns

    model = build()
    optimizer = ZeroRedundancyOptimizer(groups(model, scaling), SGDSaI, **settings(scaling))
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    train(model, optimizer, range(STEPS), rows(), forward=wrapped, late_step=subject.late_step)
    return {"weights": weights(model)}


def ddp_idle_expert(subject: Subject, _: Path) -> dict[str, Any]:
    """Each rank uses `late` in steps of its own; where no rank does, its gradient is None."""
    model = build(frozen=subject.frozen)
    optimizer = subject.make(model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    for step, users in enumerate([(), (1,), (0,), (), (0, 1)]):
        tokens, targets = batch(step)
        optimizer.zero_grad()
        output = wrapped(tokens[rows()], use_late=dist.get_rank() in users)
        (output - targets[rows()]).square().mean().backward()
        optimizer.step()
    return report(model, optimizer)


def fsdp2_raw(subject: Subject, _: Path) -> dict[str, Any]:
    return fsdp2(subject, "raw", torch.float32)


def fsdp2_max(subject: Subject, _: Path) -> dict[str, Any]:
    return fsdp2(subject, "max", torch.float32)


def fsdp2_adamw(subject: Subject, _: Path) -> dict[str, Any]:
    return fsdp2(subject, "adamw", torch.float32)


def fsdp2_float64(subject: Subject, _: Path) -> dict[str, Any]:
    """Past the window in which scales are calibrated."""
    return fsdp2(subject, "adamw", torch.float64, LONG)


def ddp_float64(subject: Subject, _: Path) -> dict[str, Any]:
    model = build(dtype=torch.float64)
    optimizer = subject.make(model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    train(model, optimizer, range(LONG), rows(), forward=wrapped, late_step=subject.late_step)
    return report(model, optimizer)


def fsdp2(subject: Subject, scaling: str, dtype: torch.dtype, steps: int = STEPS) -> dict[str, Any]:
    model = shard(build(dtype=dtype, frozen=subject.frozen), init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = subject.make(model, scaling)
    train(model, optimizer, range(steps), rows(), late_step=subject.late_step)
    return report(model, optimizer)


def fsdp2_by_accelerate(subject: Subject, _: Path) -> dict[str, Any]:
    """accelerate takes the optimizer before it shards the model, and swaps the parameters in it afterwards."""
    accelerator = Accelerator(cpu=True)
    # It keeps FSDP for GPUs; on a CPU it would run DistributedDataParallel without a word.
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=100, cpu_ram_efficient_loading=False
    )
    accelerator.state.distributed_type = DistributedType.FSDP
    model = build(frozen=subject.frozen)
    model, optimizer = accelerator.prepare(model, subject.make(model, "adamw"))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    train(model, optimizer, range(STEPS), rows(), late_step=subject.late_step)
    AcceleratorState._reset_state(reset_partial_state=True)
    return report(model, optimizer.optimizer)


def fsdp1(subject: Subject, _: Path) -> dict[str, Any]:
    """What making the optimizer says after FSDP1 has flattened the model, and the first step where it came before."""

    def wrapped(model: nn.Module, use_orig_params: bool) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=use_orig_params)

    def said(act: Callable[[], Any]) -> str | None:
        try:
            act()
        except ValueError as error:
            return str(error)
        return None

    model = build()
    optimizer = subject.make(model)
    outer = wrapped(model, True)
    return {
        "flat": said(lambda: subject.make(wrapped(build(), False))),
        "original": said(lambda: subject.make(wrapped(build(), True))),
        "before": said(lambda: train(outer, optimizer, range(1), rows())),
    }


def fsdp2_costs(subject: Subject, _: Path) -> dict[str, Any]:
    """Collectives of the first step, a later one and one after the window; the largest temporary of two steps."""
    found: dict[str, Any] = {}
    for layers in (2, 8):
        costs = costs_of_steps(subject, layers, 64)
        found[f"collectives_{layers}"] = {
            step: costs[step][0] for step in (0, 1, WINDOW - 1, WINDOW, WINDOW + INTERVAL - 1)
        }
    width = 2048
    found["largest"] = [largest for _, largest in costs_of_steps(subject, 2, width, 2)]
    found["local_numel"] = width * width // dist.get_world_size()
    return found


def costs_of_steps(subject: Subject, layers: int, width: int, steps: int = WINDOW + INTERVAL) -> list[tuple[Any, int]]:
    """Of each step its collectives and the elements of the largest tensor that it makes."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    fully_shard(model)
    optimizer = subject.make(model)
    costs = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, width)).square().mean().backward()
        with Recorder() as recorder:
            optimizer.step()
        costs.append((recorder.collectives, recorder.largest))
    return costs


def fsdp2_measure(subject: Subject, _: Path) -> dict[str, Any]:
    """The largest temporary of the statistics."""
    model = nn.Linear(2048, 2048)
    fully_shard(model)
    model(torch.randn(2, 2048)).square().mean().backward()
    params = list(model.parameters())
    with Recorder() as recorder:
        measure(params, [p.grad for p in params], [1e-8] * len(params))
    return {"collectives": recorder.collectives, "largest": recorder.largest, "local_numel": local(params[0]).numel()}


# By step and rank, the blocks without a gradient.
MISSING = {(0, 1): ["down.weight", "lora_b.weight"], (1, 0): ["lora_b.weight"], (2, 0): ["down.weight", "embed.weight"]}


def fsdp2_ranks_without_gradient(subject: Subject, _: Path) -> dict[str, Any]:
    """At a learning rate of 0, so that all runs have the same gradients but for those that are missing."""
    model = shard(build(dtype=torch.float64), init_device_mesh("cpu", (2,)))
    optimizer = subject.make(model, lr=0.0)
    for step in range(4):
        tokens, targets = batch(step, torch.float64)
        optimizer.zero_grad()
        (model(tokens[rows()], use_late=False) - targets[rows()]).square().mean().backward()
        for name in MISSING.get((step, dist.get_rank()), []):
            model.get_parameter(name).grad = None
        optimizer.step()
    return report(model, optimizer)


def fsdp2_not_finite(subject: Subject, _: Path) -> dict[str, Any]:
    """One rank's shard of one block is NaN in the first step: nobody touches that block, everybody warns."""
    model = shard(build(frozen=subject.frozen), init_device_mesh("cpu", (2,)))
    optimizer = subject.make(model, "raw")
    before = weights(model)
    tokens, targets = batch(0)
    (model(tokens[rows()], use_late=False) - targets[rows()]).square().mean().backward()
    if dist.get_rank() == 0:
        local(model.down.weight.grad)[0, 0] = float("nan")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    after = weights(model)
    told = [str(w.message) for w in caught if "NaN" in str(w.message)]
    first = gsnrs(model, optimizer)["down.weight"]
    train(model, optimizer, range(1, 2), rows(), late_step=subject.late_step)
    return {
        "untouched": after["down.weight"] == before["down.weight"],
        "others_moved": after["up.weight"] != before["up.weight"],
        "warnings": told,
        "gsnr_first": first,
        "gsnr_second": gsnrs(model, optimizer)["down.weight"],
    }


def fsdp2_monitor(subject: Subject, _: Path) -> dict[str, Any]:
    """The g-SNR of each block's gradient during training, with an optimizer that measures none itself."""
    model = shard(build(), init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    train(model, optimizer, range(3), rows())
    return {"gsnr": {m.name: m.statistics.gsnr for m in measure_gradients(optimizer, model)}}


def tensor_parallel(subject: Subject, _: Path) -> dict[str, Any]:
    """Without FSDP: the norm's gradients are partial sums, the other blocks' are split by columns or by rows."""
    model = parallelize(build(TwoLayers), init_device_mesh("cpu", (2,)))
    optimizer = subject.make(model, "adamw")
    train(model, optimizer, range(STEPS), late_step=subject.late_step)
    return report(model, optimizer)


def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    from torch.distributed.tensor import Replicate, Shard

    return parallelize_module(
        model,
        mesh,
        {
            "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(),
        },
    )


# Four processes.


def hsdp(subject: Subject, _: Path) -> dict[str, Any]:
    model = shard(build(frozen=subject.frozen), init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    optimizer = subject.make(model, "adamw")
    train(model, optimizer, range(STEPS), rows(), late_step=subject.late_step)
    return report(model, optimizer)


def fsdp2_tensor_parallel(subject: Subject, _: Path) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize(build(TwoLayers), mesh["tp"])
    fully_shard(model.up, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer = subject.make(model, "adamw")
    placements = {name: str(p.placements) for name, p in model.named_parameters() if isinstance(p, DTensor)}
    train(model, optimizer, range(1), rows(mesh["dp"].get_group()), late_step=subject.late_step)
    params = list(model.parameters())
    with Recorder() as recorder:
        measure(params, [p.grad for p in params], [1e-8] * len(params))
    train(model, optimizer, range(1, STEPS), rows(mesh["dp"].get_group()), late_step=subject.late_step)
    return {**report(model, optimizer), "placements": placements, "collectives": recorder.collectives}


# Checkpoints, on any number of processes.


def save_sharded(subject: Subject, folder: Path) -> dict[str, Any]:
    """Train to step 10 and save, in shards and whole; go on to step 15."""
    model = shard(build(frozen=subject.frozen), init_device_mesh("cpu", (dist.get_world_size(),)))
    return save_checkpoint(folder, dist.get_world_size(), subject, model, rows())


def save_checkpoint(
    folder: Path, processes: int, subject: Subject, model: nn.Module, part: slice = slice(None)
) -> dict[str, Any]:
    optimizer = subject.make(model, "adamw")
    train(model, optimizer, range(SAVED_AT), part, late_step=subject.late_step)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder / f"sharded_from_{processes}")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    if processes == 1 or dist.get_rank() == 0:
        torch.save(whole, folder / f"full_from_{processes}.pt")
    train(model, optimizer, range(SAVED_AT, SAVED_AT + 5), part, late_step=subject.late_step)
    return report(model, optimizer)


def load_sharded(subject: Subject, folder: Path) -> dict[str, Any]:
    """Load what any number of processes saved, and go on to step 15."""
    dist.barrier()
    found = {}
    for path in sorted(folder.glob("*_from_*")):
        model = shard(build(seed=99, frozen=subject.frozen), init_device_mesh("cpu", (dist.get_world_size(),)))
        found[path.name] = load_checkpoint(path, subject, model, rows())
    return found


def load_checkpoint(path: Path, subject: Subject, model: nn.Module, part: slice = slice(None)) -> dict[str, Any]:
    optimizer = subject.make(model, "adamw")
    options = StateDictOptions(full_state_dict=path.is_file())
    if path.is_file():
        state = torch.load(path, weights_only=True)
    else:
        # This takes a step with zero gradients and learning rate 0, which must calibrate nothing.
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    loaded = gsnrs(model, optimizer)
    train(model, optimizer, range(SAVED_AT, SAVED_AT + 5), part, late_step=subject.late_step)
    return {**report(model, optimizer), "loaded": loaded}


Check = Callable[[Subject, Path], dict[str, Any]]
CHECKS: dict[int, list[Check]] = {
    2: [
        ddp,
        ddp_float64,
        zero_redundancy,
        zero_redundancy_max,
        ddp_idle_expert,
        fsdp2_raw,
        fsdp2_max,
        fsdp2_adamw,
        fsdp2_float64,
        fsdp2_by_accelerate,
        fsdp1,
        fsdp2_costs,
        fsdp2_measure,
        fsdp2_ranks_without_gradient,
        fsdp2_not_finite,
        fsdp2_monitor,
        tensor_parallel,
        save_sharded,
        load_sharded,
    ],
    4: [hsdp, fsdp2_tensor_parallel, save_sharded, load_sharded],
}
# What the authors' release is put through: it has one scaling only, and cannot do the rest.
FOR_AUTHORS = (ddp, ddp_idle_expert, fsdp2_raw, fsdp1, fsdp2_costs, fsdp2_not_finite, tensor_parallel)


def main() -> None:
    output, folder = Path(sys.argv[1]), Path(sys.argv[2])
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results: dict[str, dict[str, list[Any]]] = {which: {} for which in SUBJECTS}
    for which, subject in SUBJECTS.items():
        own = folder / which
        own.mkdir(exist_ok=True, parents=True)
        for check in CHECKS[dist.get_world_size()]:
            if which == "authors" and check not in FOR_AUTHORS:
                continue
            results[which][check.__name__] = on_every_rank(check, subject, own)
    if dist.get_rank() == 0:
        scratch = output.with_suffix(".tmp")
        scratch.write_text(json.dumps(results))
        os.replace(scratch, output)


def on_every_rank(check: Check, subject: Subject, folder: Path) -> list[Any]:
    """What a check returns on each rank, or its error."""
    with redirect_stdout(None):
        try:
            found = check(subject, folder)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    return everywhere


if __name__ == "__main__":
    main()
