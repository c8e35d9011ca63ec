"""Launches the worker once for two processes and once for four; the tests assert on the numbers it wrote."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from launching import once, shared_folder, torchrun

WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the launches leave checkpoints for each other."""
    return shared_folder(tmp_path_factory) / "checkpoints"


@pytest.fixture(scope="session")
def one(checkpoints: Path) -> dict[str, Any]:
    """A run of this process alone that leaves checkpoints too."""
    from cases import build
    from worker import SUBJECTS, save_checkpoint

    output = checkpoints.with_name("1.json")

    def run() -> None:
        folder = checkpoints / "hf_sai"
        folder.mkdir(parents=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch on saving without a process group, SGDSaI on a constant gradient
            output.write_text(json.dumps(save_checkpoint(folder, 1, SUBJECTS["hf_sai"], build())))

    results: dict[str, Any] = once(output, run)
    return results


@pytest.fixture(scope="session")
def four(one: dict[str, Any], checkpoints: Path) -> dict[str, Any]:
    """What each check returned on each of four ranks, by optimizer."""
    return _launch(4, checkpoints)


@pytest.fixture(scope="session")
def two(four: dict[str, Any], checkpoints: Path) -> dict[str, Any]:
    """The same on two ranks; after `four`, whose checkpoints it loads."""
    return _launch(2, checkpoints)


@pytest.fixture(scope="session")
def saved(one: dict[str, Any], two: dict[str, Any], four: dict[str, Any]) -> dict[int, Any]:
    """The run that was saved half-way, by number of processes."""
    return {1: one, 2: two["hf_sai"]["save_sharded"][0], 4: four["hf_sai"]["save_sharded"][0]}


def _launch(processes: int, checkpoints: Path) -> dict[str, Any]:
    output = checkpoints.with_name(f"{processes}.json")
    results: dict[str, Any] = once(output, lambda: torchrun(processes, WORKER, str(output), str(checkpoints)))
    return results
