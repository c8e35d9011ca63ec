"""Configuration, records, measuring: recipes/common/common.py and recipes/common/optimizers.py."""

from recipes.common.start import run_main

import copy
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import peft.optimizers
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_sai import SGDSaI
from recipes.common.config import parse_config
from recipes.common.errors import UserError
from recipes.common.files import write_json, write_text
from recipes.common.measure import StepTimer
from recipes.common.optimizers import (
    OWN_OPTIMIZERS,
    OptimizerArguments,
    RecipeArguments,
    build_optimizer,
    trainer_optimizer,
)
from recipes.common.provenance import run_record
from recipes.common.records import machine, public_settings, versions

# peft 0.21 reads an attribute that transformers 5.23 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@dataclass
class Settings:
    data: str = "somewhere"
    rows: int = 3
    flag: bool = True
    words: list[str] = field(default_factory=lambda: ["a"])
    limit: int | None = 7


def arguments(tmp_path: Path, **kwargs: Any) -> RecipeArguments:
    return RecipeArguments(output_dir=str(tmp_path), use_cpu=True, **kwargs)


@pytest.mark.parametrize("able", [True, False])
def test_bf16_is_float32_on_a_cpu_without_bfloat16_instructions(able, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.common.optimizers.multiplies_bf16", lambda: able)
    assert arguments(tmp_path, bf16=True).bf16 is able


def tiny_lora() -> nn.Module:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=32, n_layer=1, n_head=2, n_embd=16, bos_token_id=0, eos_token_id=0)
    )
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, fan_in_fan_out=True))


def backward(model: nn.Module) -> None:
    ids = torch.arange(24).reshape(2, 12) % 64
    model(input_ids=ids, labels=ids).loss.backward()


# ---------------------------------------------------------------- configuration


def test_file_then_options_which_win(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "learning_rate: 1e-3\nweight_decay: 2e-2\nrows: 5\nflag: false\nwords: [b, c]\nlimit:\noptim: sgdm\n"
        "use_cpu: true\nlr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.1}\n"
    )
    argv = ["--config", str(path), "--rows", "9", "--weight-decay", "0.5", "--output_dir", str(tmp_path)]
    settings, args = parse_config([Settings, RecipeArguments], argv)
    assert (settings.rows, settings.flag, settings.words, settings.limit) == (9, False, ["b", "c"], None)
    assert (args.learning_rate, args.weight_decay, args.optim) == (1e-3, 0.5, "sgdm")
    assert args.lr_scheduler_kwargs == {"min_lr_rate": 0.1}


