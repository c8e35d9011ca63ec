"""The g-SNR of the current gradients, and the scales that a re-calibration on them would give."""

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from hf_sai.blocks import KINDS, block_names
from hf_sai.gsnr import BlockStatistics, measure, paper_scales
from hf_sai.optimizer import SGDSaI
from hf_sai.shards import gradient
from hf_sai.update import fused_moments

FORMAT = 1  # the format of the record, incremented when the meaning of a field changes


class Measured(NamedTuple):
    """One block at one step.

    Attributes:
        name: the parameter's name in the model.
        scaling: the scaling of its param group, or ``None`` if the optimizer is not SGDSaI.
        statistics: the statistics of its gradient.
    """

    name: str
    scaling: str | None
    statistics: BlockStatistics


def measure_gradients(optimizer: Any, model: nn.Module) -> list[Measured]:
    """Measure the gradient of every parameter that ``optimizer`` trains, between backward and ``step``.

    Sharded parameters need collectives, so every process must call this in the same step.

    Args:
        optimizer: any ``torch.optim.Optimizer``, or a wrapper with ``.optimizer`` (accelerate's).
        model: the model that it trains, wrapped or not.

    Returns:
        The measurements in the order of the param groups, the same on every process. The kind of a block without a
        gradient is ``"zero"``.

    Raises:
        ValueError: if the gradients are not available: under DeepSpeed, FSDP1 or gradient release.
    """
    while hasattr(optimizer, "optimizer"):
        if "deepspeed" in type(optimizer).__module__:
            raise ValueError("g-SNR cannot be measured during training under DeepSpeed, which steps within backward")
        optimizer = optimizer.optimizer
    own = isinstance(optimizer, SGDSaI)
    if own and optimizer.releases_gradients:
        raise ValueError(
            "g-SNR cannot be measured during training with release_gradients, which frees each gradient within "
            "backward; train without release_gradients"
        )
    names = block_names(model)
    blocks: list[tuple[str, Tensor, dict[str, Any]]] = []
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            if hasattr(p, "_fsdp_flattened"):
                raise ValueError("g-SNR cannot be measured under FSDP1, which flattens the blocks; use FSDP2")
            if p.requires_grad and p.numel():
                blocks.append((names[p].name if p in names else f"param_groups[{i}].params[{j}]", p, group))
    statistics = measure(
        [p for _, p, _ in blocks],
        [gradient(p) for _, p, _ in blocks],
        [group["eps"] if own else 1e-8 for _, _, group in blocks],
        fused_moments,
    )
    return [
        Measured(name, group["scaling"] if own else None, s)
        for (name, _, group), s in zip(blocks, statistics, strict=True)
    ]


def usable(measured: Sequence[Measured]) -> list[Measured]:
    """The measurements that a calibration would use."""
    return [m for m in measured if m.statistics.kind in ("usable", "constant")]


def recalibrated(measured: Sequence[Measured]) -> dict[str, float]:
    """The scale that each block would get if all blocks were calibrated on these gradients. Empty without SGDSaI.

    Under ``scaling="adamw"`` the block counts as one channel.
    """
    scales: dict[str, float] = {}
    for scaling in ("raw", "max"):
        members = [m for m in usable(measured) if m.scaling == scaling]
        values = paper_scales([m.statistics.gsnr for m in members], scaling)
        scales |= {m.name: value for m, value in zip(members, values, strict=True)}
    for m in usable(measured):
        if m.scaling == "adamw":
            scales[m.name] = math.sqrt(m.statistics.numel) / m.statistics.norm
    return scales


# --- the record of a run ---------------------------------------------------------------------------------------------

NOW, DRIFT = "gsnr_now/", "gsnr_drift/"  # the keys of a Trainer's log


def build_record(
    log_history: Sequence[Mapping[str, Any]],
    model: nn.Module,
    calibrated: Mapping[str, tuple[float, float]],
    every: int,
) -> dict[str, Any]:
    """Collect the measurements of a run as columns from the Trainer's log, which a resumed run continues.

    Args:
        log_history: ``trainer.state.log_history``.
        model: the trained model.
        calibrated: the g-SNR and scale of each calibrated block by name. Empty without SGDSaI.
        every: the number of optimizer steps between measurements.

    Returns:
        ``steps`` and ``blocks``. ``steps`` has the numbers of the optimizer steps that used the gradients, from 1. Each
        block has ``name``, ``kind``, ``layer``, ``shape``, ``numel`` and the calibrated ``gsnr`` and ``scale``
        (``None`` if it is not calibrated). It also has one value per step of ``gsnr_now`` and ``drift``. A value is
        ``None`` for a step without a usable gradient. The drift is the scale that a re-calibration would give divided
        by the current scale. Without SGDSaI, ``drift`` is ``None``. Numbers are rounded to six digits.
    """
    rows = {row["step"]: row for row in log_history if any(key.startswith(NOW) for key in row)}
    steps = sorted(rows)
    blocks = []
    for p, (name, kind, layer) in block_names(model).items():
        now = [rows[step].get(NOW + name) for step in steps]
        drift = [rows[step].get(DRIFT + name) for step in steps]
        if any(x is not None for x in now):
            gsnr, scale = calibrated.get(name, (None, None))
            blocks.append(
                {"name": name, "kind": kind, "layer": layer, "shape": list(p.shape), "numel": p.numel()}
                | {"gsnr": _rounded(gsnr), "scale": _rounded(scale)}
                | {"gsnr_now": [_rounded(x) for x in now]}
                | {"drift": [_rounded(x) for x in drift] if any(x is not None for x in drift) else None}
            )
    blocks.sort(key=lambda block: KINDS.index(block["kind"]))  # stable: layers stay in order
    return {"format": FORMAT, "every": every, "steps": steps, "blocks": blocks}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a record of :class:`hf_sai.GSNRCallback`.

    Raises:
        ValueError: if the file is not such a record or has another format.
        OSError: if the file cannot be read.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a g-SNR record: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or not isinstance(record.get("blocks"), list):
        raise ValueError(f"{path} must be a gsnr.json from GSNRCallback in format {FORMAT}")
    return record


def write_json(path: str | Path, content: Any) -> Path:
    """Write JSON atomically. Short values and lists of numbers are on one line each."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        temporary.write_text(_compact(content) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    return path


def _compact(value: Any, indent: str = "") -> str:
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if len(line) <= 200 or not any(isinstance(item, dict | list) for item in nested):
        return line
    inner = indent + " "
    if isinstance(value, dict):
        lines = [f"{inner}{json.dumps(key)}: {_compact(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inner + _compact(item, inner) for item in value) + f"\n{indent}]"
