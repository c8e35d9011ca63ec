"""`optim_args`: what each form of it means, and every mistake named, wherever the arguments are built."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainingArguments
from ways import QUIET

from hf_sai import SaITrainingArguments, SGDSaI, sgd_sai_from_args
from hf_sai.optim_args import _TYPES, normalize_optim_args, parse_optim_args


def quiet(cls: type[TrainingArguments] = TrainingArguments, **settings: Any) -> Any:
    return cls("out", **{**QUIET, **settings})


def test_they_cover_the_optimizers_hyperparameters() -> None:
    hyperparameters = set(inspect.signature(SGDSaI).parameters) - {"params", "lr", "weight_decay"}
    # The one key that is an action on the model, not a hyper-parameter.
    assert set(_TYPES) - {"release_gradients"} == hyperparameters


CASES: list[tuple[Any, dict[str, Any], str | None]] = [
    (None, {}, None),
    ("", {}, None),
    ({}, {}, None),
    (
        "momentum=0.9,eps=1e-8,scaling=adamw,momentum_dtype=bfloat16",
        {"momentum": 0.9, "eps": 1e-8, "scaling": "adamw", "momentum_dtype": torch.bfloat16},
        "momentum=0.9,eps=1e-8,scaling=adamw,momentum_dtype=bfloat16",
    ),
    (" momentum = 0 , maximize = True ", {"momentum": 0.0, "maximize": True}, "momentum=0,maximize=True"),
    ("foreach=none,fused=false", {"foreach": None, "fused": False}, "foreach=none,fused=false"),
    ("stochastic_rounding=FALSE", {"stochastic_rounding": False}, "stochastic_rounding=FALSE"),
    ("momentum_dtype=none", {"momentum_dtype": None}, "momentum_dtype=none"),
    (
        "scaling=Max,momentum_dtype=INT8",
        {"scaling": "max", "momentum_dtype": torch.int8},
        "scaling=Max,momentum_dtype=INT8",
    ),
    (
        {"momentum": 0.9, "eps": "1e-8", "scaling": "raw", "maximize": True, "foreach": None},
        {"momentum": 0.9, "eps": 1e-8, "scaling": "raw", "maximize": True, "foreach": None},
        "momentum=0.9,eps=1e-8,scaling=raw,maximize=true,foreach=none",
    ),
    ({"momentum": np.float64(0.5)}, {"momentum": 0.5}, "momentum=0.5"),
    (
        {"momentum": 0, "momentum_dtype": torch.int8},
        {"momentum": 0.0, "momentum_dtype": torch.int8},
        "momentum=0,momentum_dtype=int8",
    ),
    (' {"momentum": 0.25, "fused": false}', {"momentum": 0.25, "fused": False}, "momentum=0.25,fused=false"),
]


@pytest.mark.parametrize(("given", "parsed", "text"), CASES)
def test_every_form_is_cast_and_kept_as_text(given: Any, parsed: dict[str, Any], text: str | None) -> None:
    found = parse_optim_args(given)
    assert found == parsed
    assert {k: type(v) for k, v in found.items()} == {k: type(v) for k, v in parsed.items()}
    assert normalize_optim_args(given) == text
    assert parse_optim_args(text) == parsed
    assert quiet(SaITrainingArguments, optim_args=given).optim_args == text


MISTAKES = [
    ("momentun=0.9", r"no key 'momentun' \(did you mean momentum\?\); valid keys: momentum, eps, scaling"),
    ("nesterov=true", "no key 'nesterov'; valid keys: momentum"),
    ({"nesterov": True}, "no key 'nesterov'; valid keys: momentum"),
    ("momentum", "must be key=value pairs separated by commas, got 'momentum' in 'momentum'"),
    ("momentum=0.9,", "must be key=value pairs separated by commas, got '' in 'momentum=0.9,'"),
    ("momentum=", "must be key=value pairs"),
    ("=0.9", "must be key=value pairs"),
    ("momentum=0.9=1", "momentum must be a number, got '0.9=1'"),
    ("momentum=high", "momentum must be a number, got 'high'"),
    ({"momentum": None}, "momentum must be a number, got 'none'"),
    ({"momentum": [0.9]}, r"momentum must be a number, a word, true, false or null, got \[0.9\]"),
    ({"scaling": " "}, "scaling must be a number, a word, true, false or null, got ' '"),
    ("momentum=1.5", r"momentum must be in \[0, 1\), got 1.5"),
    ("momentum=nan", "momentum must be in"),
    ("eps=-1e-8", "eps must be"),
    ("scaling=adam", r"scaling must be one of .*, got 'adam' \(did you mean adamw\?\)"),
    ("maximize=1", "maximize must be one of true, false, got '1'"),
    ("fused=maybe", "fused must be one of true, false, none, got 'maybe'"),
    ("momentum_dtype=bf16", r"momentum_dtype must be .*float32, bfloat16.*got 'bf16' \(did you mean bfloat16"),
    ("momentum_dtype=float64", r"momentum_dtype must be .*float32, bfloat16.*got 'float64'"),
    ("momentum=0.9,momentum=0.8", "sets momentum twice"),
    ('{"momentum": 0.9, "momentum": 0.8}', "sets momentum twice"),
    ('{"momentum": 0.9', "begins like a JSON object but is not valid JSON"),
    ("lr=0.1", "cannot set lr: set learning_rate of the training arguments instead"),
    ("weight_decay=0.1", "cannot set weight_decay: set weight_decay of the training arguments instead"),
    (["momentum=0.9"], r"must be a mapping or a string of key=value pairs, got \['momentum=0.9'\]"),
    # Words of earlier versions name what has come in their place.
    ("momentum_init=zero", "momentum_init was removed: scaling='adamw'"),
    ({"clip_threshold": 1}, "clip_threshold was removed: scaling='adamw'"),
    ("scaling=floor", "scaling=floor was removed: use scaling='adamw'"),
    ({"scaling": "Floor"}, "scaling=floor was removed: use scaling='adamw'"),
]


@pytest.mark.parametrize(("given", "message"), MISTAKES)
def test_mistakes_are_named(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sgd_sai_from_args(quiet(learning_rate=1e-3, optim_args=given))
    with pytest.raises(ValueError, match=message):
        quiet(SaITrainingArguments, optim_args=given)
    with pytest.raises(ValueError, match=message):
        quiet(SaITrainingArguments).set_optimizer(args=given)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(("given", "message"), MISTAKES)
def test_mistakes_are_named_under_register_when_the_arguments_are_built(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quiet(optim="sgd_sai", optim_args=given)
    with pytest.raises(ValueError, match=message):
        quiet().set_optimizer("sgd_sai", args=given)


@pytest.mark.usefixtures("registered")
def test_stock_arguments_keep_text_and_leave_other_optimizers_alone() -> None:
    assert quiet(optim="sgd_sai", optim_args={"momentum": 0.8, "fused": None}).optim_args == "momentum=0.8,fused=none"
    assert quiet().set_optimizer("sgd_sai", args={"momentum": 0.8}).optim_args == "momentum=0.8"
    assert quiet(optim="adamw_torch", optim_args="betas=1").optim_args == "betas=1"
