"""`register()`: a name that stock transformers accepts everywhere, and nothing before it is called."""

import copy
import json
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import ways
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_sai import SGDSaI, register

STOCK_NAMES = {name.value for name in OptimizerNames}


def quiet(**settings: Any) -> TrainingArguments:
    return TrainingArguments("out", **{**ways.QUIET, "optim": "sgd_sai", **settings})


def run_python(code: str, *argv: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_registers_nothing() -> None:
    assert "sgd_sai" not in run_python(
        "import hf_sai, hf_sai.trainer, hf_sai.registration, hf_sai.callbacks, hf_sai.launch\n"
        "from transformers import Trainer\n"
        "from transformers.training_args import OptimizerNames\n"
        "print(list(OptimizerNames), vars(OptimizerNames), Trainer.get_optimizer_cls_and_kwargs.__module__)"
    )


@pytest.mark.usefixtures("registered")
def test_the_member_behaves_as_one_of_the_class_body() -> None:
    member = OptimizerNames("sgd_sai")
    assert member is OptimizerNames.SGD_SAI is OptimizerNames["SGD_SAI"]  # type: ignore[attr-defined]
    assert (member.name, member.value, member) == ("SGD_SAI", "sgd_sai", "sgd_sai")
    assert isinstance(member, OptimizerNames)
    assert member in OptimizerNames
    assert hash(member) == hash("sgd_sai")
    assert repr(member) == "<OptimizerNames.SGD_SAI: 'sgd_sai'>"
    assert {name.value for name in OptimizerNames} == STOCK_NAMES | {"sgd_sai"}
    assert copy.deepcopy(member) == copy.copy(member) == "sgd_sai"


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_member_pickles_as_a_plain_string(protocol: int) -> None:
    back = pickle.loads(pickle.dumps(OptimizerNames("sgd_sai"), protocol))
    assert type(back) is str
    assert back == "sgd_sai"


@pytest.mark.usefixtures("registered")
def test_a_second_call_changes_nothing() -> None:
    names, handler = list(OptimizerNames), Trainer.get_optimizer_cls_and_kwargs
    register()
    assert list(OptimizerNames) == names
    assert Trainer.get_optimizer_cls_and_kwargs is handler


@pytest.mark.usefixtures("registered")
def test_other_optimizers_are_what_they_were() -> None:
    model = nn.Linear(2, 2)
    for name in ("adamw_torch", "sgd", "adafactor"):
        args = quiet(optim=name, learning_rate=1e-3, optim_args=None)
        # functools.wraps keeps what was there before.
        stock = Trainer.get_optimizer_cls_and_kwargs.__wrapped__  # type: ignore[attr-defined]
        assert Trainer.get_optimizer_cls_and_kwargs(args, model) == stock(args, model)
    with pytest.raises(ValueError, match=r"sgd_say is not a valid OptimizerNames.*'sgd_sai'"):
        quiet(optim="sgd_say")


# transformers 4.57 warns of a field of its own.
@pytest.mark.filterwarnings("ignore:.--push_to_hub_token. is deprecated:FutureWarning")
@pytest.mark.usefixtures("registered")
def test_arguments_convert_and_serialise() -> None:
    args = quiet(learning_rate=1e-3, optim_args="momentum=0.5")
    assert args.optim is OptimizerNames("sgd_sai")
    assert args.to_dict()["optim"] == "sgd_sai"
    assert json.loads(args.to_json_string())["optim"] == "sgd_sai"
    assert args.to_sanitized_dict()["optim"] == "sgd_sai"
    assert TrainingArguments(**args.to_dict()).to_dict() == args.to_dict()
    assert pickle.loads(pickle.dumps(args)).optim == copy.deepcopy(args).optim == "sgd_sai"


@pytest.mark.usefixtures("registered")
def test_set_optimizer() -> None:
    args = quiet(optim="adamw_torch").set_optimizer("sgd_sai", learning_rate=1e-2, args="scaling=raw")
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    assert (cls, kwargs["lr"], kwargs["scaling"]) == (SGDSaI, 1e-2, "raw")


@pytest.mark.usefixtures("registered")
def test_command_line_and_files(tmp_path: Path) -> None:
    parser = HfArgumentParser(TrainingArguments)  # built after register(): argparse copies the names
    command = ["--output_dir", "out", "--use_cpu", "--optim", "sgd_sai", "--optim_args", "momentum=0.8,scaling=max"]
    (tmp_path / "args.yaml").write_text("output_dir: out\nuse_cpu: true\noptim: sgd_sai\noptim_args: momentum=0.8\n")
    (tmp_path / "args.json").write_text('{"output_dir": "out", "use_cpu": true, "optim": "sgd_sai"}')
    for args in (
        parser.parse_args_into_dataclasses(command)[0],
        parser.parse_yaml_file(tmp_path / "args.yaml")[0],
        parser.parse_json_file(tmp_path / "args.json")[0],
    ):
        args.learning_rate = 1e-2
        assert args.optim is OptimizerNames("sgd_sai")
        assert Trainer.get_optimizer_cls_and_kwargs(args)[0] is SGDSaI


@pytest.mark.usefixtures("registered")
def test_bad_optim_args_are_named_before_transformers_trips_over_them() -> None:
    args = quiet()
    args.optim_args = "momentum"  # set after the arguments were built
    with pytest.raises(ValueError, match="optim_args must be key=value pairs separated by commas, got 'momentum'"):
        Trainer(nn.Linear(2, 2), args).create_optimizer()


@pytest.mark.usefixtures("registered")
def test_a_trainer_that_overrides_the_lookup_still_finds_it() -> None:
    class Overriding(Trainer):
        @staticmethod
        def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
            return Trainer.get_optimizer_cls_and_kwargs(args, model)

    assert type(Overriding(nn.Linear(2, 2), quiet()).create_optimizer()) is SGDSaI


@pytest.mark.usefixtures("registered")
def test_saved_arguments_load_where_hf_sai_is_unknown(tmp_path: Path) -> None:
    torch.save(quiet(learning_rate=1e-3), tmp_path / "training_args.bin")
    found = run_python(
        "import sys, json, torch\n"
        "sys.modules['hf_sai'] = None  # importing it would be an error\n"
        "args = torch.load(sys.argv[1], weights_only=False)\n"
        "print(json.dumps([type(args.optim).__name__, args.optim, args.to_dict()['optim'], args.learning_rate]))",
        str(tmp_path / "training_args.bin"),
    )
    assert json.loads(found.splitlines()[-1]) == ["str", "sgd_sai", "sgd_sai", 1e-3]


@pytest.mark.usefixtures("registered")
def test_arguments_register_in_the_process_that_multiprocessing_hands_them_to(tmp_path: Path) -> None:
    """As `torch.multiprocessing.spawn(work, args=(args,))` does."""
    handed = [quiet(optim_args="momentum=0.5"), quiet(optim="adafactor", optim_args=None)]
    (tmp_path / "handed").write_bytes(ForkingPickler.dumps(handed))
    found = run_python(
        "import json, pickle, sys, torch\n"
        "from transformers import Trainer\n"
        "args, other = pickle.load(open(sys.argv[1], 'rb'))\n"
        "optimizer = Trainer(torch.nn.Linear(2, 2), args).create_optimizer()\n"
        "print(json.dumps([type(optimizer).__name__, optimizer.param_groups[0]['momentum'], args.optim, other.optim]))",
        str(tmp_path / "handed"),
    )
    assert json.loads(found.splitlines()[-1]) == ["SGDSaI", 0.5, "sgd_sai", "adafactor"]
