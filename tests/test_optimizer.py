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
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_sai import SGDSaI

SCALINGS = ("raw", "max", "adamw", "floor")


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
    torch.testing.assert_close(optimizer.state[a]["momentum_buffer"], first)
    torch.testing.assert_close(a.detach(), before - 0.1 * optimizer.state[a]["scale"] * first)


def test_a_calibrated_block_keeps_its_gsnr() -> None:
    a = block(6)
    optimizer = SGDSaI([a])
    step(optimizer, torch.randn(6))
    found = gsnr(optimizer, a)
    for gradient in (torch.randn(6), torch.zeros(6), 1e6 * torch.randn(6)):
        step(optimizer, gradient)
    assert gsnr(optimizer, a) == found


def test_a_zero_gradient_decays_an_uncalibrated_block_as_adamw_does() -> None:
    a = block(6)
    expected = (1 - 0.1 * 0.5) * a.detach()
    step(SGDSaI([a], lr=0.1, weight_decay=0.5), torch.zeros(6))
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


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("momentum_dtype", [None, "int8"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_momentum_that_begins_at_zero(scaling: str, momentum_dtype: str | None, foreach: bool) -> None:
    """m_t = sum of (1-mu) mu^(t-k) g_k, with the scale that a momentum begun with the gradient has too."""
    generator = torch.Generator().manual_seed(3)
    gradients = [torch.randn(300, generator=generator, dtype=torch.float64) for _ in range(4)]
    options = {"lr": 0.1, "weight_decay": 0.1, "scaling": scaling, "foreach": foreach}
    start = torch.randn(300, generator=generator, dtype=torch.float64)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    zero = SGDSaI([p], **options, momentum_init="zero", momentum_dtype=momentum_dtype)
    paper = SGDSaI([q], **options)
    expected, m = start.clone(), torch.zeros_like(start)
    for g in gradients:
        step(zero, g)
        step(paper, g)
        scale = zero.state[p]["scale"].item()
        m = 0.9 * m + 0.1 * g
        expected = (1 - 0.1 * 0.1) * expected - 0.1 * scale * m
    assert scale == paper.state[q]["scale"].item()
    # int8 keeps m to 1/127 of the largest of 128 elements, each time it is written
    tolerance = 1e-12 if momentum_dtype is None else 4 * 0.1 * scale * m.abs().max().item() / 127
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=tolerance)
    assert (p - q).abs().max() > 10 * tolerance


def test_a_state_dict_from_before_momentum_init_loads() -> None:
    p, q = block(4), block(4)
    optimizer = SGDSaI([p])
    step(optimizer, torch.randn(4))
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["momentum_init"]
    other = SGDSaI([q], momentum_init="zero")
    other.load_state_dict(saved)
    assert other.param_groups[0]["momentum_init"] == "zero"  # what the optimizer was made with
    step(other, torch.randn(4))


def rms(tensor: Tensor) -> float:
    return tensor.detach().double().square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", ["adamw", "floor"])
def test_clip_threshold_bounds_the_update_of_a_gradient_that_has_grown(scaling: str, dtype: torch.dtype) -> None:
    starts = [torch.zeros(300, 20, dtype=dtype), torch.zeros(500, dtype=dtype)]
    clipped, plain = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    options = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "scaling": scaling}
    ours, other = SGDSaI(clipped, **options, clip_threshold=0.7), SGDSaI(plain, **options)
    generator = torch.Generator().manual_seed(0)
    for size in (1.0, 0.01, 1e3, 1e20):
        gradients = [(size * torch.randn(p.shape, generator=generator)).to(dtype) for p in clipped]
        for p in (*clipped, *plain):
            p.data.zero_()  # so that they are the update
        step(ours, *gradients)
        step(other, *gradients)
        for p, q in zip(clipped, plain, strict=True):
            if size <= 1.0:  # the first gradient has nothing to be compared with, the second is small
                assert torch.equal(p, q)
            elif size < 1e19:
                assert rms(p) == pytest.approx(0.1 * 0.7, rel=1e-5 if dtype == torch.float32 else 2**-8)
                torch.testing.assert_close(p / rms(p), q / rms(q), rtol=2**-7, atol=1e-6)
            else:  # its norm is infinite in float32
                assert not p.any()
    with pytest.raises(ValueError, match=r"clip_threshold is in units of AdamW's update.*use scaling='adamw' or"):
        SGDSaI([block(2)], clip_threshold=1.0)


