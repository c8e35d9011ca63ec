"""The pretraining recipe end to end on models of some thousand parameters."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sai.state import scale_shapes
from recipes.common.errors import UserError
from recipes.pretrain import train as recipe
from recipes.pretrain.gsnr_summary import summary
from recipes.pretrain.report import model_flops_per_token
from recipes.pretrain.train import PretrainTrainer, read_config
from recipes.pretrain.train import run as pretrain

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("HF_SAI_DATA", ROOT / ".." / "shared" / "data")).resolve()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text of 300 documents and, after the first use, the tokens of it."""
    folder = tmp_path_factory.mktemp("pretrain")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(60)]
    rows = [" ".join(rng.choices(words, k=rng.randint(20, 80))) for _ in range(300)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return folder


@pytest.fixture
def config(folder, tmp_path):
    return {
        "train_files": [str(folder / "text.jsonl")],
        "validation_fraction": 0.1,
        "tokenizer": "train",
        "vocab_size": 300,
        "cache_dir": str(folder / "cache"),
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "n_positions": 32,
        "block_size": 32,
        "optim": "sgd_sai",
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 6,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
        "output_dir": str(tmp_path / "run"),
    }


def record_of(folder):
    return json.loads((Path(folder) / "record.json").read_text())


def losses(record, split="train"):
    return [row["loss"] for row in record["curves"][split]]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_result_is_a_model_with_its_tokenizer_and_a_record(config):
    folder = pretrain(config)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size == 300
    assert tokenizer.decode(tokenizer("abc hgf")["input_ids"]) == "abc hgf"
    assert tokenizer.eos_token_id == model.config.eos_token_id == 0

    record = record_of(folder)
    _, validation = recipe.load_blocks(*read_config(config)[:2], tokenizer)
    total = count = 0.0
    with torch.no_grad():
        for block in validation:  # the loss by hand, block by block
            logits = model.eval()(input_ids=block["input_ids"][None]).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, block["labels"][1:], reduction="sum").item()
            count += (block["labels"] != -100).sum().item()
    assert count == len(validation.tokens) - 1
    assert count % 31  # the last block is padded: a mean of batch means would be another number
    assert record["final"]["eval_loss"] == pytest.approx(total / count, rel=1e-5)  # float32, summed in another order
    assert record["final"]["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert record["tokens"] == 12 * 4 * 32
    assert [row["tokens"] for row in record["curves"]["validation"]] == [6 * 4 * 32, 12 * 4 * 32]
    seconds = [row["seconds"] for row in record["curves"]["train"]]
    assert seconds == sorted(seconds)
    assert record["speed"]["steps_timed"] == 10
    assert 0 < record["speed"]["optimizer_share"] < 1
    assert 0 < record["speed"]["model_flops_utilisation"] < 1
    # Momentum and scales in float32; g-SNR and the count of each block. The head shares the embedding.
    numbers = 0
    for name, p in model.named_parameters():
        group = {"scaling": "adamw", "token_rows": "wte" in name or "wpe" in name}
        numbers += p.numel() + sum(shape.numel() for shape in scale_shapes(p.shape, group).values())
    assert record["optimizer_state_bytes"] == 4 * numbers + 12 * len(list(model.parameters()))
    assert str(Path(config["output_dir"]).parent) not in json.dumps(record)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert losses(record)[-1] < losses(record)[0] - 0.1


def test_killed_in_mid_epoch_and_resumed_is_the_run_never_killed(config, tmp_path, monkeypatch):
    config |= {"save_strategy": "steps", "save_steps": 5, "lr_scheduler_type": "cosine", "max_grad_norm": 1.0}
    config |= {"gsnr_every": 3}
    whole = pretrain({**config, "output_dir": str(tmp_path / "whole")})

    step = PretrainTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 8:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PretrainTrainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config)
    batches = []

    def recorded(self, model, inputs, *args, **kwargs):
        batches.append(inputs["input_ids"].clone())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PretrainTrainer, "training_step", recorded)
    with pytest.raises(UserError, match=r"holds checkpoint-5 of an earlier run.*--resume_from_checkpoint last"):
        pretrain(config)
    resumed = pretrain({**config, "resume_from_checkpoint": "auto"})
    assert len(batches) == 12 - 5
    pretrain({**config, "output_dir": str(tmp_path / "again")})
    assert all(torch.equal(a, b) for a, b in zip(batches[:7], batches[7 + 5 :], strict=True))  # the same batches

    first, second = weights(whole), weights(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)  # bitwise
    records = [record_of(whole), record_of(resumed)]
    for split in ("train", "validation"):
        assert losses(records[0], split) == losses(records[1], split)
    seconds = [row["seconds"] for row in records[1]["curves"]["train"]]
    assert seconds == sorted(seconds)  # the clock went on too
    measured = [(run / "gsnr.json").read_text() for run in (whole, resumed)]
    assert measured[0] == measured[1]
    assert json.loads(measured[0])["steps"] == [1, 4, 7, 10]
    for name in ("kinds", "time", "drift"):
        assert (resumed / f"gsnr_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_g_snr_of_another_optimizer_and_initialisation(config):
    config |= {"optim": "adamw_torch", "gsnr_every": 4, "init_scheme": "orthogonal", "max_steps": 5}
    folder = pretrain(config)
    measured = json.loads((folder / "gsnr.json").read_text())
    assert (measured["steps"], len(measured["blocks"])) == ([1, 5], 2 + 12 * 2 + 2)
    assert (folder / "gsnr_time.png").exists()
    assert not (folder / "gsnr_drift.png").exists()
    assert record_of(folder)["config"]["init_scheme"] == "orthogonal"
    found = summary(folder)
    ratios = [x / math.sqrt(b["numel"]) for b in measured["blocks"] if b["kind"] == "bias" for x in b["gsnr_now"]]
    assert found["kinds"]["bias"]["to_sqrt_d"] == pytest.approx([min(ratios), median(ratios), max(ratios)], rel=1e-4)
    assert found["kinds"]["bias"]["drift"] is None
    with pytest.raises(UserError, match=r"is no finished run of recipes\.pretrain with gsnr_every"):
        summary(folder / "nowhere")


def test_every_optimizer_sees_the_same_data(config, tmp_path, monkeypatch):
    seen = {}
    step = PretrainTrainer.training_step

    def recorded(self, model, inputs, *args, **kwargs):
        seen.setdefault(self.args.output_dir, []).append(inputs["input_ids"].clone())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PretrainTrainer, "training_step", recorded)
    for optim in ("sgd_sai", "adamw_torch", "sgdm"):
        pretrain({**config, "optim": optim, "output_dir": str(tmp_path / optim), "max_steps": 4})
    first, *others = seen.values()
    assert len(others) == 2
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_diverged_run_stops_and_says_so(config):
    record = record_of(pretrain({**config, "optim": "sgdm", "learning_rate": 1e20, "max_grad_norm": 0.0}))
    assert record["diverged"]
    assert record["steps"] < 12


