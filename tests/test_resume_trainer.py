"""A run that stops and resumes ends bitwise where the uninterrupted run ends."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from ways import QUIET

from hf_sai import SaITrainer, SaITrainingArguments, create_sgd_sai, gsnr_table

# peft 0.21 still reads a name that transformers 5.23 has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),  # peft 0.18, of a base in memory
]

STEPS, STOP = 8, 4
# Learning rates at which every scaling moves bf16 weights by more than their rounding.
LEARNING_RATES = {"raw": 1e-2, "max": 1.0, "adamw": 1e-2}

Build = Callable[..., Any]


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[request.param]


@pytest.fixture
def build(request: pytest.FixtureRequest, make_gpt2: Callable[..., Any], dtype: torch.dtype) -> Build:
    """Builds the same model every time; dropout stays on, so that the random state must be resumed too."""

    def full() -> Any:
        return make_gpt2(dtype=dtype)

    def lora() -> Any:
        config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["c_attn"], fan_in_fan_out=True)
        return get_peft_model(full(), config)

    return {"full": full, "lora": lora}[request.param]


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The optimizer's part of the training arguments."""
    return {
        "learning_rate": LEARNING_RATES[request.param],
        "weight_decay": 0.1,
        "optim_args": f"scaling={request.param}",
        "warmup_steps": 2,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
    }


def check_same_end(whole: Any, resumed: Any, begin: Any) -> None:
    trained = 0
    for (name, p), q, start in zip(whole.named_parameters(), resumed.parameters(), begin.parameters(), strict=True):
        assert p.dtype == q.dtype == start.dtype
        assert torch.equal(p, q), name
        trained += p.requires_grad and not torch.equal(p, start)
    # Not all: in bf16 a layer norm's weight of 1.0 can stay what it was.
    assert trained > sum(p.requires_grad for p in whole.parameters()) / 2


def check_same_state(ours: Any, theirs: Any) -> None:
    a, b = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert a.keys() == b.keys()
    for index in a:
        assert a[index].keys() == b[index].keys()
        for key, value in a[index].items():
            assert value.dtype == b[index][key].dtype
            assert torch.equal(value, b[index][key])


