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
from kernel_cases import DTYPES, HYPER, MOMENTUM_DTYPES, SHAPES, assert_same, copied, make_blocks, on_cpu
from torch import nn

from hf_sai import SGDSaI, release_gradients
from hf_sai.calibration import INTERVAL, WINDOW
from hf_sai.kernels import update_foreach, update_plain

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning"),
]


def both(before: Any, **changes: Any) -> None:
    """The fused and the foreach path on the device against the plain path on the CPU."""
    from hf_sai.fused import fits_fused, update_fused

    hyper = HYPER._replace(**changes)
    plain = on_cpu(before)
    expected = copied(plain)
    update_plain(expected, hyper)
    for update in (update_fused, update_foreach):
        found = copied(before)
        assert all(map(fits_fused, found))
        update(found, hyper)
        assert_same(on_cpu(found), expected, plain, hyper)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("stochastic", "maximize"), [(False, False), (True, True)])
@pytest.mark.parametrize(
    ("p_dtype", "g_dtype", "m_dtype"),
    list(itertools.product(DTYPES, (torch.float32, torch.bfloat16), MOMENTUM_DTYPES)),
)
def test_every_dtype_and_shape(
    p_dtype: torch.dtype, g_dtype: torch.dtype, m_dtype: torch.dtype | None, stochastic: bool, maximize: bool
) -> None:
    shapes = (*SHAPES, (1000, 1000), (3000, 301))
    before = make_blocks(shapes, p_dtype, g_dtype, m_dtype, stochastic, device="cuda")
    both(before, maximize=maximize, stochastic_rounding=stochastic)


@pytest.mark.parametrize("token_rows", [False, True])
@pytest.mark.parametrize("m_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 1), (1, 3), (130, 130), (3, 9000), (9000, 3), (2, 100, 90), (2, 90, 100), (17, 5, 7, 3)]
)
def test_the_channel_of_every_element(shape: tuple[int, ...], m_dtype: torch.dtype, token_rows: bool) -> None:
    both(make_blocks([shape], m_dtype=m_dtype, device="cuda", factors=token_rows))


@pytest.mark.parametrize("options", [{"weight": 1.0}, {"limit": None}, {"lr": 0.0}, {"weight_decay": 0.0}], ids=str)
def test_options(options: dict[str, Any]) -> None:
    both(make_blocks(device="cuda"), **options)


def test_a_learning_rate_on_the_device() -> None:
    from hf_sai.fused import update_fused

    before = make_blocks(device="cuda")
    found, expected = copied(before), copied(on_cpu(before))
    update_fused(found, HYPER._replace(lr=torch.tensor(0.02, device="cuda")))
    update_plain(expected, HYPER._replace(lr=0.02))
    assert_same(on_cpu(found), expected, on_cpu(before), HYPER._replace(lr=0.02))


def test_five_hundred_blocks() -> None:
    both(make_blocks([(1 + 37 * i,) for i in range(500)], device="cuda"))


def test_blocks_that_share_a_stack() -> None:
    both(make_blocks([(5,), (4, 40), (40, 4)], count=3, device="cuda"))


def test_addresses_that_allow_no_wide_loads() -> None:
    from hf_sai.fused import update_fused

    def moved(many: Any) -> Any:  # by one element: a fresh tensor is aligned
        return [
            b._replace(
                params=[torch.cat([p[:1], p])[1:] for p in b.params],
                grads=[torch.cat([g[:1], g])[1:] for g in b.grads],
                momentum=torch.cat([b.momentum[:, :1], b.momentum], 1)[:, 1:],
            )
            for b in many
        ]

    before = make_blocks([(130,), (9001,)], device="cuda")
    found, expected = moved(before), copied(on_cpu(before))
    assert all(b.params[0].data_ptr() % 16 for b in found)
    update_fused(found, HYPER)
    update_plain(expected, HYPER)
    assert_same(on_cpu(found), expected, on_cpu(before), HYPER)


