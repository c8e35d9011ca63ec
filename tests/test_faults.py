"""What users of the stack have run into, each kind of fault as a test of what is right."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_sai import SGDSaI, release_gradients
from hf_sai.calibration import INTERVAL

SCALINGS = ("adamw", "raw", "max")


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 3))


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return (model(torch.randn(8, 6, generator=generator)) - torch.randn(8, 3, generator=generator)).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, scheduler: Any = None) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def snapshot(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Parameters, gradients, groups and state, as values."""
    rows: list[Any] = []
    for group in optimizer.param_groups:
        rows.append({k: v for k, v in group.items() if k != "params"})
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            rows.append([p, p.grad, {k: state[k] for k in sorted(state)}])
    return copy.deepcopy(rows)


def same(one: Any, other: Any) -> bool:
    """Whether two trees are equal to the last bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.layout is not torch.strided:
            return one.layout is other.layout and torch.equal(one.to_dense(), other.to_dense())
        return one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


# ------------------------------------------------------------------------------------------ gradient release


def schedule(name: str, optimizer: torch.optim.Optimizer) -> Any:
    rules: dict[str, Callable[[int], float]] = {
        "constant": lambda step: 1.0,
        "linear": lambda step: 1 - step / 10,
        "warm-up": lambda step: min(1.0, (step + 1) / 5),
    }
    return torch.optim.lr_scheduler.LambdaLR(optimizer, rules[name])


def test_release_follows_the_schedule_also_when_a_state_dict_has_replaced_the_groups() -> None:
    """accelerate loads an optimizer's own state dict into it when it prepares it."""
    results = {}
    for name in ("constant", "linear", "warm-up"):
        models = make_model(), make_model()
        for released, model in enumerate(models):
            optimizer = SGDSaI(model.parameters(), lr=1e-2)
            if released:
                release_gradients(optimizer, model)
            optimizer.load_state_dict(optimizer.state_dict())
            train(model, optimizer, range(6), schedule(name, optimizer))
            optimizer.param_groups[0]["weight_decay"] = 1.0
            train(model, optimizer, range(6, 8))
        assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))
        results[name] = models[1][0].weight.detach()
    assert not torch.equal(results["constant"], results["linear"])
    assert not torch.equal(results["constant"], results["warm-up"])
    assert not torch.equal(results["linear"], results["warm-up"])


@pytest.mark.parametrize("first", ["release", "load"])
def test_release_and_load_in_either_order_go_on_bitwise(first: str) -> None:
    model, twin = make_model(), make_model(1)
    optimizer = SGDSaI(model.parameters(), lr=1e-2)
    release_gradients(optimizer, model)
    train(model, optimizer, range(INTERVAL - 1))
    resumed = SGDSaI(twin.parameters(), lr=9.0)
    if first == "release":
        release_gradients(resumed, twin)
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if first == "load":
        release_gradients(resumed, twin)
    for m, o in ((model, optimizer), (twin, resumed)):
        train(m, o, range(INTERVAL - 1, INTERVAL + 3))
    assert same(snapshot(optimizer), snapshot(resumed))


@pytest.mark.parametrize("layer", range(5))
def test_a_backward_that_fails_in_any_layer_is_forgotten_by_zero_grad(layer: int) -> None:
    """As `auto_find_batch_size` and loops that skip a batch do; parameters that were updated stay updated."""
    model = make_model()
    optimizer = SGDSaI(model.parameters(), lr=1e-2)
    release_gradients(optimizer, model)
    train(model, optimizer, range(2))

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    hook = model[layer].register_forward_hook(lambda *call: call[2].register_hook(fail) and None)
    with pytest.raises(RuntimeError, match="out of memory"):
        loss_of(model, 2).backward()
    hook.remove()
    optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model, 3).backward()
    optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------------ state dicts


