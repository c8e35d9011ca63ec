"""What a resumed run says of the state that it loads: settings that differ, the state of another optimizer."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Adafactor, Trainer, TrainingArguments
from ways import QUIET

from hf_sai import SaITrainer, SaITrainingArguments, SGDSaI, create_sgd_sai
from hf_sai.saved_state import optimizer_of

STEPS: dict[str, Any] = {**QUIET, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}

Start = Callable[..., Trainer]


@pytest.fixture(params=["SaITrainer", "register", "optimizers"])
def start(
    request: pytest.FixtureRequest,
    make_gpt2: Callable[..., Any],
    token_dataset: list[dict[str, Tensor]],
    tmp_path: Path,
    registered: None,
) -> Start:
    """A Trainer with SGD-SaI, made in one of three ways, or with a stock optimizer."""

    def make(stock: str = "", **settings: Any) -> Trainer:
        given = {**STEPS, "learning_rate": 1e-2, "per_device_train_batch_size": 4, **settings}
        if stock or request.param == "register":
            args = TrainingArguments(str(tmp_path), optim=stock or "sgd_sai", **given)
            return Trainer(make_gpt2(), args, train_dataset=token_dataset)
        if request.param == "SaITrainer":
            return SaITrainer(make_gpt2(), SaITrainingArguments(str(tmp_path), **given), train_dataset=token_dataset)
        model, args = make_gpt2(), TrainingArguments(str(tmp_path), **given)
        return Trainer(model, args, train_dataset=token_dataset, optimizers=create_sgd_sai(model, args, 4))

    return make


def test_settings_that_differ_are_listed(start: Start, tmp_path: Path) -> None:
    start(weight_decay=0.1, optim_args="momentum=0.8").train()
    checkpoint = str(tmp_path / "checkpoint-2")
    wanted = (
        r"keeps the optimizer settings of its checkpoint, which differ from its arguments: "
        r"lr 0.01 \(0.02 in this run's arguments\), "
        r"momentum 0.8 \(0.9 in.*\), weight_decay 0.1 \(0.3 in.*\), scaling (\w+) \(max in.*\)\. To train with new"
    )
    resumed = start(learning_rate=2e-2, weight_decay=0.3, optim_args={"scaling": "max"})
    with pytest.warns(UserWarning, match=wanted):
        resumed.train(resume_from_checkpoint=checkpoint)
    groups = getattr(resumed.optimizer, "optimizer", resumed.optimizer).param_groups
    assert {(group["momentum"], group["weight_decay"]) for group in groups} == {(0.8, 0.1), (0.8, 0.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the learning rate of the schedule differs, and is no setting
        start(weight_decay=0.1, optim_args="momentum=0.8").train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize(("stock", "name"), [("sgd", "SGD"), ("adamw_torch", "AdamW"), ("adafactor", "Adafactor")])
def test_the_state_of_another_optimizer_is_refused_by_its_name(
    stock: str, name: str, start: Start, tmp_path: Path
) -> None:
    start(stock).train()
    resumed = start()
    with pytest.raises(
        ValueError, match=f"is from {name}, not from SGDSaI; resume with optim='{stock}', or start from"
    ):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_stock_optimizer_of_sai_trainer_refuses_the_state_of_sgd_sai(
    make_gpt2: Callable[..., Any], token_dataset: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    def trainer(**settings: Any) -> SaITrainer:
        args = SaITrainingArguments(str(tmp_path), **{**STEPS, "learning_rate": 1e-2, **settings})
        return SaITrainer(make_gpt2(), args, train_dataset=token_dataset)

    trainer().train()
    resumed = trainer(optim="sgd")
    with pytest.raises(ValueError, match="is from SGDSaI, not from SGD; resume with optim='sgd_sai', or start from"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer(optim="sgd", weight_decay=0.1).train()
    with pytest.warns(UserWarning, match=r"arguments: weight_decay 0\.1 \(0\.2 in this run's arguments\)\."):
        trainer(optim="sgd", weight_decay=0.2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(
    "name", ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop", "LBFGS", "Muon"]
)
def test_every_optimizer_of_torch_is_known_by_its_group(name: str) -> None:
    optimizer = getattr(torch.optim, name)([nn.Parameter(torch.ones(2, 2))], lr=0.1)
    assert optimizer_of(optimizer.state_dict()["param_groups"][0]) == name
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    assert optimizer_of(optimizer.state_dict()["param_groups"][0]) == name


def test_other_optimizers_are_known_by_their_settings() -> None:
    p = [nn.Parameter(torch.ones(2, 2))]
    assert optimizer_of(SGDSaI(p).state_dict()["param_groups"][0]) == "SGDSaI"
    assert optimizer_of(Adafactor(p).state_dict()["param_groups"][0]) == "Adafactor"
    assert optimizer_of({"params": [0], "lr": 1, "d0": 1}) == "an optimizer with the settings d0, lr"