@pytest.mark.parametrize(
    ("build", "dtype", "settings", "stop"),
    [
        ("full", "fp32", "raw", STOP),
        ("full", "bf16", "adamw", STOP),
        ("lora", "fp32", "max", 1),
        ("lora", "bf16", "adamw", 1),
    ],
    indirect=["build", "dtype", "settings"],
)
def test_trainer_resumes_bitwise(
    stop: int,
    build: Build,
    settings: dict[str, Any],
    token_dataset: list[dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    """Also after step 1, when LoRA's A has state and no g-SNR yet. Every dtype and scaling: tests/test_optimizer.py."""

    def train(folder: str, resume_from: Path | None = None) -> SaITrainer:
        saving = {"save_strategy": "steps", "save_steps": stop, "save_total_limit": None}
        args = SaITrainingArguments(str(tmp_path / folder), **{**QUIET, **settings, **saving})
        trainer = SaITrainer(build(), args, train_dataset=token_dataset)
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        return trainer

    whole = train("whole")
    resumed = train("resumed", tmp_path / "whole" / f"checkpoint-{stop}")
    assert resumed.state.global_step == STEPS
    check_same_end(whole.model, resumed.model, build())
    check_same_state(whole.optimizer, resumed.optimizer)
    assert gsnr_table(whole.optimizer, whole.model) == gsnr_table(resumed.optimizer, resumed.model)


@pytest.mark.parametrize(("build", "dtype"), [("full", "bf16"), ("lora", "fp32")], indirect=True)
def test_accelerate_state_resumes_bitwise(build: Build, token_dataset: list[dict[str, Tensor]], tmp_path: Path) -> None:
    from accelerate import Accelerator

    args = TrainingArguments(str(tmp_path), **{**QUIET, "learning_rate": 1e-2, "weight_decay": 0.1})
    batches = list(DataLoader(token_dataset, batch_size=4))[:STEPS]  # type: ignore[arg-type]
    accelerator = Accelerator(cpu=True)

    def train(first: int, last: int, load: bool = False, save: bool = False) -> tuple[Any, Any]:
        accelerator.free_memory()
        model = build().train()
        torch.manual_seed(5)
        prepared, optimizer, scheduler = accelerator.prepare(model, *create_sgd_sai(model, args, STEPS))
        if load:
            accelerator.load_state(str(tmp_path / "state"))
        for batch in batches[first:last]:
            accelerator.backward(prepared(**batch)["loss"])
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if save:
            accelerator.save_state(str(tmp_path / "state"))
        return accelerator.unwrap_model(prepared), optimizer

    whole, whole_optimizer = train(0, STEPS)
    train(0, STOP, save=True)
    resumed, resumed_optimizer = train(STOP, STEPS, load=True)
    check_same_end(whole, resumed, build())
    check_same_state(whole_optimizer, resumed_optimizer)


@pytest.mark.usefixtures("registered")
def test_checkpoints_move_between_ways(token_dataset: list[Any], make_gpt2: Callable[..., Any], tmp_path: Path) -> None:
    """A run begun under `register()` ends the same when SaITrainer, or `optimizers=`, takes it over."""
    common = {**QUIET, "learning_rate": 1e-2, "max_steps": STEPS, "per_device_train_batch_size": 4}
    saving = {"save_strategy": "steps", "save_steps": STOP}
    args = TrainingArguments(str(tmp_path / "a"), optim="sgd_sai", **{**common, **saving})
    whole = Trainer(make_gpt2(), args, train_dataset=token_dataset)
    whole.train()
    checkpoint = str(tmp_path / "a" / f"checkpoint-{STOP}")

    takeover = SaITrainer(make_gpt2(), SaITrainingArguments(str(tmp_path / "b"), **common), train_dataset=token_dataset)
    takeover.train(resume_from_checkpoint=checkpoint)
    check_same_end(whole.model, takeover.model, make_gpt2())

    model, args = make_gpt2(), TrainingArguments(str(tmp_path / "c"), **common)
    named = Trainer(model, args, train_dataset=token_dataset, optimizers=create_sgd_sai(model, args, STEPS))
    named.train(resume_from_checkpoint=checkpoint)
    check_same_end(whole.model, named.model, make_gpt2())


def test_resume_of_a_model_that_is_saved_under_other_names(tmp_path: Path) -> None:
    """A ViT: transformers 5 writes the old names of its layers and looks for the new ones when it resumes."""
    from transformers import ViTConfig, ViTForImageClassification

    def build() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes))

    generator = torch.Generator().manual_seed(1)
    data = [{"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": i % 3} for i in range(24)]
    common = {"learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 4, **QUIET}
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainers = []
    for folder in (None, tmp_path / "a" / "checkpoint-2"):
        output = tmp_path / ("a" if folder is None else "b")
        trainer = SaITrainer(build(), SaITrainingArguments(str(output), **{**common, **saving}), train_dataset=data)
        trainer.train(resume_from_checkpoint=None if folder is None else str(folder))
        trainers.append(trainer)
    for (name, p), q in zip(trainers[0].model.named_parameters(), trainers[1].model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_resume_refuses_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    def train(layers: int, output: Path, **options: Any) -> None:
        model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(layers)))

        class Net(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = model

            def forward(self, x: Tensor) -> dict[str, Tensor]:
                return {"loss": self.layers(x).square().mean()}

        args = SaITrainingArguments(str(output), max_steps=2, save_steps=1, **{**QUIET, "save_strategy": "steps"})
        SaITrainer(Net(), args, train_dataset=[{"x": torch.ones(2)}] * 8).train(**options)

    train(1, tmp_path / "a")
    with pytest.raises(ValueError, match=r"lacks weights of this model: layers\.1\.\w+"):
        train(2, tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
