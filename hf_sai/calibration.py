"""Calibrates blocks: computes scales from gradients, logs this, and warns about unusable gradients.

A gradient is usable if it is finite and not all zero. The first usable gradient of a block gives its g-SNR. The paper's
scalings need nothing else. Under ``scaling="adamw"`` the scale of a channel is ``1 / (rms + eps)``. For each gradient,
the root mean square of the channel's elements is measured. ``rms`` is its mean over the first ``WINDOW`` usable
gradients, or over the gradients so far if there are fewer. After the window, a gradient is measured every ``INTERVAL``
steps, with a weight of 1 / ``WINDOW``.

The rows and the columns of a matrix are channels. The scale of an element is the scale of its row times the scale of
its column relative to the mean over the columns. A channel without a gradient keeps its ``rms``. In a matrix of token
rows, it counts as a zero instead, because the scale of a token must compensate for how often the token occurs.

Nothing here depends on the learning rate. Nothing depends on other blocks, except under ``scaling="max"``.
"""

import logging
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_sai.batches import Batch, Member
from hf_sai.channels import Channels
from hf_sai.gsnr import BlockStatistics, measure, measure_stacked, paper_scales, sum_over_processes
from hf_sai.shards import reduction_groups
from hf_sai.update import fused_moments

# The number of usable gradients that a scale averages. After these, the scale changes only slowly.
WINDOW = 60
# Steps between measurements after the window.
INTERVAL = 10
# The bound of each element of a scaled gradient, in units of the root mean square of its channel.
LIMIT = 2.0
# The bound in a matrix of token rows, where a rare token's gradient is far larger than its mean. The bound of Adam's
# updates is similar, 1 / sqrt(1 - beta2).
TOKEN_LIMIT = 30.0
# The number of steps after which a block without a usable gradient causes a warning.
_PATIENCE = 100


class Work:
    """A batch in this step.

    Attributes:
        group: its param group.
        batch: the blocks.
        grads: their local gradients. None if this process has no gradient for a sharded block but takes part in its
            calibration.
        kinds: the kind of each first gradient (see :class:`hf_sai.gsnr.BlockStatistics`), else ``"usable"`` or
            ``"zero"``.
    """

    __slots__ = ("batch", "grads", "group", "kinds")

    def __init__(self, group: dict[str, Any], batch: Batch, grads: list[Tensor | None]) -> None:
        self.group, self.batch, self.grads = group, batch, grads
        self.kinds = ["usable"] * len(grads)

    def weight(self) -> float:
        """The weight of this gradient in the momentum, for a batch whose blocks have the same count.

        Under ``scaling="adamw"`` the momentum is a mean of gradients without a bias to zero, like Adam's momentum after
        bias correction. Under the paper's scalings it starts as the first gradient.
        """
        momentum, first = float(self.group["momentum"]), self.batch.members[0]
        if first.starts and self.kinds[0] == "usable":
            return 1.0
        if self.group["scaling"] != "adamw" or not 0 < first.count < WINDOW or self.kinds[0] != "usable":
            return 1.0 - momentum
        return (1.0 - momentum) / (1.0 - momentum**first.count)


