"""Runs a script as `python SCRIPT` does and leaves without the interpreter's exit.

During that exit a thread of gloo that still holds a tensor can ask for the interpreter; Python ends the thread, and
C++ aborts the process ("terminate called without an active exception"), once in some hundred launches.

torchrun --nproc-per-node N run.py SCRIPT [ARGS]
"""

import os
import runpy
import sys

import torch.distributed as dist

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
    if dist.is_initialized():
        dist.barrier()  # no process leaves while another still talks to it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