def test_clip_threshold_is_each_groups_own_and_lora_as() -> None:
    """A block that waited is clipped by its own scale, corrected for the warm-up; its first gradient is not."""
    a, b, late = block(40), block(40), block(40)
    groups = [{"params": [a, late], "clip_threshold": 1.0}, {"params": [b]}]
    optimizer = SGDSaI(groups, lr=0.1, momentum=0.0, weight_decay=0.0, scaling="floor")
    gradient = torch.randn(40)
    for times, late_times in ((1, 0), (100, 1), (100, 100)):
        before = [p.detach().clone() for p in (a, late, b)]
        step(optimizer, times * gradient, late_times * gradient, times * gradient)
        moved = [rms(p - q) / 0.1 for p, q in zip((a, late, b), before, strict=True)]
    assert moved[:2] == pytest.approx([1.0, 1.0], rel=1e-4)
    assert moved[2] > 50  # the group without a threshold


def test_clip_threshold_knows_the_scale_of_grad_scaler() -> None:
    a, b = block(50), block(50)
    one, other = (SGDSaI([p], lr=0.1, scaling="adamw", clip_threshold=1.0) for p in (a, b))
    b.data.copy_(a.data)
    for times in (1, 1, 30, 0.5):
        gradient = times * torch.randn(50)
        step(one, gradient)
        other.grad_scale, other.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
        step(other, 1024 * gradient)
    torch.testing.assert_close(a, b)


def test_a_state_dict_from_before_clip_threshold_loads() -> None:
    p, q = block(4), block(4)
    optimizer = SGDSaI([p], scaling="adamw")
    step(optimizer, torch.randn(4))
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["clip_threshold"]
    other = SGDSaI([q], scaling="adamw", clip_threshold=1.0)
    other.load_state_dict(saved)
    assert other.param_groups[0]["clip_threshold"] == 1.0
    step(other, torch.randn(4))


def active_rms(grad: Tensor) -> float:
    wide = grad.double()
    return (wide.pow(4).sum() / (3 * wide.square().sum())).sqrt().item()


def test_floor_raises_only_the_blocks_that_would_begin_below_lr() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(600), 1e-3 * torch.randn(50), 1e-12 * torch.randn(50), torch.tensor([-1e-4])]

    def updates(scaling: str) -> list[float]:
        blocks = [block(g.numel()) for g in gradients]
        before = [p.detach().clone() for p in blocks]
        step(SGDSaI(blocks, lr=0.1, weight_decay=0.0, scaling=scaling), *gradients)
        return [(p.detach() - q).square().mean().sqrt().item() for p, q in zip(blocks, before, strict=True)]

    shared, raised = updates("adamw"), updates("floor")
    assert shared[0] > 0.1 > 1e-3 > shared[1], "one factor for all leaves the second block behind"
    assert raised[0] == pytest.approx(shared[0], rel=1e-6)
    rms = gradients[1].square().mean().sqrt().item()
    assert raised[1] == pytest.approx(0.1 * min(1.0, rms / active_rms(gradients[1])), rel=1e-3)
    assert raised[2] < 1e-4, "rounding noise is not made up for"
    assert raised[3] == pytest.approx(0.1, rel=1e-3), "to lr, not above"


def test_floor_sees_the_part_of_a_block_that_has_gradients() -> None:
    """In the fused weight of a fresh GPT-2 only the values have gradients to speak of; their update should be lr."""
    torch.manual_seed(0)
    fused, other, values = block(3000), block(40_000), slice(2000, 3000)
    grad = 1e-7 * torch.randn(3000)
    grad[values] = 1e-4 * torch.randn(1000)
    before = fused.detach().clone()
    step(SGDSaI([fused, other], lr=0.1, weight_decay=0.0, scaling="floor"), grad, torch.randn(40_000))
    updates = fused.detach() - before
    assert updates[values].square().mean().sqrt().item() == pytest.approx(0.1, rel=0.1)


def test_each_step_of_calibration_has_its_own_adamw_factor() -> None:
    a, b = block(6), block(4)
    optimizer = SGDSaI([a, b], lr=0.1, weight_decay=0.0, scaling="adamw")
    step(optimizer, torch.randn(6), None)
    before = b.detach().clone()
    step(optimizer, torch.randn(6), 1e-4 * torch.randn(4))
    assert (b.detach() - before).square().mean().sqrt().item() == pytest.approx(0.1, rel=1e-5)