@pytest.mark.parametrize(
    ("text", "argv", "says"),
    [
        ("lerning_rate: 1", [], "unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
        ("", ["--lerning_rate", "1"], "unknown option '--lerning_rate'; did you mean 'learning_rate'?"),
        ("", ["--learning", "1"], "unknown option '--learning'"),  # no abbreviations: they change meaning over versions
        ("learning_rate: fast", [], "invalid float value: 'fast'"),
        ("optim: sgd_say", [], "unknown optimizer 'sgd_say'; did you mean 'sgd_sai'?"),
        ("optim_args: momentun=0.5", [], "momentun"),
        ("- 1", [], "must hold `key: value` lines, got a list"),
        ("a: [", [], "is not valid YAML"),
    ],
)
def test_bad_configuration_says_what_and_where(tmp_path: Path, text: str, argv: list[str], says: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    argv = ["--config", str(path), "--output_dir", str(tmp_path), "--use_cpu", *argv]
    with pytest.raises(UserError) as error:
        parse_config([Settings, RecipeArguments], argv)
    assert says in str(error.value)


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: !!python/object/apply:os.getcwd []")
    with pytest.raises(UserError, match="not valid YAML"):
        parse_config(Settings, ["--config", str(path)])


def test_missing_file() -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: No such file"):
        parse_config(Settings, ["--config", "nowhere.yaml"])


def test_user_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise UserError("rows must be at least 1, got 0")

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: rows must be at least 1, got 0\n"


# ---------------------------------------------------------------- optimizers


needs_riemannian = pytest.mark.skipif(
    not hasattr(peft.optimizers, "create_riemannian_optimizer"), reason="peft has it from 0.21 on"
)
OWN = [pytest.param(name, marks=needs_riemannian) if "scaled" in name else name for name in OWN_OPTIMIZERS]


@pytest.mark.parametrize("name", [*OWN, "adamw_torch", "sgd", "adafactor"])
def test_every_optimizer_takes_a_lora_step_in_a_bare_loop(tmp_path: Path, name: str) -> None:
    """Two steps: B is zero at the first, so A has no gradient before the second."""
    model = tiny_lora()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerArguments(optim=name, learning_rate=1e-2))
    for _ in range(2):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    expected = {key for key in before if "lora_" in key}
    if name == "sgd_sai_authors":  # its A stays frozen for ever: the failure DESIGN's table of differences is about
        expected = {key for key in before if "lora_B" in key}
    assert moved == expected


@pytest.mark.parametrize("name", [*OWN, "adamw_torch"])
def test_trainer_arguments_name_the_same_class(tmp_path: Path, name: str) -> None:
    model = tiny_lora()
    args = arguments(tmp_path, optim=name, learning_rate=1e-2)
    given = trainer_optimizer(model, args)
    bare = build_optimizer(model, args)
    if name == "adamw_torch":
        assert given == {}
        assert isinstance(bare, torch.optim.AdamW)
    elif "optimizers" in given:
        # peft makes a class a call
        assert given["optimizers"][0].__class__.__name__ == bare.__class__.__name__
        assert given["optimizers"][1] is None
    else:
        assert issubclass(given["optimizer_cls_and_kwargs"][0], type(bare))


def test_muon_takes_hidden_matrices_and_resumes_bitwise(make_gpt2, token_dataset) -> None:
    """Saved after two steps and loaded into a new one, three more steps give the same weights."""
    batch = {key: torch.stack([row[key] for row in token_dataset[:8]]) for key in ("input_ids", "labels")}

    def train(model, optimizer, steps):
        for _ in range(steps):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    settings = OptimizerArguments(optim="muon", learning_rate=1e-2, weight_decay=0.1)
    model = make_gpt2().eval()  # without dropout
    optimizer = build_optimizer(model, settings)
    muon, adamw = optimizer.parts
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p].split(".")[-2] for p in muon.param_groups[0]["params"]} == {"c_attn", "c_proj", "c_fc"}
    assert all(p.dim() == 2 for p in muon.param_groups[0]["params"])
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1, 0.0]
    optimizer.param_groups[0]["lr"] = 2e-2  # as a scheduler does
    assert muon.param_groups[0]["lr"] == 2e-2
    train(model, optimizer, 2)
    assert len(optimizer.state) == len(names)

    again = make_gpt2().eval()
    again.load_state_dict(model.state_dict())
    resumed = build_optimizer(again, settings)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 3)
    train(again, resumed, 3)
    assert resumed.param_groups[0] is resumed.parts[0].param_groups[0]
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


@needs_riemannian
def test_scaled_adamw_is_adamw_on_preconditioned_gradients() -> None:
    model = tiny_lora()
    args = OptimizerArguments(optim="scaled_adamw", optim_args="reg=0.5", learning_rate=0.1, adam_beta1=0.7)
    optimizer = build_optimizer(model, args)
    backward(model)
    named = dict(model.named_parameters())
    a, b = (next(p for key, p in named.items() if part in key) for part in ("lora_A", "lora_B"))
    expected = b.grad @ torch.linalg.inv(a @ a.T + 0.5 * torch.eye(2))
    optimizer.step()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["betas"][0] == 0.7
    torch.testing.assert_close(optimizer.state[b]["exp_avg"], (1 - 0.7) * expected, rtol=1e-4, atol=1e-7)


def test_decay_spares_biases_and_norms() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    optimizer = build_optimizer(model, OptimizerArguments(optim="sgdm", weight_decay=0.3))
    decayed, spared = optimizer.param_groups
    assert [p is model[0].weight for p in decayed["params"]] == [True]
    assert (decayed["weight_decay"], spared["weight_decay"], len(spared["params"])) == (0.3, 0.0, 3)


def test_optim_args_reach_the_optimizer_and_typos_do_not() -> None:
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, OptimizerArguments(optim="sgdm", optim_args="momentum=0.5, nesterov=true"))
    assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.5, True)
    with pytest.raises(UserError, match="momentun=0"):
        build_optimizer(model, OptimizerArguments(optim="sgdm", optim_args="momentun=0.5"))


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_optim_args_cannot_hide_the_learning_rate(key: str) -> None:
    with pytest.raises(UserError, match=f"{key}=1"):
        build_optimizer(nn.Linear(2, 2), OptimizerArguments(optim="sgdm", optim_args=f"{key}=1"))