class Calibration:
    """Everything that is not saved: the steps of this process and the warnings issued so far."""

    def __init__(self) -> None:
        self._steps = 0
        self._warned: set[str] = set()

    def run(self, work: Sequence[Work], largest_gsnr: Callable[[], float]) -> None:
        """Measure the gradients that are due, and set the scales of their blocks.

        Args:
            work: in the same order on every process.
            largest_gsnr: returns the largest g-SNR of the calibrated blocks with ``scaling="max"``.

        Raises:
            RuntimeError: for a block without a scale under CUDA graph capture.
        """
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        first = [(w, i) for w in work for i, m in enumerate(w.batch.members) if not m.count]
        if capturing:
            if first:
                raise RuntimeError(
                    f"{first[0][0].batch.members[first[0][1]].name} is not calibrated yet, and a CUDA graph cannot "
                    "capture the calibration; run steps before capturing until every block has had a gradient that is "
                    "not all zero"
                )
            return
        if first:
            self._first(first, largest_gsnr)
        due = [w for w in work if w.group["scaling"] == "adamw" and is_due(w)]
        if due:
            _measure_channels(due)

    def count_step(self) -> None:
        """Count a step for the log."""
        self._steps += 1

    def _first(self, pairs: Sequence[tuple[Work, int]], largest_gsnr: Callable[[], float]) -> None:
        """Measure the g-SNR of blocks that do not have one yet."""
        members = [w.batch.members[i] for w, i in pairs]
        statistics = _statistics(pairs)
        largest = largest_gsnr() if any(w.group["scaling"] == "max" for w, _ in pairs) else 0.0
        usable: list[tuple[Work, Member, float]] = []
        for (w, i), m, s in zip(pairs, members, statistics, strict=True):
            w.kinds[i] = "usable" if s.kind == "constant" else s.kind
            if w.kinds[i] == "usable":
                m.state["gsnr"].fill_(s.gsnr)
                usable.append((w, m, s.gsnr))
        for scaling in ("raw", "max"):
            chosen = [(m, gsnr) for w, m, gsnr in usable if w.group["scaling"] == scaling]
            values = paper_scales([gsnr for _, gsnr in chosen], scaling, largest)
            for (m, _), scale in zip(chosen, values, strict=True):
                m.state["scale"].fill_(scale)
                m.count, m.starts = 1, True
                m.state["calibration_step"].fill_(1)
        if usable:
            gsnrs = [gsnr for _, _, gsnr in usable]
            _logger().info(
                f"SGDSaI calibrates {len(usable)} blocks at step {self._steps + 1}: "
                f"g-SNR from {min(gsnrs):.4g} to {max(gsnrs):.4g}"
            )
        self._warn_about(
            "has a constant first gradient; its g-SNR is set to sqrt(numel)",
            [m.name for (w, _), m, s in zip(pairs, members, statistics, strict=True)
             if s.kind == "constant" and w.group["scaling"] != "adamw"],
        )  # fmt: skip
        self._warn_about(
            "has NaN or infinite elements in its first gradient; it is not updated until its gradient is finite",
            [m.name for m, s in zip(members, statistics, strict=True) if s.kind == "nonfinite"],
        )
        if self._steps >= _PATIENCE:
            self._warn_about(
                f"has had no usable gradient in {_PATIENCE} steps, only zeros or NaN; it is not being trained",
                [m.name for (w, i), m in zip(pairs, members, strict=True)
                 if w.kinds[i] != "usable" and w.grads[i] is not None],
            )  # fmt: skip

    def _warn_about(self, what: str, names: list[str]) -> None:
        """Warn once about each kind of gradient. The warning names the first block and the number of other blocks."""
        if names and what not in self._warned:
            self._warned.add(what)
            others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            warnings.warn(f"SGDSaI: {names[0]}{others} {what}", stacklevel=_stacklevel_of_user())


def _statistics(pairs: Sequence[tuple[Work, int]]) -> list[BlockStatistics]:
    """The statistics of the gradients of these blocks. Small blocks of the same shape are measured together."""
    results: dict[tuple[int, int], BlockStatistics] = {}
    rest: list[tuple[Work, int]] = []
    for w, i in pairs:
        if len(w.grads) == 1 or w.batch.dtype == torch.float64:
            rest.append((w, i))
        elif (id(w), i) not in results:
            stacked = torch.stack([g for g in w.grads if g is not None])
            for j, s in enumerate(measure_stacked(stacked, float(w.group["eps"]))):
                results[id(w), j] = s
    one_by_one = measure(
        [w.batch.members[i].param for w, i in rest],
        [w.grads[i] for w, i in rest],
        [float(w.group["eps"]) for w, _ in rest],
        fused_moments,
    )
    results |= {(id(w), i): s for (w, i), s in zip(rest, one_by_one, strict=True)}
    return [results[id(w), i] for w, i in pairs]


def is_due(w: Work) -> bool:
    """Whether the channels of a batch are measured in this step. The result is the same on every process."""
    return measures(w.group) or w.batch.is_early(WINDOW)


def measures(group: Mapping[str, Any]) -> bool:
    """Whether the channels of all blocks of a group are measured in this step."""
    return (int(group["step"]) + 1) % INTERVAL == 0


class _Measured(NamedTuple):
    """The mean squares of the channels (rows or columns) of one batch."""

    work: Work
    layout: Channels
    scale: Tensor
    squares: Tensor


