"""Every figure that the project makes, from the committed records: what `figure_checks.py` asks of each."""

import io
import json
import math
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
from recipes import classifier, pretrain_report
from recipes.sweep_report import draw, pareto

RESULTS = Path(__file__).parents[1] / "recipes" / "results"
SWEEPS = sorted(path.stem for path in RESULTS.glob("*.json") if "sweep" in json.loads(path.read_text()))


def record(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


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
    content = record(name)
    one = figure(lambda path: draw(content, path))
    assert faults(one) == []
    colours = line_colours(one.axes[0])
    assert len(set(colours)) == len(colours)


@pytest.mark.parametrize(
    "names", [["pareto_text", "pareto_lora"], ["lr_text"], ["pareto_lora", "lr_lora", "e2e_table"]]
)
def test_pareto(figure: Any, names: list[str]) -> None:
    contents = [record(name) for name in names]
    one = figure(lambda path: pareto(contents, path))
    assert faults(one) == []
    assert [sum(bool(text.get_text()) for text in axes.texts) for axes in one.axes] == [
        sum(math.isfinite(best["value"] or math.nan) for best in content["best"].values()) for content in contents
    ]


@pytest.mark.parametrize("name", ["bench_cpu", "bench_cpu_1thread"])
def test_bench(figure: Any, name: str) -> None:
    results = [Result(**{**one, "rows": [Row(**row) for row in one["rows"]]}) for one in record(name)["results"]]
    assert faults(figure(lambda path: chart(path, results))) == []


def pretraining() -> list[dict[str, Any]]:
    return [record(path.stem) for path in sorted(RESULTS.glob("pretrain5m_sweep_*.json"))]


@pytest.mark.parametrize("draw_some", [pretrain_report.draw_curves, pretrain_report.draw_costs])
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


def blocks() -> list[dict[str, Any]]:
    return record("gsnr_5m_init")["results"][0]["blocks"]


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


@pytest.mark.parametrize("part", range(len(record("gsnr_5m_init")["results"])))
def test_kinds(figure: Any, part: int) -> None:
    found = record("gsnr_5m_init")["results"][part]["blocks"]
    assert faults(figure(lambda path: plot_kinds(found, path, "a title"))) == []
