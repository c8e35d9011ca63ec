"""Which group each parameter goes into: decayed or not, a row for each token or not, and by which name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments
from ways import QUIET

from hf_sai import SaITrainer, SaITrainingArguments, SGDSaI, create_sgd_sai, param_groups, sgd_sai_from_args
from hf_sai.param_groups import split_token_rows

# peft 0.21 still reads a name that transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

VOCABULARY = 20


def llama() -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, bos_token_id=0, eos_token_id=0, **sizes)
    )


def t5() -> Any:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes))


def token_rows(groups: list[dict[str, Any]]) -> set[str]:
    return {name for group in groups if group["token_rows"] for name in group["param_names"]}


def decayed(groups: list[dict[str, Any]]) -> set[str]:
    return {name for group in groups if group["weight_decay"] for name in group["param_names"]}


def check_complete(groups: list[dict[str, Any]], model: nn.Module) -> None:
    """Every trained parameter stands once, under its own name; no group is empty or of two kinds."""
    found = [(name, id(p)) for group in groups for name, p in zip(group["param_names"], group["params"], strict=True)]
    assert sorted(found) == sorted((name, id(p)) for name, p in model.named_parameters() if p.requires_grad)
    assert all(group["params"] for group in groups)
    kinds = [(group["weight_decay"], group["token_rows"]) for group in groups]
    assert len(set(kinds)) == len(kinds)


@pytest.mark.parametrize("build", [llama, t5])
def test_the_decayed_parameters_are_the_trainers(build: Callable[[], Any]) -> None:
    model = build()
    groups = param_groups(model, 0.3)
    check_complete(groups, model)
    names = {name for name, _ in model.named_parameters()}
    assert decayed(groups) == names & set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    assert {group["weight_decay"] for group in groups} == {0.3, 0.0}


def test_norms_and_biases_of_any_shape_are_not_decayed() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj, self.gate_up_proj_bias = (
                nn.Parameter(torch.ones(2, 3, 4)),
                nn.Parameter(torch.ones(2, 4)),
            )
            self.scale = nn.Parameter(torch.tensor(1.0))

    model = nn.ModuleDict(
        {"conv": nn.Conv2d(1, 2, 3), "a": nn.LayerNorm((2, 3)), "b": nn.GroupNorm(1, 2), "e": Experts()}
    )
    groups = param_groups(model, 0.1)
    check_complete(groups, model)
    assert decayed(groups) == {"conv.weight", "e.gate_up_proj"}
    assert token_rows(groups) == set()


def test_the_token_rows_of_tied_and_untied_heads(make_gpt2: Callable[..., Any]) -> None:
    assert token_rows(param_groups(make_gpt2())) == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert token_rows(param_groups(llama())) == {"model.embed_tokens.weight", "lm_head.weight"}
    bias = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert token_rows(param_groups(t5())) == {"shared.weight", bias.format("encoder"), bias.format("decoder")}


def test_the_token_rows_of_a_model_of_ones_own() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.bag = nn.Embedding(9, 4), nn.EmbeddingBag(5, 4)
            self.inner, self.out, self.lm_head = nn.Linear(4, 4), nn.Linear(4, 9), nn.Linear(4, 9)

    model = Own()
    known = {"table.weight", "bag.weight", "lm_head.weight"}
    assert token_rows(param_groups(model)) == known
    groups = param_groups(model, token_modules=["out"])
    check_complete(groups, model)
    assert token_rows(groups) == {*known, "out.weight"}
    with pytest.raises(ValueError, match=r"\(tokens, features\), got 'output', which the model lacks"):
        param_groups(model, token_modules=["output"])
    with pytest.raises(ValueError, match=r"got '', which has none"):
        param_groups(model, token_modules=[""])


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"target_modules": ["q_proj"]}, set()),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
            {"model.embed_tokens.modules_to_save.default.weight", "lm_head.modules_to_save.default.weight"},
        ),
        # B has a row for each token; A has columns of features.
        ({"target_modules": ["q_proj", "lm_head"]}, {"lm_head.lora_B.default.weight"}),
        (
            {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2, 3]},
            {"model.embed_tokens.token_adapter.trainable_tokens_delta.default"},
        ),
    ],
    ids=["lora", "modules_to_save", "head", "trainable tokens"],
)
def test_the_token_rows_under_peft(config: dict[str, Any], wanted: set[str]) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, task_type="CAUSAL_LM", **config))
    groups = param_groups(model, 0.1)
    check_complete(groups, model)
    assert token_rows(groups) == {f"base_model.model.{name}" for name in wanted}
    assert len(groups) == 1 + bool(wanted), "nothing undecayed, and no empty group"


def test_names_of_others_decide_what_is_decayed() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    groups = param_groups(model, 0.1, decay_parameters=["1.weight", "1.bias", "tied.weight"])
    check_complete(groups, model)
    assert decayed(groups) == {"1.weight", "1.bias"}


def test_a_model_that_is_frozen_is_refused() -> None:
    with pytest.raises(ValueError, match="model has no parameter with requires_grad"):
        param_groups(nn.Linear(2, 2).requires_grad_(False))


def test_groups_of_others_are_kept_and_only_split() -> None:
    model, stray = nn.ModuleDict({"table": nn.Embedding(5, 2), "out": nn.Linear(2, 2)}), nn.Parameter(torch.ones(3))
    table, weight, bias = model.parameters()
    given = [
        {"params": [weight, table], "lr": 0.5},
        {"params": iter([("mine", bias)])},
        {"params": stray, "token_rows": True, "weight_decay": 0.2},
        {"params": []},
    ]
    assert split_token_rows(given, model) == [
        {"params": [weight], "param_names": ["out.weight"], "token_rows": False, "lr": 0.5},
        {"params": [table], "param_names": ["table.weight"], "token_rows": True, "lr": 0.5},
        {"params": [bias], "param_names": ["mine"], "token_rows": False},
        {"params": [stray], "param_names": ["param_groups[2].params[0]"], "token_rows": True, "weight_decay": 0.2},
    ]
    plain = split_token_rows(model.parameters(), model)
    assert [group["param_names"] for group in plain] == [["out.weight", "out.bias"], ["table.weight"]]
    assert [group["param_names"] for group in split_token_rows(model.named_parameters(), model)] == [
        ["out.weight", "out.bias"],
        ["table.weight"],
    ]


def described(optimizer: Any) -> list[tuple[Any, ...]]:
    assert type(optimizer) is SGDSaI
    keys = ("params", "param_names", "weight_decay", "token_rows", "lr")
    return [
        tuple(group[key] if key != "params" else list(map(id, group[key])) for key in keys)
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.usefixtures("registered")
def test_every_way_makes_the_same_groups(lora: bool, tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])) if lora else llama()
    settings: dict[str, Any] = {"learning_rate": 1e-2, "weight_decay": 0.1, **QUIET}
    args = TrainingArguments(str(tmp_path), optim="sgd_sai", **settings)
    wanted = described(SGDSaI(param_groups(model, 0.1), lr=1e-2))
    assert len(wanted) == (1 if lora else 3)
    assert described(create_sgd_sai(model, args, 1)[0]) == wanted
    assert described(Trainer(model, args).create_optimizer()) == wanted
    sai = SaITrainer(model, SaITrainingArguments(str(tmp_path), **settings))
    assert described(sai.create_optimizer()) == wanted
    by_class = Trainer(model, args, optimizer_cls_and_kwargs=sgd_sai_from_args(args, model))
    assert described(by_class.create_optimizer()) == wanted


@pytest.mark.usefixtures("registered")
def test_a_trainers_own_rule_and_own_groups_are_kept(tmp_path: Path) -> None:
    class DecaysAll(Trainer):
        def get_decay_parameter_names(self, model: Any) -> list[str]:
            return [name for name, _ in model.named_parameters()]

    class OneGroup(Trainer):
        """As many a Trainer of others does it."""

        def create_optimizer(self, model: Any = None) -> Any:
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = cls([{"params": list(self.model.parameters()), "lr": 0.5}], **kwargs)
            return self.optimizer

    args = TrainingArguments(str(tmp_path), optim="sgd_sai", learning_rate=1e-2, weight_decay=0.1, **QUIET)
    groups = DecaysAll(llama(), args).create_optimizer().param_groups
    assert [(group["weight_decay"], group["token_rows"]) for group in groups] == [(0.1, False), (0.1, True)]
    groups = OneGroup(llama(), args).create_optimizer().param_groups
    assert [(group["lr"], group["token_rows"], len(group["params"])) for group in groups] == [
        (0.5, False, 10),
        (0.5, True, 2),
    ]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("cls", [Trainer, SaITrainer])
def test_messages_under_a_trainer_name_parameters(cls: type[Trainer], tmp_path: Path) -> None:
    model = llama()
    args = TrainingArguments(str(tmp_path), optim="sgd_sai", learning_rate=1e-2, **QUIET)
    optimizer = cls(model, args).create_optimizer()
    saved = optimizer.state_dict()
    saved["state"] = {0: {"gsnr": torch.zeros(())}}
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight"):
        optimizer.load_state_dict(saved)
