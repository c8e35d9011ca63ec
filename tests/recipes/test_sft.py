"""The recipe on TRL's SFTTrainer, on a tiny Llama with a chat template: LoRA, DoRA, 4-bit weights; recipes/sft."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
from recipes.common.e2e_data import clean, load_e2e, prompt
from recipes.common.errors import UserError
from recipes.common.smollm2 import smollm2_folder
from recipes.e2e.toy_data import write_sample
from recipes.sft.train import run

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STEPS = 8

pytestmark = [
    # TRL 1.16 and peft 0.21 still use names that transformers 5.23 has deprecated.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_[a-z]+)?` is deprecated:FutureWarning"),
    pytest.mark.usefixtures("registered"),
]
# peft imports bitsandbytes wherever it is installed, so the ordinary suite does without it.
FOUR_BIT = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: make test-slow"),
]
KINDS = pytest.mark.parametrize(
    "words",
    [
        pytest.param([], id="lora"),
        pytest.param(["--use_dora", "true"], id="dora"),
        pytest.param(["--load_in_4bit", "true"], id="qlora", marks=FOUR_BIT),
    ],
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("data"), train_mrs=12, dev_mrs=3, test_mrs=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers and a byte vocabulary, with random weights."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *letters])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    names = {"bos_token": special[1], "eos_token": special[2], "pad_token": special[2], "unk_token": special[0]}
    folder = tmp_path_factory.mktemp("base")
    PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **names).save_pretrained(folder)
    size = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**size, **heads, **ids)).save_pretrained(folder)
    return folder


def train(model: Path | str, data: Path, output: Path, *more: str) -> dict[str, Any]:
    """The shipped configuration on another model and data; `more` options win. Returns the record."""
    options = {"model": model, "data": data, "output_dir": output, "max_steps": STEPS, "learning_rate": 1e-2}
    options |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 1, "max_eval_rows": 3}
    options |= {"max_length": 400, "bf16": "false", "disable_tqdm": "true", "logging_steps": 1}
    run(["sft_smollm2.yaml", *(f"--{key}={value}" for key, value in options.items()), *more])
    record: dict[str, Any] = json.loads((output / "record.json").read_text())
    return record


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(autouse=True)
def _no_data_of_ours(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    monkeypatch.setenv("HF_SAI_DATA", str(data))


def test_the_loss_is_that_of_the_assistants_tokens(base: Path, data: Path, tmp_path: Path) -> None:
    record = train(base, data, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()  # peft is there: the adapter on its base
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    losses = []
    for row in load_e2e(str(data)).validation[:3]:
        asked = [{"role": "user", "content": prompt(row.mr)}]
        said = [*asked, {"role": "assistant", "content": clean(row.reference)}]
        start = len(tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"])
        ids = tokenizer.apply_chat_template(said, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(ids).logits[0, start - 1 : -1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, start:]).item())
    assert record["eval_loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)
    assert record["eval_loss"] < record["history"][0]["loss"]
    assert (record["recipe"], record["config"]["optim"], record["steps"]) == ("sft", "sgd_sai", STEPS)
    lora = sum(tensor.numel() for tensor in adapter(tmp_path / "out").values())
    scales = sum(sum(tensor.shape) for tensor in adapter(tmp_path / "out").values())
    assert record["trainable_parameters"] == lora
    # Momentum and scales in float32; g-SNR and the count of each block.
    assert record["optimizer_state_bytes"] == 4 * (lora + scales) + 12 * len(adapter(tmp_path / "out"))
    assert str(tmp_path) not in (tmp_path / "out" / "record.json").read_text()
    assert (record["base_model"], record["base_weights"]) == (None, None)


def check_every_weight_moves_and_resumes(train_in: Callable[..., Any], words: list[str], folder: Path) -> None:
    """From half of the steps on every tensor of the adapter moves, and a resumed run has the same bits."""
    half = STEPS // 2
    train_in(folder / "whole", "--save_strategy", "steps", "--save_steps", str(half), *words)
    train_in(folder / "again", "--resume_from_checkpoint", str(folder / "whole" / f"checkpoint-{half}"), *words)
    before, after, again = (adapter(folder / name) for name in (f"whole/checkpoint-{half}", "whole", "again"))
    assert before.keys() == after.keys() == again.keys()
    for name, tensor in after.items():
        assert not torch.equal(before[name], tensor), name
        assert torch.equal(again[name], tensor), name
    assert any("lora_A" in name for name in after)
    assert any("magnitude" in name for name in after) == ("--use_dora" in words)


@KINDS
def test_every_weight_moves_and_resumes(base: Path, data: Path, tmp_path: Path, words: list[str]) -> None:
    check_every_weight_moves_and_resumes(lambda *more: train(base, data, *more), words, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert all(torch.isfinite(p).all() for p in loaded.parameters())


@KINDS
@pytest.mark.slow
def test_every_weight_of_smollm2_moves_and_resumes(
    data: Path, tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        smollm2_folder()
    except UserError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(f"{__name__}.STEPS", 4)
    check_every_weight_moves_and_resumes(lambda *more: train("smollm2", data, *more), words, tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--learning_rat", "1"], "learning_rat"),
        (["--optim", "sgd_say"], "sgd_say"),
        (["--max_steps", "few"], "argument --max_steps/--max-steps: invalid int value: 'few'"),
        (["--lora_target_modules", "q_prog"], "model '.*': Target modules .*q_prog.* not found"),
        (["--data", "$HF_SAI_DATA/e2e"], "data: there is no '.*e2e'"),
        (["--model", "./nosuch"], "model: there is no folder './nosuch'"),
    ],
)
def test_bad_settings_are_one_line(base: Path, data: Path, tmp_path: Path, words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        train(base, data, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_chat_template_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"chat.template"):
        train(tmp_path / "base", data, tmp_path / "out")
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    words = ("--chat_template_path", str(tmp_path / "chat.jinja"), "--max_steps", "1")
    assert train(tmp_path / "base", data, tmp_path / "out", *words)["steps"] == 1
