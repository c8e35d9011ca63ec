"""Fixtures that several test modules share. Nothing here or below needs a network."""

import os

# Read when huggingface_hub, datasets and tokenizers are imported: set before any of them is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

# The same examples in every run, and as much time as a busy machine needs: by default an example may take 0.2 s.
settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

# Tests of the core use these and what `import hf_sai` loads; the authors' release is their oracle.
CORE_LIBRARIES = {"hypothesis", "numpy", "pytest", "sgd_sai", "torch"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--core", action="store_true", help="only the test files of the optimizer's core")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --core: leave out all files but those of the core, in this folder."""
    if not config.getoption("core") or collection_path == Path(__file__).parent:
        return None
    return collection_path.suffix != ".py" or not tests_the_core(collection_path) or None


def tests_the_core(path: Path) -> bool:
    """Whether a test file imports hf_sai, and only modules of it that the optimizer needs."""
    import hf_sai

    core = {name for name in sys.modules if name.partition(".")[0] == "hf_sai"} | {
        f"hf_sai.{name}" for name in ("__version__", "SGDSaI", "param_groups")
    }
    helpers = {helper.stem for helper in path.parent.glob("*.py")}
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {f"hf_sai.{a.name}" for a in node.names} if node.module == "hf_sai" else {str(node.module)}
    ours = {name for name in imported if name.partition(".")[0] == hf_sai.__name__}
    others = {name.partition(".")[0] for name in imported - ours}
    return bool(ours) and ours <= core and others <= CORE_LIBRARIES | helpers | sys.stdlib_module_names


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """What a test sets in the environment ends with it; `TrainingArguments(bf16=True)` sets accelerate's precision."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


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
