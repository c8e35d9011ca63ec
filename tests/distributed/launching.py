"""Starts a script on several processes, as a user would."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A temporary folder of this test run that all xdist workers know."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "launched"
    folder.mkdir(exist_ok=True)
    return folder


def once(output: Path, make: Callable[[], Any]) -> Any:
    """What ``output`` holds as JSON after ``make`` has written it, in whichever xdist worker came first."""
    with output.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            make()
        return json.loads(output.read_text())


def torchrun(processes: int, script: Path, *args: str, timeout: float = 280) -> None:
    """Run a script on several gloo processes of one thread each; its output is shown when it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += [str(Path(__file__).with_name("run.py")), str(script), *args]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        try:
            output, _ = run.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            run.terminate()  # not kill: torchrun then ends its workers
            output, _ = run.communicate()
    assert run.returncode == 0, f"{script.name} on {processes} processes:\n{output[-12000:]}"
