"""Memory, collectives and bytes of an optimizer step on one of many devices, counted without any of them.

    python -m recipes.studies.sharded --models 7b 13b 70b --devices 8 64 512

Llama-2's shapes on meta tensors, sharded by FSDP2 over torch's fake process group as rank 0, which holds the largest
shards. SGD-SaI and AdamW step as they are, both with `foreach=True`, and `Counter` sees every operation. Where a step
asks for the value of a meta tensor it gets 1, as of a finite gradient that is not zero. A Triton kernel is no operation
of torch, so SGD-SaI's fused path is not counted; its collectives and its state are those of the other paths.
"""

from recipes.common.start import run_main

import argparse
import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sai import SGDSaI, param_groups
from hf_sai.calibration import INTERVAL, WINDOW
from recipes.common.errors import UserError
from recipes.common.files import check_writable, write_json
from recipes.common.provenance import run_record, sealed

# Width, layers, heads, heads of keys and values, width of the MLP; the vocabulary is 32,000, the head is not tied.
SHAPES = {
    "7b": (4096, 32, 32, 32, 11008),
    "13b": (5120, 40, 40, 40, 13824),
    "70b": (8192, 80, 64, 8, 28672),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Operations that write to an argument without reading it; so does every `out=`.
_OVERWRITE = ("aten::copy_", "aten::fill_", "aten::zero_", "aten::_foreach_copy_", "aten::_foreach_zero_")


@dataclass
class Options:
    """The options of the study.

    Attributes:
        models: keys of `SHAPES`.
        devices: numbers of devices.
        dtype: of parameters and gradients, a key of `DTYPES`; the state has it, too, but for float32 scales.
    """

    models: list[str] = field(default_factory=lambda: list(SHAPES))
    devices: list[int] = field(default_factory=lambda: [8, 64, 512])
    dtype: str = "float32"


class Counter(TorchDispatchMode):
    """Counts what the operations within it do on this process, in bytes.

    Attributes:
        collectives: for each kind, how often it is called and the bytes of the tensors that this process passes to it.
        read: bytes that operations read from their arguments; views read nothing.
        written: bytes that operations write, to new tensors and to their arguments.
        live: bytes of device tensors that were made within it and still exist.
        peak: the largest `live` since `start`, above that at `start`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.start()

    def start(self) -> None:
        """Count from here on; what lives stays known."""
        self.collectives: dict[str, dict[str, int]] = {}
        self.read = self.written = self.peak = 0
        self._before = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # DTensor takes it apart, and its operations on local tensors come here
        given = _tensors((args, kwargs))
        if func.namespace == "c10d":
            found = self.collectives.setdefault(func._schema.name.removeprefix("c10d::"), {"number": 0, "bytes": 0})
            found["number"] += 1
            found["bytes"] += sum(map(_bytes, given))
            return func(*args, **kwargs)
        result = _value(func, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
        held = {id(t.untyped_storage()) for t in given}
        new = [t for t in _tensors(result) if id(t.untyped_storage()) not in held]
        for storage in {id(t.untyped_storage()): t.untyped_storage() for t in new if t.is_meta}.values():
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes()).atexit = False
        self.peak = max(self.peak, self.live - self._before)
        overwritten = sum(map(_bytes, _tensors(_targets(func, args, kwargs))))
        if new or overwritten:
            blind = func._schema.name in _OVERWRITE or "out" in kwargs
            self.read += sum(map(_bytes, given)) - blind * overwritten
            self.written += sum(map(_bytes, new)) + overwritten
        return result

    def _free(self, size: int) -> None:
        self.live -= size

    def counts(self) -> dict[str, Any]:
        """Since `start`, for a record."""
        return {
            "collectives": self.collectives,
            "read_bytes": self.read,
            "written_bytes": self.written,
            "peak_bytes": self.peak,
        }


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Of the elements of a tensor; those that an expanded one repeats count once."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _targets(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation writes to."""
    named = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    places = {a.name: i for i, a in enumerate(func._schema.arguments)}
    return [kwargs[a.name] if a.name in kwargs else args[places[a.name]] for a in named]


def _value(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What stands for the values of a meta tensor where the host asks for them: ones. None for other operations."""
    if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
        return 1.0
    device = kwargs.get("device")
    if func is torch.ops.aten._to_copy.default and args[0].is_meta and device is not None and device.type == "cpu":
        return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    return None


@contextmanager
def fake_processes(number: int) -> Iterator[Any]:
    """A mesh of `number` devices, this process being rank 0; collectives do nothing.

    Raises:
        UserError: a process group exists already.
    """
    if dist.is_initialized():
        raise UserError("a process group exists already; run the study in a process of its own, without a launcher")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
    try:
        yield init_device_mesh("cpu", (number,))
    finally:
        dist.destroy_process_group()


def sharded_model(config: LlamaConfig, mesh: Any, dtype: torch.dtype) -> Any:
    """A Llama on meta tensors, sharded by layer as FSDP2 does, with a gradient for each parameter."""
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.to(dtype)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    return model


def llama(name: str) -> LlamaConfig:
    """Llama-2 of that size, a key of `SHAPES`."""
    width, layers, heads, kv_heads, mlp = SHAPES[name]
    return LlamaConfig(
        vocab_size=32000, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=mlp, tie_word_embeddings=False,
    )  # fmt: skip


def local_bytes(tensors: Iterable[Tensor], device: str = "meta") -> int:
    """Bytes that this process holds of tensors on a device of that type."""
    own = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.nbytes for t in own if t.device.type == device)


def global_bytes(tensors: Iterable[Tensor], devices: int) -> int:
    """Bytes that all processes hold of tensors on their devices: shards once, whole copies once for each process."""
    found = 0
    for t in (t for t in tensors if t.is_meta):
        sharded = isinstance(t, DTensor) and not all(p.is_replicate() for p in t.placements)
        found += t.numel() * t.element_size() * (1 if sharded else devices)
    return found


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every tensor of the state, sharded ones as DTensor."""
    return [t for state in optimizer.state.values() for t in state.values()]


def adamw_steps(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, dict[str, Any], int]:
    """AdamW, the counts of its steps by kind, and the bytes of what it holds on the device."""
    optimizer, counter = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=True), Counter()
    steps = {"first": _first(optimizer, counter), "ordinary": count_step(optimizer, counter)}
    return optimizer, steps, counter.live


def sgd_sai_steps(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, dict[str, Any], int]:
    """SGD-SaI, the counts of its steps by kind, and the bytes of what it holds on the device.

    Steps 1 and 2 are counted. Then the state says that the window is over, as that of a resumed run does.
    """
    optimizer, counter = SGDSaI(param_groups(model), lr=1e-5, foreach=True), Counter()
    steps = {"first": _first(optimizer, counter), "calibration": count_step(optimizer, counter)}
    held = counter.live
    for state in optimizer.state.values():
        state["calibration_step"].fill_(WINDOW)
    for group in optimizer.param_groups:
        group["step"] = WINDOW
    optimizer.load_state_dict(optimizer.state_dict())
    count_step(optimizer, counter)  # makes the batches of the loaded state
    steps["ordinary"] = count_step(optimizer, counter)
    for group in optimizer.param_groups:
        group["step"] = WINDOW + INTERVAL - 1
    steps["measuring"] = count_step(optimizer, counter)
    return optimizer, steps, held


def _first(optimizer: torch.optim.Optimizer, counter: Counter) -> dict[str, Any]:
    """Collectives only: in the first step DTensor also tries its operations on shapes, which no device does."""
    return {"collectives": count_step(optimizer, counter)["collectives"]}


def count_step(optimizer: torch.optim.Optimizer, counter: Counter) -> dict[str, Any]:
    """The counts of one step. What earlier steps have left in reference cycles is gone before it starts."""
    gc.collect()
    counter.start()
    with counter:
        optimizer.step()
    return counter.counts()


def count(config: LlamaConfig, devices: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row for each optimizer, for one device of so many.

    Args:
        config: the model's.
        devices: over which it is sharded.
        dtype: of parameters and gradients.
    """
    rows = []
    for name, run in (("AdamW", adamw_steps), ("SGD-SaI", sgd_sai_steps)):
        with fake_processes(devices) as mesh:
            model = sharded_model(config, mesh, dtype)
            optimizer, steps, held = run(model)
            state = state_tensors(optimizer)
            parameters = list(model.parameters())
            rows.append(
                {
                    "optimizer": name,
                    "devices": devices,
                    "parameters": sum(p.numel() for p in parameters),
                    "parameter_bytes": local_bytes(parameters),
                    "gradient_bytes": local_bytes(p.grad for p in parameters if p.grad is not None),
                    "state_bytes": local_bytes(state),
                    "beside_state_bytes": held - local_bytes(state),
                    "host_state_bytes": local_bytes(state, "cpu"),
                    "state_bytes_of_all": global_bytes(state, devices),
                    "steps": steps,
                }
            )
    return rows


def as_line(row: dict[str, Any]) -> str:
    """A row as one line: bytes of a device, and the collectives of each kind of step."""
    collectives = ", ".join(f"{kind} {step['collectives'] or 'none'}" for kind, step in row["steps"].items())
    return (
        f"{row['model']} on {row['devices']} devices, {row['optimizer']}: parameters "
        f"{row['parameter_bytes'] / 1e9:.2f} GB, state {row['state_bytes'] / 1e9:.2f} GB; collectives: {collectives}"
    )


def main() -> None:
    """Count, print each row, and write the record."""
    default = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=default.models)
    parser.add_argument("--devices", nargs="+", type=int, default=default.devices)
    parser.add_argument("--dtype", choices=list(DTYPES), default=default.dtype, help="of parameters and gradients")
    parser.add_argument("--record", type=Path, help="write the counts there as JSON")
    args = parser.parse_args()
    if min(args.devices) < 1:
        raise UserError(f"--devices must be at least 1, got {min(args.devices)}; leave it out for {default.devices}")
    if args.record:
        check_writable("--record", args.record.parent)
    rows = []
    for name in args.models:
        for devices in args.devices:
            for row in count(llama(name), devices, DTYPES[args.dtype]):
                rows.append({"model": name, **row})
                print(as_line(rows[-1]), flush=True)
    if args.record:
        options = Options(args.models, args.devices, args.dtype)
        write_json(args.record, sealed(run_record("studies.sharded", [options], rows=rows)))


if __name__ == "__main__":
    run_main(main)
