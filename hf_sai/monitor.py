"""The g-SNR of the gradients that are there now, and what a re-calibration would make of them."""

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

FORMAT = 1  # of the record: raised when its fields change their meaning


class Measured(NamedTuple):
    """One block at one step.

    Attributes:
        name: the parameter's name in the model.
        scaling: that of its param group; ``None`` where the optimizer is no SGDSaI.
        statistics: of its gradient.
    """

    name: str
    scaling: str | None
    statistics: BlockStatistics


def measure_gradients(optimizer: Any, model: nn.Module) -> list[Measured]:
    """Measure the gradient of every parameter that ``optimizer`` trains, between backward and ``step``.

    Takes part in the collectives of sharded parameters: every process must call it in the same step.

    Args:
        optimizer: any ``torch.optim.Optimizer``, or a wrapper with ``.optimizer`` (accelerate's).
        model: the model that it trains, wrapped or not.

    Returns:
        In the order of the param groups, the same on every process; the statistics of a block without a gradient are
        of kind ``"zero"``.

    Raises:
        ValueError: where the gradients are not to be seen: under DeepSpeed, FSDP1, or released within backward.
    """
    while hasattr(optimizer, "optimizer"):
        if "deepspeed" in type(optimizer).__module__:
            raise ValueError("g-SNR cannot be measured during training under DeepSpeed, which steps within backward")
        optimizer = optimizer.optimizer
    own = isinstance(optimizer, SGDSaI)
    if own and optimizer.releases_gradients:
        raise ValueError(
            "g-SNR cannot be measured during training with release_gradients, which frees each gradient within "
            "backward: train without it"
        )
    names = block_names(model)
    blocks: list[tuple[str, Tensor, dict[str, Any]]] = []
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            if hasattr(p, "_fsdp_flattened"):
                raise ValueError("g-SNR cannot be measured under FSDP1, which flattens the blocks: use FSDP2")
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
    """Those that a calibration would take."""
    return [m for m in measured if m.statistics.kind in ("usable", "constant")]


def recalibrated(measured: Sequence[Measured]) -> dict[str, float]:
    """The scale that each block would get if all were calibrated on these gradients; nothing without SGDSaI.

    Under ``scaling="adamw"``, that of the block as one channel.
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
    """The measurements of a run as columns, from the Trainer's log, which a resumed run continues.

    Args:
        log_history: ``trainer.state.log_history``.
        model: what was trained.
        calibrated: g-SNR and scale of each calibrated block by name; empty without SGDSaI.
        every: optimizer steps between measurements.

    Returns:
        ``steps`` (the number of the optimizer step that the gradient made, from 1) and ``blocks``: for each its
        ``name``, ``kind``, ``layer``, ``shape``, ``numel``, calibrated ``gsnr`` and ``scale`` (``None`` without), and
        one value a step of ``gsnr_now`` and ``drift`` (the scale that a re-calibration would give, in units of the
        kept one; ``None`` as a whole without SGDSaI). ``None`` for a step without a usable gradient. Numbers are
        rounded to six digits.
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
    """A record that was written here.

    Raises:
        ValueError: when it is none, or of another format.
        OSError: when it cannot be read.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no record of g-SNR: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or not isinstance(record.get("blocks"), list):
        raise ValueError(f"{path} must be a gsnr.json of GSNRCallback of format {FORMAT}")
    return record


def write_json(path: str | Path, content: Any) -> Path:
    """Write JSON in one piece or not at all; what fits a line stands on one, as do lists of numbers."""
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