def _adapter(
    warmup_steps: int, steps: int, scaling: str = "adamw", stop_at: int | None = None, momentum_init: str = "gradient"
) -> SGDSaI:
    """A product of two factors, the second zero at first as LoRA's B, trained with a linear warm-up from 0."""
    torch.manual_seed(3)
    a, b, x, y = block(4, 8), nn.Parameter(torch.zeros(5, 4)), torch.randn(16, 8), torch.randn(16, 5)
    settings = {"eps": 0.0, "weight_decay": 0.0, "scaling": scaling, "momentum_init": momentum_init}
    optimizer = SGDSaI([("a", a), ("b", b)], lr=1e-4, **settings)
    schedule = None
    if warmup_steps:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, t / warmup_steps))
    for i in range(steps):
        if i == stop_at:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = SGDSaI(optimizer.param_groups[0]["params"], lr=9.0)
            optimizer.load_state_dict(saved)
            schedule.optimizer = optimizer
        optimizer.zero_grad()
        ((x @ a.T @ b.T - y) ** 2).mean().backward()
        optimizer.step()
        if schedule:
            schedule.step()
    return optimizer


@pytest.mark.parametrize("momentum_init", ["gradient", "zero"])
@pytest.mark.parametrize("scaling", ["adamw", "floor"])
@pytest.mark.parametrize("warmup_steps", [0, 10, 1000])
def test_a_slow_start_does_not_inflate_the_scale_of_a_late_block(
    warmup_steps: int, scaling: str, momentum_init: str
) -> None:
    """Without the correction LoRA's A would get a scale `warmup_steps` times larger, times 1 / (1 - momentum) where
    momentum begins at zero."""
    expected, found = (
        [s["scale"].item() for s in _adapter(*how, scaling, momentum_init=init).state.values()]
        for how, init in (((0, 3), "gradient"), ((warmup_steps, 4), momentum_init))
    )
    # The step is so small that the gradient of a is linear in how far b has moved.
    assert found == pytest.approx(expected, rel=1e-2)


def test_a_warmup_does_not_touch_the_papers_scalings() -> None:
    for scaling in ("raw", "max"):
        expected, found = ([s["scale"].item() for s in _adapter(w, 4, scaling).state.values()] for w in (0, 1000))
        assert found == pytest.approx(expected, rel=1e-2)


def test_a_block_that_waits_in_a_warmup_is_resumed_exactly() -> None:
    for init in ("gradient", "zero"):
        whole, resumed = (_adapter(10, 5, stop_at=stop_at, momentum_init=init) for stop_at in (None, 2))
        for p, q in zip(whole.state.values(), resumed.state.values(), strict=True):
            assert torch.equal(p["scale"], q["scale"])
            assert p["gsnr"] == q["gsnr"] > 0


def test_a_block_without_gradient_in_a_warmup_is_scaled_by_its_own_gradient_alone() -> None:
    a, b = block(6), block(4)
    optimizer = SGDSaI([a, b], lr=0.1, weight_decay=0.0, scaling="adamw")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (t + 1) / 100)
    for _ in range(3):
        step(optimizer, torch.randn(6), None)
        schedule.step()
    gradient = torch.randn(4)
    step(optimizer, torch.randn(6), gradient)
    assert (optimizer.state[b]["scale"] * gradient).square().mean().sqrt().item() == pytest.approx(1.0, rel=1e-5)


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
    optimizer = SGDSaI([("bias", block(4)), ("other", block(9))])
    with pytest.warns(UserWarning, match=r"bias \(and 1 more\) has a constant first gradient"):
        step(optimizer, torch.ones(4), torch.ones(9))
    assert [s["gsnr"].item() for s in optimizer.state.values()] == [2.0, 3.0]


def test_one_element_block_does_not_diverge() -> None:
    a = nn.Parameter(torch.tensor(1.0))
    optimizer = SGDSaI([a], lr=0.1, weight_decay=0.0)
    step(optimizer, torch.tensor(0.5))
    assert a.item() == pytest.approx(0.95)


def test_learning_rate_and_decay_do_not_matter_for_calibration() -> None:
    """The dummy step of torch.distributed.checkpoint: all-zero gradients and lr 0, before any real one."""
    a = block(6)
    before = a.detach().clone()
    optimizer = SGDSaI([a], lr=0.0)
    step(optimizer, torch.zeros(6))
    assert torch.equal(a, before)
    assert {k: v.abs().sum().item() for k, v in optimizer.state[a].items()} == {
        "momentum_buffer": 0,
        "gsnr": 0,
        "scale": 0,
    }
    first = torch.randn(6)
    step(optimizer, first)
    assert torch.equal(a, before)
    assert gsnr(optimizer, a) == pytest.approx((first.norm() / first.std()).item(), rel=1e-5)


