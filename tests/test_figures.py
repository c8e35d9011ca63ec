"""Every figure that the project makes, from made records as large as real ones: see `figure_checks.py`."""

import io
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from figure_checks import faults, line_colours
from matplotlib.figure import Figure

from hf_sai.bench.measure import Result, Row
from hf_sai.bench.report import chart
from hf_sai.gsnr_plots import plot_drift, plot_kinds, plot_over_time
from hf_sai.plots import plot_gsnr, plot_losses
from hf_sai.table import GSNRRow
from recipes.common import classifier
from recipes.pretrain import report
from recipes.sweep.report import draw, pareto

OPTIMIZERS = (
    *("AdamW", "SGD-SaI", "SGD-SaI bfloat16", "SGD-SaI int8", "SGD-SaI raw", "SGDM", "AdamW 8-bit", "Adafactor"),
    *("Adam-mini", "Prodigy", "Muon", "AdamW schedule-free", "scaled AdamW"),
)


def sweep(metric: str = "final.eval_loss", optimizers: int = 13, decays: int = 0) -> dict[str, Any]:
    """A sweep's results: five rates each, those of SGDM a hundred times larger; the largest rate of some diverges."""
    numbers, rows, best = random.Random(optimizers), [], {}
    for i, name in enumerate(OPTIMIZERS[:optimizers]):
        rates = [x * (100 if name == "SGDM" else 1) for x in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)]
        for rate in rates:
            for decay in (0.0, 0.05, 0.5)[:decays] if decays else (None,):
                point = {"learning_rate": rate} | ({} if decay is None else {"weight_decay": decay})
                value = None if rate == rates[-1] and i % 4 == 1 else 3.5 + 0.04 * i + numbers.random() / 5
                if value is not None and metric.endswith("top1"):
                    value = 1 - value / 5
                rows.append({"run": name, "point": point, "seed": 0, "value": value, "optimizer_state_bytes": 0})
        mine = [row for row in rows if row["run"] == name]
        for row in mine:
            row["optimizer_state_bytes"] = int(2_233_000 / (1 + i / 2))
        values = [row["value"] for row in mine if row["value"] is not None]
        value = (max if metric.endswith("top1") else min)(values)
        best[name] = {"point": next(row["point"] for row in mine if row["value"] == value), "value": value}
    return {"sweep": "made.yaml", "metric": metric, "runs": rows, "finals": [], "best": best}


SWEEPS: dict[str, dict[str, Any]] = {
    "thirteen": sweep(),
    "three": sweep(optimizers=3),
    "top-1, eight": sweep("final.eval_top1", 8, 3),
    "loss, five": sweep("eval_loss", 5, 2),
}


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Callable[[Any], Any]], Figure]:
    """The figure that a function draws, as it is when it is saved."""
    saved: list[Figure] = []

    def save(self: Figure, target: Any, **_: Any) -> None:
        saved.append(self)
        if isinstance(target, Path):
            target.touch()

    monkeypatch.setattr(Figure, "savefig", save)

    def make(function: Callable[[Any], Any]) -> Figure:
        function(tmp_path / "figure.png")
        (one,) = saved
        return one

    return make


@pytest.mark.parametrize("name", SWEEPS)
def test_sweep(figure: Any, name: str) -> None:
    content = SWEEPS[name]
    one = figure(lambda path: draw(content, path))
    assert faults(one) == []
    colours = line_colours(one.axes[0])
    assert len(set(colours)) == len(colours)


@pytest.mark.parametrize("names", [["thirteen", "top-1, eight"], ["three"], ["thirteen", "three", "loss, five"]])
def test_pareto(figure: Any, names: list[str]) -> None:
    contents = [SWEEPS[name] for name in names]
    one = figure(lambda path: pareto(contents, path))
    assert faults(one) == []
    assert [sum(bool(text.get_text()) for text in axes.texts) for axes in one.axes] == [
        sum(math.isfinite(best["value"] or math.nan) for best in content["best"].values()) for content in contents
    ]


@pytest.mark.parametrize("counts", [[16], [11, 5]])
def test_bench(figure: Any, counts: list[int]) -> None:
    def row(i: int, key: str) -> Row:
        return Row(key, f"SGD-SaI (hf_sai), {key}", step_ms=30.0 * 1.4**i, state_bytes=498_000_000 * (1 + i % 4))

    results = [
        Result("gpt2", "GPT-2 124M", 124_439_808, 148, "float32", "cpu", 2, 14.0, True)
        for _ in counts
    ]  # fmt: skip
    for result, count in zip(results, counts, strict=True):
        result.rows = [row(i, f"optimizer {i}") for i in range(count)]
    assert faults(figure(lambda path: chart(path, results))) == []


def pretraining() -> list[dict[str, Any]]:
    """Five runs of 1,220 steps, each with its own options and one of them diverged early."""
    options = [("adamw_torch_fused", None), ("sgd_sai", None), ("sgd_sai", "scaling=raw"), ("sgdm", None)]
    options.append(("sgd_sai", "momentum=0.95,momentum_dtype=bfloat16,stochastic_rounding=true"))
    records = []
    for i, (optim, optim_args) in enumerate(options):
        steps = range(20, 300 if i == 3 else 1221, 20)
        train = [
            {"step": s, "tokens": 4096 * s, "seconds": 1.5 * s, "loss": 4.5 + 0.1 * i + 60 / (s + 10)} for s in steps
        ]
        config = {"optim": optim, "optim_args": optim_args, "learning_rate": 3e-4 * (i + 1)}
        records.append(
            {
                "config": config,
                "curves": {"train": train, "validation": [row | {"loss": row["loss"] + 0.1} for row in train[::5]]},
                "speed": {"optimizer_ms": 4.0 + 9 * i},
                "optimizer_state_bytes": 43_100_000 // (1 + i),
            }
        )
    return records


