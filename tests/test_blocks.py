"""Kinds and layers of blocks, for models of several families."""

import pytest
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    T5Config,
    ViTConfig,
)
from transformers import BertConfig as Bert

from hf_sai.blocks import block_names

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def kinds(model: nn.Module) -> dict[str, tuple[str, int | None]]:
    return {block.name: (block.kind, block.layer) for block in block_names(model).values()}


def test_gpt2_and_its_layers() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, **TOKENS))
    found = kinds(model)
    for layer in (0, 1):
        at = f"transformer.h.{layer}."
        assert {name.removeprefix(at): kind for name, kind in found.items() if name.startswith(at)} == {
            "ln_1.weight": ("norm", layer),
            "ln_1.bias": ("bias", layer),
            "attn.c_attn.weight": ("attention qkv", layer),
            "attn.c_attn.bias": ("bias", layer),
            "attn.c_proj.weight": ("attention out", layer),
            "attn.c_proj.bias": ("bias", layer),
            "ln_2.weight": ("norm", layer),
            "ln_2.bias": ("bias", layer),
            "mlp.c_fc.weight": ("mlp in", layer),
            "mlp.c_fc.bias": ("bias", layer),
            "mlp.c_proj.weight": ("mlp out", layer),
            "mlp.c_proj.bias": ("bias", layer),
        }
    assert found["transformer.wte.weight"] == ("embedding", None)
    assert found["transformer.wpe.weight"] == ("position embedding", None)
    assert found["transformer.ln_f.weight"] == ("norm", None)
    assert "lm_head.weight" not in found, "tied to the embedding"


@pytest.mark.parametrize(
    ("family", "config", "expected"),
    [
        (
            AutoModelForCausalLM,
            LlamaConfig(**TINY, **TOKENS),
            {"self_attn.k_proj.weight": "attention qkv", "self_attn.o_proj.weight": "attention out"}
            | {"mlp.gate_proj.weight": "mlp in", "mlp.down_proj.weight": "mlp out", "lm_head.weight": "head"}
            | {"input_layernorm.weight": "norm", "model.norm.weight": "norm"},
        ),
        (
            AutoModelForCausalLM,
            OPTConfig(**{**TINY, "ffn_dim": 64, "word_embed_proj_dim": 32}, **TOKENS),
            {"self_attn.q_proj.weight": "attention qkv", "self_attn.out_proj.weight": "attention out"}
            | {"fc1.weight": "mlp in", "fc2.weight": "mlp out", "embed_positions.weight": "position embedding"},
        ),
        (
            AutoModelForCausalLM,
            MixtralConfig(**TINY, num_key_value_heads=1, num_local_experts=2, **TOKENS),
            {"self_attn.v_proj.weight": "attention qkv", "self_attn.o_proj.weight": "attention out"}
            | {"gate.weight": "other", "lm_head.weight": "head"},
        ),
        (
            AutoModelForSequenceClassification,
            Bert(**TINY, pad_token_id=0),
            {"attention.self.key.weight": "attention qkv", "attention.output.dense.weight": "attention out"}
            | {"0.intermediate.dense.weight": "mlp in", "0.output.dense.weight": "mlp out"}
            | {"attention.output.LayerNorm.weight": "norm", "attention.output.LayerNorm.bias": "bias"}
            | {"classifier.weight": "head", "classifier.bias": "bias", "pooler.dense.weight": "other"},
        ),
        (
            AutoModelForSequenceClassification,
            Bert(**{**TINY, "intermediate_size": 32}, pad_token_id=0),  # square: the names tell
            {"0.intermediate.dense.weight": "mlp in", "0.output.dense.weight": "mlp out"},
        ),
        (
            AutoModelForImageClassification,
            ViTConfig(**{k: v for k, v in TINY.items() if k != "vocab_size"}, image_size=32, patch_size=16),
            {"position_embeddings": "position embedding", "patch_embeddings.projection.weight": "convolution"}
            | {"cls_token": "other", "classifier.weight": "head"},
        ),
        (
            AutoModelForSeq2SeqLM,
            T5Config(d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16, vocab_size=50, decoder_start_token_id=0),
            {"shared.weight": "embedding", "SelfAttention.q.weight": "attention qkv", "wi.weight": "mlp in"}
            | {"EncDecAttention.o.weight": "attention out", "wo.weight": "mlp out"},
        ),
    ],
    ids=["llama", "opt", "mixtral", "bert", "square", "vit", "t5"],
)
def test_families(family: type, config: object, expected: dict[str, str]) -> None:
    found = kinds(family.from_config(config))
    for ending, kind in expected.items():
        of_that_name = {found[name][0] for name in found if name.endswith(ending)}
        assert of_that_name == {kind}, ending


def test_torch_modules_and_lora() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    found = kinds(nn.ModuleDict({"layers": nn.ModuleList([layer])}))
    assert found["layers.0.self_attn.in_proj_weight"] == ("attention qkv", 0)
    assert found["layers.0.self_attn.out_proj.weight"] == ("attention out", 0)
    assert found["layers.0.linear1.weight"] == ("mlp in", 0)
    pair = nn.ModuleDict({"lora_A": nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})})
    pair["lora_B"] = nn.ModuleDict({"default": nn.Linear(2, 4, bias=False)})
    assert [kind for kind, _ in kinds(nn.ModuleDict({"q_proj": pair})).values()] == ["LoRA A", "LoRA B"]


def test_wrapped_models_have_the_names_of_the_model_itself() -> None:
    import torch

    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    names = [name for name, _ in model.named_parameters()]
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert [block.name for block in block_names(wrapped).values()] == names
