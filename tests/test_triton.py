"""The Triton kernels equal the plain path in Triton's interpreter, and compile for Hopper, both without a GPU.

Whether Triton interprets is settled when it is imported: the tests of the interpreter run in a process of their own,
which ``test_in_the_interpreter`` starts.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import DTYPES, HYPER, MOMENTUM_DTYPES, SHAPES, assert_same, copied, make_blocks

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_in_the_interpreter")
pytestmark = [
    # Triton 3.9 tells of a default that is to change.
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning"),
]


@pytest.mark.skipif(INTERPRETED, reason="starts this process")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, str(Path(__file__))], env=environment, capture_output=True, text=True, check=False, timeout=800
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\b(\d\d+) passed", done.stdout), done.stdout  # they ran, and were not skipped


def both(before: Any, **changes: Any) -> None:
    """Both paths from the same blocks."""
    from hf_sai.fused import fits_fused, update_fused
    from hf_sai.kernels import update_plain

    hyper = HYPER._replace(**changes)
    fused, plain = copied(before), copied(before)
    assert all(map(fits_fused, fused))
    update_fused(fused, hyper)
    update_plain(plain, hyper)
    assert_same(fused, plain, before, hyper)


# Each pair of a parameter's, a gradient's and a momentum's dtype. Only bfloat16 is ever rounded stochastically.
DTYPES_OF_A_BLOCK = [
    (p, DTYPES[(i + k) % 3], m, stochastic)
    for i, p in enumerate(DTYPES)
    for k, m in enumerate((*MOMENTUM_DTYPES, torch.float16))
    for stochastic in ((False, True) if torch.bfloat16 in (p, m) else (False,))
]


@interpreted
@pytest.mark.parametrize(("p_dtype", "g_dtype", "m_dtype", "stochastic"), DTYPES_OF_A_BLOCK)
def test_every_dtype(p_dtype: torch.dtype, g_dtype: torch.dtype, m_dtype: torch.dtype | None, stochastic: bool) -> None:
    before = make_blocks(SHAPES, p_dtype, g_dtype, m_dtype, stochastic)
    both(before, stochastic_rounding=stochastic)


@interpreted
@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 4097, 8192, 8193])
@pytest.mark.parametrize("m_dtype", [torch.float32, torch.int8])
def test_every_size(size: int, m_dtype: torch.dtype) -> None:
    before = make_blocks([(size,)], torch.bfloat16, torch.bfloat16, m_dtype, True)
    both(before, maximize=True, stochastic_rounding=True)


@interpreted
@pytest.mark.parametrize("token_rows", [False, True])
@pytest.mark.parametrize("m_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 1), (1, 3), (130, 130), (3, 9000), (9000, 3), (2, 100, 90), (2, 90, 100), (17, 5, 7, 3)]
)
def test_the_channel_of_every_element(shape: tuple[int, ...], m_dtype: torch.dtype, token_rows: bool) -> None:
    """Rows and columns that begin anywhere in a piece or a tile, in one matrix and in several."""
    both(make_blocks([shape], m_dtype=m_dtype, factors=token_rows))


@interpreted
@pytest.mark.parametrize(("dtype", "m_dtype"), [(torch.float32, torch.float32), (torch.bfloat16, torch.int8)])
def test_a_million_elements(dtype: torch.dtype, m_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_sai.fused.PIECE", 8192)  # fewer, for the interpreter's sake
    both(make_blocks([(1000, 1000)], dtype, dtype, m_dtype, True), stochastic_rounding=True)


@interpreted
@pytest.mark.parametrize("blocks", [1, 64])
def test_all_blocks_in_one_launch_each_with_its_own_scale(blocks: int) -> None:
    both(make_blocks([(1 + i % 7,) for i in range(blocks)]))


@interpreted
def test_blocks_that_share_a_stack() -> None:
    both(make_blocks([(5,), (4, 40), (40, 4)], count=3))


@interpreted
@pytest.mark.parametrize(
    "options",
    [
        {"maximize": True},
        {"lr": torch.tensor(0.02)},
        {"weight_decay": 0.0},
        {"lr": 0.0},
        {"weight": 1.0},
        {"limit": None},
    ],
    ids=str,
)
def test_options(options: dict[str, Any]) -> None:
    both(make_blocks([(5,), (300,), (20, 30)]), **options)


@interpreted
def test_a_nan_stays_a_nan_and_infinity_is_limited() -> None:
    from hf_sai.fused import update_fused

    (block,) = make_blocks([(4,)])
    block.grads[0].copy_(torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0]))
    block.momentum.zero_()
    update_fused([block], HYPER)
    assert block.momentum[0, 0].isnan()
    assert block.momentum[0, 1:].tolist() == pytest.approx([0.15, -0.15, 0.0])


@interpreted
def test_addresses_that_allow_no_wide_loads() -> None:
    before = [
        b._replace(params=[b.params[0][1:]], grads=[b.grads[0][1:]], momentum=b.momentum[:, 1:])
        for b in make_blocks([(130,), (131,)])
    ]
    assert any(b.params[0].data_ptr() % 16 for b in before)

    def copied_there(many: Any) -> Any:  # clones would be aligned
        return [
            b._replace(
                params=[torch.cat([p[:1], p])[1:] for p in b.params],
                grads=[torch.cat([g[:1], g])[1:] for g in b.grads],
                momentum=torch.cat([b.momentum[:, :1], b.momentum], 1)[:, 1:],
            )
            for b in many
        ]

    from hf_sai.fused import update_fused
    from hf_sai.kernels import update_plain

    fused, plain = copied_there(before), copied_there(before)
    update_fused(fused, HYPER)
    update_plain(plain, HYPER)
    assert_same(fused, plain, before, HYPER)


@interpreted
def test_mixed_dtypes_in_one_call() -> None:
    both(
        [
            block
            for dtypes in ((torch.float32, torch.float32, torch.int8), (torch.bfloat16, torch.float32, torch.float32))
            for block in make_blocks([(3,), (200,)], *dtypes)
        ]
    )


@interpreted
@pytest.mark.parametrize("options", [{}, {"momentum_dtype": "int8"}, {"scaling": "raw"}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_optimizer(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """From the first step on, in any memory format, with token rows and a block whose gradient comes late."""
    from hf_sai import SGDSaI

    def make() -> list[torch.nn.Parameter]:
        torch.manual_seed(2)
        image = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
        blocks = (torch.randn(40, 10), image, torch.randn(6, 8).T, torch.randn(9), torch.randn(7, 5))
        return [torch.nn.Parameter(x.to(dtype)) for x in blocks]

    fused, plain = make(), make()
    optimizers = [
        SGDSaI(
            [{"params": params[:4]}, {"params": params[4:], "token_rows": True}],
            lr=1e-2,
            stochastic_rounding=True,
            **path,
            **options,
        )
        for params, path in ((fused, {"fused": True}), (plain, {"foreach": False}))
    ]
    first: dict[torch.Tensor, torch.Tensor] = {}
    for step in range(4):
        for i, (p, q) in enumerate(zip(fused, plain, strict=True)):
            if step or i != 1:
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
                first.setdefault(p, p.grad)
        for optimizer in optimizers:
            optimizer.step()
    for p in fused:
        expected = first[p].double()
        gsnr = expected.norm() / (expected.std() + 1e-8)
        torch.testing.assert_close(optimizers[0].state[p]["gsnr"].double(), gsnr, rtol=2e-6, atol=0)
    for p, q in zip(fused, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        mine, other = optimizers[0].state[p], optimizers[1].state[q]
        assert mine.keys() == other.keys()
        torch.testing.assert_close(mine["gsnr"], other["gsnr"], rtol=2e-6, atol=0)
        torch.testing.assert_close(mine["scale"], other["scale"], rtol=2e-6, atol=0)
        assert mine.get("rounding_step") == other.get("rounding_step")


@interpreted
def test_moments_are_those_of_float64() -> None:
    from hf_sai.fused import gradient_moments

    sizes = (1, 2, 127, 129, 8191, 8192, 8193, 50_000)
    grads = [3 * torch.randn(n).to(dtype) + offset for n in sizes for dtype in DTYPES for offset in (0, 1)]
    for g, (total, centred) in zip(grads, gradient_moments(grads), strict=True):
        exact = g.double()
        # float32 sums over 8192 elements at a time, pairwise within; float64 beyond.
        assert abs(total - exact.sum().item()) <= 16 * 2.0**-24 * exact.abs().sum().item()
        expected = ((exact - exact.mean()) ** 2).sum().item()
        assert abs(centred - expected) <= 32 * 2.0**-24 * expected + 1e-12
    # A mean far above the spread: where E[g^2] - E[g]^2 in float32 has no digit left.
    far = torch.randn(20_000).double().mul(1e-3).add(1).float()
    ((_, centred),) = gradient_moments([far])
    assert centred == pytest.approx(((far.double() - far.double().mean()) ** 2).sum().item(), rel=1e-4)


# --------------------------------------------------------------------------- compiled for a GPU that is not here


@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel cannot be compiled")
@pytest.mark.parametrize(
    ("dtypes", "wide"),
    [
        (("fp32", "fp32", "fp32"), {"ld.global.v4.b32": 6, "st.global.v4.b32": 4}),
        (("bf16", "bf16", "bf16"), {"ld.global.v4.b32": 3, "st.global.v4.b32": 2}),
        (("bf16", "bf16", "int8"), {"ld.global.v4.b32": 2, "ld.global.v2.b32": 1, "st.global.v4.b32": 1}),
    ],
)
def test_kernel_compiles_with_wide_loads(dtypes: tuple[str, ...], wide: dict[str, int], tmp_path: Path) -> None:
    """For each thread of 8 elements of p, g and m: 16 bytes a load and store wherever the tile is whole."""
    ptx = compiled("update_kernel", tmp_path, dtypes=dtypes)
    assert {name: ptx.count(name) for name in wide} == wide


@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel cannot be compiled")
def test_every_option_compiles(tmp_path: Path) -> None:
    compiled(
        "update_kernel", tmp_path, dtypes=("fp16", "fp32", "bf16"), aligned=False,
        STOCHASTIC=True, MAXIMIZE=True, LR_TENSOR=True, LIMITED=False,
    )  # fmt: skip
    compiled("update_kernel", tmp_path, dtypes=("bf16", "bf16", "bf16"), HAS_MOMENTUM=False, STOCHASTIC=True)
    assert "ld.global.v4" in compiled("moments_kernel", tmp_path, dtypes=("", "bf16", ""))
    compiled("combine_kernel", tmp_path, dtypes=("", "", ""))


def compiled(name: str, cache: Path, dtypes: tuple[str, ...], aligned: bool = True, **options: Any) -> str:
    """The PTX of a kernel for an H100 or H200; needs Triton's own assembler, no GPU."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_sai import fused, triton_kernels

    kernel = getattr(triton_kernels, name)
    names = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "int8": tl.int8, "": tl.float32}
    constants: dict[str, Any] = dict(zip(("P_DTYPE", "G_DTYPE", "M_DTYPE"), (names[d] for d in dtypes), strict=True))
    constants |= {"ALIGNED": aligned, "TILE": fused.TILE, "PIECE": fused.PIECE, "WIDTH": 256, "HAS_MOMENTUM": True}
    constants |= {"INT8": dtypes[2] == "int8", "STOCHASTIC": dtypes[0] == "bf16"}
    constants |= {"MAXIMIZE": False, "LR_TENSOR": False, "LIMITED": True, **options}
    pointers = {"table_ptr": "*i64", "tiles_ptr": "*i32", "first_tile_ptr": "*i32", "moments_ptr": "*fp64"}
    signature = {
        argument: "constexpr" if argument in constants else pointers.get(argument, "*fp32")
        if argument.endswith("_ptr") else "fp32"
        for argument in kernel.arg_names
    }  # fmt: skip
    attributes = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if a.endswith("_ptr")}
    used = {k: v for k, v in constants.items() if k in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=used, attrs=attributes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", str(cache))
        program = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": fused.WARPS})
    assert program.asm["cubin"]
    return str(program.asm["ptx"])