def test_a_block_with_more_elements_than_an_int32_counts_bytes() -> None:
    from hf_sai.fused import update_fused

    columns = 2**11
    n = 2**31 + columns  # bfloat16 and int8 momentum: 14 GB, so only where there is room
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    (small,) = make_blocks([(n // columns, 1)], torch.bfloat16, torch.bfloat16, torch.int8, device="cuda")
    p = torch.zeros(n // columns, columns, dtype=torch.bfloat16, device="cuda")
    g = torch.zeros_like(p)
    p[-1], g[-1] = 1.0, 2.0
    codes = torch.zeros(1, *p.shape, dtype=torch.int8, device="cuda")
    scales = torch.zeros(n // 128, device="cuda")
    scale = torch.ones(1, p.shape[0], 1, device="cuda")
    scale[0, -1] = 0.5
    block = small._replace(
        params=[p], grads=[g], momentum=codes, momentum_scale=scales, scale=scale, columns=columns, rows=0
    )
    update_fused([block], HYPER._replace(weight=1.0))
    assert (codes[0, -1] == 127).all()
    assert not p[:-1].any()
    expected = torch.full((columns,), 1 - 0.001 - 0.01 * 0.5 * 2, device="cuda")
    torch.testing.assert_close(p[-1].float(), expected, rtol=2**-8, atol=0)


def parameters(dtype: torch.dtype = torch.float32, device: str = "cuda") -> list[nn.Parameter]:
    torch.manual_seed(0)
    shapes = [(300, 40), (40,), (4, 3, 5, 5), (1,), (2, 40, 50), (50, 12)]
    params = [nn.Parameter(torch.randn(s).to(device, dtype)) for s in shapes]
    params[2].data = params[2].data.contiguous(memory_format=torch.channels_last)
    return params


@pytest.mark.parametrize("options", [{}, {"momentum_dtype": "int8"}, {"momentum_dtype": "bfloat16"}, {"momentum": 0.0}])
@pytest.mark.parametrize("scaling", ["adamw", "raw", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_training_equals_the_cpu(dtype: torch.dtype, scaling: str, options: dict[str, Any]) -> None:
    here, there = parameters(dtype), parameters(dtype, "cpu")
    made = {"lr": 1e-3, "scaling": scaling, "stochastic_rounding": True, **options}
    groups = [[{"params": p[:5]}, {"params": p[5:], "token_rows": scaling == "adamw"}] for p in (here, there)]
    optimizers = [SGDSaI(g, **made) for g in groups]
    for _ in range(5):
        for p, q in zip(here, there, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.to("cuda")
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(here, there, strict=True):
        for key in ("gsnr", "scale"):
            found, expected = (o.state[x][key].cpu() for o, x in zip(optimizers, (p, q), strict=True))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        # One level of int8, and one unit of bfloat16, of the largest update in five steps.
        largest = 1e-3 * (10 if scaling == "adamw" else 4 * max(1.0, float(expected.max())))
        level = largest * (1 / 127 + 2**-8) if "momentum_dtype" in options else 0.0
        torch.testing.assert_close(p.cpu(), q, rtol=4 * torch.finfo(dtype).eps, atol=2e-5 + 5 * level)


@pytest.mark.parametrize("foreach", [None, True])
@pytest.mark.parametrize(
    "options", [{}, {"momentum_dtype": "int8"}, {"lr": "tensor"}, {"scaling": "raw"}, {"scaling": "max"}], ids=str
)
def test_no_host_synchronisation_after_calibration(options: dict[str, Any], foreach: bool | None) -> None:
    params = parameters(torch.bfloat16)
    if "lr" in options:
        options = {**options, "lr": torch.tensor(0.01, device="cuda")}
    groups = [{"params": params[:5]}, {"params": params[5:], "token_rows": "scaling" not in options}]
    optimizer = SGDSaI(groups, stochastic_rounding=True, foreach=foreach, **options)
    # Within the window gradients are counted on the host; after it a step measures them and still does not wait.
    calibrating = 2 if "scaling" in options else WINDOW
    for step in range(calibrating + 2 * INTERVAL):
        for p in params:
            p.grad = torch.randn_like(p)
        if step < calibrating:
            optimizer.step()
            continue
        with no_synchronisation():
            optimizer.step()


def test_gradscaler_skips_a_step_that_overflows() -> None:
    params, plain = parameters(), parameters()
    optimizer, reference = SGDSaI(params), SGDSaI(plain)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=1000)
    for step in range(4):
        gradients = [torch.randn_like(p) for p in plain]
        optimizer.zero_grad()
        scaler.scale(sum((p * g).sum() for p, g in zip(params, gradients, strict=True))).backward()
        overflow = step in (0, 2)
        if overflow:
            params[1].grad[3] = float("inf")
        before = [p.detach().clone() for p in params]
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
            assert step or not optimizer.state
            continue
        for p, g in zip(plain, gradients, strict=True):
            p.grad = g
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
        for _ in range(WINDOW):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(WINDOW):
        reference.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    # Fewer replays than steps to the next measurement, which a graph leaves out.
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
    p = nn.Parameter(torch.randn(1 << 12, 1 << 12, device="cuda"))
    p.grad = torch.randn_like(p)
    optimizer = SGDSaI([p])
    for _ in range(WINDOW):
        optimizer.step()
    for _ in range(INTERVAL):  # one of them measures
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
        # A few numbers for each of the 4096 channels.
        assert torch.cuda.max_memory_allocated() - before < 32 * 4 * 4096


def test_calibration_takes_little_memory() -> None:
    p = nn.Parameter(torch.randn(1 << 26, device="cuda"))
    p.grad = torch.randn_like(p)
    optimizer = SGDSaI([p])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    buffer = p.numel() * 4
    # At most eight numbers of 4 bytes for every 8192 elements.
    assert torch.cuda.max_memory_allocated() - before - buffer < 8 * 4 * p.numel() / 8192


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
