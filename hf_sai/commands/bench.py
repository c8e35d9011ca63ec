"""Time the steps of SGD-SaI and other optimizers on a model's shapes, in turn and in one process.

Nothing is downloaded: parameters and gradients are random numbers with the model's shapes. Optimizers whose package is
not installed are listed as such. The first figures of each optimizer are printed to stderr at once. A model's table
follows when all optimizers are measured. Its columns are:
  step ms, quartiles: the median and quartiles of a step
  first: the first step
  less alloc: the first step without the time to allocate its state (0 if allocation alone takes longer)
  state GB: the optimizer state
  peak GB: the memory that a step allocates at its peak (CUDA only)
  of copy: the share of the copy bandwidth measured in the same run
  / NAME: the step time in units of three rivals
  the paper's figures, from another machine
"""

import argparse
import platform
import sys
from importlib import metadata
from pathlib import Path

NAME = "bench"
HELP = "step time and state of optimizers on a model's shapes"

_DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", nargs="+", default=["gpt2"], metavar="NAME", help="default: gpt2; see --list")
    parser.add_argument("--optimizers", nargs="+", metavar="NAME", help="default: all; see --list")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="dtype of parameters and gradients")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: cuda if available")
    parser.add_argument("--steps", type=int, default=20, help="number of ordinary steps to time (default: 20)")
    parser.add_argument("--threads", type=int, help="number of CPU threads (default: torch's choice)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results to this file")
    parser.add_argument("--chart", metavar="FILE", type=Path, help="plot step time and state (.png, .svg, .pdf)")
    parser.add_argument("--list", action="store_true", help="list models and optimizers")


def run(args: argparse.Namespace) -> None:
    import torch

    from hf_sai.bench.measure import bench
    from hf_sai.bench.report import chart, table, write_json
    from hf_sai.bench.rivals import RIVALS
    from hf_sai.bench.shapes import MODELS, model

    if args.list:
        print("models:", ", ".join(MODELS))
        print("optimizers:")
        for key, rival in RIVALS.items():
            print(f"  {key:<20}{rival.title}")
        return
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    models = {name: model(name) for name in args.model}
    if args.threads:
        torch.set_num_threads(args.threads)
    results = []
    for name, shapes in models.items():
        results.append(
            bench(
                name,
                shapes,
                optimizers=args.optimizers or list(RIVALS),
                dtype=getattr(torch, args.dtype),
                device=device,
                steps=args.steps,
                progress=lambda text: print(f"  {text}", file=sys.stderr, flush=True),
            )
        )
        print(table(results[-1]), end="\n\n", flush=True)
    if args.json:
        write_json(args.json, results, versions=versions(), machine=platform.machine())
    if args.chart:
        chart(args.chart, results)


def versions() -> dict[str, str]:
    """The versions of Python and of the compared packages."""
    installed = {"python": platform.python_version()}
    for package in ("hf_sai", "torch", "triton", "sgd-sai", "adam-mini", "prodigyopt", "bitsandbytes", "torchao"):
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed
