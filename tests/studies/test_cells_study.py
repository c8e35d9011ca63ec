"""The study of cells: which rate counts, what is correlated, what the table says."""

import pytest

from recipes.common.errors import UserError
from recipes.common.provenance import sealed
from recipes.studies.cells import FEATURES, best_rates, correlations, measure
from recipes.sweep.tables import cells as table


def row(run: str, rate: float, cell: str, value: float | None) -> dict:
    return {"run": run, "point": {"learning_rate": rate, "model": cell}, "value": value}


ROWS = [
    *(row("AdamW", 1e-3, cell, value) for cell, value in (("cell_1", 0.5), ("cell_2", 0.9), ("cell_3", 0.7))),
    *(row("AdamW", 1e-2, cell, value) for cell, value in (("cell_1", 0.9), ("cell_2", None), ("cell_3", 0.9))),
]
CELLS = [
    {"cell": f"cell_{i}", "connected": i < 4, "least": i / 10, "median": -i, "decades": 1.0 + i, "parameters": 9 * i}
    for i in (1, 2, 3, 4)
]


def test_the_rate_with_the_best_mean_counts_and_a_run_that_diverged_is_zero():
    best = best_rates(ROWS)["AdamW"]
    assert (best["learning_rate"], best["at_edge"]) == (1e-3, True)
    assert best["accuracy"] == {"cell_1": 0.5, "cell_2": 0.9, "cell_3": 0.7}
    assert best["mean_by_rate"] == {"0.001": pytest.approx(0.7), "0.01": pytest.approx(0.6)}
    assert list(best_rates(ROWS[:-1])["AdamW"]["mean_by_rate"]) == ["0.001"], "a rate that lacks a cell is left out"
    with pytest.raises(UserError, match="not finished: SGDM has no rate with 3 cells"):
        best_rates([*ROWS, row("SGDM", 1.0, "cell_1", 0.5)])


def test_ranks_of_connected_cells_are_correlated():
    found = correlations(CELLS, {"cell_1": 0.1, "cell_2": 0.2, "cell_3": 0.8, "cell_4": 0.0})
    assert list(found) == list(FEATURES)
    assert [found[name]["rho"] for name in FEATURES] == [1.0, -1.0, 1.0, 1.0]


def test_a_fresh_cell_is_measured():
    base = {"dataset": "digits", "model_options": {"width": 8}}
    found = measure("cell_375", base)  # a 3x3 convolution from the first node to the last
    assert found["connected"]
    assert 0 < found["least"] <= found["median"] <= 1.0 + 1e-6
    assert found == measure("cell_375", base)
    assert not measure("cell_1", base)["connected"]


def test_the_table_and_an_edited_record():
    own = {"learning_rate": 1e-3, "at_edge": True, "accuracy": {f"cell_{i}": i / 10 for i in (1, 2, 3, 4)}}
    own["spearman"] = {name: {"rho": 0.5, "p": 0.01} for name in FEATURES}
    record = sealed(
        {
            "recipe": "studies.cells",
            "command": "python -m recipes.studies.cells",
            "cells": CELLS,
            "optimizers": {"AdamW": own},
            "machine": {"cpu": "a CPU"},
            "versions": {"torch": "2.13.0"},
        }
    )
    text = table(record)
    assert "| AdamW | 0.001 (edge) | 20.0 (15.0 to 25.0) | 10.0 | 3 |" in text
    assert "| AdamW | +0.50 (p 0.01) | +0.50 (p 0.01) | +0.50 (p 0.01) | +0.50 (p 0.01) |" in text
    with pytest.raises(UserError, match="was edited"):
        table({**record, "recipe": "other"})
