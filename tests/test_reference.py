"""SGDSaI's default rule against its float64 twin, on every path."""

from typing import Any

import pytest
import torch
from reference import Reference
from torch import nn

from hf_sai import SGDSaI

SHAPES = [(7, 12), (12, 7), (9, 9), (4, 3, 3, 3), (13,), ()]
PATHS: list[dict[str, Any]] = [{}, {"foreach": True}, {"foreach": False}]


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_eighty_steps(path: dict[str, Any], dtype: torch.dtype, momentum: float, weight_decay: float) -> None:
    """Blocks of every kind, twice each so that they are stacked, some late, some with zero gradients in between."""
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in (*SHAPES, *SHAPES)]
    tokens = nn.Parameter(torch.randn(11, 5, dtype=dtype))
    options = {"lr": 1e-2, "momentum": momentum, "weight_decay": weight_decay}
    groups: list[dict[str, Any]] = [{"params": params}, {"params": [tokens], "token_rows": True}]
    optimizer = SGDSaI(groups, **options, **path)
    twins = [Reference(p.detach(), **options) for p in params]
    twins.append(Reference(tokens.detach(), **options, token_rows=True))
    for step in range(80):
        for i, (p, twin) in enumerate(zip([*params, tokens], twins, strict=True)):
            size = 1.0 if step % 7 else 3.0 * (1 + i)
            p.grad = size * torch.randn_like(p)
            if (i == 1 and step < 4) or (i == 2 and step in (0, 1, 9, 70)):
                p.grad.zero_()
            if p is tokens:
                p.grad[step % 11 :: 3] = 0
            twin.step(p.grad, step + 1)
        optimizer.step()
    eps = torch.finfo(torch.float32).eps
    for p, twin in zip([*params, tokens], twins, strict=True):
        scale = optimizer.state[p]["scale"].double().flatten()
        expected = 1 / (twin.rms.flatten() + 1e-8)
        assert ((scale - expected).abs() <= 100 * eps * expected).all()
        assert (p.double() - twin.p).abs().max() <= 80 * eps * (1 + twin.p.abs().max())