def test_a_loss_above_max_loss_ends_the_run_as_diverged(config):
    record = record_of(pretrain({**config, "max_loss": 0.1, "logging_steps": 2}))
    assert (record["diverged"], record["steps"]) == (True, 2)
    assert not record_of(pretrain({**config, "max_loss": 20.0, "output_dir": config["output_dir"] + "2"}))["diverged"]


def test_a_run_without_a_finite_gradient_has_an_empty_record_of_g_snr(config, monkeypatch):
    build = recipe.build_model

    def broken(*args):
        model = build(*args)
        model.transformer.ln_f.weight.data.fill_(math.nan)
        return model

    monkeypatch.setattr(recipe, "build_model", broken)
    config |= {"gsnr_every": 1, "optim": "adamw_torch", "max_grad_norm": 0.0}
    folder = pretrain(config)
    assert record_of(folder)["diverged"]
    assert json.loads((folder / "gsnr.json").read_text())["blocks"] == []
    assert not list(folder.glob("gsnr_*.png"))


def test_length_in_tokens_and_warm_up_as_a_fraction(config):
    config.pop("max_steps")
    config |= {"max_tokens": 1300, "warmup_fraction": 0.5, "gradient_accumulation_steps": 2}
    record = record_of(pretrain(config))
    assert record["steps"] == math.ceil(1300 / (4 * 2 * 32))
    assert record["config"]["warmup_steps"] == 3
    assert record["config"]["max_tokens"] == 1300
    assert record["tokens"] == 6 * 256


