"""Configurations: one or more dataclasses, filled from a YAML file and then from the command line, which wins.

python -m recipes.e2e run.yaml --learning_rate 1e-3
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from recipes.common.errors import UserError, did_you_mean
from recipes.common.public_data import expand

RECIPES = Path(__file__).parents[1]


class _Parser(HfArgumentParser):
    def error(self, message: str) -> Any:
        # argparse would print the usage of some 150 options above the one line that matters
        raise UserError(message)


def find_config(path: str | Path) -> Path:
    """The file, or one that a job ships, by its bare name: `first_look.yaml` or `first_look`."""
    path = Path(path)
    if path.name != str(path) or path.is_file():
        return path
    shipped = RECIPES.glob(f"*/configs/**/{path.stem if path.suffix == '.yaml' else path.name}.yaml")
    return next(shipped, path)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The `key: value` lines of a YAML file (`find_config`); no tag of it can run code."""
    path = find_config(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        top: Any = yaml.compose(text, Loader=yaml.SafeLoader) if isinstance(content, dict) else None
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config file {path} must be UTF-8: {error}") from error
    # ValueError: a date such as 2020-13-45; RecursionError: thousands of brackets
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"config file {path} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"config file {path} must hold `key: value` lines, got a {type(content).__name__}")
    keys = [key.value for key, _ in top.value]
    if twice := [key for key in content if keys.count(key) > 1]:
        raise UserError(f"config file {path} has the key {twice[0]!r} twice; leave one of them out")
    return content


def parse_config(types: Any, argv: Sequence[str] | None = None, description: str | None = None) -> tuple[Any, ...]:
    """Fill dataclasses from `--config FILE.yaml` (or a first word `FILE.yaml`) and options, which win.

    YAML values pass through the same type checks as options, so `learning_rate: 1e-3` (which YAML 1.1 reads
    as a string) is a number here. An unknown key or option raises `UserError` and names the nearest known one.

    Args:
        types: a dataclass type or several; a field name must be in one of them only.
        argv: the options, `sys.argv[1:]` by default.
        description: shown by `--help`.
    """
    parser = _Parser(types, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="settings to start from; options override them")
    hints = {key: hint for kind in parser.dataclass_types for key, hint in get_type_hints(kind).items()}
    known = {action.dest for action in parser._actions} - {"help", "config"}
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--config")

    config, _ = _config_option(argv)
    from_file: list[str] = []
    for key, value in (read_yaml(config) if config else {}).items():
        if key not in known:
            raise UserError(f"config file {config}: unknown key {key!r}{did_you_mean(str(key), known)}")
        if value is not None:
            from_file += _as_options(key, value, f"config file {config}: {key}")
        elif type(None) in get_args(hints[key]):
            parser.set_defaults(**{key: None})
        else:
            raise UserError(f"config file {config}: {key} must have a value; leave the line out for the default")

    try:
        *filled, _namespace, unknown = parser.parse_args_into_dataclasses(
            from_file + argv, return_remaining_strings=True, look_for_args_file=False
        )
    except UserError:
        raise
    except ValueError as error:  # of a dataclass's own checks
        raise UserError(str(error)) from error
    if unknown:
        option = next((word for word in unknown if word.startswith("--")), unknown[0])
        name = option.lstrip("-").split("=")[0].replace("-", "_")
        raise UserError(f"unknown option {option!r}{did_you_mean(name, known)}")
    for config in filled:
        expand_data_folder(config)
    return tuple(filled)


def expand_data_folder(config: Any) -> None:
    """`$HF_SAI_DATA` in the values of a dataclass, replaced."""
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not any(isinstance(v, str) and v.startswith("$") for v in values):
            continue
        expanded = [expand(v) if isinstance(v, str) else (v, None) for v in values]
        if missing := next((reason for _, reason in expanded if reason), None):
            raise UserError(f"{spec.name}: {missing}")
        found = [path for path, _ in expanded]
        setattr(config, spec.name, found[0] if isinstance(value, str) else found)


def _as_options(key: str, value: Any, where: str) -> list[str]:
    """A value of a YAML file as command-line words that can mean nothing else."""
    if isinstance(value, dict):
        try:
            return [f"--{key}={json.dumps(value)}"]
        except (TypeError, ValueError, RecursionError) as error:  # a date, a mapping inside itself
            raise UserError(f"{where} cannot be passed on as JSON: {error}") from error
    if not isinstance(value, list):
        return [f"--{key}={value}"]
    for item in value:
        if isinstance(item, list | dict | set):
            raise UserError(f"{where} must be a flat list, got a {type(item).__name__} in it")
        if isinstance(item, str) and item.startswith("-"):
            raise UserError(f"{where}: an item must not start with '-', got {item!r}: it would be taken for an option")
    return [f"--{key}", *map(str, value)]


def _config_option(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    namespace, rest = parser.parse_known_args(argv)
    return namespace.config, rest


def config_words(config: str | Path | Mapping[str, Any] | Sequence[str]) -> list[str]:
    """A YAML file, a mapping of options, or words such as `run.yaml --seed 1`, as words for `parse_config`."""
    if isinstance(config, Mapping):
        words: list[str] = []
        for key, value in config.items():
            if isinstance(value, list | tuple):
                words += [f"--{key}", *map(str, value)]
            elif value is not None:
                words.append(f"--{key}={json.dumps(value) if isinstance(value, Mapping) else value}")
    else:
        words = [str(config)] if isinstance(config, str | Path) else list(config)
        if words and not words[0].startswith("-"):
            words = ["--config", *words]
    return words
