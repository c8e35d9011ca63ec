"""LoRA really trains: A's first gradient is zero because B is, and nothing may freeze it for that."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import ways
from peft import LoraConfig, get_peft_model
from sgd_sai import SGD_sai
from torch import Tensor

# peft 0.21 still reads a name that transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

STEPS = 20
LR, WEIGHT_DECAY = 3e-3, 0.1
# The Trainer's schedule only lowers the learning rate, so this is the most that weight decay can shrink a parameter by.
DECAY = 1 - (1 - LR * WEIGHT_DECAY) ** STEPS


@pytest.fixture
def lora(make_gpt2: Callable[..., Any]) -> Any:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model = get_peft_model(make_gpt2(), config)
    assert len(adapters(model)) == 12, "two matrices at three places in two layers"
    return model


@pytest.fixture
def rows(token_dataset: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return (token_dataset * 2)[: STEPS * ways.BATCH]


def adapters(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def frozen(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    """How far each matrix has moved, in units of what weight decay explains (of the lr for B, which starts at zero)."""
    return {
        name: ((after[name] - p).norm() / (DECAY * p.norm() if p.any() else LR * WEIGHT_DECAY)).item()
        for name, p in before.items()
    }


@pytest.mark.parametrize("way", ways.REGISTERED, ids=lambda way: way.__name__)
@pytest.mark.usefixtures("registered")
def test_every_adapter_trains_when_registered(way: ways.Way, lora: Any, rows: list[Any], tmp_path: Path) -> None:
    check_every_adapter_trains(way, lora, rows, tmp_path, "adamw", LR)


@pytest.mark.parametrize("way", ways.UNREGISTERED, ids=lambda way: way.__name__)
def test_every_adapter_trains(way: ways.Way, lora: Any, rows: list[Any], tmp_path: Path) -> None:
    check_every_adapter_trains(way, lora, rows, tmp_path, "adamw", LR)


# High, because this untrained model has small gradients, and A's are proportional to B.
@pytest.mark.parametrize(("scaling", "lr"), [("raw", 0.3), ("max", 10.0)])
def test_every_adapter_trains_in_the_papers_units(
    scaling: str, lr: float, lora: Any, rows: list[Any], tmp_path: Path
) -> None:
    check_every_adapter_trains(ways.sai_trainer, lora, rows, tmp_path, scaling, lr)


def check_every_adapter_trains(
    way: ways.Way, lora: Any, rows: list[Any], tmp_path: Path, scaling: str, lr: float
) -> None:
    before, untouched = adapters(lora), frozen(lora)
    settings = {"learning_rate": lr, "weight_decay": WEIGHT_DECAY * LR / lr, "optim_args": f"scaling={scaling}"}
    optimizer = way(str(tmp_path), lora, rows, **settings)
    # Three times what decay explains is far above rounding, and the known-bad control below reaches 1.
    assert min(moved(before, adapters(lora)).values()) > 3
    for name, p in frozen(lora).items():
        assert torch.equal(p, untouched[name])
    trained = {name: p for name, p in lora.named_parameters() if p.requires_grad}
    assert trained.keys() == before.keys()
    assert all(optimizer.state[p]["gsnr"] > 0 for p in trained.values())


def test_the_authors_release_leaves_a_where_it_was(lora: Any, rows: list[Any]) -> None:
    """The control: without calibration at the first non-zero gradient these tests would fail."""
    before = adapters(lora)
    optimizer = SGD_sai([p for p in lora.parameters() if p.requires_grad], lr=LR, weight_decay=WEIGHT_DECAY)
    for i in range(STEPS):
        batch = {k: torch.stack([row[k] for row in rows[4 * i : 4 * i + 4]]) for k in ("input_ids", "labels")}
        lora(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    distances = moved(before, adapters(lora))
    assert max(d for name, d in distances.items() if "lora_A" in name) < 1.001
    assert min(d for name, d in distances.items() if "lora_B" in name) > 10