def test_streaming_trains_on_local_files_too(config):
    record = record_of(pretrain({**config, "streaming": True, "stream_validation_documents": 20}))
    assert record["steps"] == 12
    assert losses(record)[-1] < losses(record)[0] - 0.1


def test_model_flops_are_what_torch_counts():
    options = read_config(
        {
            "train_files": ["x"],
            "model_size": "tiny",
            "n_positions": 64,
            "block_size": 64,
            "attn_implementation": "eager",
        }
    )[1]
    tokenizer = type("Tokenizer", (), {"__len__": lambda self: 500, "eos_token_id": 0})()
    model = recipe.build_model(options, tokenizer)
    ids = torch.zeros(3, 64, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    assert counter.get_total_flops() == model_flops_per_token(model.config, 64) * ids.numel()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 64}, r"block_size must be from 2 to n_positions \(32\), got 64.*lower block_size"),
        ({"model_vocab_size": 200}, "model_vocab_size must be at least the tokenizer's 300 tokens, got 200"),
        ({"learning_rat": 1e-3}, "did you mean 'learning_rate'"),
        ({"blok_size": 8}, "did you mean 'block_size'"),
        ({"optim": "sgd_say"}, "did you mean 'sgd_sai'"),
        ({"init_scheme": "he"}, "init_scheme must be one of default, xavier, kaiming, orthogonal, got 'he'"),
        ({"gsnr_every": 0}, "gsnr_every must be at least 1, or left out, got 0"),
        ({"max_loss": 0.0}, "max_loss must be above 0, or left out, got 0.0"),
        ({"model_size": "huge"}, "model_size must be one of tiny, 5m, small.*got 'huge'"),
        ({"tokenizer": "no/such-tokenizer"}, "tokenizer: 'no/such-tokenizer' is neither.*`train`"),
        ({"train_files": ["/no/such.txt"]}, "train_files: no file at '/no/such.txt'"),
        ({"vocab_size": 100}, "vocab_size must be at least 257.*got 100"),
        ({"warmup_fraction": 2}, r"warmup_fraction must be in \[0, 1\), got 2"),
        ({"streaming": True, "max_steps": -1}, "streaming needs the length of the run: give max_tokens"),
        ({"train_files": None, "dataset": "Skylion007/openwebtext"}, "dataset: .* could not be read.*train_files"),
        ({"resume_from_checkpoint": "/no/such/checkpoint"}, "resume_from_checkpoint: there is no folder"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_options_are_explained(config, change, message):
    with pytest.raises(UserError, match=message):
        pretrain({**config, **change})
    assert not (Path(config["output_dir"]) / "config.json").exists()


def test_yaml_file_and_overrides(config, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train_files: [a.txt]\nlearning_rate: 1e-3\nmax_tokens: 1_000\n")
    corpus, _, args = read_config([str(path), "--max_tokens", "2000", "--use_cpu", "true"])
    assert (corpus.train_files, args.learning_rate, args.max_tokens) == (["a.txt"], 1e-3, 2000)
    path.write_text("train_files: [a.txt]\nlerning_rate: 1e-3\n")
    with pytest.raises(UserError, match="unknown key 'lerning_rate'; did you mean 'learning_rate'"):
        read_config(str(path))


@pytest.mark.distributed
def test_two_processes_are_one_with_twice_the_batch(config, tmp_path):
    config |= {"max_steps": 8, "lr_scheduler_type": "cosine", "gsnr_every": 7}
    one = record_of(pretrain({**config, "per_device_train_batch_size": 8, "output_dir": str(tmp_path / "one")}))
    config |= {"output_dir": str(tmp_path / "two")}
    (tmp_path / "two.yaml").write_text(json.dumps(config))  # JSON is YAML
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
    command = [*launch, "-m", "recipes.pretrain", str(tmp_path / "two.yaml")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=800)
    two = record_of(tmp_path / "two")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["tokens"] == two["tokens"]
    # Float32 sums in another order: relative errors of 2**-23 that the steps carry on; 1e-4 is 840, one is seen.
    for split in ("train", "validation"):
        assert losses(two, split) == pytest.approx(losses(one, split), rel=1e-4)
    one, two = (json.loads((tmp_path / run / "gsnr.json").read_text()) for run in ("one", "two"))
    assert two["steps"] == one["steps"] == [1, 8]
    for mine, other in zip(one["blocks"], two["blocks"], strict=True):
        assert other["name"] == mine["name"]
        for key in ("gsnr_now", "drift"):
            assert other[key] == pytest.approx(mine[key], rel=1e-3)  # of gradients; the record has six digits


@pytest.mark.skipif(not (DATA / "tinyshakespeare").is_dir(), reason="needs HF_SAI_DATA")
def test_tiny_shakespeare(tmp_path):
    shorter = ["--max_tokens", "61440", "--eval_steps", "15", "--max_eval_blocks", "32"]
    places = ["--train_files", str(DATA / "tinyshakespeare" / "input.txt"), "--cache_dir", str(tmp_path / "cache")]
    pretrain(["tiny_shakespeare.yaml", *shorter, *places, "--output_dir", str(tmp_path / "run")])
    record = record_of(tmp_path / "run")
    assert record["steps"] == 30
    assert record["final"]["eval_loss"] < math.log(2048) - 0.5  # well below the uniform distribution


def test_a_given_model_is_trained_on_and_the_run_ends_with_its_results(config, tmp_path, capsys):
    """The first loss is the last one of the run before, up to what one batch differs; the size options are refused."""
    base = pretrain({**config, "output_dir": str(tmp_path / "base"), "max_steps": 60})
    fresh = {key: value for key, value in config.items() if not key.startswith("n_") and key != "tokenizer"}
    given = {**fresh, "n_positions": 32, "model": str(base), "max_steps": 2}
    capsys.readouterr()
    record = record_of(pretrain({**given, "output_dir": str(tmp_path / "on")}))
    said = capsys.readouterr().out.splitlines()
    final = record["final"]
    losses = f"validation loss {final['eval_loss']:.4f}, train loss {final['train_loss']:.4f}"
    assert said[-2].endswith(f": {losses}, 2 steps, 256 tokens, {record['train_seconds']} s")
    assert said[-1] == f"model, record and curves: {tmp_path / 'on'}"
    assert record["curves"]["train"][0]["loss"] < record_of(base)["curves"]["train"][0]["loss"] - 0.5
    assert (record["data"]["base_model"], record["data"]["base_weights"]) == (None, None)
    before, after = weights(base), weights(tmp_path / "on")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(UserError, match="n_layer is for fresh weights; leave it out with `model`"):
        read_config({**given, "n_layer": 2})
    with pytest.raises(UserError, match=r"model: there is no folder '\./nosuch'"):
        read_config({**given, "model": "./nosuch"})


def test_files_are_looked_at_before_the_hub_is_asked(config, monkeypatch):
    def asked(*args, **kwargs):
        raise AssertionError("asked the hub for a tokenizer")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", asked)
    with pytest.raises(UserError, match=r"train_files: no file at 'nosuch\.txt'"):
        pretrain({**config, "tokenizer": "gpt2", "train_files": ["nosuch.txt"]})
