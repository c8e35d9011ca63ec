"""Cells of NATS-Bench's topology space: their number, their operations and what a cell computes."""

import pytest
import torch

from recipes.common.errors import UserError
from recipes.images.cells import CELLS, EDGES, OPERATIONS, Cell, is_connected, operations
from recipes.images.models import ImageModelArguments, build_model


def test_there_are_15625_cells_and_each_has_other_operations():
    assert CELLS == 15_625
    assert len({tuple(operations(cell)) for cell in range(CELLS)}) == CELLS
    assert operations(0) == ["none"] * 6
    assert operations(CELLS - 1) == [OPERATIONS[-1]] * 6
    assert operations(1 + 3 * 5**5) == ["skip_connect", "none", "none", "none", "none", "nor_conv_3x3"]
    assert EDGES == ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))


def number(**chosen: str) -> int:
    """The cell with these operations, `e01="skip_connect"`, and none elsewhere."""
    digits = {(int(edge[1]), int(edge[2])): OPERATIONS.index(name) for edge, name in chosen.items()}
    return sum(digits.get(edge, 0) * 5**k for k, edge in enumerate(EDGES))


def test_nodes_are_sums_over_their_edges():
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    skip = "skip_connect"
    assert torch.equal(Cell(number(e01=skip), 2)(x), torch.zeros_like(x)), "nothing reaches the last node"
    assert torch.equal(Cell(number(e03=skip), 2)(x), x)
    # 1 = x, 2 = x + 1 = 2x, 3 = x + 1 + 2 = 4x
    assert torch.equal(Cell(number(e01=skip, e02=skip, e12=skip, e03=skip, e13=skip, e23=skip), 2)(x), 4 * x)
    pooled = torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    assert torch.equal(Cell(number(e03="avg_pool_3x3"), 2)(x), pooled)


def test_a_cell_is_connected_where_its_output_depends_on_its_input():
    x = torch.rand(2, 2, 3, 3)
    torch.manual_seed(0)
    for cell in [*range(0, CELLS, 97), number(e01="skip_connect", e23="skip_connect"), number(e03="avg_pool_3x3")]:
        depends = not torch.equal(Cell(cell, 2)(x), torch.zeros_like(x))
        assert is_connected(cell) == depends, operations(cell)


def test_a_network_by_the_number_of_its_cell():
    name = f"cell_{number(e03='nor_conv_3x3', e01='nor_conv_1x1')}"
    model = build_model(
        ImageModelArguments(model=name, model_options={"width": 4}), image_size=8, channels=1, classes=3
    )
    assert model(pixel_values=torch.zeros(2, 1, 8, 8)).logits.shape == (2, 3)
    cells = sum(4 * 4 * k * k + 8 for k in (1, 3)) + sum(8 * 8 * k * k + 16 for k in (1, 3))
    cells += sum(16 * 16 * k * k + 32 for k in (1, 3))
    between = sum(a * b * 9 + 2 * b + b * b * 9 + 2 * b + a * b for a, b in ((4, 8), (8, 16)))
    assert sum(p.numel() for p in model.parameters()) == 9 * 4 + 8 + cells + between + 32 + 16 * 3 + 3


@pytest.mark.parametrize("name", ["cell_15625", "cell_", "cell_-1", "cells_1"])
def test_a_cell_that_there_is_not(name):
    with pytest.raises(UserError, match=rf"or cell_N with N below 15625, got '{name}'"):
        ImageModelArguments(model=name)
