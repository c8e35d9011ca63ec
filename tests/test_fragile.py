"""What breaks an optimizer that is calibrated on its first gradients: here it ends where AdamW ends.

Small regressions with noise, in float64 on fixed batches: a run has one result, whatever the machine and its threads.
"""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_sai import SGDSaI
from hf_sai.calibration import WINDOW

STEPS, BATCH, LR = 600, 32, 2e-2
WIDTH, OUT = 16, 4


def nothing(step: int, model: nn.Module) -> None:
    """Leave gradients as backward makes them."""


class Case(NamedTuple):
    """A fragile training.

    Attributes:
        model: made from a seed.
        edit: changes gradients between backward and step; gets the step, from 0, and the model.
        weight: of the loss of each step.
    """

    model: Callable[[], nn.Module]
    edit: Callable[[int, Any], None] = nothing
    weight: Callable[[int], float] = lambda step: 1.0


class Net(nn.Module):
    """``head(lift(h) + scale * out(tanh(fc(h))))`` with ``h = into(x)``: no part of it can stay as it begins."""

    def __init__(self, scale: float | None = None, zero: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.into, self.lift = nn.Linear(8, 2), nn.Linear(2, WIDTH)
        self.fc, self.out, self.head = nn.Linear(2, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, OUT)
        self.scale = 1.0 if scale is None else nn.Parameter(torch.full((WIDTH,), scale))
        for name in zero:
            for p in self.get_submodule(name).parameters():
                nn.init.zeros_(p)

    def forward(self, x: Tensor, step: int) -> Tensor:
        h = self.into(x)
        y: Tensor = self.head(self.lift(h) + self.scale * self.out(torch.tanh(self.fc(h))))
        return y


class LateBranch(Net):
    """``fc`` and ``out`` are first used in step 4."""

    def forward(self, x: Tensor, step: int) -> Tensor:
        y: Tensor = super().forward(x, step) if step >= 3 else self.head(self.lift(self.into(x)))
        return y


class Experts(nn.Module):
    """Four experts in one parameter (experts, rows, columns); the last one has no input in the first 20 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, OUT)
        self.experts = nn.Parameter(torch.randn(4, WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor, step: int) -> Tensor:
        chosen = quadrant(x)
        if step < 20:
            chosen = chosen.clamp(max=2)
        h = torch.tanh(self.into(x))
        y: Tensor = self.head(torch.tanh(torch.einsum("bi,bio->bo", h, self.experts[chosen])))
        return y


def quadrant(x: Tensor) -> Tensor:
    return (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()


def data(generator: torch.Generator, by_quadrant: bool) -> tuple[Tensor, Tensor]:
    """Inputs (1024, 8), and targets (1024, 4) that depend on two directions of them, with noise."""
    x = torch.randn(1024, 8, generator=generator, dtype=torch.float64)
    u, v = (x @ torch.randn(8, 2, generator=generator, dtype=torch.float64) / 8**0.5).unbind(1)
    y = torch.stack([torch.sin(2 * u), torch.cos(2 * v), torch.sin(u + v), u * v], 1)
    if by_quadrant:
        y = y + torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=torch.float64)[quadrant(x), None]
    return x, y + 0.3 * torch.randn(1024, OUT, generator=generator, dtype=torch.float64)


def zeros(layer: str, when: Callable[[int], bool]) -> Callable[[int, nn.Module], None]:
    """The gradients of a layer are zero in some steps."""

    def edit(step: int, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            if name.startswith(layer) and p.grad is not None and when(step):
                p.grad.zero_()

    return edit


def noise(size: float, steps: int) -> Callable[[int, nn.Module], None]:
    """The first gradients of a layer are rounding noise."""

    def edit(step: int, model: Any) -> None:
        if step < steps:
            model.into.weight.grad.normal_(std=size, generator=torch.Generator().manual_seed(step))

    return edit


CASES = {
    "nothing fragile": Case(Net),
    **{f"zero in the first {k}": Case(Net, zeros("into", lambda s, k=k: s < k)) for k in (2, 5, 30)},
    "zero in between": Case(Net, zeros("into", lambda s: s % 3 == 1)),
    "all zero in the first": Case(Net, zeros("", lambda s: s == 0)),
    **{f"noise of {size} in the first": Case(Net, noise(size, 1)) for size in (1e-15, 1e-6)},
    "noise in the first ten": Case(Net, noise(1e-15, 10)),
    "two zero layers in a row": Case(lambda: Net(zero=("out", "head"))),
    "layer scale": Case(lambda: Net(1e-6)),
    "a branch first used in step 4": Case(LateBranch),
    "an idle expert": Case(Experts),
    "a thousand times as large after the window": Case(Net, weight=lambda s: 1e3 if s > WINDOW + 5 else 1.0),
}
SCHEDULES: dict[str, Callable[[int], float]] = {
    "linear warm-up": lambda step: min((step + 1) / 40, (STEPS - step) / (STEPS - 40)),
    "none": lambda step: 1.0 if step < STEPS // 2 else 2 - 2 * step / STEPS,
}


def final_losses(make: Callable[[Any], torch.optim.Optimizer], case: Case, schedule: str, seeds: range) -> list[float]:
    """The loss over all data after a training from each seed; targets have noise, so that it has a floor.

    One optimizer and one backward pass serve all seeds: no block of a model depends on another model.
    """
    models, data_of_seeds, generators = [], [], []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(case.model().double())
        generators.append(torch.Generator().manual_seed(seed))
        data_of_seeds.append(data(generators[-1], isinstance(models[-1], Experts)))
    x, y = map(torch.stack, zip(*data_of_seeds, strict=True))  # (seeds, 1024, 8), (seeds, 1024, 4)
    named = [dict(model.named_parameters()) for model in models]
    optimizer = make([p for of_seed in named for p in of_seed.values()])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, SCHEDULES[schedule])

    def losses(x: Tensor, y: Tensor, step: int) -> Tensor:
        stacked = {name: torch.stack([of_seed[name] for of_seed in named]) for name in named[0]}
        out = torch.vmap(lambda params, x: functional_call(models[0], params, (x, step)))(stacked, x)
        return (out - y).square().mean((1, 2))

    every = torch.arange(len(models))[:, None]
    for step in range(STEPS):
        rows = torch.stack([torch.randint(x.shape[1], (BATCH,), generator=generator) for generator in generators])
        optimizer.zero_grad()
        (case.weight(step) * losses(x[every, rows], y[every, rows], step)).sum().backward()
        for model in models:
            case.edit(step, model)
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        found: list[float] = losses(x, y, STEPS).tolist()
    return found


# One run in ten ends on a plateau, with either optimizer: the median over seeds of the ratio of losses decides.
SEEDS = range(7)
ROWS = [
    *((case, "linear warm-up") for case in CASES if case != "an idle expert"),
    *((case, "none") for case in ("zero in the first 2", "two zero layers in a row", "noise of 1e-15 in the first")),
    pytest.param("an idle expert", "linear warm-up", marks=pytest.mark.xfail(reason="6 % above AdamW")),
]


@pytest.mark.parametrize(("case", "schedule"), ROWS)
def test_the_loss_is_that_of_adamw_or_better(case: str, schedule: str) -> None:
    def losses(make: Callable[..., torch.optim.Optimizer], **options: Any) -> list[float]:
        return final_losses(
            lambda params: make(params, lr=LR, weight_decay=0.01, **options), CASES[case], schedule, SEEDS
        )

    ours, theirs = losses(SGDSaI), losses(torch.optim.AdamW, fused=True)
    ratio = statistics.median(our / their for our, their in zip(ours, theirs, strict=True))
    print(f"{case}, {schedule}: {ratio:.3f} of AdamW's loss")
    assert ratio < 1.05


def test_the_losses_would_show_a_layer_that_is_left_behind() -> None:
    """AdamW's loss with a layer that does not train: what is tested above is far from it."""

    def loss(case: Case) -> float:
        (found,) = final_losses(lambda params: torch.optim.AdamW(params, lr=LR), case, "linear warm-up", range(1))
        return found

    for layer in ("into", "fc"):
        assert loss(Case(Net, zeros(layer, lambda step: True))) > 1.15 * loss(CASES["nothing fragile"]), layer
