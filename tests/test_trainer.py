"""SGD-SaI in transformers without patching it: arguments, trainer, and every way of plugging the optimizer in."""

import copy
import dataclasses
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import ways
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_sai import SaITrainer, SaITrainingArguments, SGDSaI, create_sgd_sai, sgd_sai_from_args

STEPS = 8
SETTINGS = {"learning_rate": 3e-3, "weight_decay": 0.1, "optim_args": "momentum=0.8"}


class Regression(nn.Module):
    """A model with decayed and undecayed parameters whose loss a Trainer takes as it is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layers(x) - y).square().mean()}


def regression_rows() -> list[dict[str, Tensor]]:
    x = torch.randn(STEPS * ways.BATCH, 6, generator=torch.Generator().manual_seed(1))
    return [{"x": row, "y": row.sum(0, keepdim=True)} for row in x]


@pytest.fixture(scope="module")
def expected() -> list[Tensor]:
    """The parameters after training with nothing of transformers, and of hf_sai the optimizer class alone."""
    model = Regression()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = SGDSaI(groups, lr=3e-3, momentum=0.8)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: step / 2 if step < 2 else (STEPS - step) / (STEPS - 2)
    )
    for batch in DataLoader(ways.InOrder(regression_rows()), batch_size=ways.BATCH):
        model(**batch)["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("way", ways.REGISTERED, ids=lambda way: way.__name__)
@pytest.mark.usefixtures("registered")
def test_registered_ways_train_as_the_bare_loop_does(way: ways.Way, expected: list[Tensor], tmp_path: Path) -> None:
    check_same_weights(way, expected, tmp_path)


@pytest.mark.parametrize("way", ways.UNREGISTERED, ids=lambda way: way.__name__)
def test_other_ways_train_as_the_bare_loop_does(way: ways.Way, expected: list[Tensor], tmp_path: Path) -> None:
    check_same_weights(way, expected, tmp_path)
    assert "sgd_sai" not in OptimizerNames._value2member_map_


def check_same_weights(way: ways.Way, expected: list[Tensor], tmp_path: Path) -> None:
    model = Regression()
    way(str(tmp_path), model, regression_rows(), **SETTINGS)
    for found, wanted in zip(model.parameters(), expected, strict=True):
        assert torch.equal(found, wanted)


def quiet(cls: type[TrainingArguments] = TrainingArguments, **settings: Any) -> Any:
    return cls("out", **{**ways.QUIET, **settings})


def test_from_args_reads_only_what_applies() -> None:
    args = quiet(learning_rate=1e-3, weight_decay=0.03, adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=0.7)
    assert sgd_sai_from_args(args) == (SGDSaI, {"lr": 1e-3, "weight_decay": 0.03})


def test_from_args_passes_optim_args_on() -> None:
    cls, kwargs = sgd_sai_from_args(quiet(learning_rate=1e-2, optim_args="scaling=raw,momentum_dtype=bfloat16"))
    group = cls([nn.Parameter(torch.ones(2))], **kwargs).param_groups[0]
    assert (group["scaling"], group["momentum_dtype"], group["lr"]) == ("raw", torch.bfloat16, 1e-2)


def test_create_sgd_sai_groups_and_schedules_as_the_trainer_does() -> None:
    args = quiet(SaITrainingArguments, learning_rate=1e-3, weight_decay=0.1, warmup_steps=4, lr_scheduler_type="cosine")
    model = Regression()
    trainer = SaITrainer(model, args)
    trainer.create_optimizer_and_scheduler(20)
    optimizer, scheduler = create_sgd_sai(model, args, 20)
    for ours, theirs in zip(optimizer.param_groups, trainer.optimizer.param_groups, strict=True):
        assert [id(p) for p in ours["params"]] == [id(p) for p in theirs["params"]]
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}
    assert optimizer.param_groups[0]["param_names"] == ["layers.0.weight", "layers.3.weight"]
    for _ in range(20):
        assert scheduler.get_last_lr() == trainer.lr_scheduler.get_last_lr()
        for stepped in (optimizer, trainer.optimizer, scheduler, trainer.lr_scheduler):
            stepped.step()


def test_create_sgd_sai_leaves_frozen_parameters_out() -> None:
    model = Regression()
    model.layers[0].requires_grad_(False)
    optimizer, _ = create_sgd_sai(model, quiet(learning_rate=1e-3), 1)
    assert [g["param_names"] for g in optimizer.param_groups] == [
        ["layers.3.weight"],
        ["layers.1.weight", "layers.1.bias", "layers.3.bias"],
    ]


@pytest.mark.parametrize("steps", [0, -1])
def test_create_sgd_sai_refuses_no_steps(steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_training_steps must be at least 1, got {steps}"):
        create_sgd_sai(Regression(), quiet(), steps)


@dataclasses.dataclass
class OtherDefault(TrainingArguments):
    """As TRL's SFTConfig, whose default is 2e-5."""

    learning_rate: float = 2e-5


