"""The paths of the update agree with each other and with the formula in float64."""

import itertools
from typing import Any

import pytest
import torch
from kernel_cases import DTYPES, HYPER, MOMENTUM_DTYPES, SIZES, assert_same, copied, make_blocks
from torch import Tensor

from hf_sai import SGDSaI, kernels
from hf_sai.kernels import _CPU_PIECE, Block, update_blocks, update_cpu, update_foreach, update_single_tensor

COMBINATIONS = list(itertools.product(DTYPES, (torch.float32, torch.bfloat16), MOMENTUM_DTYPES))


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("p_dtype", "g_dtype", "m_dtype"), COMBINATIONS)
def test_per_tensor_path_is_the_formula(
    p_dtype: torch.dtype, g_dtype: torch.dtype, m_dtype: torch.dtype | None, maximize: bool
) -> None:
    hyper = {**HYPER, "maximize": maximize, "stochastic_rounding": False}
    if m_dtype is None:
        hyper["momentum"] = 0.0
    blocks = make_blocks((1, 129, 4097), p_dtype, g_dtype, m_dtype)
    expected = [_formula(b, **hyper) for b in blocks]
    before = copied(blocks)
    update_single_tensor(blocks, **hyper)
    for b, (p, m), old in zip(blocks, expected, before, strict=True):
        # Half a unit of the stored dtype, and four roundings to float32 of numbers no larger than the terms.
        size = old.param.double().abs() + 0.01 * old.host_scale * 8
        assert ((b.param.double() - p).abs() <= torch.finfo(p_dtype).eps / 2 * p.abs() + 2**-22 * size).all()
        if m_dtype == torch.int8:
            held = b.momentum_buffer.double() * b.momentum_scale.repeat_interleave(128)[: p.numel()]
            level = b.momentum_scale.repeat_interleave(128)[: p.numel()].double()
            assert ((held - m).abs() <= level * (1 + 1e-5)).all()
        elif m_dtype is not None:
            assert ((b.momentum_buffer.double() - m).abs() <= torch.finfo(m_dtype).eps / 2 * m.abs() + 2**-20).all()


def _formula(b: Block, lr: float, momentum: float, weight_decay: float, maximize: bool, **_: Any) -> Any:
    g = b.grad.double() * (-1 if maximize else 1)
    m = g
    if b.momentum_buffer is not None:
        held = b.momentum_buffer.double()
        if b.momentum_scale is not None:
            held = held * b.momentum_scale.double().repeat_interleave(128)[: g.numel()]
        m = momentum * held + (1 - momentum) * g
    return (1 - lr * weight_decay) * b.param.double() - lr * float(b.host_scale) * m, m


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(("p_dtype", "g_dtype", "m_dtype"), COMBINATIONS)
def test_foreach_equals_per_tensor(
    p_dtype: torch.dtype, g_dtype: torch.dtype, m_dtype: torch.dtype | None, stochastic: bool
) -> None:
    hyper = {**HYPER, "stochastic_rounding": stochastic}
    if m_dtype is None:
        hyper["momentum"] = 0.0
    before = make_blocks((1, 2, 129, 4097), p_dtype, g_dtype, m_dtype, stochastic)
    one, other = copied(before), copied(before)
    update_single_tensor(one, **hyper)
    update_foreach(other, **hyper)
    assert_same(other, one, before)


def test_a_large_block_on_the_cpu_is_updated_piece_by_piece() -> None:
    before = make_blocks((2 * _CPU_PIECE + 3,))
    (whole,) = copied(before)
    update_single_tensor(before, **HYPER, stochastic_rounding=False)
    whole.momentum_buffer.lerp_(whole.grad, 0.1)
    expected = whole.param * (1 - 0.01 * 0.1) - 0.01 * whole.host_scale * whole.momentum_buffer
    # A processor may join a product and a sum in one rounding or not: at most four roundings of the terms.
    held = whole.momentum_buffer.abs() + whole.grad.abs()
    assert ((before[0].momentum_buffer - whole.momentum_buffer).abs() <= 4 * 2.0**-23 * held).all()
    size = whole.param.abs() + 0.01 * whole.host_scale * held
    assert ((before[0].param - expected).abs() <= 4 * 2.0**-23 * size).all()


