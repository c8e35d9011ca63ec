"""Fixtures that several test modules share. Nothing here or below needs a network."""

import os

# Read when huggingface_hub, datasets and tokenizers are imported: set before any of them is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

# The same examples in every run, and as much time as a busy machine needs: by default an example may take 0.2 s.
settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture
def make_gpt2() -> Callable[..., Any]:
    """Builds a GPT-2 of 2 layers, width 32 and 64 tokens; the same seed gives the same weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def build(seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
        torch.manual_seed(seed)
        settings = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, **config}
        special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "loss_type": "ForCausalLM"}
        return GPT2LMHeadModel(GPT2Config(**settings, **special)).to(dtype)

    return build


@pytest.fixture
def token_dataset() -> list[dict[str, Tensor]]:
    """48 sequences of 16 tokens, as a Trainer takes them."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(1, 64, (48, 16), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


@pytest.fixture
def tokenizer() -> Any:
    """A fast tokenizer of 64 tokens, made here: letters, digits, punctuation and three special tokens."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVW0123456789 .,!?"[:61]
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<pad>", "<unk>", *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<eos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture
def registered() -> Iterator[None]:
    """`register()` for one test: what it patches is put back, so that other tests see transformers untouched."""
    from transformers import Trainer, TrainingArguments
    from transformers.training_args import OptimizerNames

    from hf_sai import register

    patch = pytest.MonkeyPatch()
    patch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(Trainer.get_optimizer_cls_and_kwargs))
    for name in ("__post_init__", "set_optimizer"):
        patch.setattr(TrainingArguments, name, getattr(TrainingArguments, name))
    for name in ("_member_names_", "_member_map_", "_value2member_map_", "_hashable_values_"):
        if hasattr(OptimizerNames, name):
            patch.setattr(OptimizerNames, name, getattr(OptimizerNames, name).copy())
    register()
    yield
    patch.undo()
    type.__delattr__(OptimizerNames, "SGD_SAI")


@pytest.fixture
def snapshot() -> Callable[[nn.Module], dict[str, Tensor]]:
    """Copies of a model's parameters by name."""
    return lambda model: {name: p.detach().clone() for name, p in model.named_parameters()}
