"""Launches the worker once for two processes and once for four; the tests assert on the numbers it wrote."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from launching import torchrun

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the launches leave checkpoints for each other."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def one(checkpoints: Path) -> dict[str, Any]:
    """A run of this process alone that leaves checkpoints too."""
    from cases import build
    from worker import SUBJECTS, save_checkpoint

    folder = checkpoints / "hf_sai"
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch on saving without a process group, SGDSaI on a constant gradient
        return save_checkpoint(folder, 1, SUBJECTS["hf_sai"], build())


@pytest.fixture(scope="session")
def saved(one: dict[str, Any], two: dict[str, Any], four: dict[str, Any]) -> dict[int, Any]:
    """The run that was saved half-way, by number of processes."""
    return {1: one, 2: two["hf_sai"]["save_sharded"][0], 4: four["hf_sai"]["save_sharded"][0]}


@pytest.fixture(scope="session")
def four(one: dict[str, Any], checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each check returned on each of four ranks, by optimizer."""
    return _launch(4, checkpoints, tmp_path_factory)


@pytest.fixture(scope="session")
def two(four: dict[str, Any], checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same on two ranks; after `four`, whose checkpoints it loads."""
    return _launch(2, checkpoints, tmp_path_factory)


def _launch(processes: int, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("launched") / f"{processes}.json"
    torchrun(processes, HERE / "worker.py", str(output), str(checkpoints))
    results: dict[str, Any] = json.loads(output.read_text())
    return results
