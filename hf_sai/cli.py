"""The `hf-sai` command: parses the command line, runs one of the subcommands, and reports bad input in one line.

A subcommand is a module of `hf_sai.commands` with the attributes of `Command`, listed in `COMMANDS`. The module imports
only what its arguments need. Heavy or optional imports are inside `run`.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Protocol

import hf_sai
from hf_sai.commands import bench, gsnr, score
from hf_sai.launch import main as launch


class Command(Protocol):
    """The interface of a module of `hf_sai.commands`."""

    NAME: str  # the word after `hf-sai`
    HELP: str  # one line

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None: ...

    def run(self, args: argparse.Namespace, /) -> None:
        """Print the result. For bad input, raise a ValueError or OSError with a complete message."""


COMMANDS: tuple[Command, ...] = (bench, gsnr, score)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hf-sai` and return its exit code.

    Args:
        argv: the arguments, without the program's name. None uses the arguments of the process.

    Returns:
        0 on success, 130 after Ctrl-C. 1 if the input is bad or a package is missing; then stderr has one line with the
        remedy.

    Raises:
        SystemExit: with 2 after a usage error, with 0 after `--help` and `--version`.
    """
    parser = argparse.ArgumentParser(prog="hf-sai", description="Tools for the SGD-SaI optimizer.")
    parser.add_argument("--version", action="version", version=f"hf_sai {hf_sai.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    subparsers.add_parser("launch", help="run a script or command where optim='sgd_sai' is valid", add_help=False)
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.NAME, help=command.HELP, description=command.__doc__)
        subparser.formatter_class = argparse.RawDescriptionHelpFormatter
        subparser.set_defaults(command=command)
        command.add_arguments(subparser)

    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["launch"]:
        launch(words[1:])  # errors are those of the script
        return 0
    args = parser.parse_args(words)
    chosen: Command = args.command
    try:
        chosen.run(args)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", hf_sai.__name__):
            raise
        message = f"needs the package {package}: pip install {package}"
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    except ValueError as error:
        message = str(error)
    except KeyboardInterrupt:
        return 130
    else:
        return 0
    print(f"hf-sai {chosen.NAME}: error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
