"""The paths of the update agree with each other and with the formula in float64."""

import itertools
from typing import Any

import pytest
import torch
from kernel_cases import DTYPES, HYPER, MOMENTUM_DTYPES, SHAPES, assert_same, copied, exact, held_momentum, make_blocks
from torch import Tensor

from hf_sai import SGDSaI, kernels, update
from hf_sai.kernels import _CPU_PIECE, Blocks, is_native, update_foreach, update_plain
from hf_sai.momentum import CODE_BLOCK
from hf_sai.update import update_blocks

COMBINATIONS = list(itertools.product(DTYPES, (torch.float32, torch.bfloat16), MOMENTUM_DTYPES))
VARIANTS = [{}, {"maximize": True}, {"limit": None}, {"weight": 1.0}, {"weight_decay": 0.0}, {"lr": torch.tensor(0.02)}]


def assert_exact(after: list[Blocks], before: list[Blocks], hyper: Any) -> None:
    """Half a unit of the stored dtype, and four roundings of float32 (float64) of numbers no larger than the terms."""
    for b, old in zip(after, before, strict=True):
        for k, terms in enumerate(exact(old, hyper)):
            p = b.params[k]
            wide = torch.float64 if p.dtype == torch.float64 else torch.float32
            assert_rounded_once(p, terms.param, terms.param_size, wide)
            if b.momentum is None:
                continue
            if b.momentum_scale is None:
                assert_rounded_once(b.momentum[k], terms.momentum, terms.momentum_size, wide)
                continue
            level = b.momentum_scale.double().repeat_interleave(CODE_BLOCK)[: p.numel()].view(p.shape)
            assert ((held_momentum(b, k) - terms.momentum).abs() <= level * (1 + 1e-5)).all()


def assert_rounded_once(found: Tensor, value: Tensor, size: Tensor, wide: torch.dtype) -> None:
    limits = torch.finfo(found.dtype)
    half = 0.0 if found.dtype == wide else limits.eps / 2 * (value.abs() + limits.smallest_normal)
    error = (found.double() - value).abs() - half - 4 * torch.finfo(wide).eps * size
    assert error.max() <= 0, error.max()


@pytest.mark.parametrize("token_rows", [False, True])
@pytest.mark.parametrize("path", [update_plain, update_foreach])
@pytest.mark.parametrize(("p_dtype", "g_dtype", "m_dtype"), [*COMBINATIONS, (torch.float64,) * 3])
def test_the_formula_in_every_dtype(path: Any, p_dtype: Any, g_dtype: Any, m_dtype: Any, token_rows: bool) -> None:
    many = make_blocks(SHAPES, p_dtype, g_dtype, m_dtype, factors=token_rows)
    before = copied(many)
    path(many, HYPER)
    assert_exact(many, before, HYPER)


@pytest.mark.parametrize("path", [update_plain, update_foreach])
@pytest.mark.parametrize(("count", "token_rows"), [(1, False), (1, True), (3, False)])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_option(path: Any, variant: dict[str, Any], count: int, token_rows: bool) -> None:
    hyper = HYPER._replace(**variant)
    many = make_blocks(count=count, factors=token_rows)
    before = copied(many)
    path(many, hyper)
    assert_exact(many, before, hyper)
    for b, old in zip(many, before, strict=True):
        assert all(torch.equal(g, h) for g, h in zip(b.grads, old.grads, strict=True)), "gradients are not written to"
        assert torch.equal(b.scale, old.scale)


