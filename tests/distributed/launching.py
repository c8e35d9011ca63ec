"""Starts a script on several processes, as a user would."""

import os
import subprocess
import sys
from pathlib import Path


def torchrun(processes: int, script: Path, *args: str, timeout: float = 280) -> None:
    """Run a script on several gloo processes of one thread each; its output is shown when it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += [str(script), *args]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        try:
            output, _ = run.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            run.terminate()  # not kill: torchrun then ends its workers
            output, _ = run.communicate()
    assert run.returncode == 0, f"{script.name} on {processes} processes:\n{output[-12000:]}"
