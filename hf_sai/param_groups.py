"""Param groups of a model: which parameters get weight decay, and which matrices have a row for each token.

This module needs only torch, for bare loops. The transformers integration uses the same functions.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from hf_sai.options import check_model, check_number

# Names of parameters without weight decay, the same as in transformers' Trainer.
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm($|\.)|_norm($|\.)", re.IGNORECASE)
# Output layers of models without `get_output_embeddings`, by the last part of the module's name.
_HEADS = ("lm_head", "embed_out")
# PEFT's trainable tokens are not in a module but in a ParameterDict of this name, with one row per token.
_TRAINABLE_TOKENS = "trainable_tokens_delta"


def param_groups(
    model: nn.Module,
    weight_decay: float = 1e-2,
    *,
    decay_parameters: Collection[str] | None = None,
    token_modules: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Make param groups for :class:`hf_sai.SGDSaI` in a bare loop, like those of the Trainer paths.

    A group has the keys ``params``, ``param_names``, ``weight_decay`` and ``token_rows``. Token rows are the weights of
    ``nn.Embedding`` and ``nn.EmbeddingBag``, of the module that ``get_output_embeddings()`` returns, of modules named
    ``lm_head`` or ``embed_out``, and PEFT's copies of these (``modules_to_save``) and trainable tokens. A tied weight
    is one parameter, in one group. No group is empty.

    Args:
        model: the model. Each of its parameters with ``requires_grad`` is in one group. Wrap it with PEFT first.
        weight_decay: the weight decay of tensors with two or more dimensions, in the optimizer's units (1 / lr).
            Biases, norm weights and other parameters with fewer than two dimensions have none.
        decay_parameters: names of the parameters with weight decay, instead of this rule. Names that the model lacks
            are ignored, because the Trainer's list contains every name of a tied weight.
        token_modules: names of other modules whose ``weight``, ``(tokens, features)``, has a row for each token,
            such as the untied output layer of a custom model.

    Returns:
        One to four groups, in this order: with weight decay, with weight decay and token rows, without weight decay,
        without weight decay and with token rows.

    Raises:
        ValueError: if no parameter is trained, if ``weight_decay`` is negative or not a number, or if ``token_modules``
            names anything but a module with such a weight.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
        >>> groups = param_groups(model, weight_decay=0.1)
        >>> [(group["param_names"], group["weight_decay"], group["token_rows"]) for group in groups]
        [(['1.weight'], 0.1, False), (['0.weight'], 0.1, True), (['1.bias'], 0.0, False)]
        >>> optimizer = hf_sai.SGDSaI(groups, lr=2e-4)
    """
    check_model(model)
    check_number("weight_decay", weight_decay)
    for option, names in (("decay_parameters", decay_parameters), ("token_modules", token_modules)):
        if isinstance(names, str):
            raise ValueError(f"{option} must be a collection of names, got the string {names!r}; write [{names!r}]")
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError("model has no parameter with requires_grad; unfreeze the parameters to train first")
    decayed = _decayed_names(model) if decay_parameters is None else set(decay_parameters)
    groups = [
        {"params": [p for name, p in trained if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    ]
    return split_token_rows(groups, model, token_modules)


def split_token_rows(
    params: Iterable[Any], model: nn.Module, token_modules: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Name the parameters of the groups, and put token rows in separate groups.

    Args:
        params: param groups, parameters or named parameters, as for a torch optimizer. A group with the key
            ``token_rows`` is named but not split.
        model: the model with these parameters. A parameter that the model lacks is named by its index.
        token_modules: as for :func:`param_groups`.

    Returns:
        New groups, without empty ones.

    Raises:
        ValueError: as in :func:`param_groups` for ``token_modules``.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    tokens = set(_token_rows(model, token_modules))
    groups = list(params)
    if not all(isinstance(group, Mapping) for group in groups):
        groups = [{"params": groups}]
    divided = []
    for number, group in enumerate(groups):
        members = _named(group, names, number)
        parts = (
            [(group["token_rows"], members)]
            if "token_rows" in group
            else [
                (is_tokens, [(name, p) for name, p in members if (p in tokens) == is_tokens])
                for is_tokens in (False, True)
            ]
        )
        divided += [
            {
                **group,
                "params": [p for _, p in part],
                "param_names": [name for name, _ in part],
                "token_rows": is_tokens,
            }
            for is_tokens, part in parts
            if part
        ]
    return divided


def _named(group: Mapping[str, Any], names: Mapping[Tensor, str], number: int) -> list[tuple[str, Tensor]]:
    """The parameters of a group, with the group's own names if it has them, else with the model's names."""
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    given = group.get("param_names", [None] * len(params))
    members = []
    for index, (name, p) in enumerate(zip(given, params, strict=True)):
        if isinstance(p, tuple):
            name, p = p
        members.append((name or names.get(p) or f"param_groups[{number}].params[{index}]", p))
    return members


def _decayed_names(model: nn.Module) -> set[str]:
    norms = {
        id(p)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for p in module.parameters(recurse=False)
    }
    return {
        name
        for name, p in model.named_parameters()
        if p.ndim > 1 and id(p) not in norms and not _UNDECAYED.search(name)
    }


def _token_rows(model: nn.Module, token_modules: Collection[str]) -> Iterator[Tensor]:
    for module in _modules_of_tokens(model, token_modules):
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2:
            # All matrices with one row per token. Under PEFT, these include the trained copy and LoRA's B of a head.
            yield from (p for p in module.parameters() if p.ndim == 2 and len(p) == len(weight))
    yield from (p for name, p in model.named_parameters() if f".{_TRAINABLE_TOKENS}." in f".{name}")


def _modules_of_tokens(model: nn.Module, token_modules: Collection[str]) -> Iterator[nn.Module]:
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) or name.rpartition(".")[2] in _HEADS:
            yield module
        head = _output_embeddings(module)
        if head is not None:
            yield head
    for name in token_modules:
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise ValueError(
                f"token_modules must name modules with a weight of shape (tokens, features), got {name!r}, "
                + ("which has none" if name in modules else "which the model lacks")
            )
        yield modules[name]


def _output_embeddings(module: nn.Module) -> nn.Module | None:
    find = getattr(module, "get_output_embeddings", None)
    try:
        head = find() if callable(find) else None
    except (AttributeError, NotImplementedError):  # raised by models without such a head
        return None
    return head if isinstance(head, nn.Module) else None
