"""The fused path on a GPU: right, without host synchronisation, capturable, and gradient release frees memory.

Run with `python -m pytest -m cuda tests/cuda`; one test needs 24 GB of GPU memory and is skipped where there is less.
"""

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from kernel_cases import DTYPES, HYPER, MOMENTUM_DTYPES, SIZES, assert_same, copied, make_blocks
from torch import nn

from hf_sai import SGDSaI
from hf_sai.kernels import update_single_tensor
from hf_sai.release import release_gradients

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning"),
]


def both(before: Any, **hyper: Any) -> None:
    from hf_sai.fused import update_fused

    if before[0].momentum_buffer is None:
        hyper["momentum"] = 0.0
    fused, plain = copied(before), copied(before)
    update_fused(fused, **hyper)
    update_single_tensor(plain, **hyper)
    assert_same([_on_cpu(b) for b in fused], [_on_cpu(b) for b in plain], [_on_cpu(b) for b in before])


def _on_cpu(block: Any) -> Any:
    return type(block)(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in block))


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(
    ("p_dtype", "g_dtype", "m_dtype"),
    list(itertools.product(DTYPES, (torch.float32, torch.bfloat16), MOMENTUM_DTYPES)),
)
def test_every_dtype_and_size(
    p_dtype: torch.dtype, g_dtype: torch.dtype, m_dtype: torch.dtype | None, stochastic: bool, maximize: bool
) -> None:
    before = make_blocks((*SIZES, 1_000_000), p_dtype, g_dtype, m_dtype, stochastic, device="cuda")
    both(before, **{**HYPER, "maximize": maximize}, stochastic_rounding=stochastic)


def test_five_hundred_blocks() -> None:
    both(make_blocks([1 + 37 * i for i in range(500)], device="cuda"), **HYPER, stochastic_rounding=False)


def test_addresses_that_allow_no_wide_loads() -> None:
    before = make_blocks((130, 9001), device="cuda")
    before = [b._replace(param=b.param[1:], grad=b.grad[1:], momentum_buffer=b.momentum_buffer[1:]) for b in before]
    both(before, **HYPER, stochastic_rounding=False)