@pytest.mark.parametrize("draw_some", [report.draw_curves, report.draw_costs])
@pytest.mark.parametrize("count", [1, 5])
def test_pretraining(figure: Any, draw_some: Any, count: int) -> None:
    assert faults(figure(lambda _: draw_some(pretraining()[:count], io.BytesIO()))) == []


def test_classifier(figure: Any) -> None:
    config = {"optim": "sgd_sai", "optim_args": "scaling=adamw,momentum=0.9"}
    runs = []
    for lr in (0.001, 0.01):
        train = [{"epoch": i / 10, "loss": 2.3 - 30 * lr * i} for i in range(50)]
        validation = [{"epoch": i, "loss": 2.3 - 300 * lr * i, "top1": 0.1 + 20 * lr * i} for i in range(6)]
        curves = {"train": train, "validation": validation}
        runs.append({"config": {**config, "learning_rate": lr}, "curves": curves})
    assert faults(figure(lambda _: classifier.draw_curves(runs, io.BytesIO()))) == []


def test_losses(figure: Any) -> None:
    histories = {}
    for one in pretraining():
        curves = one["curves"]
        history = [{"step": row["step"], "loss": row["loss"]} for row in curves["train"]]
        histories[one["config"]["optim"] + str(len(histories))] = history + [
            {"step": row["step"], "eval_loss": row["loss"]} for row in curves["validation"]
        ]
    assert faults(figure(lambda path: plot_losses(histories, path))) == []


def blocks(excess: float = 1.0) -> list[dict[str, Any]]:
    """The 52 blocks of a GPT-2 of 4 layers; those of vectors stand above sqrt(d) by up to `excess`."""
    found: list[dict[str, Any]] = []

    def add(name: str, kind: str, layer: int | None, *shape: int) -> None:
        numel = math.prod(shape)
        ratio = 1.0 if len(shape) > 1 else 1.0 + (excess - 1.0) * (len(found) % 7) / 6
        gsnr = ratio * math.sqrt(numel)
        found.append(
            {"name": name, "kind": kind, "layer": layer, "shape": list(shape), "numel": numel, "gsnr": gsnr}
            | {"scale": gsnr}
        )

    add("transformer.wte.weight", "embedding", None, 8192, 256)
    add("transformer.wpe.weight", "position embedding", None, 1024, 256)
    for i in range(4):
        at = f"transformer.h.{i}"
        add(f"{at}.ln_1.weight", "norm", i, 256)
        add(f"{at}.ln_1.bias", "bias", i, 256)
        for part, kind, rows, columns in (
            ("attn.c_attn", "attention qkv", 256, 768),
            ("attn.c_proj", "attention out", 256, 256),
            ("mlp.c_fc", "mlp in", 256, 1024),
            ("mlp.c_proj", "mlp out", 1024, 256),
        ):
            add(f"{at}.{part}.weight", kind, i, rows, columns)
            add(f"{at}.{part}.bias", "bias", i, columns)
        add(f"{at}.ln_2.weight", "norm", i, 256)
        add(f"{at}.ln_2.bias", "bias", i, 256)
    add("transformer.ln_f.weight", "norm", None, 256)
    add("transformer.ln_f.bias", "bias", None, 256)
    return found


@pytest.mark.parametrize("count", [1, 2, 52, 156])
def test_gsnr(figure: Any, count: int) -> None:
    rows = [GSNRRow(b["name"], tuple(b["shape"]), b["numel"], b["gsnr"], b["scale"], True) for b in 3 * blocks()]
    one = figure(lambda path: plot_gsnr(rows[:count], path))
    assert faults(one) == []
    low, high = one.axes[0].get_xlim()
    assert sum(low <= tick <= high for tick in one.axes[0].get_xticks()) >= 2


def test_gsnr_over_time(figure: Any) -> None:
    growth = [1.0, 1.1, 0.8, 1.3]
    measured = [{**b, "gsnr_now": [x * b["gsnr"] for x in growth], "drift": growth} for b in blocks()]
    whole = {"steps": [1, 6, 11, 16], "every": 5, "blocks": measured}
    assert faults(figure(lambda path: plot_over_time(whole, path))) == []


def test_drift(figure: Any) -> None:
    measured = [{**b, "gsnr_now": [b["gsnr"]] * 2, "drift": [1.0, 1.4]} for b in blocks()]
    assert faults(figure(lambda path: plot_drift({"steps": [1, 6], "every": 5, "blocks": measured}, path))) == []


@pytest.mark.parametrize("excess", [1.0, 1.09, 2.0])
def test_kinds(figure: Any, excess: float) -> None:
    found = blocks(excess)
    assert faults(figure(lambda path: plot_kinds(found, path, "a title"))) == []
