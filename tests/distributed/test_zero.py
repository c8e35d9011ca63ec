"""DeepSpeed on two processes: ZeRO 1 and 2 give each block its own g-SNR, ZeRO 3 is refused."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    BATCH,
    LENGTH,
    batch,
    build,
    largest_difference,
    largest_error_of_scales,
    scales,
    settings,
    weights,
)
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


def one_process(scaling: str) -> tuple[dict[str, float], dict[str, list[float]], dict[str, list[float]], float]:
    """g-SNR, scales, weights and their tolerance, of the same training without DeepSpeed."""
    model = build()
    groups = {"token_rows": scaling == "adamw"}, {}, {"weight_decay": 0.0}
    tokens, *rest = sorted(model.named_parameters(), key=lambda pair: pair[0] != "embed.weight")
    parts = [[tokens], rest[:5], rest[5:]]
    given: Any = [{"params": part, **group} for part, group in zip(parts, groups, strict=True)]
    one_group = [{"params": list(model.parameters()), "weight_decay": 0.0}]
    optimizer = SGDSaI(one_group if scaling == "max" else given, **settings(scaling))
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
    return {row.name: row.gsnr for row in gsnr_table(optimizer, model)}, scales(model, optimizer), start, tolerance


@pytest.mark.filterwarnings("ignore:SGDSaI.*constant first gradient:UserWarning")
@pytest.mark.parametrize("scaling", ["adamw", "raw", "max"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_numbers_of_one_process(ranks: list[dict[str, Any]], stage: int, scaling: str) -> None:
    """Groups, clipped, blocks that straddle two partitions, blocks calibrated at steps 1, 2 and 13."""
    gsnr, scale, expected, tolerance = one_process(scaling)
    assert min(gsnr.values()) > 0
    for rank in ranks:
        found = rank[f"{stage}_{scaling}"]
        assert found["gsnr"] == pytest.approx(gsnr, rel=1e-6)
        assert largest_error_of_scales(found["scale"], scale) < 1e-6
        assert largest_difference(found["weights"], expected) < tolerance
        assert found == ranks[0][f"{stage}_{scaling}"]


@pytest.mark.parametrize("which", ["0_bf16", "1_bf16", "2_bf16", "1_bf16_sums_in_float32"])
def test_bf16(ranks: list[dict[str, Any]], which: str) -> None:
    """The g-SNR of bf16 gradients differs from that of float32 ones by their rounding, not by mixed-up blocks."""
    gsnr, *_ = one_process("adamw")
    for rank in ranks:
        # By value: stage 0 steps float32 copies, which the model does not name.
        found = sorted(rank[which]["gsnr"].values())
        assert found == pytest.approx(sorted(gsnr.values()), rel=8 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("stage", [1, 2])
def test_resumed_bitwise(ranks: list[dict[str, Any]], stage: int) -> None:
    for rank in ranks:
        assert rank[f"{stage}_resumed"]["resumed"] == rank[f"{stage}_resumed"]["whole"]
        assert rank[f"{stage}_resumed"]["whole"]["weights"] == rank[f"{stage}_adamw"]["weights"]


def test_stage_3_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "partitioned by DeepSpeed ZeRO 3" in rank["3"]["error"]
        assert "use FSDP2" in rank["3"]["error"]


def test_max_over_groups_is_refused(ranks: list[dict[str, Any]]) -> None:
    """ZeRO steps one group after the other: no group knows the largest g-SNR of the others."""
    for rank in ranks:
        assert "scaling='max' compares the blocks of all groups" in rank["max_in_groups"]["error"]
        assert "use one param group" in rank["max_in_groups"]["error"]
