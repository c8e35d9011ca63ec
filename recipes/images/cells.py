"""Networks of the topology space of NATS-Bench (Dong et al., 2021): 15,625 cells, five operations on six edges.

A cell has four nodes; node j is the sum over the nodes i < j of an operation on i. `cell_7` is the cell whose edges
(0,1), (0,2), (1,2), (0,3), (1,3), (2,3) have the operations that the digits of 7 to base 5 name, the last edge first.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
NODES = 4
EDGES = tuple((i, j) for j in range(1, NODES) for i in range(j))
CELLS = len(OPERATIONS) ** len(EDGES)


class CellConfig(PreTrainedConfig):
    """A stem, then `stages` cells of width `width`, 2 * `width`, ... with half the side each, and a linear head."""

    model_type = "hf_sai_cell"

    def __init__(
        self,
        cell: int = 0,
        width: int = 16,
        stages: int = 3,
        num_channels: int = 3,
        **kwargs: Any,
    ) -> None:
        self.cell, self.width, self.stages, self.num_channels = cell, width, stages, num_channels
        super().__init__(**kwargs)


def operations(cell: int) -> list[str]:
    """The operations on `EDGES`, in their order."""
    return [OPERATIONS[cell // len(OPERATIONS) ** k % len(OPERATIONS)] for k in range(len(EDGES))]


def is_connected(cell: int) -> bool:
    """Whether the last node depends on the first."""
    reached = {0}
    for (i, j), name in zip(EDGES, operations(cell), strict=True):
        if i in reached and name != "none":
            reached.add(j)
    return NODES - 1 in reached


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Module:
    return nn.Sequential(
        nn.ReLU(), nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs)
    )


def _operation(name: str, width: int) -> nn.Module | None:
    if name == "none":
        return None
    if name == "skip_connect":
        return nn.Identity()
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    return _convolution(width, width, int(name[-1]))


class Cell(nn.Module):
    """One cell; a node without any operation is zero."""

    def __init__(self, cell: int, width: int) -> None:
        super().__init__()
        made = {f"{i}_{j}": _operation(name, width) for (i, j), name in zip(EDGES, operations(cell), strict=True)}
        self.edges = nn.ModuleDict({edge: operation for edge, operation in made.items() if operation is not None})

    def forward(self, x: Tensor) -> Tensor:
        nodes = [x]
        for j in range(1, NODES):
            into = [self.edges[f"{i}_{j}"](nodes[i]) for i in range(j) if f"{i}_{j}" in self.edges]
            nodes.append(torch.stack(into).sum(0) if into else torch.zeros_like(x))
        return nodes[-1]


class _Reduction(nn.Module):
    """Half the side and other width: a residual block of two convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(_convolution(inputs, outputs, 3), _convolution(outputs, outputs, 3))
        self.pool = nn.AvgPool2d(2)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        halved = self.pool(x)
        shortcut: Tensor = self.shortcut(halved)
        return shortcut + self.convolutions(halved)


class CellNetwork(PreTrainedModel):
    """The classifier; inputs (images, channels, side, side), logits (images, labels)."""

    config_class = CellConfig
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        widths = [config.width * 2**stage for stage in range(config.stages)]
        stem = nn.Conv2d(config.num_channels, config.width, 3, padding=1, bias=False)
        layers: list[nn.Module] = [stem, nn.BatchNorm2d(config.width), Cell(config.cell, config.width)]
        for inputs, outputs in itertools.pairwise(widths):
            layers += [_Reduction(inputs, outputs), Cell(config.cell, outputs)]
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(widths[-1]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(widths[-1], config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)

    def forward(self, pixel_values: Tensor, **_: Any) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.classifier(self.body(pixel_values)))


AutoConfig.register(CellConfig.model_type, CellConfig)
AutoModelForImageClassification.register(CellConfig, CellNetwork)
