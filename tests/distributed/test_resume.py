"""A run that resumes on another number of processes ends where a run on one process ends."""

import json
from pathlib import Path

import pytest
from launching import torchrun
from resume_worker import STEPS, Regression, train

from hf_sai.checkpoints import last_whole_checkpoint, why_not_whole

WORKER = Path(__file__).parent / "resume_worker.py"


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_one_to_two_to_four_to_one(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", STEPS, 1)
    folder = tmp_path / "moving"
    train(folder, 2, 1)
    for processes, stop in ((2, 4), (4, 6)):
        torchrun(processes, WORKER, str(folder), str(stop))
        assert last_whole_checkpoint(folder) == str(folder / f"checkpoint-{stop}")
        assert len(list((folder / f"checkpoint-{stop}").glob("rng_state_*.pth"))) == processes
        # The log that it took over, and its own two steps.
        assert json.loads((folder / "steps.json").read_text())[:stop] == list(range(1, stop + 1))
    moved = train(folder, STEPS, 1)
    assert moved.state.global_step == STEPS
    start = dict(Regression().named_parameters())
    for (name, p), q in zip(whole.model.named_parameters(), moved.model.named_parameters(), strict=True):
        # All is float64 but the scales, which may differ by a unit in the last place of float32.
        way = (p - start[name]).abs().max().item()
        assert way > 1e-3
        assert (p - q[1]).abs().max().item() < STEPS * 2**-23 * way, name
    (folder / "checkpoint-4" / "rng_state_1.pth").unlink()
    assert why_not_whole(folder / "checkpoint-4") == "rng_state_1.pth is missing"
