"""SGDSaI as an optimizer: calibration over time, groups, state, saving, and what it refuses."""

import copy
import io
import logging
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from reference import scale_of_elements
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_sai import SGDSaI
from hf_sai.calibration import INTERVAL, LIMIT, WINDOW

SCALINGS = ("adamw", "raw", "max")


def block(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape).to(dtype))


def step(optimizer: SGDSaI, *gradients: Tensor | None) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, g in zip(params, gradients, strict=True):
        p.grad = None if g is None else g.to(p.dtype)
    optimizer.step()


def gsnr(optimizer: SGDSaI, p: Tensor) -> float:
    return optimizer.state[p]["gsnr"].item()


# ------------------------------------------------------------------ calibration


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_block_is_calibrated_at_its_first_nonzero_gradient(scaling: str) -> None:
    a, b = block(6), block(4)
    optimizer = SGDSaI([a, b], lr=0.1, weight_decay=0.0, scaling=scaling)
    before = a.detach().clone()
    step(optimizer, torch.zeros(6), torch.randn(4))
    assert torch.equal(a, before)
    assert gsnr(optimizer, a) == 0
    first = torch.randn(6)
    step(optimizer, first, torch.randn(4))
    assert gsnr(optimizer, a) == pytest.approx((first.norm() / first.std()).item(), rel=1e-5)
    scaled = optimizer.state[a]["scale"] * first
    if scaling == "adamw":
        scaled = scaled.clamp(-LIMIT, LIMIT)
    torch.testing.assert_close(optimizer.state[a]["momentum_buffer"], scaled)
    torch.testing.assert_close(a.detach(), before - 0.1 * scaled)


def test_scales_are_one_over_the_mean_rms_of_each_channel_in_the_window() -> None:
    """A gradient without an element of a channel's says nothing about it; after the window one in ten counts."""
    p = block(3, 5)
    optimizer = SGDSaI([p], lr=0.0)
    measured: list[Tensor] = []
    for i in range(WINDOW + INTERVAL):
        gradient = torch.randn(3, 5) * (1 + i)
        if i % 3 == 0:
            gradient[:, 1] = 0
        step(optimizer, gradient)
        if i < WINDOW or (i + 1) % INTERVAL == 0:
            measured.append(gradient.double().square().mean(0).sqrt())
        # Each measurement counts as one of the gradients so far, of at most WINDOW.
        mean = measured[0]
        for n, rms in enumerate(measured[1:], 2):
            new = mean + (rms - mean) / min(n, WINDOW)
            mean = torch.where(rms > 0, torch.where(mean > 0, new, rms), mean)
        expected = torch.where(mean > 0, 1 / (mean + 1e-8), 0.0)
        torch.testing.assert_close(optimizer.state[p]["column_scale"][0].double(), expected, rtol=1e-5, atol=0)
    assert optimizer.state[p]["calibration_step"] == WINDOW


