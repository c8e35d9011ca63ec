"""What a record says of versions, machine and settings; `provenance.py` makes the whole."""

import dataclasses
import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

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


def label(record: Mapping[str, Any]) -> str:
    """What names a run in a legend: optimizer, its options, learning rate."""
    config = record["config"]
    parts = [str(config.get("optim")), str(config.get("optim_args") or ""), f"lr {config.get('learning_rate'):g}"]
    return ", ".join(filter(None, parts))


def markdown_text(text: Any) -> str:
    """Plain text in Markdown: nothing in it becomes markup, and it stays on its line."""
    return re.sub(r"([\\`*\[\]<>|~$])", r"\\\1", " ".join(str(text).replace("&", "&amp;").split()))