@pytest.mark.parametrize(
    ("cls", "settings", "default", "remedy"),
    [
        (TrainingArguments, {"optim_args": "scaling=raw"}, "5e-05", "1e-2 for full fine-tuning, 1e-3 to 3e-2 for LoRA"),
        (TrainingArguments, {"optim_args": "scaling=max"}, "5e-05", "1.0"),
        (OtherDefault, {"optim_args": "scaling=raw"}, "2e-05", "1e-2"),
        (OtherDefault, {"optim_args": "scaling=raw", "learning_rate": 5e-5}, "5e-05", "1e-2"),
    ],
)
def test_paper_units_with_the_default_learning_rate_warn(
    cls: type[TrainingArguments], settings: dict[str, Any], default: str, remedy: str
) -> None:
    wanted = f"learning_rate is still at its default of {default},.*would not train.*start from {remedy}"
    with pytest.warns(UserWarning, match=wanted):
        sgd_sai_from_args(quiet(cls, **settings))


@pytest.mark.parametrize(
    "settings", [{}, {"optim_args": "scaling=adamw"}, {"learning_rate": 1e-2, "optim_args": "scaling=raw"}]
)
def test_sensible_units_do_not_warn(settings: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sgd_sai_from_args(quiet(**settings))


def test_arguments_default_to_sgd_sai() -> None:
    args = quiet(SaITrainingArguments)
    assert type(args.optim) is str
    assert args.optim == "sgd_sai"
    assert "sgd_sai" not in OptimizerNames._value2member_map_


# transformers 4.57 warns of a field of its own.
@pytest.mark.filterwarnings("ignore:.--push_to_hub_token. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "round_trip",
    [
        lambda args: pickle.loads(pickle.dumps(args)),
        copy.deepcopy,
        dataclasses.replace,
        lambda args: SaITrainingArguments(**args.to_dict()),
        lambda args: HfArgumentParser(SaITrainingArguments).parse_dict(json.loads(args.to_json_string()))[0],
    ],
    ids=["pickle", "deepcopy", "replace", "to_dict", "json"],
)
def test_arguments_survive_round_trips(round_trip: Any) -> None:
    args = quiet(SaITrainingArguments, learning_rate=1e-3, optim_args={"momentum": 0.5})
    back = round_trip(args)
    assert type(back) is SaITrainingArguments
    assert (back.optim, back.optim_args) == ("sgd_sai", "momentum=0.5")
    assert back.to_dict() == args.to_dict()
    assert sgd_sai_from_args(back) == sgd_sai_from_args(args)


def test_arguments_from_a_command_line_and_files(tmp_path: Path) -> None:
    parser = HfArgumentParser(SaITrainingArguments)
    command = ["--output_dir", "out", "--use_cpu", "--optim_args", "scaling=max"]
    assert parser.parse_args_into_dataclasses(command)[0].optim == "sgd_sai"
    assert parser.parse_args_into_dataclasses([*command, "--optim", "sgd_sai"])[0].optim == "sgd_sai"
    assert parser.parse_args_into_dataclasses(["--output_dir", "out", "--use_cpu", "--optim", "sgd"])[0].optim == "sgd"
    mapping = "optim_args:\n  momentum: 0.8\n  eps: 1e-7\n  fused: false\n  momentum_dtype: null\n"
    (tmp_path / "args.yaml").write_text("output_dir: out\nuse_cpu: true\noptim: sgd_sai\n" + mapping)
    (tmp_path / "args.json").write_text('{"output_dir": "out", "use_cpu": true, "optim_args": {"momentum": 0.8}}')
    from_yaml, from_json = (
        parser.parse_yaml_file(tmp_path / "args.yaml")[0],
        parser.parse_json_file(tmp_path / "args.json")[0],
    )
    assert from_yaml.optim == from_json.optim == "sgd_sai"
    wanted = {"momentum": 0.8, "eps": 1e-7, "fused": False, "momentum_dtype": None}
    assert {key: sgd_sai_from_args(from_yaml)[1][key] for key in wanted} == wanted
    assert from_yaml.optim_args == "momentum=0.8,eps=1e-7,fused=false,momentum_dtype=none"
    assert sgd_sai_from_args(from_json)[1]["momentum"] == 0.8
    as_json = parser.parse_args_into_dataclasses([*command[:3], "--optim_args", '{"momentum": 0.8}'])[0]
    assert as_json.optim_args == "momentum=0.8"


def test_arguments_name_stock_optimizers_too() -> None:
    args = quiet(SaITrainingArguments, optim="adamw_torch")
    assert args.optim is OptimizerNames.ADAMW_TORCH
    trainer = SaITrainer(Regression(), args)
    assert type(trainer.create_optimizer()) is torch.optim.AdamW
    with pytest.raises(ValueError, match="sgd_say"):
        quiet(SaITrainingArguments, optim="sgd_say")


def test_set_optimizer() -> None:
    args = quiet(SaITrainingArguments, optim="adamw_torch")
    assert args.set_optimizer(learning_rate=1e-3, weight_decay=0.2, args="momentum=0.7") is args
    assert args.optim == "sgd_sai"
    assert sgd_sai_from_args(args)[1] == {"lr": 1e-3, "weight_decay": 0.2, "momentum": 0.7}
    assert args.set_optimizer(args={"momentum": 0.6}).optim_args == "momentum=0.6"
    assert args.set_optimizer("adafactor").optim is OptimizerNames.ADAFACTOR


def test_trainer_without_arguments_uses_sgd_sai(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = SaITrainer(Regression())
    assert type(trainer.args) is SaITrainingArguments
    assert type(trainer.create_optimizer()) is SGDSaI


def test_trainer_refuses_to_guess_from_stock_arguments() -> None:
    trainer = SaITrainer(Regression(), quiet(optim="adamw_torch"))
    with pytest.raises(ValueError, match=r"TrainingArguments with optim='adamw_torch'.*use SaITrainingArguments"):
        trainer.create_optimizer()


def test_trainer_mixes_with_other_trainers() -> None:
    class SaISeq2SeqTrainer(SaITrainer, Seq2SeqTrainer):
        pass

    @dataclasses.dataclass
    class SaISeq2SeqTrainingArguments(SaITrainingArguments, Seq2SeqTrainingArguments):
        pass

    trainer = SaISeq2SeqTrainer(Regression(), quiet(SaISeq2SeqTrainingArguments))
    assert type(trainer.create_optimizer()) is SGDSaI


def test_importing_and_using_the_trainer_patches_nothing() -> None:
    assert Trainer.get_optimizer_cls_and_kwargs.__module__ == "transformers.trainer"
    with pytest.raises(ValueError, match="sgd_sai is not a valid OptimizerNames"):
        quiet(optim="sgd_sai")
