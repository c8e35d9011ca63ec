"""Measures optimizer steps on one model's shapes: time, first step, state, peak memory, bytes moved."""

import gc
import io
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_sai.bench.rivals import RIVALS, Named
from hf_sai.bench.shapes import Model
from hf_sai.bench.state_bytes import optimizer_state_bytes

# Optimizers run in turn if together they need at most this share of free memory.
_SHARE = 0.6


@dataclass
class Row:
    """The measurements of one optimizer. Times are in milliseconds. A value that was not measured is None.

    Attributes:
        step_ms: the median of ordinary steps.
        quartiles_ms: their 25% and 75% quantiles.
        mean_step_ms: their mean. For SGD-SaI it includes the steps that measure channels, one in ten.
        first_step_ms: the first step, including the allocation of the state and the calibration of SGD-SaI.
        first_step_less_allocation_ms: the first step without the time to allocate and first touch the same number of
            bytes. It is 0 if allocation alone, measured separately, takes longer than the whole first step.
        state_bytes: the size of all tensors in the optimizer's state.
        peak_bytes: the memory that a step allocates at its peak.
        moved_bytes: the bytes to read parameters, gradients and state once and to write parameters and state once.
        gb_per_s: moved_bytes divided by step_ms.
        of_copy: gb_per_s as a share of the copy bandwidth measured in this run.
        error: the reason why there are no figures.
    """

    optimizer: str
    title: str
    step_ms: float | None = None
    quartiles_ms: tuple[float, float] | None = None
    mean_step_ms: float | None = None
    steps: int = 0
    first_step_ms: float | None = None
    first_step_less_allocation_ms: float | None = None
    state_bytes: int | None = None
    peak_bytes: int | None = None
    moved_bytes: int | None = None
    gb_per_s: float | None = None
    of_copy: float | None = None
    error: str | None = None


@dataclass
class Result:
    """The results for one model, dtype and device: the conditions and a row for each optimizer."""

    model: str
    title: str
    parameters: int
    tensors: int
    dtype: str
    device: str
    threads: int
    copy_gb_per_s: float
    in_turn: bool
    rows: list[Row] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def bench(
    name: str,
    model: Model,
    *,
    optimizers: Sequence[str],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    steps: int = 20,
    settling: int = 3,
    deadline: float = math.inf,
    progress: Callable[[str], None] = lambda text: None,
) -> Result:
    """Time optimizers on a model's shapes. If the state of all optimizers fits in memory, their steps run in turn.

    Args:
        name: the model's name.
        model: its shapes.
        optimizers: keys of ``RIVALS``.
        dtype: the dtype of parameters and gradients.
        device: the device of parameters and gradients.
        steps: the number of ordinary steps to time.
        settling: the number of steps after the first that are not timed, so that allocators, caches and clocks settle.
        deadline: the ``time.monotonic()`` after which no further optimizer is started.
        progress: called with each optimizer's first figures before all are timed in turn: its first step and an early
            figure of an ordinary step.

    Raises:
        ValueError: for an unknown optimizer, or fewer than 1 step.
    """
    unknown = [key for key in optimizers if key not in RIVALS]
    if unknown:
        raise ValueError(f"optimizers must be among {', '.join(RIVALS)}, got {', '.join(unknown)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(0)
    named: Named = []
    for parameter, shape in model.shapes:
        p = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02, generator=generator))
        p.grad = torch.empty_like(p).normal_(0, 1e-3, generator=generator)
        named.append((parameter, p))
    numel = sum(p.numel() for _, p in named)
    copy = copy_bandwidth(device)
    selected = [key for key in optimizers if RIVALS[key].only in (None, device.type)]
    expected = sum(RIVALS[key].numbers * numel * dtype.itemsize for key in selected)
    in_turn = expected < _SHARE * _free_bytes(device)
    result = Result(
        model=name,
        title=model.title,
        parameters=numel,
        tensors=len(named),
        dtype=str(dtype).removeprefix("torch."),
        device=_device_name(device),
        threads=torch.get_num_threads(),
        copy_gb_per_s=copy,
        in_turn=in_turn,
    )
    begun: list[_Measurement] = []
    for key in selected:
        one = _Measurement(key, named, device)
        if time.monotonic() < deadline:
            one.begin(model, max(settling, RIVALS[key].settling))
        else:
            one.row.error = "not measured: out of time"
        progress(one.so_far())
        if not in_turn:
            for _ in range(steps):
                one.step()
            one.finish(copy)
            if one.row.step_ms is not None:
                progress(f"{one.row.title}: {one.row.step_ms:.2f} ms a step")
            _release_memory(device)
        begun.append(one)
    if in_turn:
        progress(f"{steps} steps of each in turn")
        for _ in range(steps):
            for one in begun:
                one.step()
        for one in begun:
            one.finish(copy)
    result.rows = [one.row for one in begun]
    return result


