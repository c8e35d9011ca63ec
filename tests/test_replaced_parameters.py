"""What libraries put in the place of parameters is recognised: blocks as before, partitions, or refused."""

import copy
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sai import SGDSaI


@pytest.fixture
def params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5))]


def with_gradient(*tensors: Tensor) -> list[Tensor]:
    for t in tensors:
        t.grad = torch.randn_like(t)
    return list(tensors)


def test_a_flat_tensor_in_the_place_of_blocks(params: list[nn.Parameter]) -> None:
    """apex, and DeepSpeed in ways that leave no trace on the parameters."""
    optimizer = SGDSaI(params)
    flat = torch.cat([p.detach().flatten() for p in params])
    before = flat.clone()
    optimizer.param_groups[0]["params"] = with_gradient(flat)
    with pytest.raises(ValueError, match=r"has replaced 2 parameters.*use FSDP2"):
        optimizer.step()
    assert torch.equal(flat, before)
    assert not optimizer.state


def test_a_flat_tensor_when_loading(params: list[nn.Parameter]) -> None:
    optimizer = SGDSaI(params)
    optimizer.param_groups[0]["params"] = [torch.zeros(17)]
    saved = SGDSaI([nn.Parameter(torch.zeros(17))]).state_dict()
    with pytest.raises(ValueError, match="has replaced 2 parameters"):
        optimizer.load_state_dict(saved)


def test_copies_of_every_parameter_are_blocks(params: list[nn.Parameter]) -> None:
    """float32 masters of half-precision parameters, as DeepSpeed's stage 0 makes them."""
    optimizer = SGDSaI(params)
    masters = with_gradient(*(p.detach().clone() for p in params))
    optimizer.param_groups[0]["params"] = masters
    optimizer.step()
    expected = [float(p.grad.norm() / (p.grad.std() + 1e-8)) for p in masters]  # type: ignore[union-attr]
    assert [optimizer.state[p]["gsnr"].item() for p in masters] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("attribute", "message"), [("_fsdp_flattened", "FSDP1"), ("ds_id", "ZeRO 3")])
def test_sharded_before_and_after_the_optimizer_is_made(
    attribute: str, message: str, params: list[nn.Parameter]
) -> None:
    optimizer = SGDSaI(params)
    with_gradient(*params)
    setattr(params[1], attribute, True)
    with pytest.raises(ValueError, match=message):
        SGDSaI(params)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_what_a_partition_cannot_have(params: list[nn.Parameter], monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 momentum shares a scale among 128 neighbours, which here belong to several blocks."""
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))  # only where it is loaded can it have acted
    for p in params:
        p._hp_mapping, p._dp_group = None, SimpleNamespace()  # type: ignore[attr-defined]
    for options in ({"momentum_dtype": "int8"}, {"stochastic_rounding": True}):
        optimizer = SGDSaI(params, **options)  # type: ignore[arg-type]
        optimizer.param_groups[0]["params"] = with_gradient(torch.zeros(17))
        with pytest.raises(ValueError, match="int8' and stochastic_rounding do not support DeepSpeed ZeRO"):
            optimizer.step()


def test_a_copy_knows_its_own_parameters(params: list[nn.Parameter]) -> None:
    model: dict[str, Any] = {"params": params, "optimizer": SGDSaI(params)}
    copied = copy.deepcopy(model)
    with_gradient(*copied["params"])
    copied["optimizer"].step()
    assert all("gsnr" in copied["optimizer"].state[p] for p in copied["params"])
    assert not model["optimizer"].state