@pytest.mark.parametrize("token_rows", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(2 * _CPU_PIECE + 3,), (3, _CPU_PIECE // 2 + 1), (_CPU_PIECE // 2 + 1, 3)])
def test_a_large_block_on_the_cpu_is_updated_piece_by_piece(
    shape: tuple[int, ...], weight_decay: float, token_rows: bool
) -> None:
    hyper = HYPER._replace(weight_decay=weight_decay)
    many = make_blocks([shape], factors=token_rows)
    before = copied(many)
    update_plain(many, hyper)
    assert_exact(many, before, hyper)


@pytest.mark.parametrize("m_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(3000, 500), (500, 3000)])
def test_a_large_matrix_in_fewer_bits_is_updated_piece_by_piece(shape: tuple[int, ...], m_dtype: torch.dtype) -> None:
    hyper = HYPER._replace(stochastic_rounding=True)
    whole = make_blocks([shape], torch.bfloat16, torch.bfloat16, m_dtype, stochastic_rounding=True)
    assert whole[0].params[0].numel() > _CPU_PIECE
    pieces = copied(whole)
    update_plain(pieces, hyper)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_CPU_PIECE", 1 << 30)
        update_plain(whole, hyper)
    assert torch.equal(pieces[0].params[0], whole[0].params[0])
    assert torch.equal(pieces[0].momentum, whole[0].momentum)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(("p_dtype", "g_dtype", "m_dtype"), COMBINATIONS)
def test_foreach_equals_plain(p_dtype: Any, g_dtype: Any, m_dtype: Any, stochastic: bool) -> None:
    hyper = HYPER._replace(stochastic_rounding=stochastic)
    before = make_blocks(SHAPES, p_dtype, g_dtype, m_dtype, stochastic)
    one, other = copied(before), copied(before)
    update_plain(one, hyper)
    update_foreach(other, hyper)
    assert_same(other, one, before, hyper)


# --------------------------------------------------------------------------- torch's own fused kernel


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
@pytest.mark.parametrize("shape", [(1_000_000,), (1000, 900), (900, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchs_fused_kernel_is_the_formula(
    dtype: torch.dtype, shape: tuple[int, ...], maximize: bool, torch_fused_calls: list[Tensor]
) -> None:
    hyper = HYPER._replace(weight_decay=0.0, maximize=maximize)
    many = make_blocks([shape], dtype, dtype, dtype)
    before = copied(many)
    update_plain(many, hyper)
    assert torch_fused_calls
    assert_exact(many, before, hyper)


@pytest.mark.parametrize(
    ("shape", "dtypes", "options"),
    [
        ((1000, 900), (torch.float32,) * 3, {"weight_decay": 0.1}),
        ((1000, 900), (torch.float32,) * 3, {"weight": 1.0}),
        ((1000, 900), (torch.float32, torch.float32, None), {}),
        ((1000, 900), (torch.float32, torch.float32, torch.bfloat16), {}),
        ((1000, 900), (torch.float32, torch.bfloat16, torch.float32), {}),
        ((1000, 900), (torch.bfloat16,) * 3, {}),
        ((10, 9), (torch.float32,) * 3, {}),
    ],
)
def test_what_torchs_fused_kernel_is_not_for(
    shape: tuple[int, ...], dtypes: Any, options: dict[str, Any], torch_fused_calls: list[Tensor]
) -> None:
    hyper = HYPER._replace(**{"weight_decay": 0.0, **options})
    many = make_blocks([shape], *dtypes)
    before = copied(many)
    update_plain(many, hyper)
    assert not torch_fused_calls
    assert_exact(many, before, hyper)


@pytest.mark.parametrize("shape", [(1_000_000,), (1000, 900)])
def test_a_torch_without_that_kernel(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_torch_fused_sgd", None)
    hyper = HYPER._replace(weight_decay=0.0)
    many = make_blocks([shape])
    before = copied(many)
    update_plain(many, hyper)
    assert_exact(many, before, hyper)


# --------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("momentum_dtype", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "holes", "gradient differs"])
def test_memory_formats(layout: str, foreach: bool, dtype: torch.dtype, momentum_dtype: str | None) -> None:
    """A parameter in any memory format goes where its contiguous twin goes."""
    values = torch.randn(6, 8, 3, 3)
    plain = torch.nn.Parameter(values.to(dtype))
    odd = torch.nn.Parameter(laid_out(values.to(dtype), layout))
    optimizers = [SGDSaI([p], lr=0.01, momentum_dtype=momentum_dtype, foreach=foreach) for p in (plain, odd)]
    for _ in range(4):
        gradient = torch.randn_like(values).to(dtype)
        plain.grad = gradient
        odd.grad = gradient.clone(memory_format=torch.preserve_format)
        if layout != "gradient differs":
            odd.grad = laid_out(gradient, layout)
        for optimizer in optimizers:
            optimizer.step()
    if momentum_dtype == "int8":
        # int8 has the same random bits for an element wherever it lies: its codes are in row-major order.
        assert odd.stride() != plain.stride()
        state = optimizers[1].state[odd]
        torch.testing.assert_close(state["momentum_buffer"], optimizers[0].state[plain]["momentum_buffer"])
    torch.testing.assert_close(odd, plain, rtol=torch.finfo(dtype).eps, atol=1e-6)


def laid_out(values: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "holes":
        wide = torch.zeros(*values.shape[:-1], values.shape[-1] * 2, dtype=values.dtype)
        return wide[..., ::2].copy_(values)
    return values.contiguous(memory_format=torch.channels_last)


# --------------------------------------------------------------------------- choosing a path


def test_fused_on_the_cpu_says_why_not() -> None:
    p = torch.nn.Parameter(torch.randn(3))
    with pytest.raises(ValueError, match=r"fused=True is impossible for .*it is on cpu.*set it to None"):
        SGDSaI([p], fused=True)
    optimizer = SGDSaI([p])
    with pytest.raises(ValueError, match="fused=True is impossible"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.randn(2))], "fused": True})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("foreach", "expected"), [(None, "plain"), (False, "plain"), (True, "foreach")])
def test_the_cpu_is_updated_by_the_plain_path_by_default(
    foreach: bool | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    monkeypatch.setattr(update, "update_foreach", lambda *_: called.append("foreach"))
    monkeypatch.setattr(update, "update_plain", lambda *_: called.append("plain"))
    update_blocks(make_blocks([(4,)]), HYPER, foreach, None)
    assert called == [expected]


def test_what_is_native() -> None:
    """Everything else is computed in float32 and rounded once."""
    assert all(map(is_native, make_blocks()))
    for dtypes in ((torch.bfloat16,) * 3, (torch.float32, torch.bfloat16, torch.float32)):
        assert not any(map(is_native, make_blocks(SHAPES, *dtypes)))
    assert not any(map(is_native, make_blocks(m_dtype=torch.bfloat16)))
    assert not any(map(is_native, make_blocks(stochastic_rounding=True)))