def _measure_channels(due: Sequence[Work]) -> None:
    """Fold the gradients of this step into the scales of their channels."""
    measured = []
    for w in due:
        b = w.batch
        measured.append(_Measured(w, b.channels, b.scale, b.mean_squares(w.grads, b.channels, b.scale)))
        if b.column_channels is not None and b.column_scale is not None:
            squares = b.mean_squares(w.grads, b.column_channels, b.column_scale)
            measured.append(_Measured(w, b.column_channels, b.column_scale, squares))
    early = [m for m in measured if m.work.batch.is_early(WINDOW) and m.scale is m.work.batch.scale]
    if early:
        _count([m.work for m in early], [m.squares for m in early])
    # One set of operations handles all channels on a device.
    rows: dict[tuple[bool, float, torch.device], list[tuple[Tensor, Tensor, float]]] = {}
    for w, _, scale, x in _reduced(measured):
        members = w.batch.members
        own = rows.setdefault((w.group["token_rows"], float(w.group["eps"]), scale.device), [])
        if w.batch.is_uniform() and w.kinds.count("usable") == len(members):
            own.append((scale, x, 1.0 / max(1, members[0].count)))
            continue
        own += [(scale[i], x[i], 1.0 / max(1, m.count)) for i, m in enumerate(members) if w.kinds[i] == "usable"]
    for (token_rows, eps, _), own in rows.items():
        if own:
            _fold(own, eps, zeros_count=token_rows)
    for w in due:
        w.batch.refresh_columns()


def _count(works: Sequence[Work], squares: Sequence[Tensor]) -> None:
    """Count the usable gradients of blocks within the window, with one host synchronisation."""
    sums = [x.double().reshape(len(x), -1).sum(1) for x in squares]
    on_host = torch.cat([s.to(sums[0].device) for s in sums]).tolist() if sums else []
    params = [m.param for w in works for m in w.batch.members]
    totals = iter(sum_over_processes(params, on_host))
    for w in works:
        for i, m in enumerate(w.batch.members):
            total = next(totals)
            if m.count == 0:  # already measured as a whole, without underflow
                usable = w.kinds[i] == "usable"
            else:
                usable = math.isfinite(total) and total > 0
                w.kinds[i] = "usable" if usable else "zero" if total == 0 else "nonfinite"
            if usable:
                m.count = min(m.count + 1, WINDOW)
        w.batch.store_counts()


def _reduced(measured: Sequence[_Measured]) -> list[_Measured]:
    """``measured``, summed over the processes that hold parts of a channel. Each process group needs one collective."""
    results = list(measured)
    sharded = [i for i, m in enumerate(measured) if m.work.batch.sharded]
    params = [measured[i].work.batch.members[0].param for i in sharded]
    dims = [measured[i].layout.dims for i in sharded]
    for group, (members, device) in reduction_groups(params, dims).items():
        parts = [results[sharded[k]].squares for k in members]
        flat = torch.cat([x.reshape(-1).double() for x in parts]).to(device)
        torch.distributed.all_reduce(flat, group=group)
        summed = torch.split(flat, [x.numel() for x in parts])
        for k, own, total in zip(members, parts, summed, strict=True):
            results[sharded[k]] = results[sharded[k]]._replace(squares=total.to(own.device).view_as(own))
    return results


def _fold(rows: Sequence[tuple[Tensor, Tensor, float]], eps: float, *, zeros_count: bool) -> None:
    """Include the root mean squares of one more gradient in scales ``1 / (average + eps)``.

    If all weights are equal, as they are after the window, there is no host synchronisation.
    """
    scales = [s for s, _, _ in rows]
    old = torch.cat([s.reshape(-1) for s in scales])
    new = torch.cat([x.reshape(-1).to(old.device, torch.float32) for _, x, _ in rows]).sqrt_()
    weights = {w for _, _, w in rows}
    weight: float | Tensor = weights.pop()
    if weights:
        weight = torch.cat([torch.full_like(s, w).reshape(-1) for s, _, w in rows])
    held = 1.0 / old - eps  # infinite for a channel without a measurement
    average = held + (new - held) * weight
    is_measured = old > 0
    if not zeros_count:
        average = torch.where(new > 0, average, held)
    average = torch.where(is_measured, average, new * weight if zeros_count else new)
    result = 1.0 / (average + eps)
    keep = new.isfinite() & ((new > 0) | is_measured) if not zeros_count else new.isfinite()
    result = torch.where(keep, result, old)
    parts = torch.split(result, [s.numel() for s in scales])
    torch._foreach_copy_(scales, [part.view_as(s) for s, part in zip(scales, parts, strict=True)])


def _stacklevel_of_user() -> int:
    """The ``stacklevel`` for the first caller outside this package and the libraries that call optimizers."""
    libraries = {"hf_sai", "torch", "accelerate", "transformers", "trl", "deepspeed"}
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None:
        frame, level = frame.f_back, level + 1
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] not in libraries:
            return level
    return 2


def _logger() -> logging.Logger:
    """transformers' logger if that library is loaded, else the logger ``hf_sai``."""
    if "transformers" in sys.modules:
        logger: logging.Logger = sys.modules["transformers"].utils.logging.get_logger("transformers.hf_sai")
        return logger
    return logging.getLogger("hf_sai")