def test_a_block_with_more_elements_than_an_int32_counts_bytes() -> None:
    from hf_sai.fused import update_fused

    n = 2**31 + 8  # bfloat16 and int8 momentum: 14 GB, so only where there is room
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    (small,) = make_blocks((8,), torch.bfloat16, torch.bfloat16, torch.int8, device="cuda")
    p = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    g = torch.zeros_like(p)
    p[-8:], g[-8:] = 1.0, 2.0
    codes = torch.zeros(n, dtype=torch.int8, device="cuda")
    scales = torch.zeros(-(-n // 128), device="cuda")
    update_fused([small._replace(param=p, grad=g, momentum_buffer=codes, momentum_scale=scales)],
                 **{**HYPER, "momentum": 0.0}, stochastic_rounding=False)  # fmt: skip
    assert (codes[-8:] == 127).all()
    assert not p[:-8].any()
    torch.testing.assert_close(
        p[-8:].float(), torch.full((8,), 1 - 0.001 - 0.01 * 0.5 * 2, device="cuda"), rtol=0.01, atol=0
    )


def parameters(dtype: torch.dtype = torch.float32, device: str = "cuda") -> list[nn.Parameter]:
    torch.manual_seed(0)
    shapes = [(300, 40), (40,), (4, 3, 5, 5), (1,), (128, 128)]
    params = [nn.Parameter(torch.randn(s).to(device, dtype)) for s in shapes]
    params[2].data = params[2].data.contiguous(memory_format=torch.channels_last)
    return params


@pytest.mark.parametrize("options", [{}, {"momentum_dtype": "int8"}, {"momentum_dtype": "bfloat16"}, {"momentum": 0.0}])
@pytest.mark.parametrize("scaling", ["raw", "max", "adamw", "floor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_training_equals_the_cpu(dtype: torch.dtype, scaling: str, options: dict[str, Any]) -> None:
    here, there = parameters(dtype), parameters(dtype, "cpu")
    optimizers = [SGDSaI(p, scaling=scaling, stochastic_rounding=True, **options) for p in (here, there)]
    for _ in range(5):
        for p, q in zip(here, there, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.to("cuda")
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(here, there, strict=True):
        gsnrs = [o.state[x]["gsnr"].cpu() for o, x in zip(optimizers, (p, q), strict=True)]
        torch.testing.assert_close(*gsnrs, rtol=1e-5, atol=0)
        level = 0.02 if "momentum_dtype" in options else 0.0
        torch.testing.assert_close(p.cpu(), q, rtol=4 * torch.finfo(dtype).eps, atol=1e-5 + level)


@pytest.mark.parametrize(
    "options", [{}, {"momentum_dtype": "int8"}, {"lr": "tensor"}, {"scaling": "floor", "clip_threshold": 0.1}]
)
def test_no_host_synchronisation_after_calibration(options: dict[str, Any]) -> None:
    params = parameters(torch.bfloat16)
    options = {**options, "lr": torch.tensor(0.01, device="cuda")} if "lr" in options else options
    optimizer = SGDSaI(params, stochastic_rounding=True, **options)
    for step in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        if step < 2:
            optimizer.step()
            continue
        with no_synchronisation():
            optimizer.step()


def test_gradscaler_without_host_synchronisation() -> None:
    params, plain = parameters(), parameters()
    optimizer, reference = SGDSaI(params), SGDSaI(plain)
    for step in range(4):
        for p, q in zip(params, plain, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad * 1024
        overflow = step == 2
        before = [p.clone() for p in params]
        optimizer.grad_scale = torch.tensor(1024.0, device="cuda")
        optimizer.found_inf = torch.tensor(float(overflow), device="cuda")
        if step:
            with no_synchronisation():
                optimizer.step()
        else:
            optimizer.step()
        if overflow:
            assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        else:
            reference.step()
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("momentum_dtype", [None, "int8"])
def test_cuda_graph(momentum_dtype: str | None) -> None:
    """A captured step replayed goes where the eager one goes, and follows the learning rate."""
    params, plain = parameters(torch.bfloat16), parameters(torch.bfloat16)
    lr = torch.tensor(0.01, device="cuda")
    made = {"momentum_dtype": momentum_dtype, "stochastic_rounding": True, "lr": lr}
    optimizer, reference = SGDSaI(params, **made), SGDSaI(plain, **made)
    for p, q in zip(params, plain, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        reference.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for value in (0.01, 0.02, 0.0, 0.03):
        lr.fill_(value)
        for p, q in zip(params, plain, strict=True):
            p.grad.normal_()
            q.grad.copy_(p.grad)
        graph.replay()
        reference.step()
        # Tables made later must not disturb what the graph reads.
        other = nn.Parameter(torch.randn(7, device="cuda"))
        other.grad = torch.randn_like(other)
        SGDSaI([other]).step()
    for p, q in zip(params, plain, strict=True):
        assert torch.equal(p, q)


def test_capture_before_calibration_says_what_to_do() -> None:
    p = nn.Parameter(torch.randn(5, device="cuda"))
    p.grad = torch.randn_like(p)
    optimizer = SGDSaI([p])
    with (
        pytest.raises(RuntimeError, match="cannot capture; run steps before"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()


def test_a_step_allocates_nothing_of_a_tensors_size() -> None:
    p = nn.Parameter(torch.randn(1 << 24, device="cuda"))
    p.grad = torch.randn_like(p)
    optimizer = SGDSaI([p])
    for _ in range(2):
        optimizer.step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < 1 << 16


def test_calibration_takes_little_memory() -> None:
    p = nn.Parameter(torch.randn(1 << 26, device="cuda"))
    p.grad = torch.randn_like(p)
    optimizer = SGDSaI([p])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    buffer = p.numel() * 4
    # Two numbers for every 8192 elements.
    assert torch.cuda.max_memory_allocated() - before - buffer < p.numel() / 512


def test_release_frees_gradients() -> None:
    layers = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(8))).to("cuda", torch.bfloat16)
    optimizer = SGDSaI(layers.parameters(), momentum_dtype="int8")
    release_gradients(optimizer, layers)
    x = torch.randn(4, 2048, device="cuda", dtype=torch.bfloat16)
    peak = 0
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        layers(x).square().mean().backward()
        optimizer.step()
        peak = torch.cuda.max_memory_allocated() - before
    one = 2048 * 2048 * 2
    assert peak < 3 * one, f"{peak / one:.1f} gradients at once, of 8"


def test_mixed_devices_and_dtypes_in_one_group() -> None:
    params = [*parameters(), *parameters(torch.bfloat16), *parameters(device="cpu"), *parameters(torch.float64)]
    twins = [nn.Parameter(p.detach().cpu().clone()) for p in params]
    one, other = SGDSaI(params), SGDSaI(twins, foreach=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            for p, q in zip(params, twins, strict=True):
                q.grad = torch.randn_like(q)
                p.grad = q.grad.to(p.device)
            one.step()
            other.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=4 * max(torch.finfo(p.dtype).eps, 1e-7), atol=1e-5)
