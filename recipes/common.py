"""What every recipe shares: configuration, step times, settings for a record, files written in one piece.

A recipe's configuration is one or more dataclasses. `parse_config` fills them from a YAML file and then from the
command line, which wins: `python -m recipes.gpt2_lora_e2e --config run.yaml --learning_rate 1e-3`.
"""

import dataclasses
import difflib
import json
import logging
import math
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments

from recipes.public_data import expand


class UserError(ValueError):
    """Bad input that the message explains fully: `run_main` prints it without a traceback."""


def start_logging(level: int = logging.INFO) -> None:
    """Log to stderr. The hub's own handler writes its lines already: they do not come a second time."""
    logging.basicConfig(level=level, format="%(name)s: %(message)s")
    logging.getLogger("huggingface_hub").propagate = False


# ---------------------------------------------------------------- configuration


class _Parser(HfArgumentParser):
    def error(self, message: str) -> Any:
        # argparse would print the usage of some 150 options above the one line that matters
        raise UserError(message)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'learning_rate'?` for the nearest of `known`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


CONFIGS = Path(__file__).parent / "configs"


def find_config(path: str | Path) -> Path:
    """The file, or from any folder one of the shipped ones: `first_look.yaml`, `recipes/configs/first_look.yaml`."""
    path = Path(path)
    may_be_shipped = path.parent.parts in ((), ("recipes", "configs")) and not path.exists()
    return CONFIGS / path.name if may_be_shipped and (CONFIGS / path.name).exists() else path


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The `key: value` lines of a YAML file (`find_config`); no tag of it can run code."""
    path = find_config(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        top = yaml.compose(text, Loader=yaml.SafeLoader) if isinstance(content, dict) else None
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


def parse_config(
    types: type | Sequence[type], argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[Any, ...]:
    """Fill dataclasses from `--config FILE.yaml` (or a first word `FILE.yaml`) and options, which win.

    YAML values pass through the same type checks as options, so `learning_rate: 1e-3` (which YAML 1.1 reads
    as a string) is a number here. An unknown key or option raises `UserError` and names the nearest known one.

    Args:
        types: dataclass types; a field name must be in one of them only.
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


# ---------------------------------------------------------------- measuring


class StepTimer(TrainerCallback):
    """Times each training step (forward, backward, update; not data loading) and the optimizer's part of it.

    The first `skip` steps are kept apart: they hold allocation, warm-up of the kernels, and calibration. In a bare loop
    call `start`, `before_update`, `after_update` and `stop` around the same places.
    """

    def __init__(self, skip: int = 2):
        self.skip = skip
        self.steps: list[float] = []
        self.updates: list[float] = []

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self) -> None:
        self._start = self._now()

    def before_update(self) -> None:
        self._update = self._now()

    def after_update(self) -> None:
        self.updates.append(self._now() - self._update)

    def stop(self) -> None:
        self.steps.append(self._now() - self._start)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before_update()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def summary(self) -> dict[str, Any]:
        """Milliseconds over the steps after the first `skip`: median, quartiles, and the optimizer's median share."""
        steps = [1000 * t for t in self.steps[self.skip :]]
        updates = [1000 * t for t in self.updates[self.skip :]]
        if not steps or len(steps) != len(updates):
            return {"steps_timed": 0}
        quartiles = statistics.quantiles(steps, n=4, method="inclusive") if len(steps) > 1 else [steps[0]] * 3
        return {
            "steps_timed": len(steps),
            "step_ms": round(quartiles[1], 3),
            "step_ms_quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
            "optimizer_ms": round(statistics.median(updates), 3),
            "optimizer_share": round(statistics.median(u / s for u, s in zip(updates, steps, strict=True)), 4),
            "first_step_ms": round(1000 * self.steps[0], 3),
        }


# ---------------------------------------------------------------- what a record says (the whole: `provenance.py`)

_PACKAGES = (
    *("hf_sai", "torch", "transformers", "accelerate", "peft", "datasets", "evaluate", "tokenizers", "numpy"),
    *("diffusers", "trl", "sgd-sai", "adam-mini", "prodigyopt", "bitsandbytes", "triton"),
)


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that matter to a result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """The hardware: processor, cores, threads, memory, accelerators. Holds no host or user name."""
    described: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        described["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if torch.cuda.is_available():
        described["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return described


_ALWAYS = ("optim", "learning_rate", "weight_decay", "per_device_train_batch_size", "max_grad_norm", "seed")
# Access tokens, and names of a person's places and accounts. `push_to_hub_*` and `logging_dir` are of transformers 4.
PRIVATE = (
    *("hub_token", "push_to_hub_token"),
    *("output_dir", "logging_dir", "run_name", "hub_model_id", "push_to_hub_model_id", "push_to_hub_organization"),
    *("overwrite_output_dir", "trackio_space_id", "trackio_static_space_id", "trackio_bucket_id"),
)


def public_settings(*configs: Any) -> dict[str, Any]:
    """The settings of dataclass configs for a record: no access tokens, a path by its last part only.

    Of `TrainingArguments` only what differs from its defaults, and always the learning rate and the optimizer.
    """
    found: dict[str, Any] = {}
    for config in configs:
        for spec in dataclasses.fields(config):
            value = getattr(config, spec.name)
            value = getattr(value, "value", value)
            default = spec.default_factory() if callable(spec.default_factory) else spec.default
            default = getattr(default, "value", default)
            optional = isinstance(config, TrainingArguments) and spec.name not in _ALWAYS
            if spec.name in PRIVATE or (optional and (value == default or not value)):
                continue
            if isinstance(value, bool | int | float | str | list | dict | None):
                found[spec.name] = without_folders(value)
    return found


def without_folders(value: Any) -> Any:
    """A path as its last part, also inside a list or a mapping; anything else as it is."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if isinstance(value, str) and value:
        parts = Path(value).parts
        if os.path.isabs(value) or ".." in parts or parts[:1] == ("~",) or os.path.exists(value):
            return Path(value).name
    return value


def check_writable(option: str, folder: str | Path) -> None:
    """Try to write in a folder, or in the nearest one above it that exists: before a run, not after it. Makes nothing.

    Raises:
        UserError: nothing can be written in it.
    """
    folder = Path(folder)
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"x")
    except OSError as error:
        raise UserError(f"{option}: cannot write in {str(folder)!r} ({error.strerror}); give another folder") from error


def markdown_text(text: Any) -> str:
    """Plain text in Markdown: nothing in it becomes markup, and it stays on its line."""
    return re.sub(r"([\\`*\[\]<>|~$])", r"\\\1", " ".join(str(text).replace("&", "&amp;").split()))


def write_text(path: str | Path, text: str) -> Path:
    """`write_bytes` of UTF-8."""
    return write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file in one piece: under a temporary name in the same folder, then renamed. Folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files only their owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def finite(value: Any) -> Any:
    """JSON has no NaN or infinity: a diverged loss becomes the word."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def write_json(path: str | Path, content: Any) -> Path:
    """`write_text` of indented JSON."""
    return write_text(path, json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
