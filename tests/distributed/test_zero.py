"""DeepSpeed on two processes: ZeRO 1 and 2 give each block its own g-SNR, ZeRO 3 is refused."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BATCH, LENGTH, batch, build, largest_difference, settings, weights
from launching import once, shared_folder, torchrun

from hf_sai import SGDSaI, gsnr_table

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
    pytest.mark.distributed,
]

STEPS, CLIP = 20, 0.05


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each configuration of DeepSpeed gave on each of two ranks."""
    folder = shared_folder(tmp_path_factory)
    output, script = folder / "zero.json", Path(__file__).with_name("zero_worker.py")
    results: list[dict[str, Any]] = once(output, lambda: torchrun(2, script, str(output), str(folder / "zero")))
    return results


def one_process(scaling: str) -> tuple[dict[str, float], dict[str, list[float]], float]:
    """g-SNR, weights and their tolerance, of the same training without DeepSpeed."""
    model = build()
    named = list(model.named_parameters())
    groups = [{"params": named[:6]}, {"params": named[6:], "weight_decay": 0.0}]
    optimizer = SGDSaI(groups, **settings(scaling))
    path, start = 0.0, weights(model)
    for step in range(STEPS):
        tokens, targets = batch(step)
        optimizer.zero_grad()
        (model(tokens, use_late=step >= 12) - targets).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        path, start = path + largest_difference(weights(model), start), weights(model)
    largest = max(abs(x) for values in start.values() for x in values)
    tolerance = torch.finfo(torch.float32).eps * (STEPS * largest + BATCH * LENGTH * path)
    return {row.name: row.gsnr for row in gsnr_table(optimizer, model)}, start, tolerance


@pytest.mark.filterwarnings("ignore:SGDSaI.*constant first gradient:UserWarning")
@pytest.mark.parametrize("scaling", ["raw", "max", "adamw", "floor", "clip"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_numbers_of_one_process(ranks: list[dict[str, Any]], stage: int, scaling: str) -> None:
    """Two groups, clipped, blocks that straddle two partitions, blocks calibrated at steps 1, 2 and 13."""
    gsnr, expected, tolerance = one_process(scaling)
    assert min(gsnr.values()) > 0
    for rank in ranks:
        found = rank[f"{stage}_{scaling}"]
        assert found["gsnr"] == pytest.approx(gsnr, rel=1e-6)
        assert largest_difference(found["weights"], expected) < tolerance
        assert found == ranks[0][f"{stage}_{scaling}"]


@pytest.mark.filterwarnings("ignore:SGDSaI.*constant first gradient:UserWarning")
@pytest.mark.parametrize("which", ["0_bf16", "1_bf16", "2_bf16", "1_bf16_sums_in_float32"])
def test_bf16(ranks: list[dict[str, Any]], which: str) -> None:
    """The g-SNR of bf16 gradients differs from that of float32 ones by their rounding, not by mixed-up blocks."""
    gsnr, _, _ = one_process("adamw")
    for rank in ranks:
        # In order: stage 0 steps float32 copies, which the model does not name.
        found = list(rank[which]["gsnr"].values())
        assert found == pytest.approx(list(gsnr.values()), rel=8 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("stage", [1, 2])
def test_resumed_bitwise(ranks: list[dict[str, Any]], stage: int) -> None:
    for rank in ranks:
        assert rank[f"{stage}_resumed"]["resumed"] == rank[f"{stage}_resumed"]["whole"]
        assert rank[f"{stage}_resumed"]["whole"]["weights"] == rank[f"{stage}_adamw"]["weights"]


def test_stage_3_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "partitioned by DeepSpeed ZeRO 3" in rank["3"]["error"]
        assert "use FSDP2" in rank["3"]["error"]