def test_clipping_before_the_step_does_not_change_gsnr() -> None:
    gradient = 100 * torch.randn(50)
    found = []
    for clipped in (gradient, gradient / gradient.norm()):
        a = block(50)
        optimizer = SGDSaI([a])
        step(optimizer, clipped)
        found.append(gsnr(optimizer, a))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_one_log_line_at_calibration(capsys: pytest.CaptureFixture[str]) -> None:
    import transformers  # noqa: F401  (its logger is used where the library is loaded)

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.hf_sai")
    a = block(6)
    optimizer = SGDSaI([a, block(5)], scaling="adamw")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        for _ in range(3):
            step(optimizer, torch.randn(6), torch.randn(5))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    (message,) = messages
    assert "calibrated 2 blocks at step 1" in message
    factor = (optimizer.state[a]["scale"] / optimizer.state[a]["gsnr"]).item()
    assert f"{factor:.4g} * lr" in message
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
@pytest.mark.parametrize("scaling", SCALINGS)
def test_no_host_synchronisation_after_calibration(scaling: str, foreach: bool) -> None:
    optimizer = SGDSaI([block(6), block(5, 3)], scaling=scaling, foreach=foreach)
    step(optimizer, torch.randn(6), torch.randn(5, 3))
    with _HostReads() as reads:
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
            {"params": [c], "weight_decay": 0.0},
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


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_neither_calibration_nor_a_step_takes_memory_of_a_blocks_size(weight_decay: float) -> None:
    """Beside the momentum nothing larger than one chunk of 2^18 float32 numbers is allocated."""
    p = block(1 << 21)
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
        assert [size for size in sizes.values() if size > 4 << 18] == expected
        old.add(optimizer.state[p]["momentum_buffer"].untyped_storage().data_ptr())
        sizes.clear()


@pytest.mark.parametrize(
    ("scaling", "options"),
    [
        *((s, o) for s in SCALINGS for o in ({"lr": torch.tensor(0.01)}, {"lr": 0.01, "weight_decay": 0.0})),
        ("floor", {"lr": 0.01, "clip_threshold": 0.5}),
    ],
)
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
        torch.testing.assert_close(p, q)
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
@pytest.mark.parametrize("momentum_dtype", [None, "float32", torch.bfloat16])
def test_resume_is_bitwise(dtype: torch.dtype, scaling: str, momentum_dtype: Any) -> None:
    def start() -> tuple[SGDSaI, list[nn.Parameter]]:
        torch.manual_seed(1)
        params = [block(6, dtype=dtype), block(5, 4, dtype=dtype), block(3, dtype=dtype)]
        return SGDSaI(params, scaling=scaling, momentum_dtype=momentum_dtype), params

    torch.manual_seed(2)
    gradients = [[torch.randn(6), torch.zeros(5, 4) if i < 5 else torch.randn(5, 4), None] for i in range(4)]
    gradients += [[torch.randn(6), torch.randn(5, 4), torch.randn(3)] for i in range(4)]
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
    optimizer = SGDSaI([a], lr=1.0, weight_decay=0.0, momentum=0.0)
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
        ({"scaling": "adam"}, r"scaling must be one of 'raw', 'max', 'adamw', 'floor', got 'adam'"),
        ({"momentum_init": "ema"}, r"momentum_init must be one of 'gradient', 'zero', got 'ema'"),
        ({"scaling": "floor", "clip_threshold": 0}, r"clip_threshold must be above 0, or None for no clipping, got 0"),
        ({"scaling": "floor", "clip_threshold": -1}, r"clip_threshold must be a finite number >= 0, got -1"),
        ({"scaling": "raw", "clip_threshold": 1.0}, r"clip_threshold is in units of AdamW's update"),
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


def _adamw_state(saved: dict[str, Any]) -> None:
    saved["state"][0] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(6), "exp_avg_sq": torch.zeros(6)}


_STATE_DAMAGES = [
    pytest.param(_adamw_state, r"no number 'gsnr': this is not a state dict of SGDSaI", id="of AdamW"),
    pytest.param(lambda s: s["state"][0].pop("scale"), r"no number 'scale'", id="no scale"),
    pytest.param(lambda s: s["state"][0].pop("momentum_buffer"), r"no momentum_buffer", id="no buffer"),
    pytest.param(lambda s: s["state"][0].update(momentum_buffer=torch.zeros(7)), r"shape \(6,\).*\(7,\)", id="shape"),
    pytest.param(lambda s: s["state"][0]["gsnr"].fill_(math.nan), r"gsnr of .* must be finite", id="NaN"),
    pytest.param(lambda s: s["param_groups"][0].update(momentum=2), r"momentum must be in", id="momentum"),
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