def test_the_scale_of_a_token_counts_the_steps_without_it() -> None:
    p = block(4, 3)
    optimizer = SGDSaI([{"params": [p], "token_rows": True}], lr=0.0)
    rms = [torch.zeros(4, 1, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)]
    for i in range(WINDOW):
        gradient = torch.randn(4, 3) * torch.tensor([1.0, 10.0, 0.1])
        gradient[1], gradient[2] = 0, gradient[2] * (i % 4 == 1)
        step(optimizer, gradient)
        for dim in (1, 0):
            rms[1 - dim] += gradient.double().square().mean(dim, keepdim=True).sqrt() / WINDOW
    for key, mean in zip(("scale", "column_scale"), rms, strict=True):
        expected = 1 / (mean + 1e-8)
        torch.testing.assert_close(optimizer.state[p][key].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("shape", [(1500, 900), (900, 1500), (7, 5)])
def test_an_element_of_a_token_row_is_scaled_by_its_row_and_its_column(shape: tuple[int, ...], foreach: bool) -> None:
    """As Adafactor's second moment: the row's times the column's over the mean of all."""
    p = nn.Parameter(torch.zeros(shape))
    group = {"params": [p], "token_rows": True}
    optimizer = SGDSaI([group], lr=1.0, momentum=0.0, weight_decay=0.0, foreach=foreach)
    gradient = torch.randn(shape) * (0.1 + torch.rand(shape[1])) * (0.1 + torch.rand(shape[0], 1))
    step(optimizer, gradient)
    v = gradient.double().square()
    expected = gradient.double() / (v.mean(1, keepdim=True) * v.mean(0, keepdim=True) / v.mean()).sqrt()
    torch.testing.assert_close(p.detach().double(), -expected.clamp(-30, 30), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("token_rows", "limit"), [(False, 2.0), (True, 30.0)])
def test_an_update_has_a_limit_in_learning_rates(token_rows: bool, limit: float) -> None:
    """Also where a gradient outgrows its calibration by any factor."""
    p = nn.Parameter(torch.zeros(5, 4))
    group = {"params": [p], "token_rows": token_rows}
    optimizer = SGDSaI([group], lr=0.1, momentum=0.0, weight_decay=0.0)
    for _ in range(WINDOW):
        step(optimizer, torch.ones(5, 4))
    for factor in (1.5, 1e3, 1e20, 3e38):
        before = p.detach().clone()
        step(optimizer, factor * torch.ones(5, 4))
        torch.testing.assert_close(before - p.detach(), torch.full((5, 4), 0.1 * min(limit, factor)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scaling", ["raw", "max"])
def test_under_the_papers_scalings_a_calibrated_block_keeps_its_scale(scaling: str) -> None:
    a = block(6)
    optimizer = SGDSaI([a], scaling=scaling)
    step(optimizer, torch.randn(6))
    found = {key: optimizer.state[a][key].clone() for key in ("gsnr", "scale", "calibration_step")}
    for gradient in (torch.randn(6), torch.zeros(6), *(1e6 * torch.randn(6) for _ in range(INTERVAL))):
        step(optimizer, gradient)
    assert all(torch.equal(optimizer.state[a][key], value) for key, value in found.items())


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_zero_gradient_decays_an_uncalibrated_block_as_adamw_does(scaling: str) -> None:
    a = block(6)
    expected = (1 - 0.1 * 0.5) * a.detach()
    step(SGDSaI([a], lr=0.1, weight_decay=0.5, scaling=scaling), torch.zeros(6))
    torch.testing.assert_close(a.detach(), expected)


def test_late_gradients_and_late_groups() -> None:
    a, b, c = block(6), block(4), block(3)
    optimizer = SGDSaI([a, b], scaling="max")
    step(optimizer, torch.randn(6), None)
    assert b not in optimizer.state
    optimizer.add_param_group({"params": [c], "lr": 0.5})
    step(optimizer, torch.randn(6), torch.tensor([1.0, 1.0, 1.0, 1.01]), torch.randn(3))
    # b's g-SNR is about 230, the largest by now; c shares its step.
    assert optimizer.state[b]["scale"].item() == 1.0
    assert optimizer.state[c]["scale"].item() == pytest.approx(gsnr(optimizer, c) / gsnr(optimizer, b))
    assert optimizer.state[a]["scale"].item() == 1.0


@pytest.mark.parametrize("shape", [(300,), (20, 15)])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("momentum_dtype", [None, "int8"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_how_momentum_begins(scaling: str, momentum_dtype: str | None, foreach: bool, shape: tuple[int, ...]) -> None:
    """adamw: the mean of the scaled gradients with weights mu^(t-k); the paper's: the first one, then an average."""
    generator = torch.Generator().manual_seed(3)
    gradients = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    p = nn.Parameter(start.clone())
    options = {"lr": 0.1, "weight_decay": 0.1, "scaling": scaling, "foreach": foreach}
    optimizer = SGDSaI([p], **options, momentum_dtype=momentum_dtype)
    expected, scaled, largest = start.clone(), [], 0.0
    for t, g in enumerate(gradients, 1):
        step(optimizer, g)
        scaled.append(scale_of_elements(optimizer.state[p]) * g)
        if scaling == "adamw":
            scaled[-1].clamp_(-LIMIT, LIMIT)
            weights = [0.9 ** (t - k) for k in range(1, t + 1)]
        else:
            weights = [0.9 ** (t - 1), *(0.1 * 0.9 ** (t - k) for k in range(2, t + 1))]
        m = sum(w * u for w, u in zip(weights, scaled, strict=True)) / sum(weights)
        expected = (1 - 0.1 * 0.1) * expected - 0.1 * m
        largest = max(largest, m.abs().max().item())
    # Scales are float32; int8 keeps m to 1/127 of the largest of 128 elements, each time it is written.
    tolerance = 0.1 * largest * 4 * (2**-23 if momentum_dtype is None else 1 / 127)
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=tolerance)


# ------------------------------------------------------------------ what a first gradient can be


def test_nonfinite_first_gradient_leaves_its_block_alone_and_warns_once() -> None:
    a, b = block(3), block(4)
    optimizer = SGDSaI([("a.weight", a), ("b.weight", b)], weight_decay=0.1)
    before = a.detach().clone()
    with pytest.warns(UserWarning, match=r"a\.weight has NaN or infinite elements"):
        step(optimizer, torch.tensor([1.0, math.nan, 2.0]), torch.randn(4))
    step(optimizer, torch.tensor([1.0, math.inf, 2.0]), torch.randn(4))
    assert torch.equal(a, before)
    assert gsnr(optimizer, b) > 0
    step(optimizer, torch.randn(3), torch.randn(4))
    assert gsnr(optimizer, a) > 0
    assert not torch.equal(a, before)
    assert a.isfinite().all()


def test_constant_gradient_is_named_once() -> None:
    optimizer = SGDSaI([("bias", block(4)), ("other", block(9))], scaling="raw")
    with pytest.warns(UserWarning, match=r"bias \(and 1 more\) has a constant first gradient"):
        step(optimizer, torch.ones(4), torch.ones(9))
    assert [s["gsnr"].item() for s in optimizer.state.values()] == [2.0, 3.0]


@pytest.mark.parametrize(("scaling", "expected"), [("adamw", 0.9), ("raw", 0.95), ("max", 0.95)])
def test_a_one_element_block(scaling: str, expected: float) -> None:
    """Its standard deviation says nothing; in AdamW's units it moves by the learning rate."""
    a = nn.Parameter(torch.tensor(1.0))
    optimizer = SGDSaI([a], lr=0.1, weight_decay=0.0, scaling=scaling)
    step(optimizer, torch.tensor(0.5))
    assert a.item() == pytest.approx(expected)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_step_of_zero_gradients_and_learning_rate_does_not_count(scaling: str) -> None:
    """The dummy step of torch.distributed.checkpoint, before any real one."""
    a, b = block(6, 3), block(6, 3)
    b.data.copy_(a.data)
    before = a.detach().clone()
    optimizer, other = (SGDSaI([p], scaling=scaling) for p in (a, b))
    for group in optimizer.param_groups:
        lr, group["lr"] = group["lr"], 0.0
    step(optimizer, torch.zeros(6, 3))
    optimizer.param_groups[0]["lr"] = lr
    assert torch.equal(a, before)
    assert all(not value.any() for value in optimizer.state[a].values())
    for _ in range(INTERVAL + 2):
        gradient = torch.randn(6, 3)
        step(optimizer, gradient)
        step(other, gradient)
    assert torch.equal(a, b)
    for name, value in optimizer.state[a].items():
        assert torch.equal(value, other.state[b][name]), name


def test_one_log_line_at_calibration(capsys: pytest.CaptureFixture[str]) -> None:
    import transformers  # noqa: F401  (its logger is used where the library is loaded)

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.hf_sai")
    a = block(6)
    optimizer = SGDSaI([a, block(5)])
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        for _ in range(3):
            step(optimizer, torch.randn(6), torch.randn(5))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    (message,) = messages
    values = sorted(state["gsnr"].item() for state in optimizer.state.values())
    assert message == f"SGDSaI calibrates 2 blocks at step 1: g-SNR from {values[0]:.4g} to {values[1]:.4g}"
    assert capsys.readouterr().out == ""


class _HostReads(TorchDispatchMode):
    """Counts the operators that make a CUDA stream wait for the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("scaling", [*SCALINGS, "token rows"])
def test_no_host_synchronisation_after_calibration(scaling: str, foreach: bool) -> None:
    """Under adamw after the window, also in the steps that measure."""
    group = {"token_rows": True} if scaling == "token rows" else {"scaling": scaling}
    optimizer = SGDSaI([{"params": [block(6), block(5, 3)], **group}], foreach=foreach)
    for _ in range(WINDOW if scaling == "adamw" else 1):
        step(optimizer, torch.randn(6), torch.randn(5, 3))
    with _HostReads() as reads:
        for _ in range(2 * INTERVAL):
            step(optimizer, torch.randn(6), torch.randn(5, 3))
    assert reads.count == 0


# ------------------------------------------------------------------ groups and ways of calling


def test_groups_have_their_own_settings() -> None:
    a, b, c = block(6), block(6), block(6)
    optimizer = SGDSaI(
        [
            {"params": [a], "lr": 0.0},
            {"params": []},
            {"params": [b], "momentum": 0.0, "scaling": "max"},
            {"params": [c], "scaling": "raw"},
        ],
        lr=0.1,
    )
    before = a.detach().clone()
    for _ in range(3):
        step(optimizer, torch.randn(6), torch.randn(6), torch.randn(6))
    assert torch.equal(a, before)
    assert "momentum_buffer" not in optimizer.state[b]
    assert optimizer.state[b]["scale"].item() == 1.0
    assert optimizer.state[c]["scale"].item() == gsnr(optimizer, c)


def test_zero_size_parameters_are_left_alone() -> None:
    a, empty = block(6), block(0, 4)
    optimizer = SGDSaI([a, empty])
    step(optimizer, torch.randn(6), torch.empty(0, 4))
    assert list(optimizer.state) == [a]


def test_maximize_is_minimize_of_the_negated_gradient() -> None:
    for momentum in (0.9, 0.0):
        a = block(6)
        b = copy.deepcopy(a)
        up, down = SGDSaI([a], maximize=True, momentum=momentum), SGDSaI([b], momentum=momentum)
        for _ in range(5):
            gradient = torch.randn(6)
            step(up, gradient)
            step(down, -gradient)
        torch.testing.assert_close(a, b)


def test_closure_is_called_once_with_gradients_enabled() -> None:
    a = block(6)
    optimizer = SGDSaI([a])
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (a**2).sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == calls[0]
    assert len(calls) == 1


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensor_lr_equals_float_lr(dtype: torch.dtype, foreach: bool) -> None:
    a = block(5, 4, dtype=dtype)
    b = copy.deepcopy(a)
    plain, tensor = SGDSaI([a], lr=0.01, foreach=foreach), SGDSaI([b], lr=torch.tensor(0.01), foreach=foreach)
    for i in range(4):
        gradient = torch.randn(5, 4)
        step(plain, gradient)
        step(tensor, gradient)
        plain.param_groups[0]["lr"] = 0.01 / (i + 2)
        tensor.param_groups[0]["lr"].fill_(0.01 / (i + 2))
    torch.testing.assert_close(a, b)


def test_a_scheduler_drives_it() -> None:
    a = block(6)
    optimizer = SGDSaI([a], lr=1.0, weight_decay=0.0, momentum=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=2)
    gradient = torch.randn(6)
    moves = []
    for _ in range(3):
        before = a.detach().clone()
        step(optimizer, gradient)
        scheduler.step()
        moves.append((a.detach() - before).norm().item())
    assert [m / moves[-1] for m in moves] == pytest.approx([0.5, 0.75, 1.0], rel=1e-5)


@pytest.mark.parametrize("shape", [(1 << 21,), (1 << 10, 1 << 11), (1 << 11, 1 << 10)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_neither_calibration_nor_a_step_takes_memory_of_a_blocks_size(
    weight_decay: float, shape: tuple[int, ...]
) -> None:
    """Beside the momentum nothing larger than the piece of 2^20 float32 numbers that stays in cache is allocated."""
    p = block(*shape)
    p.grad = torch.randn_like(p)
    optimizer = SGDSaI([p], weight_decay=weight_decay)
    old = {x.untyped_storage().data_ptr() for x in (p, p.grad)}
    sizes: dict[int, int] = {}

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor) and (at := x.untyped_storage().data_ptr()) not in old:
                    sizes[at] = max(sizes.get(at, 0), x.untyped_storage().nbytes())
            return out

    for expected in ([4 << 21], []):
        with Allocations():
            optimizer.step()
        assert [size for size in sizes.values() if size > 4 << 20] == expected
        old.add(optimizer.state[p]["momentum_buffer"].untyped_storage().data_ptr())
        sizes.clear()


@pytest.mark.parametrize("options", [{"lr": torch.tensor(0.01)}, {"lr": 0.01, "weight_decay": 0.0}])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_compiled_step_equals_eager(scaling: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    a, b = block(6), block(5, 4)
    c, d = copy.deepcopy(a), copy.deepcopy(b)
    eager, compiled = (SGDSaI(ps, scaling=scaling, **options) for ps in ([a, b], [c, d]))
    run = torch.compile(compiled.step, backend="aot_eager")
    for _ in range(4):
        gradients = [torch.randn(6), torch.randn(5, 4)]
        step(eager, *gradients)
        c.grad, d.grad = (g.clone() for g in gradients)
        run()
    for p, q in ((a, c), (b, d)):
        assert torch.equal(p, q)
        assert gsnr(eager, p) == gsnr(compiled, q)


# ------------------------------------------------------------------ state


def _saved(optimizer: SGDSaI) -> dict[str, Any]:
    """Through a file as a stranger would load it."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("momentum_dtype", [None, "float32", torch.bfloat16, "int8"])
def test_resume_is_bitwise(dtype: torch.dtype, scaling: str, momentum_dtype: Any, rounding: bool) -> None:
    """Through a file; blocks of every kind, some of which had no usable gradient when it was written."""

    def start() -> tuple[SGDSaI, list[nn.Parameter]]:
        torch.manual_seed(1)
        params = [block(*shape, dtype=dtype) for shape in ((6,), (5, 4), (3,), (6,), (4, 200))]
        groups = [{"params": params[:4]}, {"params": params[4:], "token_rows": scaling == "adamw"}]
        optimizer = SGDSaI(groups, scaling=scaling, momentum_dtype=momentum_dtype, stochastic_rounding=rounding)
        return optimizer, params

    torch.manual_seed(2)
    gradients = [
        [
            torch.randn(6),
            torch.zeros(5, 4) if i < 5 else torch.randn(5, 4),
            None if i < 4 else torch.randn(3),
            torch.randn(6),
            torch.randn(4, 200),
        ]
        for i in range(14)
    ]
    whole, params = start()
    for g in gradients:
        step(whole, *g)
    first, halfway = start()
    for g in gradients[:4]:
        step(first, *g)
    second, resumed = start()
    with torch.no_grad():
        for p, q in zip(resumed, halfway, strict=True):
            p.copy_(q)
    second.load_state_dict(_saved(first))
    for g in gradients[4:]:
        step(second, *g)
    for p, q in zip(params, resumed, strict=True):
        assert torch.equal(p, q)
        assert whole.state[p].keys() == second.state[q].keys()
        for name, value in whole.state[p].items():
            assert value.dtype == second.state[q][name].dtype
            assert torch.equal(value, second.state[q][name])


def test_gsnr_and_scale_stay_float32_for_bfloat16_parameters() -> None:
    a = block(5000, dtype=torch.bfloat16)
    optimizer = SGDSaI([a])
    step(optimizer, torch.randn(5000))
    exact = gsnr(optimizer, a)
    optimizer.load_state_dict(_saved(optimizer))
    assert optimizer.state[a]["gsnr"].dtype == torch.float32
    assert gsnr(optimizer, a) == exact != torch.tensor(exact).bfloat16().item()


def test_loading_gives_no_reference_to_the_given_tensors() -> None:
    a = block(6)
    optimizer = SGDSaI([a])
    step(optimizer, torch.randn(6))
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    before = saved["state"][0]["momentum_buffer"].clone()
    step(optimizer, torch.randn(6))
    assert torch.equal(saved["state"][0]["momentum_buffer"], before)


def test_loading_respects_the_users_hooks() -> None:
    a = block(6)
    optimizer = SGDSaI([a])
    step(optimizer, torch.randn(6))
    saved = copy.deepcopy(optimizer.state_dict())

    def doubled(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict["state"][0]["gsnr"] = 2 * state_dict["state"][0]["gsnr"]
        return state_dict

    optimizer.register_load_state_dict_pre_hook(doubled)
    expected = 2 * gsnr(optimizer, a)
    optimizer.load_state_dict(saved)
    assert gsnr(optimizer, a) == expected


def test_a_state_changed_in_place_takes_effect() -> None:
    """torch.distributed.checkpoint loads into the tensors that are there."""
    a = block(6)
    optimizer = SGDSaI([a], lr=1.0, weight_decay=0.0, momentum=0.0, scaling="raw")
    step(optimizer, torch.randn(6))
    optimizer.state[a]["scale"].fill_(0.25)
    before, gradient = a.detach().clone(), torch.randn(6)
    step(optimizer, gradient)
    torch.testing.assert_close(a.detach(), before - 0.25 * gradient)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike(copied: Any) -> None:
    a = block(6)
    optimizer = SGDSaI([a])
    step(optimizer, torch.randn(6))
    twin = copied(optimizer)
    gradient = torch.randn(6)
    step(optimizer, gradient)
    step(twin, gradient)
    assert torch.equal(a, twin.param_groups[0]["params"][0])


# ------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr must be a finite number >= 0, got -1\.0"),
        ({"lr": math.nan}, r"lr must be .*, got nan"),
        ({"lr": "1e-3"}, r"lr must be .*, got '1e-3'"),
        ({"lr": torch.ones(2)}, r"lr as a tensor must have one element, got shape \(2,\)"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1\.0"),
        ({"momentum": -0.1}, r"momentum must be in \[0, 1\), got -0\.1"),
        ({"eps": math.inf}, r"eps must be a finite number >= 0, got inf"),
        ({"weight_decay": -1}, r"weight_decay must be .*, got -1\.0"),
        ({"scaling": "adam"}, r"scaling must be one of 'adamw', 'raw', 'max', got 'adam'$"),
        ({"scaling": "floor"}, r"scaling must be .*, got 'floor'; 'floor' is now 'adamw'"),
        ({"maximize": 1}, r"maximize must be True or False, got 1"),
        ({"foreach": "yes"}, r"foreach must be True, False or None"),
        ({"foreach": True, "fused": True}, r"foreach and fused cannot both be True"),
        ({"momentum_dtype": "int3"}, r"momentum_dtype must be .*, got 'int3'"),
    ],
)
def test_bad_hyperparameters(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SGDSaI([block(2)], **options)
    optimizer = SGDSaI([block(2)])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [block(2)], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", ["momentum_init", "clip_threshold"])
def test_a_setting_that_went_names_its_successor(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} no longer exists; remove it: .*scaling='adamw'"):
        SGDSaI([{"params": [block(2)], name: 1.0}])
    optimizer = SGDSaI([block(2)])
    saved = optimizer.state_dict()
    saved["param_groups"][0][name] = 1.0
    with pytest.raises(ValueError, match=rf"{name} no longer exists"):
        optimizer.load_state_dict(saved)


def test_complex_parameters_are_refused_and_leave_no_group() -> None:
    optimizer = SGDSaI([block(2)])
    with pytest.raises(ValueError, match=r"is torch.complex64; train the real view"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused_by_name() -> None:
    layer = nn.Embedding(4, 3, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"weight has a sparse one; .*sparse=False"):
        SGDSaI(layer.named_parameters()).step()


def _in_state(**entries: Tensor) -> Any:
    return lambda saved: saved["state"][0].update(entries)


_STATE_DAMAGES = [
    pytest.param(lambda s: s["param_groups"][0].pop("scaling"), r"no 'scaling': it is not from SGDSaI", id="AdamW"),
    pytest.param(lambda s: s["state"][0].pop("scale"), r"has no 'scale': it is not from this version", id="scale"),
    pytest.param(lambda s: s["state"][0].pop("calibration_step"), r"has no 'calibration_step'", id="older"),
    pytest.param(_in_state(momentum_buffer=torch.zeros(7)), r"must have the shape \(6,\).* has \(7,\)", id="shape"),
    pytest.param(_in_state(scale=torch.ones(6)), r"scale of .* must have the shape \(1,\).* has \(6,\)", id="channels"),
    pytest.param(_in_state(gsnr=torch.tensor(math.nan)), r"gsnr of .* has NaN or infinite elements", id="NaN"),
    pytest.param(_in_state(gsnr=torch.tensor(-1.0)), r"gsnr of .* must not be negative.* has -1\.0", id="negative"),
    pytest.param(lambda s: s["param_groups"][0].update(momentum=2), r"momentum must be in", id="momentum"),
    pytest.param(
        lambda s: s["param_groups"][0].update(scaling="floor"), r"'floor' is now 'adamw'", id="a scaling that went"
    ),
]


@pytest.mark.parametrize(("damage", "message"), _STATE_DAMAGES)
def test_a_state_dict_that_does_not_fit_changes_nothing(damage: Any, message: str) -> None:
    a = block(6)
    optimizer = SGDSaI([a])
    step(optimizer, torch.randn(6))
    before = copy.deepcopy(optimizer.state_dict())
    saved = copy.deepcopy(before)
    damage(saved)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for name, value in before["state"][0].items():
        assert torch.equal(after["state"][0][name], value)


def test_no_warning_in_an_ordinary_run() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = SGDSaI([block(6), block(3, 2)])
        for _ in range(3):
            step(optimizer, torch.randn(6), torch.randn(3, 2))
