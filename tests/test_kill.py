"""A run that is killed again and again, and resumed each time, ends bitwise where one that is never killed ends."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killed_and_resumed(kills: int, tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "kill_run.py"), str(tmp_path), str(kills), "0"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=45 * kills + 700
    )
    assert done.returncode == 0, done.stderr[-8000:]
    lives = json.loads((tmp_path / "lives.json").read_text())
    assert [life["killed"] for life in lives] == [True] * kills
    # Some were killed while saving: what transformers would have resumed from is not whole.
    assert any(life["newest"] != life["whole"] for life in lives)
    assert any("kill_at_open" in life for life in lives)
    assert any("kill_after" in life for life in lives)
    final: list[dict[str, Any]] = [
        torch.load(tmp_path / run / "final.pt", weights_only=True) for run in ("whole", "killed")
    ]
    for part in ("model", "optimizer"):
        check_equal(final[0][part], final[1][part])


def check_equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            check_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        for x, y in zip(one, other, strict=True):
            check_equal(x, y)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other
