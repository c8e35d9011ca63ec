"""TRL's trainers: by name after `register()`, and where they take an optimizer, without it."""

import inspect
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from ways import QUIET

from hf_sai import SGDSaI, create_sgd_sai, gsnr_table, sgd_sai_from_args

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

# TRL 1.16 and peft 0.21 still use names that transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_[a-z]+)?` is deprecated:FutureWarning")

STEPS = 4
COMMON = {**QUIET, "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "weight_decay": 0.1}
LORA = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")


@pytest.fixture
def texts() -> Any:
    return Dataset.from_dict({"text": [f"the cat sat on mat {i}" for i in range(8)]})


@pytest.fixture
def preferences() -> Any:
    rows = [{"prompt": f"say {i}", "chosen": " yes please", "rejected": " no"} for i in range(8)]
    return Dataset.from_list(rows)


def trained(trainer: Any) -> dict[str, Tensor]:
    """Train; every block must be calibrated and moved by SGDSaI. Returns the weights that were trained."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    rows = {row.name: row for row in gsnr_table(trainer.optimizer, trainer.model)}
    after = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert rows.keys() == before.keys() == after.keys()
    for name, p in after.items():
        assert rows[name].calibrated, name
        assert not torch.equal(p, before[name]), name
    group = trainer.optimizer.param_groups[0]
    assert (group["scaling"], group["weight_decay"]) == (inspect.signature(SGDSaI).parameters["scaling"].default, 0.1)
    return after


def check_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, p in ours.items():
        assert torch.equal(p, theirs[name]), name


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_sft(peft_config: Any, make_gpt2: Callable[..., Any], tokenizer: Any, texts: Any, tmp_path: Path) -> None:
    def trainer(settings: dict[str, Any], **kwargs: Any) -> Any:
        args = trl.SFTConfig(str(tmp_path), max_length=32, **COMMON, **settings)
        model = make_gpt2()
        kwargs = {key: value(args, model) for key, value in kwargs.items()}
        return trl.SFTTrainer(
            model, args, train_dataset=texts, processing_class=tokenizer, peft_config=peft_config, **kwargs
        )

    torch.manual_seed(2)
    by_name = trained(trainer({"optim": "sgd_sai"}))
    torch.manual_seed(2)
    check_equal(by_name, trained(trainer({}, optimizer_cls_and_kwargs=sgd_sai_from_args)))


@pytest.mark.usefixtures("registered")
def test_dpo(make_gpt2: Callable[..., Any], tokenizer: Any, preferences: Any, tmp_path: Path) -> None:
    def trainer(settings: dict[str, Any], ready: bool) -> Any:
        args, model = trl.DPOConfig(str(tmp_path), max_length=32, **COMMON, **settings), make_gpt2()
        data = {"train_dataset": preferences, "processing_class": tokenizer}
        optimizers = {"optimizers": create_sgd_sai(model, args, STEPS)} if ready else {}
        return trl.DPOTrainer(model, make_gpt2(), args, **data, **optimizers)

    torch.manual_seed(2)
    by_name = trained(trainer({"optim": "sgd_sai"}, ready=False))
    torch.manual_seed(2)
    check_equal(by_name, trained(trainer({}, ready=True)))


@pytest.mark.usefixtures("registered")
def test_dpo_with_lora(make_gpt2: Callable[..., Any], tokenizer: Any, preferences: Any, tmp_path: Path) -> None:
    args = trl.DPOConfig(str(tmp_path), optim="sgd_sai", max_length=32, **COMMON)
    data = {"train_dataset": preferences, "processing_class": tokenizer}
    trained(trl.DPOTrainer(make_gpt2(), args=args, peft_config=LORA, **data))


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_policy_gradients_at_trls_own_rate_stay_finite(name: str, tokenizer: Any, tmp_path: Path) -> None:
    """TRL's tests of these trainers take 0.1 as AdamW's learning rate, on a Qwen2 of width 8, for nine steps."""
    size = {"vocab_size": 64, "hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    Qwen2ForCausalLM(Qwen2Config(**size, **heads, eos_token_id=0, pad_token_id=1)).save_pretrained(tmp_path / "model")
    prompts = Dataset.from_dict({"prompt": [f"say {i}" for i in range(17)]})
    settings = {**QUIET, "bf16": False, "learning_rate": 0.1, "max_steps": 9, "logging_steps": 1, "optim": "sgd_sai"}
    batch = {"per_device_train_batch_size": 3, "num_generations": 3, "max_completion_length": 8}
    tokenizer.padding_side = "left"
    trainer = getattr(trl, f"{name}Trainer")(
        str(tmp_path / "model"),
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=getattr(trl, f"{name}Config")(str(tmp_path / "out"), **settings, **batch),
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    before = {key: p.detach().clone() for key, p in trainer.model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 9
    assert all(math.isfinite(float(loss)) for loss in losses)
    for key, p in trainer.model.named_parameters():
        assert torch.isfinite(p).all(), key
        assert not torch.equal(p, before[key]), key


@pytest.mark.usefixtures("registered")
def test_a_config_file_of_trl(tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\noptim: sgd_sai\noptim_args: momentum=0.8\n"
    )
    (args,) = trl.TrlParser((trl.SFTConfig,)).parse_args_and_config(["--config", str(tmp_path / "sft.yaml")])
    cls, kwargs = trl.SFTTrainer.get_optimizer_cls_and_kwargs(args)
    assert cls is SGDSaI
    assert (kwargs["momentum"], kwargs["lr"]) == (0.8, args.learning_rate)


def test_the_command_line_of_trl(
    make_gpt2: Callable[..., Any], tokenizer: Any, tmp_path: Path, registered: None
) -> None:
    """`trl sft` starts accelerate, which starts TRL's own script; it trains as the same settings do in this process."""
    make_gpt2().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"text": f"the cat sat on mat {i}"} for i in range(8)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        **{key: value for key, value in COMMON.items() if key != "save_strategy"},
        "save_steps": STEPS,
        "logging_steps": 1,
        "max_length": 32,
        "bf16": False,
        "optim": "sgd_sai",
        "optim_args": {"momentum": 0.5, "fused": None},
    }
    config = {"model_name_or_path": "model", "dataset_name": "data", "output_dir": "out", **settings}
    (tmp_path / "sft.yaml").write_text(json.dumps(config))  # which YAML is a superset of
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]),
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
        "HF_HOME": str(tmp_path / "home"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "ACCELERATE_USE_CPU": "true",
    }
    command = [
        sys.executable,
        "-m",
        "hf_sai.cli",
        "launch",
        "trl",
        "sft",
        "--config",
        "sft.yaml",
        "--num_processes",
        "1",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=240, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]

    args = trl.SFTConfig(str(tmp_path / "here"), **settings)
    here = trl.SFTTrainer(str(tmp_path / "model"), args, train_dataset=Dataset.from_list(rows))
    here.train()
    there = json.loads((tmp_path / "out" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in here.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in there if "loss" in entry] == losses
    assert len(losses) == STEPS
    groups = torch.load(tmp_path / "out" / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)["param_groups"]
    assert {group["momentum"] for group in groups} == {0.5}
    assert [group["param_names"] for group in groups if group["token_rows"]] == [
        ["transformer.wte.weight", "transformer.wpe.weight"]
    ]