class _Measurement:
    """Measures one optimizer: `begin` its first step, `step` an ordinary step. `finish` completes its row."""

    def __init__(self, key: str, named: Named, device: torch.device) -> None:
        self.row = Row(key, RIVALS[key].title)
        self._key, self._named, self._device = key, named, device
        self._times: list[float] = []
        self._settled_ms: float | None = None
        self._optimizer: Any = None

    def begin(self, model: Model, settling: int) -> None:
        row, device = self.row, self._device
        try:
            _warm_up(self._key, model, self._named, device)
            _release_memory(device)
            with redirect_stdout(io.StringIO()):  # the authors' release prints
                self._optimizer = RIVALS[self._key].make(model, self._named)
                row.first_step_ms = self._timed()
            row.state_bytes = optimizer_state_bytes(self._optimizer)
            less = row.first_step_ms - _allocation_ms(row.state_bytes, device)
            row.first_step_less_allocation_ms = max(0.0, less)
            before = None
            for _ in range(settling):
                before = _allocated(device)
                self._settled_ms = self._timed()
            row.peak_bytes = None if before is None else torch.cuda.max_memory_allocated(device) - before
        except ModuleNotFoundError as error:
            self._fail(f"not installed: {error.name}")
        except Exception as error:  # the failure of a rival becomes a row and does not stop the benchmark
            self._fail(f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}")

    def so_far(self) -> str:
        """The result of `begin` as a line."""
        row = self.row
        if row.error is not None or row.first_step_ms is None or row.state_bytes is None:
            return f"{row.title}: {row.error}"
        then = "" if self._settled_ms is None else f", then about {self._settled_ms:.2f} ms"
        return f"{row.title}: first step {row.first_step_ms:.1f} ms{then}, state {row.state_bytes / 1e9:.3f} GB"

    def step(self) -> None:
        if self._optimizer is not None:
            self._times.append(self._timed())

    def finish(self, copy_gb_per_s: float) -> None:
        row = self.row
        self._optimizer = None
        if not self._times or row.state_bytes is None:
            return
        row.steps = len(self._times)
        row.step_ms, row.mean_step_ms = statistics.median(self._times), statistics.fmean(self._times)
        if row.steps > 1:
            quartiles = statistics.quantiles(self._times, n=4, method="inclusive")
            row.quartiles_ms = (quartiles[0], quartiles[2])
        row.moved_bytes = 2 * row.state_bytes + sum(3 * p.numel() * p.element_size() for _, p in self._named)
        row.gb_per_s = row.moved_bytes / row.step_ms / 1e6
        row.of_copy = row.gb_per_s / copy_gb_per_s

    def _fail(self, reason: str) -> None:
        self.row.error = reason
        self.row.first_step_ms, self._optimizer = None, None

    def _timed(self) -> float:
        _synchronize(self._device)
        begin = time.perf_counter()
        self._optimizer.step()
        _synchronize(self._device)
        return 1000 * (time.perf_counter() - begin)


def copy_bandwidth(device: torch.device, size: int = 1 << 28, repetitions: int = 9) -> float:
    """The copy bandwidth of the device in GB/s, read and written: the median over several copies of a large tensor."""
    size = min(size, _free_bytes(device) // 8)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(repetitions + 1):
        _synchronize(device)
        begin = time.perf_counter()
        for _ in range(4):
            target.copy_(source)
        _synchronize(device)
        times.append((time.perf_counter() - begin) / 4)
    return 2 * source.numel() * 4 / statistics.median(times[1:]) / 1e9


def _warm_up(key: str, model: Model, named: Named, device: torch.device) -> None:
    """Run two steps on a few small tensors, so that the first step's time includes no one-time loading or compiling."""
    small: Named = []
    for name, p in named[:8]:
        shape = [min(n, 8) for n in p.shape]
        twin = torch.nn.Parameter(torch.full(shape, 0.5, dtype=p.dtype, device=device))
        twin.grad = torch.rand_like(twin)
        small.append((name, twin))
    with redirect_stdout(io.StringIO()):
        optimizer = RIVALS[key].make(model._replace(dim=8, heads=1), small)
        for _ in range(2):
            optimizer.step()
    _synchronize(device)


def _allocation_ms(size: int, device: torch.device) -> float:
    """The time to allocate and first write this number of bytes, in pieces like an optimizer."""
    _release_memory(device)
    piece = 1 << 25
    _synchronize(device)
    begin = time.perf_counter()
    pieces = [torch.zeros(min(piece, size - at), dtype=torch.int8, device=device) for at in range(0, size, piece)]
    _synchronize(device)
    elapsed = 1000 * (time.perf_counter() - begin)
    del pieces
    return elapsed


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allocated(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _release_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return 1 << 32


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