@pytest.fixture
def torch_fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The parameters that torch's fused kernel has been called for."""
    calls: list[Tensor] = []

    def counted(params: Any, *args: Any, **options: Any) -> None:
        calls.extend(params)
        torch._fused_sgd_(params, *args, **options)

    monkeypatch.setattr(kernels, "_torch_fused_sgd", counted)
    return calls


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}, {"momentum": 0.0}, {"lr": 0.0, "weight_decay": 0.1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchs_fused_kernel_equals_per_tensor(
    dtype: torch.dtype, options: dict[str, Any], maximize: bool, torch_fused_calls: list[Tensor]
) -> None:
    """momentum=0 with a buffer is a block's first step: the momentum becomes the gradient, whatever it was."""
    hyper = {**HYPER, "weight_decay": 0.0, "maximize": maximize, "stochastic_rounding": False, **options}
    before = make_blocks((*SIZES, 1_000_000), dtype, dtype, dtype)
    one, other = copied(before), copied(before)
    update_single_tensor(one, **hyper)
    assert not torch_fused_calls
    update_cpu(other, **hyper)
    assert len(torch_fused_calls) == len(before)
    assert_same(other, one, before)
    if hyper["momentum"] == 0:
        assert all(torch.equal(b.momentum_buffer, -b.grad if maximize else b.grad) for b in other)


def test_torchs_fused_kernel_takes_other_shapes_than_flat_ones(torch_fused_calls: list[Tensor]) -> None:
    hyper = {**HYPER, "weight_decay": 0.0, "stochastic_rounding": False}
    shapes = [(1, 1), (3, 43), (2, 3, 5, 7), ()]
    flat = make_blocks([torch.Size(shape).numel() for shape in shapes])
    before = [
        b._replace(**{name: getattr(b, name).view(shape) for name in ("param", "grad", "momentum_buffer")})
        for b, shape in zip(flat, shapes, strict=True)
    ]
    one, other = copied(before), copied(before)
    update_single_tensor(one, **hyper)
    update_cpu(other, **hyper)
    assert len(torch_fused_calls) == len(shapes)
    assert_same(other, one, before)


@pytest.mark.parametrize(
    ("dtypes", "options", "layout"),
    [
        ((torch.float32,) * 3, {"weight_decay": 0.1}, None),
        ((torch.float32,) * 3, {"lr": torch.tensor(0.01)}, None),
        ((torch.float32,) * 3, {}, "channels_last"),
        ((torch.float32,) * 3, {}, "transposed"),
        ((torch.float32,) * 3, {}, "holes"),
        ((torch.float32, torch.float32, None), {"momentum": 0.0}, None),
        ((torch.float32, torch.bfloat16, torch.float32), {}, None),
        ((torch.float32, torch.float32, torch.bfloat16), {}, None),
        ((torch.float32, torch.float32, torch.int8), {}, None),
        ((torch.bfloat16,) * 3, {}, None),
        ((torch.float16,) * 3, {}, None),
    ],
)
def test_what_torchs_fused_kernel_cannot_do_is_done_per_tensor(
    dtypes: tuple[torch.dtype, ...], options: dict[str, Any], layout: str | None, torch_fused_calls: list[Tensor]
) -> None:
    hyper = {**HYPER, "weight_decay": 0.0, "stochastic_rounding": False, **options}
    (one,), (other,) = (make_blocks((6 * 8 * 3 * 3,), *dtypes) for _ in range(2))
    if layout:
        names = ("param", "grad", "momentum_buffer")
        one, other = (
            b._replace(**{name: _laid_out(getattr(b, name).view(6, 8, 3, 3), layout) for name in names})
            for b in (one, other)
        )
        assert not one.param.is_contiguous()
    update_single_tensor([one], **hyper)
    update_cpu([other], **hyper)
    assert not torch_fused_calls
    assert all(x is None or torch.equal(x, y) for x, y in zip(one[:4], other[:4], strict=True))


@pytest.mark.parametrize("fused", [None, False])
def test_the_optimizer_uses_torchs_fused_kernel_unless_told_not_to(
    fused: bool | None, torch_fused_calls: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    decayed, plain = (torch.nn.Parameter(torch.randn(7)) for _ in range(2))
    groups = [{"params": [decayed], "weight_decay": 0.1}, {"params": [plain], "weight_decay": 0.0}]
    optimizer = SGDSaI(groups, fused=fused)
    for p in (decayed, plain):
        p.grad = torch.randn_like(p)
    for _ in range(2):
        optimizer.step()
    assert torch_fused_calls == ([] if fused is False else [plain, plain])
    monkeypatch.setattr(kernels, "_torch_fused_sgd", None)  # a torch that has no such kernel
    before = plain.detach().clone()
    optimizer.step()
    assert not torch.equal(plain, before)


@pytest.mark.parametrize("momentum_dtype", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "holes", "gradient differs"])
def test_memory_formats(layout: str, dtype: torch.dtype, momentum_dtype: str | None) -> None:
    """A parameter in any memory format goes where its contiguous twin goes."""
    values = torch.randn(6, 8, 3, 3)
    plain = torch.nn.Parameter(values.to(dtype))
    odd = torch.nn.Parameter(_laid_out(values.to(dtype), layout))
    optimizers = [SGDSaI([p], lr=0.01, momentum_dtype=momentum_dtype) for p in (plain, odd)]
    for _ in range(4):
        gradient = torch.randn_like(values).to(dtype)
        plain.grad = gradient
        odd.grad = gradient.clone(memory_format=torch.preserve_format)
        if layout != "gradient differs":
            odd.grad = _laid_out(gradient, layout)
        for optimizer in optimizers:
            optimizer.step()
    if momentum_dtype == "int8":
        # int8 has the same random bits for an element wherever it lies: its codes are in row-major order.
        assert odd.stride() != plain.stride()
        state = optimizers[1].state[odd]
        torch.testing.assert_close(state["momentum_buffer"], optimizers[0].state[plain]["momentum_buffer"])
    torch.testing.assert_close(odd, plain, rtol=torch.finfo(dtype).eps, atol=1e-6)


def _laid_out(values: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "holes":
        wide = torch.zeros(*values.shape[:-1], values.shape[-1] * 2, dtype=values.dtype)
        return wide[..., ::2].copy_(values)
    return values.contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------- GradScaler and clipping


def _pair(**options: Any) -> tuple[list[Tensor], SGDSaI]:
    torch.manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(n)) for n in (5, 129)]
    return params, SGDSaI(params, lr=0.05, **options)