def test_entries_of_an_optimizer_that_wraps_this_one_survive_a_load() -> None:
    """schedulefree.ScheduleFreeWrapper keeps `z` in the same state."""
    model = make_model()
    optimizer = SGDSaI(model.parameters())
    train(model, optimizer, range(2))
    extra = {p: torch.randn_like(p) for p in model.parameters()}
    for p, z in extra.items():
        optimizer.state[p]["z"] = z.clone()
    saved = copy.deepcopy(optimizer.state_dict())
    for p in model.parameters():
        del optimizer.state[p]["z"]
    optimizer.load_state_dict(saved)
    assert all(torch.equal(optimizer.state[p]["z"], z) for p, z in extra.items())
    train(model, optimizer, range(2, 4))
    del saved["state"][0]["scale"]
    with pytest.raises(ValueError, match="has no 'scale'"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    "renewed",
    [
        lambda o: o.load_state_dict(copy.deepcopy(o.state_dict())) or o,
        copy.deepcopy,
        lambda o: pickle.loads(pickle.dumps(o)),
    ],
    ids=["load", "deepcopy", "pickle"],
)
def test_a_load_or_a_copy_adds_no_key_to_a_group(renewed: Callable[[Any], SGDSaI]) -> None:
    model = make_model()
    optimizer = SGDSaI(model.parameters())
    train(model, optimizer, range(1))
    keys = optimizer.param_groups[0].keys()
    once = renewed(optimizer)
    assert once.param_groups[0].keys() == keys
    assert renewed(once).param_groups[0].keys() == keys