@pytest.mark.parametrize(
    ("optim", "module", "requirement"),
    [
        ("adam_mini", "adam_mini", "adam-mini"),
        ("prodigy", "prodigyopt", "prodigyopt"),
        ("sgd_sai_authors", "sgd_sai", "sgd-sai==1.0.3"),
        ("scaled_sgd", "peft.optimizers", "peft>=0.21"),
    ],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, optim: str, module: str, requirement: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install '{requirement}'"):
        build_optimizer(nn.Linear(2, 2), OptimizerArguments(optim=optim))


def test_bare_loop_default_is_in_adamw_units() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), OptimizerArguments(learning_rate=3e-4))
    assert isinstance(optimizer, SGDSaI)
    default = SGDSaI(nn.Linear(2, 2).parameters(), lr=3e-4).defaults
    assert [optimizer.defaults[key] for key in ("scaling", "lr")] == [default["scaling"], 3e-4]


# ---------------------------------------------------------------- measuring


def test_step_timer_skips_and_takes_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = StepTimer(skip=1)
    for step, update in ((9.0, 8.0), (4.0, 1.0), (2.0, 1.0), (6.0, 3.0)):
        clock = iter([0.0, 0.0, update, step])
        monkeypatch.setattr(timer, "_now", lambda clock=clock: next(clock))
        timer.start()
        timer.before_update()
        timer.after_update()
        timer.stop()
    summary = timer.summary()
    assert (summary["steps_timed"], summary["step_ms"], summary["first_step_ms"]) == (3, 4000.0, 9000.0)
    assert summary["step_ms_quartiles"] == [3000.0, 5000.0]
    assert (summary["optimizer_ms"], summary["optimizer_share"]) == (1000.0, 0.5)
    assert StepTimer().summary() == {"steps_timed": 0}


# ---------------------------------------------------------------- records


def test_record_holds_no_paths_or_tokens(tmp_path: Path) -> None:
    args = arguments(tmp_path, hub_token="hf_secret", learning_rate=3e-4)
    record = run_record("some", (Settings(data=str(tmp_path / "e2e")), args), eval_loss=math.nan, scores={"bleu": 0.5})
    path = write_json(tmp_path / "deep" / "record.json", record)
    text = path.read_text()
    assert str(tmp_path) not in text
    assert "hf_secret" not in text
    found = json.loads(text)
    assert found["config"]["data"] == "e2e"
    assert (found["config"]["learning_rate"], found["config"]["optim"]) == (3e-4, "sgd_sai")
    assert found["eval_loss"] == "nan"  # JSON has no NaN
    assert (
        found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"] in torch.__version__
    )
    assert found["machine"]["cores"] >= 1


def test_every_access_token_of_the_trainer_is_kept_out_and_nothing_else_with_that_word(tmp_path: Path) -> None:
    @dataclass
    class Lengths:
        max_tokens: int = 5
        tokenizer: str = "gpt2"

    args = arguments(tmp_path)
    secret = [spec.name for spec in fields(args) if re.search(r"(^|_)(token|key|password|secret)$", spec.name)]
    assert "hub_token" in secret
    for name in secret:
        setattr(args, name, "hf_secret")
    args.include_num_input_tokens_seen = "all"
    found = public_settings(Lengths(), args)
    assert "hf_secret" not in found.values()
    wanted = {"max_tokens": 5, "tokenizer": "gpt2", "include_num_input_tokens_seen": "all"}
    assert {name: found.get(name) for name in wanted} == wanted


def test_hub_names_stay_whole() -> None:
    assert public_settings(Settings(data="owner/name"))["data"] == "owner/name"


def test_machine_and_versions_name_no_host_or_user() -> None:
    import getpass
    import platform

    text = json.dumps([machine(), versions()])
    assert platform.node() not in text
    if len(getpass.getuser()) > 4:
        assert getpass.getuser() not in text


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.json", "old")
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_line_of_the_hub_is_logged_once() -> None:
    """In a process of its own: logging is set up once in a process."""
    code = (
        "import huggingface_hub\n"
        "from huggingface_hub.utils import logging\nfrom recipes.common.errors import start_logging\n"
        "start_logging()\nlogging.get_logger('huggingface_hub.utils._http').warning('Retrying in 1s')"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stderr.count("Retrying in 1s") == 1
