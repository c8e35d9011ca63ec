"""Where a result comes from: what a record says of its run, and the digests that keep a row to its settings.

A digest is the start of a SHA-256. Data are known by their content, never by their path.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from recipes.common.errors import UserError
from recipes.common.files import finite
from recipes.common.models import resolve_model
from recipes.common.optimizers import ADAM
from recipes.common.public_data import expand
from recipes.common.records import PRIVATE, machine, public_settings, versions, without_folders
from recipes.common.sample_text import NAME as SAMPLE
from recipes.common.sample_text import sample_file
from recipes.common.smollm2 import NAME as SMOLLM2
from recipes.common.smollm2 import WHEEL_SHA256, is_converted

# Options of the recipes that name data: files, folders, names on the hub, or words such as `sample`.
DATA = ("train_files", "validation_files", "dataset", "data", "text", "model", "tokenizer")
# Options that say where a run computes and keeps things, not what it does.
PLACES = {*PRIVATE, "cache_dir", "record", "dataloader_pin_memory", "use_cpu"}
# What a run reads of a model's or a tokenizer's folder, which may hold the record of the run that made it, too.
_MODEL_FILES = (
    *("*.safetensors", "pytorch_model*.bin", "config.json", "model_index.json", "tokenizer*", "vocab*", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
)
# Settings of transformers whose default counts like one of ours.
_DECIDE = (
    *ADAM,
    *("learning_rate", "weight_decay", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "num_train_epochs"),
    *("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "label_smoothing_factor"),
    *("seed", "bf16", "fp16"),
)


# ---------------------------------------------------------------- digests


def plain(content: Any) -> Any:
    """The content as a JSON file gives it back."""
    return json.loads(json.dumps(finite(content), allow_nan=False))


def digest(content: Any) -> str:
    """Of JSON content, whatever the order of its keys: 16 digits."""
    return hashlib.sha256(json.dumps(plain(content), sort_keys=True).encode()).hexdigest()[:16]


def sealed(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with the digest of its content."""
    row = plain({key: value for key, value in row.items() if key != "digest"})
    return {**row, "digest": digest(row)}


def check_sealed(row: Mapping[str, Any], where: str) -> None:
    """Raise `UserError` where a row's content is not what its digest was taken of."""
    if sealed(row)["digest"] != row.get("digest"):
        point = ", ".join(f"{key} {value}" for key, value in (row.get("point") or {}).items())
        raise UserError(
            f"{where}: the row of {row.get('run')!r} ({point}, seed {row.get('seed')}) was edited: its digest is "
            f"{sealed(row)['digest']}, the file says {row.get('digest')}; remove the row and run the sweep again"
        )


@functools.cache
def _file_digest(path: str, size: int, changed: int) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 22):
            found.update(part)
    return found.hexdigest()[:16]


def _path_digest(path: Path, option: str) -> str:
    if path.is_file():
        state = path.stat()
        return _file_digest(str(path), state.st_size, state.st_mtime_ns)
    patterns = _MODEL_FILES if option in ("model", "tokenizer") else ("[!.]*",)
    found = {file for pattern in patterns for file in path.rglob(pattern) if file.is_file()}
    files = {file.relative_to(path).as_posix(): _path_digest(file, option) for file in found}
    return digest({name: one for name, one in files.items() if "checkpoint-" not in name})


@functools.cache
def _digits_digest() -> str:
    from sklearn.datasets import load_digits

    return hashlib.sha256(load_digits().data.tobytes()).hexdigest()[:16]


def _word_digest(option: str, word: str) -> str:
    if option == "dataset" and word == "digits":
        return _digits_digest()
    if word == SAMPLE and option in ("train_files", "text"):
        word = str(sample_file())
    elif option == "model" and word == SMOLLM2:
        word = resolve_model(word)
        if is_converted(word):  # the files that transformers writes differ with its version
            return WHEEL_SHA256[:16]
    word, missing = expand(word)
    if missing:
        raise UserError(f"{option}: {missing}")
    path = os.path.expanduser(word)
    found = [Path(name) for name in (sorted(glob.glob(path)) if glob.has_magic(path) else [path])]
    if not found or not all(one.exists() for one in found):
        return str(without_folders(word))  # a name on the hub, or `train`
    digests = [_path_digest(one, option) for one in found]
    return digests[0] if len(digests) == 1 else digest(digests)


def data_digests(options: Mapping[str, Any]) -> dict[str, str]:
    """Of each option that names data: the digest of its content, or the name of what the hub has.

    Raises:
        UserError: the folder of the data is not there.
    """
    found = {}
    for option in DATA:
        value = options.get(option)
        words = [value] if isinstance(value, str) else list(value or ())
        digests = [_word_digest(option, word) for word in words]
        if digests:
            found[option] = digests[0] if len(digests) == 1 else digest(digests)
    return found