@pytest.mark.parametrize("stochastic_rounding", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_asking_for_a_state_dict_changes_nothing(scaling: str, stochastic_rounding: bool) -> None:
    """Also before the first step, where torch.distributed.checkpoint makes a step of zeros to see what there is."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    models = make_model().bfloat16(), make_model().bfloat16()
    options = {"scaling": scaling, "stochastic_rounding": stochastic_rounding}
    asked, other = (SGDSaI(m.parameters(), lr=1e-2, **options) for m in models)
    get_optimizer_state_dict(models[0], asked)
    for step in range(INTERVAL + 2):
        for model, optimizer in zip(models, (asked, other), strict=True):
            optimizer.zero_grad()
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).bfloat16()
            # The last layer has no gradient in the first steps.
            (model if step > 2 else model[:4])(x).square().mean().backward()
            optimizer.step()
        before = snapshot(asked)
        asked.state_dict()
        assert same(before, snapshot(asked))
        get_optimizer_state_dict(models[0], asked)
        assert same(before, snapshot(asked))
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(p, q)


def test_what_a_users_hook_makes_of_a_loaded_state_stays() -> None:
    model = make_model()
    optimizer = SGDSaI(model.parameters())
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())

    def halve(loaded: torch.optim.Optimizer) -> None:
        for state in loaded.state.values():
            state["momentum_buffer"].mul_(0.5)
            state["scale"] = state["scale"] * 2

    optimizer.register_load_state_dict_post_hook(halve)
    optimizer.load_state_dict(saved)
    for state, old in zip(optimizer.state.values(), saved["state"].values(), strict=True):
        assert torch.equal(state["momentum_buffer"], old["momentum_buffer"] / 2)
        assert torch.equal(state["scale"], old["scale"] * 2)
    train(model, optimizer, range(2, 3))


# ------------------------------------------------------------------------------------------ groups and numbers


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("shape", [(5,), (5, 3)])
@pytest.mark.parametrize("how", ["append", "replace"])
def test_parameters_of_a_group_can_be_edited_as_with_adamw(
    how: str, shape: tuple[int, ...], stepped: bool, named: bool
) -> None:
    a, b, new = (nn.Parameter(torch.randn(size)) for size in ((4, 6), (6,), shape))
    optimizer = SGDSaI([("a", a), ("b", b)] if named else [a, b], lr=1e-2)
    for step in range(4):
        if step == 2 * stepped:
            if how == "append":
                optimizer.param_groups[0]["params"].append(new)
            else:
                optimizer.param_groups[0]["params"][1] = new
                optimizer.state.pop(b, None)
        for p in (a, b, new):
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert optimizer.state[new]["calibration_step"] == (2 if stepped else 4)
    before = new.detach().clone()
    optimizer.step()
    assert not torch.equal(new, before)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()


NUMBERS: list[Callable[[float], Any]] = [
    *(getattr(np, name) for name in ("float16", "float32", "float64", "longdouble")),
    lambda x: np.array(x),
    lambda x: torch.tensor(x),
    lambda x: torch.tensor(x, dtype=torch.float64),
]


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_of_every_library_are_numbers(number: Callable[[float], Any]) -> None:
    """In the constructor, in a group, from a scheduler and in a loaded state dict: 0.25 and 0.5 are exact in all."""
    names = ("lr", "momentum", "eps", "weight_decay")
    models = [make_model() for _ in range(4)]
    plain = SGDSaI(models[0].parameters(), **dict.fromkeys(names, 0.25))
    made = SGDSaI(models[1].parameters(), **{name: number(0.25) for name in names})
    edited, loaded = (SGDSaI(model.parameters()) for model in models[2:])
    edited.param_groups[0].update({name: number(0.25) for name in names})
    saved = loaded.state_dict()
    saved["param_groups"][0].update({name: number(0.25) for name in names})
    loaded.load_state_dict(saved)
    for model, optimizer in zip(models, (plain, made, edited, loaded), strict=True):
        train(model, optimizer, range(3))
        value = 0.5 if optimizer is plain else number(0.5)
        optimizer.param_groups[0]["lr"] = value  # as a scheduler does
        train(model, optimizer, range(3, 5))
    for model in models[1:]:
        for p, q in zip(model.parameters(), models[0].parameters(), strict=True):
            # A tensor on the CPU is read as a number; float32 rounds its products otherwise than Python does.
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("number", [np.int64(1), np.uint8(1), np.float32(1), torch.tensor(1)])
def test_whole_numbers_of_every_library_are_numbers(number: Any) -> None:
    SGDSaI([nn.Parameter(torch.ones(2))], lr=number, weight_decay=number, eps=number)


@pytest.mark.parametrize(
    "number", [np.bool_(True), True, np.float32("nan"), np.array([1.0, 2.0]), np.array([0.5]), "1", None, 1j]
)
def test_what_is_no_number_is_refused(number: Any) -> None:
    for name in ("lr", "momentum", "eps", "weight_decay"):
        with pytest.raises(ValueError, match=f"^{name} must be "):
            SGDSaI([nn.Parameter(torch.ones(2))], **{name: number})


@pytest.mark.parametrize("momentum_dtype", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_momentum_can_be_turned_on_and_off_while_training(scaling: str, momentum_dtype: str | None) -> None:
    """A buffer is made when it is first needed, and a checkpoint from any time loads."""
    model = make_model()
    optimizer = SGDSaI(model.parameters(), lr=1e-3, momentum=0.0, scaling=scaling, momentum_dtype=momentum_dtype)
    for step, momentum in enumerate((0.0, 0.9, 0.9, 0.0, 0.5, 0.5)):
        optimizer.param_groups[0]["momentum"] = momentum
        train(model, optimizer, range(step, step + 1))
        for p in model.parameters():
            assert ("momentum_buffer" in optimizer.state[p]) == (momentum > 0)
        twin = make_model(1)
        twin.load_state_dict(model.state_dict())
        resumed = SGDSaI(twin.parameters(), scaling=scaling, momentum_dtype=momentum_dtype)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for following in (momentum, 0.9 - momentum):
            whole, whole_model = copy.deepcopy((optimizer, model))
            part, part_model = copy.deepcopy((resumed, twin))
            for o, m in ((whole, whole_model), (part, part_model)):
                o.param_groups[0]["momentum"] = following
                train(m, o, range(step + 1, step + 3))
            assert same(snapshot(whole), snapshot(part))


def test_momentum_that_is_turned_on_begins_with_the_gradient() -> None:
    """Not at zero: that would be a tenth of the step for ten steps."""
    p = nn.Parameter(torch.zeros(4))
    optimizer = SGDSaI([p], lr=1e-2, momentum=0.0, weight_decay=0.0, scaling="raw")
    for momentum in (0.0, 0.9):
        optimizer.param_groups[0]["momentum"] = momentum
        p.grad = torch.tensor([1.0, -2.0, 3.0, 4.0])
        optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], optimizer.state[p]["scale"] * p.grad)


# ------------------------------------------------------------------------------------------ devices, swaps, compilers


@pytest.mark.parametrize("options", [{}, {"momentum_dtype": "int8"}, {"foreach": True}, {"scaling": "raw"}], ids=str)
def test_a_default_device_touches_no_step(options: dict[str, Any]) -> None:
    models = make_model(), make_model()
    strange, plain = (SGDSaI(m.parameters(), **options) for m in models)
    with torch.device("meta"):
        for factor in (1.0, -2.0):
            for p in models[0].parameters():
                p.grad = factor * p.detach()
            strange.step()  # whatever is cached at the first step is made here
            strange.load_state_dict(copy.deepcopy(strange.state_dict()))
    for factor in (1.0, -2.0):
        for p in models[1].parameters():
            p.grad = factor * p.detach()
        plain.step()
    for optimizer, model in ((strange, models[0]), (plain, models[1])):
        train(model, optimizer, range(2))
    assert same(snapshot(strange), snapshot(plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_can_be_swapped_under_the_optimizer(dtype: torch.dtype) -> None:
    """`model.to(...)` of FSDP2 and tensor-parallel models swaps, too; weak references to parameters forbid it."""
    model = make_model()
    optimizer = SGDSaI(model.parameters(), lr=1e-2)
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        ids = [id(p) for p in model.parameters()]
        model.to(dtype)
        assert [id(p) for p in model.parameters()] == ids
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(8, 6).to(dtype)).square().mean().backward()
    optimizer.step()
    for p, q in zip(model.parameters(), before, strict=True):
        assert p.dtype == dtype
        assert not torch.equal(p, q)


def test_two_parameters_can_be_swapped_with_each_other() -> None:
    a, b = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3, 2))
    optimizer = SGDSaI([a])
    a.grad = torch.ones(3, 2)
    optimizer.step()
    a.grad = None
    values = b.detach().clone()
    torch.utils.swap_tensors(a, b)
    assert torch.equal(a, values)
    a.grad = torch.ones(3, 2)
    optimizer.step()
    assert not torch.equal(a, values)


def test_it_can_be_made_inside_a_compiled_region() -> None:
    torch._dynamo.reset()
    model, other = make_model(), make_model()

    @torch.compile(backend="eager")
    def made() -> Any:
        return SGDSaI(model.parameters(), lr=1e-2)

    optimizer, plain = made(), SGDSaI(other.parameters(), lr=1e-2)
    train(model, optimizer, range(3))
    train(other, plain, range(3))
    assert same(snapshot(optimizer), snapshot(plain))


# ------------------------------------------------------------------------------------------ gradients


PATHS: list[dict[str, Any]] = [{}, {"foreach": True}]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"scaling": "raw"},
    {"scaling": "max"},
    {"momentum": 0.0},
    {"momentum_dtype": "bfloat16"},
    {"momentum_dtype": "int8"},
    {"momentum_dtype": "float32"},
    {"stochastic_rounding": True},
    {"momentum_dtype": "bfloat16", "stochastic_rounding": True},
    {"maximize": True, "weight_decay": 0.0},
    {"lr": torch.tensor(1e-2)},
]
LAYOUTS = ("contiguous", "transposed", "every second", "channels last", "view of a larger one")
# In the first step gradients are expanded: fewer values than elements, which a parameter cannot have.
GRADIENT_LAYOUTS = LAYOUTS[1:] + LAYOUTS[:1]


def laid_out(values: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return values[:1].expand(values.shape)
    if layout == "every second":
        return torch.stack([values, values], -1)[..., 0]
    if layout == "channels last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "view of a larger one":
        return torch.cat([values, values])[values.shape[0] :]
    return values.contiguous()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_strides_change_no_result_and_a_step_writes_into_no_gradient(
    dtype: torch.dtype, path: dict[str, Any], options: dict[str, Any]
) -> None:
    """Parameters and gradients in memory formats of their own, through every path, dtype and option."""
    shape = (4, 6, 3, 5)
    made = {"lr": 1e-2, **path, **options}
    start = torch.randn(shape).to(dtype)
    plain = nn.Parameter(start.clone())
    reference = SGDSaI([plain], **made)
    odd = [nn.Parameter(laid_out(start.clone(), layout)) for layout in LAYOUTS]
    optimizers = [SGDSaI([p], **made) for p in odd]
    for step in range(3):
        values = torch.randn(shape).to(dtype)
        if not step:
            values = values[:1].expand(shape).contiguous()
        plain.grad = values.clone()
        reference.step()
        assert torch.equal(plain.grad, values)
        for i, (p, optimizer) in enumerate(zip(odd, optimizers, strict=True)):
            p.grad = laid_out(values, GRADIENT_LAYOUTS[(i + step) % len(GRADIENT_LAYOUTS)] if step else "expanded")
            kept = p.grad.clone()
            optimizer.step()
            assert torch.equal(p.grad, kept)
            assert torch.equal(kept, values)
    eps = torch.finfo(dtype).eps
    for p in odd:
        # One rounding a step may tip where float32 sums in another order; int8 by one level of the momentum.
        level = 3 * 1e-2 * 30 / 127 if options.get("momentum_dtype") == "int8" else 0.0
        level += 3 * 1e-2 * 30 * 2**-8 if options.get("momentum_dtype") == "bfloat16" else 0.0
        scale = max(1.0, float(reference.state[plain]["scale"].max())) if "scaling" in options else 1.0
        torch.testing.assert_close(p, plain, rtol=3 * eps, atol=3 * eps + scale * level + 1e-6 * scale)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(
    ("bad", "stepped"),
    [("sparse", False), ("sparse", True), ("complex", False), ("complex", True), ("flattened", False)],
)
def test_a_step_that_raises_changes_nothing(bad: str, scaling: str, stepped: bool) -> None:
    good, other = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(7, 3))
    optimizer = SGDSaI([{"params": [good]}, {"params": [other]}], scaling=scaling)
    if stepped:
        good.grad, other.grad = torch.randn(5, 4), torch.randn(7, 3)
        optimizer.step()
    good.grad, other.grad = torch.randn(5, 4), torch.randn(7, 3)
    if bad == "sparse":
        other.grad = torch.randn(7, 3).to_sparse()
    elif bad == "complex":
        optimizer.param_groups[1]["params"][0] = strange = nn.Parameter(torch.randn(7, 3, dtype=torch.complex64))
        strange.grad = torch.randn(7, 3, dtype=torch.complex64)
    else:
        other._fsdp_flattened = True  # type: ignore[attr-defined]
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"sparse|complex64|FSDP1"):
        optimizer.step()
    after = snapshot(optimizer)
    for one, two in zip(before, after, strict=True):
        if isinstance(one, dict):
            assert one == two
        else:
            assert same(one[:2], two[:2])
            assert same({k: v for k, v in two[2].items() if v.any()}, {k: v for k, v in one[2].items() if v.any()})


def test_the_learning_rate_stands_still_where_a_step_is_skipped() -> None:
    """accelerate's scheduler does not advance on an overflow; gradients of the skipped step stay."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler
    from accelerate.state import AcceleratorState

    Accelerator(cpu=True)
    try:
        model = make_model()
        optimizer = SGDSaI(model.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
        halving = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
        scheduler = AcceleratedScheduler(halving, wrapped)
        rates = []
        for step in range(5):
            wrapped.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            overflow = step in (0, 2)
            if overflow:
                model[2].weight.grad[1, 1] = float("inf")
            before = [p.detach().clone() for p in model.parameters()]
            wrapped.step()
            scheduler.step()
            assert wrapped.step_was_skipped == overflow
            moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
            assert moved == [not overflow] * len(moved)
            rates.append(optimizer.param_groups[0]["lr"])
        assert rates == [1.0, 0.5, 0.5, 0.25, 0.125]
        assert model[2].weight.grad.isfinite().all()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


# ------------------------------------------------------------------------------------------ warnings


def here() -> int:
    import inspect

    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


@pytest.mark.parametrize("wrapped", ["plain", "scheduler", "accelerate", "closure"])
def test_a_warning_points_at_the_users_line(wrapped: str) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    p = nn.Parameter(torch.ones(3))
    optimizer: Any = SGDSaI([p])
    if wrapped == "scheduler":
        torch.optim.lr_scheduler.ConstantLR(optimizer)
    elif wrapped == "accelerate":
        optimizer = Accelerator(cpu=True).prepare_optimizer(optimizer)
    p.grad = torch.full((3,), float("nan"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if wrapped == "closure":
            line = here() + 1
            optimizer.step(lambda: 0.0)
        else:
            line = here() + 1
            optimizer.step()
    AcceleratorState._reset_state(reset_partial_state=True)
    (warning,) = [w for w in caught if "NaN" in str(w.message)]
    assert (warning.filename, warning.lineno) == (__file__, line)


def test_a_block_that_never_has_a_usable_gradient_is_named_once() -> None:
    a, b, c = (nn.Parameter(torch.randn(4)) for _ in range(3))
    optimizer = SGDSaI([("a", a), ("b", b), ("unused", c)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(300):
            a.grad, b.grad = torch.randn(4), torch.zeros(4)
            optimizer.step()
            assert len(caught) == (step >= 100), "at the first step after 100 without"
    (warning,) = caught
    assert "SGDSaI: b has had no usable gradient in 100 steps" in str(warning.message)
