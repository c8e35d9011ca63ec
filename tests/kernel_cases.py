"""Blocks for the tests of the update's paths, the update in float64, and how near two paths must come."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_sai.channels import channels, matrix_layout
from hf_sai.kernels import Blocks
from hf_sai.momentum import CODE_BLOCK, LEVELS, scale_count
from hf_sai.options import Hyper

# Vectors, then matrices whose channels are columns and rows, a convolution, and stacks of both kinds.
SHAPES = (
    *((n,) for n in (1, 2, 127, 128, 129, 4097)),
    (7, 300),
    (300, 7),
    (6, 5, 3, 3),
    (3, 16, 21),
    (3, 21, 16),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOMENTUM_DTYPES = (None, torch.float32, torch.bfloat16, torch.int8)
# The limit is within the updates, so that every path clamps.
HYPER = Hyper(lr=0.01, weight=0.1, weight_decay=0.1, limit=1.5, maximize=False, stochastic_rounding=False)


def make_blocks(
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    p_dtype: torch.dtype = torch.float32,
    g_dtype: torch.dtype = torch.float32,
    m_dtype: torch.dtype | None = torch.float32,
    stochastic_rounding: bool = False,
    device: str = "cpu",
    *,
    count: int = 1,
    factors: bool = True,
) -> list[Blocks]:
    """For each shape ``count`` blocks that are updated together, each channel with a scale of its own.

    With ``factors`` the columns of a matrix have some, too.
    """
    generator = torch.Generator().manual_seed(0)
    made = []
    for seed, shape in enumerate(shapes):
        p, g, m = (torch.randn(count, *shape, generator=generator) for _ in range(3))
        codes = None
        if m_dtype == torch.int8:
            m = torch.randint(-LEVELS, LEVELS + 1, (count, *shape), generator=generator)
            codes = (torch.rand(scale_count(p.numel()), generator=generator) / LEVELS).to(device)
        layout = channels(torch.Size(shape))
        scale = 0.5 + 1.5 * torch.rand(count, *layout.shape, generator=generator)
        factor = None
        if factors and len(shape) == 2:
            factor = (0.5 + torch.rand(count, 1, shape[1], generator=generator)).to(device)
        counter = torch.tensor(3 + seed, device=device) if stochastic_rounding or m_dtype == torch.int8 else None
        made.append(
            Blocks(
                list(p.to(device, p_dtype).unbind()),
                list(g.to(device, g_dtype).unbind()),
                None if m_dtype is None else m.to(device, m_dtype),
                scale.to(device),
                *matrix_layout(torch.Size(shape), layout.dims),
                codes,
                counter,
                seed,
                factor,
            )
        )
    return made


def copied(many: Sequence[Blocks]) -> list[Blocks]:
    return [
        b._replace(
            params=[p.clone() for p in b.params],
            grads=[g.clone() for g in b.grads],
            momentum=None if b.momentum is None else b.momentum.clone(),
            momentum_scale=None if b.momentum_scale is None else b.momentum_scale.clone(),
        )
        for b in many
    ]


def on_cpu(many: Sequence[Blocks]) -> list[Blocks]:
    def moved(x: object) -> object:
        if isinstance(x, list):
            return [t.cpu() for t in x]
        return x.cpu() if isinstance(x, Tensor) else x

    return [Blocks(*map(moved, b)) for b in many]  # type: ignore[arg-type]


class Exact(NamedTuple):
    """One block before an update, and what the update makes of it, in float64.

    Attributes:
        param: what the parameter becomes.
        momentum: what the momentum becomes, before it is rounded.
        param_size: the sum of the magnitudes of the terms that are added up in the parameter.
        momentum_size: of those in the momentum.
    """

    param: Tensor
    momentum: Tensor
    param_size: Tensor
    momentum_size: Tensor


def held_momentum(b: Blocks, k: int) -> Tensor:
    """The momentum that block ``k`` of ``b`` stands for."""
    assert b.momentum is not None
    m = b.momentum[k].double()
    if b.momentum_scale is None:
        return m
    return (m.flatten() * b.momentum_scale.double().repeat_interleave(CODE_BLOCK)[: m.numel()]).view(m.shape)


def exact(b: Blocks, hyper: Hyper) -> Iterator[Exact]:
    """The update of each block of ``b`` by the formula at the head of :mod:`hf_sai.kernels`."""
    for k, (p, g) in enumerate(zip(b.params, b.grads, strict=True)):
        u = b.scale[k].double() * g.double()
        if b.column_factor is not None:
            u = u * b.column_factor[0].double()
        if hyper.limit is not None:
            u = u.clamp(-hyper.limit, hyper.limit)
        u = -u if hyper.maximize else u
        held = torch.zeros_like(u) if b.momentum is None else held_momentum(b, k)
        m = u if b.momentum is None else held + hyper.weight * (u - held)
        lr = float(hyper.lr)
        size = held.abs() + u.abs()
        yield Exact((1 - lr * hyper.weight_decay) * p.double() - lr * m, m, p.double().abs() + lr * size, size)


def assert_same(actual: Sequence[Blocks], expected: Sequence[Blocks], before: Sequence[Blocks], hyper: Hyper) -> None:
    """Each path rounds to float32 at most four times more or less often than another, in its own order; float64 alike.

    In what is then rounded to fewer bits the two may fall on neighbouring numbers where one of those float32 numbers
    lies within that distance of a boundary: seldom (at most in 1 of 100 elements, or in one).
    """
    for a, e, b in zip(actual, expected, before, strict=True):
        for k, terms in enumerate(exact(b, hyper)):
            _assert_near(a.params[k], e.params[k], terms.param_size)
            if a.momentum is not None and e.momentum is not None:
                _assert_near(a.momentum[k], e.momentum[k], terms.momentum_size)
            if a.momentum_scale is not None and e.momentum_scale is not None:
                missing = -terms.momentum_size.numel() % CODE_BLOCK
                rows = torch.nn.functional.pad(terms.momentum_size.flatten(), (0, missing)).view(-1, CODE_BLOCK)
                allowed = 4 * 2.0**-23 * rows.amax(1) / LEVELS
                assert ((a.momentum_scale - e.momentum_scale).double().abs() <= allowed).all()


def _assert_near(a: Tensor, e: Tensor, size: Tensor) -> None:
    assert a.dtype == e.dtype
    difference = (a.double() - e.double()).abs()
    if a.dtype in (torch.float32, torch.float64):
        assert (difference <= 4 * torch.finfo(a.dtype).eps * size).all(), difference.max()
        return
    spacing = torch.ones_like(difference) if a.dtype == torch.int8 else torch.finfo(a.dtype).eps * e.double().abs()
    subnormal = 0.0 if a.dtype == torch.int8 else torch.finfo(a.dtype).smallest_normal
    # Where the terms cancel, what is left of them is what float32 has rounded.
    allowed = spacing + subnormal + (0.0 if a.dtype == torch.int8 else 4 * 2.0**-23 * size)
    assert (difference <= allowed).all(), (difference - allowed).max()
    assert (difference > 0).sum() <= max(1, difference.numel() // 100), "more than 1 of 100 elements differ"
