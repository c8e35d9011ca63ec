"""The optimizer of the partitioning study against the rule's twin, and what each partition shares."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_sai.bench.state_bytes import optimizer_state_bytes
from recipes.common.errors import UserError
from recipes.common.partitioned import PARTITIONS, Partitioned, _head_dimensions
from tests.reference import Reference


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=0)
    )


def gradients(model: nn.Module, steps: int, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.randn(p.shape, generator=generator)
        yield


def test_rows_and_columns_with_the_rules_bound_are_the_rule_within_its_window():
    """Of its float64 twin; the numbers are float32's, of 60 steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Embedding(5, 4))
    twins = {
        name: Reference(p, 1e-2, 0.9, 0.1 if p.dim() > 1 else 0.0, token_rows=name == "1.weight")
        for name, p in model.named_parameters()
    }
    optimizer = Partitioned(model, 1e-2, 0.1, partition="row_column", bound=2.0)
    for group in optimizer.param_groups:
        if group["token_rows"]:
            group["bound"] = 30.0
    for step, _ in enumerate(gradients(model, 60), 1):
        for name, p in model.named_parameters():
            twins[name].step(p.grad, step)
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.double(), twins[name].p, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("running", [False, True])
def test_scales_stay_after_the_window_unless_they_run(partition, running):
    model = gpt2()
    optimizer = Partitioned(model, 1e-3, partition=partition, running=running, window=2)
    for _ in gradients(model, 2):
        optimizer.step()
    before = {p: [x.clone() for x in state["rms"]] for p, state in optimizer.state.items() if "rms" in state}
    for _ in gradients(model, 1, seed=2):
        optimizer.step()
    for p, means in before.items():
        for mean, now in zip(means, optimizer.state[p]["rms"], strict=True):
            assert bool((mean == now).all()) != running


def test_what_each_partition_holds_besides_momentum():
    """GPT-2 of 2 layers, width 16: a float32 each for what shares a scale, and none twice."""
    sizes = {}
    for partition in PARTITIONS:
        model = gpt2()
        optimizer = Partitioned(model, 1e-3, partition=partition)
        for _ in gradients(model, 1):
            optimizer.step()
        elements = sum(p.numel() for p in model.parameters())
        sizes[partition] = optimizer_state_bytes(optimizer) // 4 - elements
    tensors = len(list(gpt2().parameters()))
    matrices = [p for p in gpt2().parameters() if p.dim() == 2]
    assert sizes == {
        "model": 1,
        "layer": 2 + 4,  # two layers; tokens, positions, weight and bias of the last norm
        "tensor": tensors,
        "head": tensors + 2 * (3 * 2 - 1) + 2 * (2 - 1),  # in each layer 6 heads of c_attn and 2 of c_proj
        "channel": tensors + sum(max(p.shape) - 1 for p in matrices),
        "row_column": tensors + sum(sum(p.shape) - 1 for p in matrices),
        "element": sum(p.numel() for p in gpt2().parameters()),
    }


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_heads_divide_the_outputs_of_queries_and_the_inputs_of_the_layer_after_attention():
    model = gpt2()
    names = {p: name for name, p in model.named_parameters()}
    found = {names[p]: dims for p, dims in _head_dimensions(model).items()}
    assert found["transformer.h.0.attn.c_attn.weight"] == (1, 8), "(inputs, outputs) in GPT-2"
    assert found["transformer.h.0.attn.c_proj.weight"] == (0, 8)
    assert len(found) == 4

    adapted = get_peft_model(gpt2(), LoraConfig(target_modules=["c_attn", "c_proj"], r=2, fan_in_fan_out=True))
    names = {p: name for name, p in adapted.named_parameters()}
    trained = {names[p].split("h.0.")[-1]: dims for p, dims in _head_dimensions(adapted).items() if p.requires_grad}
    assert trained["attn.c_attn.lora_B.default.weight"] == (0, 8)
    assert trained["attn.c_proj.lora_A.default.weight"] == (1, 8)
    assert not any("c_attn.lora_A" in name or "c_proj.lora_B" in name for name in trained)

    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=20,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    names = {p: name for name, p in llama.named_parameters()}
    found = {names[p].rpartition("self_attn.")[2]: dims for p, dims in _head_dimensions(llama).items()}
    assert found == {f"{part}_proj.weight": (1 if part == "o" else 0, 8) for part in "qkvo"}


def test_a_tensor_without_gradient_waits_and_a_shared_scale_leaves_it_out():
    """As LoRA's A in the first step."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False))
    optimizer = Partitioned(model, 1e-2, partition="model")
    first, second = model.parameters()
    first.grad, second.grad = torch.zeros_like(first), torch.full_like(second, 4.0)
    before = first.clone()
    optimizer.step()
    torch.testing.assert_close(first, before, rtol=0, atol=0)
    lead = next(state for state in optimizer.state.values() if "rms" in state)
    torch.testing.assert_close(lead["rms"][0], torch.tensor([4.0]))


def test_a_learning_rate_that_is_set_after_a_load_holds():
    """As under accelerate, which loads an optimizer's own state dict when it prepares it."""
    model = gpt2()
    optimizer = Partitioned(model, 1e-2)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.clone() for p in model.parameters()]
    for _ in gradients(model, 2):
        optimizer.step()
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, was)


def test_what_is_refused():
    with pytest.raises(UserError, match=r"partition must be one of model, .*, got 'row'"):
        Partitioned(nn.Linear(2, 2), 1e-3, partition="row")
    with pytest.raises(UserError, match=r"partition=head needs a model whose configuration has num_attention_heads"):
        Partitioned(nn.Linear(2, 2), 1e-3, partition="head")
