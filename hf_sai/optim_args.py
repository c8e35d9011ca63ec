"""Parses ``optim_args`` (text, JSON or a mapping) into keyword arguments of ``SGDSaI``. Errors name every mistake."""

import inspect
import json
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from numbers import Real
from typing import Any, get_args

import torch

from hf_sai.optimizer import SGDSaI
from hf_sai.options import check_group

# Param groups take these from the training arguments, so a second value here would be ignored silently.
_ELSEWHERE = {"lr": "learning_rate", "learning_rate": "learning_rate", "weight_decay": "weight_decay"}
# Keys and values of earlier versions.
_GONE = {
    "momentum_init": "scaling='adamw', the default, corrects the start of the momentum; 'raw' and 'max' start it "
    "as in the paper",
    "clip_threshold": "scaling='adamw', the default, needs no clipping by block; max_grad_norm of the training "
    "arguments clips the global norm",
    "scaling=floor": "use scaling='adamw', the default",
}
_PARAMETERS = inspect.signature(SGDSaI, eval_str=True).parameters
_DEFAULTS = {name: p.default for name, p in _PARAMETERS.items() if p.default is not p.empty}
# The valid types for each key. The last key is an action on the model, not a hyper-parameter.
_TYPES: dict[str, frozenset[Any]] = {
    name: frozenset(get_args(_PARAMETERS[name].annotation) or [_PARAMETERS[name].annotation])
    for name in _DEFAULTS
    if name not in _ELSEWHERE
} | {"release_gradients": frozenset([bool])}
_BOOL = {"true": True, "false": False}


def parse_optim_args(optim_args: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Parse ``optim_args`` into keyword arguments of :class:`SGDSaI`, each cast to its type.

    Args:
        optim_args: ``key=value`` pairs separated by commas (spaces do not matter), a JSON object as text, a mapping, or
            nothing.

    Returns:
        Only the given arguments. All others keep the defaults of :class:`SGDSaI`.

    Raises:
        ValueError: for another format, an unknown or repeated key, a key of earlier versions, or an invalid value. The
            message names the key and lists the valid keys or values.

    Example:
        >>> parse_optim_args("momentum=0.8, momentum_dtype=bfloat16")
        {'momentum': 0.8, 'momentum_dtype': torch.bfloat16}
    """
    parsed: dict[str, Any] = {}
    for key, value in _pairs(optim_args):
        if key in _ELSEWHERE:
            raise ValueError(f"optim_args cannot set {key}: set {_ELSEWHERE[key]} of the training arguments instead")
        for word in (key, f"{key}={value.lower()}"):
            if word in _GONE:
                raise ValueError(f"optim_args: {word} was removed: {_GONE[word]}")
        if key not in _TYPES:
            raise ValueError(
                f"optim_args has no key {key!r}{_did_you_mean(key, _TYPES)}; valid keys: {', '.join(_TYPES)}"
            )
        if key in parsed:
            raise ValueError(f"optim_args sets {key} twice in {optim_args!r}; remove one of them")
        parsed[key] = _cast(key, value)
    _check(parsed)
    return {key: getattr(torch, value) if _is_dtype(key, value) else value for key, value in parsed.items()}


def normalize_optim_args(optim_args: str | Mapping[str, Any] | None) -> str | None:
    """Check ``optim_args`` and return it as ``key=value`` pairs, which transformers can save, log and show.

    Raises:
        ValueError: as in :func:`parse_optim_args`.
    """
    parse_optim_args(optim_args)
    return ",".join(f"{key}={value}" for key, value in _pairs(optim_args)) or None


def _pairs(optim_args: str | Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if not optim_args:
        return []
    if isinstance(optim_args, str) and optim_args.lstrip().startswith("{"):
        try:
            pairs = json.loads(optim_args, object_pairs_hook=list)
        except ValueError as error:
            raise ValueError(
                f"optim_args begins like a JSON object but is not valid JSON: {error}, got {optim_args!r}"
            ) from None
        return [(key, _as_text(key, value)) for key, value in pairs]
    if isinstance(optim_args, Mapping):
        return [(str(key), _as_text(str(key), value)) for key, value in optim_args.items()]
    if not isinstance(optim_args, str):
        raise ValueError(f"optim_args must be a mapping or a string of key=value pairs, got {optim_args!r}")
    pairs = []
    for pair in optim_args.split(","):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (key and equals and value):
            raise ValueError(f"optim_args must be key=value pairs separated by commas, got {pair!r} in {optim_args!r}")
        pairs.append((key, value))
    return pairs


def _as_text(key: str, value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Real | torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise ValueError(f"optim_args: {key} must be a number, a word, true, false or null, got {value!r}")


def _cast(key: str, value: str) -> Any:
    types, word = _TYPES[key], value.lower()
    if type(None) in types and word == "none":
        return None
    if bool in types:
        choices = [*_BOOL, "none"] if type(None) in types else [*_BOOL]
        if word not in _BOOL:
            valid = ", ".join(choices)
            raise ValueError(f"optim_args: {key} must be one of {valid}, got {value!r}{_did_you_mean(value, choices)}")
        return _BOOL[word]
    if float in types:
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"optim_args: {key} must be a number, got {value!r}") from None
    return word


def _is_dtype(key: str, value: Any) -> bool:
    return torch.dtype in _TYPES[key] and isinstance(value, str)


def check_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for keyword arguments that :class:`SGDSaI` would refuse."""
    check_group({**_DEFAULTS, "token_rows": False, **kwargs})


def _check(parsed: Mapping[str, Any]) -> None:
    try:
        check_kwargs(parsed)
    except ValueError as error:
        rule, _, got = str(error).rpartition("got ")
        remedy = _did_you_mean(got.strip("'"), re.findall(r"\w+", rule)) if got.startswith("'") else ""
        raise ValueError(f"optim_args: {error}{remedy}") from None


def _did_you_mean(word: str, choices: Iterable[str]) -> str:
    close = get_close_matches(word.lower(), list(choices), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
