"""The statistics and the scales: against float64, invariants, and every edge case of a first gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_sai.gsnr import BlockStatistics, measure, measure_stacked, paper_scales

EPS = 1e-8
# Two passes in float32 whose sums are pairwise: a few roundings of the sums and of each difference.
RTOL = 16 * torch.finfo(torch.float32).eps

gradients = st.lists(
    st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3), min_size=2, max_size=300
).filter(lambda values: len({abs(v) for v in values}) > 1)


def one(grad: Tensor, eps: float = EPS) -> BlockStatistics:
    return measure([torch.empty_like(grad)], [grad], [eps])[0]


def reference(grad: Tensor, eps: float = EPS) -> float:
    wide = grad.double()
    return (wide.norm() / (wide.std() + eps)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2,), (3, 1, 5), (128, 257), (1_000_003,)])
def test_equals_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    grad = (torch.randn(shape) + 0.5).to(dtype)
    found = one(grad)
    assert found.kind == "usable"
    assert found.gsnr == pytest.approx(reference(grad), rel=RTOL)
    assert found.norm == pytest.approx(grad.double().norm().item(), rel=RTOL)


def test_a_large_mean_cancels_no_digits() -> None:
    """One pass (E[g^2] - E[g]^2) in float32 would lose all digits of a std of 1e-3 beside a mean of 10."""
    grad = 10 + 1e-3 * torch.randn(100_000)
    assert one(grad).gsnr == pytest.approx(reference(grad), rel=1e-4)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-22, 1e22, 1e37])
def test_magnitudes_whose_squares_leave_float32(magnitude: float) -> None:
    grad = magnitude * torch.randn(1000)
    assert one(grad, eps=0.0).gsnr == pytest.approx(reference(grad, eps=0.0), rel=RTOL)


@given(values=gradients, exponent=st.integers(-6, 6))
@settings(deadline=None)
def test_invariant_under_scaling_of_the_gradient(values: list[float], exponent: int) -> None:
    grad = torch.tensor(values)
    assert one(10.0**exponent * grad, eps=0.0).gsnr == pytest.approx(one(grad, eps=0.0).gsnr, rel=1e-4)


@given(values=gradients, exponent=st.integers(-6, 6))
@settings(deadline=None)
def test_eps_shifts_the_standard_deviation_only(values: list[float], exponent: int) -> None:
    """With eps, the invariance holds up to eps / std: exactly norm / (std + eps) at every scale."""
    found = one(10.0**exponent * torch.tensor(values))
    if found.kind == "usable":
        assert found.gsnr == pytest.approx(found.norm / (found.std + EPS), rel=1e-12)


@given(values=gradients, seed=st.integers(0, 99))
@settings(deadline=None)
def test_invariant_under_permutation(values: list[float], seed: int) -> None:
    grad = torch.tensor(values)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    assert one(grad[order]).gsnr == pytest.approx(one(grad).gsnr, rel=1e-4)


@pytest.mark.parametrize(
    ("grad", "kind", "gsnr"),
    [
        (torch.tensor([3.0]), "usable", 1.0),
        (torch.tensor(-2.0), "usable", 1.0),
        (torch.full((9,), 0.25), "constant", 3.0),
        (torch.full((16,), 0.1, dtype=torch.bfloat16), "constant", 4.0),
        (torch.full((1_000_000,), 0.1), "constant", 1000.0),
        (torch.zeros(5), "zero", 0.0),
        (torch.tensor([-0.0, 0.0]), "zero", 0.0),
        (torch.tensor([1.0, math.nan]), "nonfinite", 0.0),
        (torch.tensor([1.0, math.inf, -math.inf]), "nonfinite", 0.0),
        (torch.tensor([-math.inf] * 3), "nonfinite", 0.0),
        (torch.empty(0), "zero", 0.0),
    ],
    ids=str,
)
def test_edge_cases(grad: Tensor, kind: str, gsnr: float) -> None:
    found = one(grad)
    assert (found.kind, found.gsnr) == (kind, gsnr)


@pytest.mark.parametrize(
    "strided",
    [
        torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(40, 30).t(),
        torch.randn(40, 30)[:, ::3],
        torch.randn(30).expand(4, 30),
    ],
    ids=["channels_last", "transposed", "holes", "expanded"],
)
def test_strides_do_not_matter(strided: Tensor) -> None:
    assert one(strided).gsnr == pytest.approx(one(strided.contiguous()).gsnr, rel=RTOL)


def test_blocks_do_not_disturb_each_other() -> None:
    grads = [torch.randn(50), torch.zeros(3), torch.tensor([math.nan, 1.0]), 1e-25 * torch.randn(7), torch.ones(4)]
    together = measure(grads, grads, [0.0] * len(grads))
    assert [x.gsnr for x in together] == [one(g, eps=0.0).gsnr for g in grads]


def test_a_missing_gradient_is_no_gradient() -> None:
    assert measure([torch.ones(3)], [None], [EPS])[0].kind == "zero"


def test_statistics_change_no_gradient() -> None:
    grad = torch.randn(1000)
    before = grad.clone()
    measure([grad], [grad], [EPS])
    assert torch.equal(grad, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (2,), (3, 1, 5), (128, 257)])
def test_a_stack_is_measured_as_its_blocks_are(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    grads = [torch.randn(shape), torch.zeros(shape), torch.full(shape, 0.1), torch.full(shape, math.nan)]
    grads += [1e-20 * torch.randn(shape), torch.full(shape, math.inf), 100 + torch.randn(shape)]
    stacked = torch.stack(grads).to(dtype)
    for found, g in zip(measure_stacked(stacked, EPS), stacked, strict=True):
        expected = one(g)
        assert found.kind == expected.kind
        assert found.gsnr == pytest.approx(expected.gsnr, rel=RTOL)
        assert found.norm == pytest.approx(expected.norm, rel=RTOL, nan_ok=True)


def test_raw_scales_are_the_gsnrs() -> None:
    assert paper_scales([3.0, 50.0], "raw") == [3.0, 50.0]


def test_max_scales_divide_by_the_largest_so_far() -> None:
    assert paper_scales([3.0, 50.0], "max") == [3.0 / 50.0, 1.0]
    assert paper_scales([3.0], "max", largest=50.0) == [3.0 / 50.0]
    assert paper_scales([50.0], "max", largest=3.0) == [1.0]