@pytest.mark.parametrize("foreach", [False, True])
def test_gradscaler_is_undone_inside_the_update(foreach: bool) -> None:
    (params, optimizer), (plain, reference) = _pair(foreach=foreach), _pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for step in range(6):
        gradients = [torch.randn_like(p) for p in plain]
        loss = sum((p * g).sum() for p, g in zip(params, gradients, strict=True))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if step == 3:  # an overflow: nothing may change
            params[0].grad[2] = float("inf")
            before = [p.clone() for p in params]
        scaler.step(optimizer)
        scaler.update()
        if step == 3:
            assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
            continue
        for p, g in zip(plain, gradients, strict=True):
            p.grad = g
        reference.step()
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q)
    assert not hasattr(optimizer, "found_inf")


def test_calibration_waits_while_gradscaler_overflows() -> None:
    (params, optimizer), (plain, reference) = _pair(scaling="adamw"), _pair(scaling="adamw")
    gradients = [torch.randn_like(p) for p in plain]
    for scale, found_inf in ((2.0**16, 1.0), (2.0**8, 0.0)):
        for p, g in zip(params, gradients, strict=True):
            p.grad = g * scale
        params[1].grad[7] = float("nan") if found_inf else gradients[1][7] * scale
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(found_inf)
        optimizer.step()
        if found_inf:
            assert not any(optimizer.state[p]["scale"] for p in params)
    for p, g in zip(plain, gradients, strict=True):
        p.grad = g
    reference.step()
    for p, q in zip(params, plain, strict=True):
        assert optimizer.state[p]["gsnr"] == reference.state[q]["gsnr"]
        assert torch.equal(p, q)


@pytest.mark.parametrize("foreach", [False, True])
def test_grad_scale_clips_without_a_pass(foreach: bool) -> None:
    (params, optimizer), (plain, reference) = _pair(foreach=foreach), _pair()
    for _ in range(5):
        gradients = [3 * torch.randn_like(p) for p in plain]
        for p, q, g in zip(params, plain, gradients, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        norm = torch.nn.utils.clip_grad_norm_(plain, 1.0)
        reference.step()
        optimizer.grad_scale = (norm / 1.0).clamp(min=1)
        optimizer.step()
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------ choosing a path


def test_fused_on_the_cpu_says_why_not() -> None:
    p = torch.nn.Parameter(torch.randn(3))
    with pytest.raises(ValueError, match=r"fused=True is impossible for .*it is on cpu.*leave it None"):
        SGDSaI([p], fused=True)
    optimizer = SGDSaI([p])
    with pytest.raises(ValueError, match="fused=True is impossible"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.randn(2))], "fused": True})
    assert len(optimizer.param_groups) == 1


def test_the_cpu_is_updated_per_tensor_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("foreach")

    monkeypatch.setattr("hf_sai.kernels.update_foreach", refuse)
    blocks = make_blocks((4,))
    update_blocks(blocks, None, None, **HYPER, stochastic_rounding=False)
    with pytest.raises(AssertionError, match="foreach"):
        update_blocks(blocks, True, None, **HYPER, stochastic_rounding=False)