def tokenizer_digest(tokenizer: Any) -> str | None:
    """Of a tokenizer's vocabulary and rules; None without a tokenizer."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest(tokenizer.get_vocab())
    rules = json.loads(backend.to_str())
    return digest({key: value for key, value in rules.items() if key not in ("padding", "truncation")})  # a call's


def defaults(types: Iterable[type]) -> dict[str, Any]:
    """What the recipe's dataclasses say of every option that is not given, except those of `PLACES`.

    Of transformers' own options those that decide how a run trains, and all whose default is another one here.
    """
    stock = {spec.name: spec.default for spec in dataclasses.fields(TrainingArguments)}
    found = {}
    for kind in types:
        theirs = stock if issubclass(kind, TrainingArguments) else {}
        for spec in dataclasses.fields(kind):
            default = spec.default_factory() if callable(spec.default_factory) else spec.default
            same = spec.name in theirs and default == theirs[spec.name] and spec.name not in _DECIDE
            if spec.name not in PLACES and not same and default is not dataclasses.MISSING:
                found[spec.name] = getattr(default, "value", default)
    return found


# ---------------------------------------------------------------- the optimizer


def effective_optimizer(optimizer: Any) -> dict[str, Any]:
    """Class and hyper-parameters of each param group, as the optimizer holds them; `lr` is that before the schedule.

    Of the tensors only their number.
    """
    while hasattr(optimizer, "optimizer"):  # accelerate's and DeepSpeed's wrappers
        optimizer = optimizer.optimizer
    parts = getattr(optimizer, "parts", None)  # of optimizers.Together
    if parts:
        return {"class": _name(optimizer), "parts": [effective_optimizer(part) for part in parts]}
    return {"class": _name(optimizer), "groups": [_group(group) for group in optimizer.param_groups]}


def _name(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"tensors": len(group["params"])}
    for key, value in group.items():
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, torch.dtype):
            value = str(value)
        if key not in ("params", "param_names", "initial_lr") and _is_plain(value):
            found[key] = value
    return found | ({"lr": float(group["initial_lr"])} if "initial_lr" in group else {})


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


# ---------------------------------------------------------------- the record of a run


@functools.lru_cache(maxsize=1)
def commit() -> tuple[str | None, bool | None]:
    """The commit of this code and whether the code is as committed; None where git does not know it.

    In a copy without git `HF_SAI_COMMIT` names the commit that was copied; whether it was changed since is unknown.
    """

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parents[2]), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", "recipes/common/provenance.py"
        )  # not a repository that only surrounds this code
        code = ("hf_sai", "recipes", "pyproject.toml", ":!recipes/results")
        return git("rev-parse", "HEAD"), not git("status", "--porcelain", "--", *code)
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("HF_SAI_COMMIT"), None


def command() -> str:
    """This program's command line; a path by its last part only."""
    program = Path(sys.argv[0])
    start = program.name
    if "recipes" in program.parts[:-1]:
        module = program.with_suffix("").parts[program.parts.index("recipes") :]
        start = f"-m {'.'.join(module).removesuffix('.__main__')}"
    return " ".join(["python", start, *(shlex.quote(_public_word(word)) for word in sys.argv[1:])])


def _public_word(word: str) -> str:
    option, equals, value = word.partition("=")
    return f"{option}={without_folders(value)}" if equals else str(without_folders(word))


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def _load() -> list[float] | None:
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


class Began(TrainerCallback):
    """Notes what a record says of the beginning of its run: when, on what, with which code, optimizer and tokenizer."""

    def __init__(self) -> None:
        self.started, self.load = _now(), _load()
        self.commit, self.clean = commit()
        self.optimizer: dict[str, Any] | None = None
        self.tokenizer: str | None = None
        self.device, self.resumed_at_step = "", 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note(kwargs["optimizer"], args.device, state.global_step, kwargs.get("processing_class"))

    def note(self, optimizer: Any, device: torch.device, step: int, tokenizer: Any = None) -> None:
        """For a bare loop, before its first step; `step` is that of the checkpoint from which it resumes."""
        self.resumed_at_step = step
        self.optimizer = effective_optimizer(optimizer)
        self.tokenizer = tokenizer_digest(tokenizer)
        self.device = torch.cuda.get_device_name(device) if device.type == "cuda" else machine()["cpu"]


# Of a record that was made with `Began`: what a row of a sweep takes over.
ORIGIN = (
    *("started", "finished", "resumed_at_step", "commit", "clean", "versions", "machine", "device", "load_average"),
    *("optimizer", "data_digests", "tokenizer_digest"),
)


def run_record(recipe: str, configs: Sequence[Any], began: Began | None = None, **results: Any) -> dict[str, Any]:
    """What `record.json` holds: the recipe, its settings, `results` as given, and where they come from.

    Args:
        recipe: its name.
        configs: its dataclasses.
        began: of a run that trains; without it the record says nothing of the optimizer and the data.
        results: of the run.
    """
    commits = (began.commit, began.clean) if began else commit()
    start: dict[str, Any] = {}
    if began:
        options = {spec.name: getattr(config, spec.name) for config in configs for spec in dataclasses.fields(config)}
        start = {
            "started": began.started,
            "resumed_at_step": began.resumed_at_step,
            "optimizer": began.optimizer,
            "data_digests": data_digests(options),
            "tokenizer_digest": began.tokenizer,
            "device": began.device,
        }
    return {
        "recipe": recipe,
        "command": command(),
        "config": public_settings(*configs),
        **results,
        **start,
        "finished": _now(),
        "commit": commits[0],
        "clean": commits[1],
        "load_average": {"start": began.load, "end": _load()} if began else {"end": _load()},
        "machine": machine(),
        "versions": versions(),
    }


def origins(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line that names the commits, versions and machines of rows where these are several; else empty."""
    commits = {f"{(row['commit'] or 'unknown')[:7]}{'' if row['clean'] else ' with changes'}" for row in rows}
    machines = {json.dumps({**row["machine"], "torch_threads": None}, sort_keys=True): row["device"] for row in rows}
    packages = {name for row in rows for name in row["versions"]}
    several = {name: sorted({row["versions"].get(name, "none") for row in rows}) for name in sorted(packages)}
    parts = [
        *([f"{len(commits)} commits ({', '.join(sorted(commits))})"] if len(commits) > 1 else []),
        *(f"{name} {' and '.join(found)}" for name, found in several.items() if len(found) > 1),
        *([f"{len(machines)} machines ({', '.join(sorted(machines.values()))})"] if len(machines) > 1 else []),
    ]
    return f"Rows of {'; '.join(parts)}." if parts else ""
