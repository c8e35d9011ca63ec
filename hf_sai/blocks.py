"""The kind of each block of a model (attention, MLP, norm, embedding and so on) and its layer.

The paper's Figure 3 groups blocks in this way. The module type usually determines the kind. If it does not, the kind
follows from the module names of transformers, PEFT and timm.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

# In the order of tables and figures.
KINDS = (
    "embedding",
    "position embedding",
    "attention qkv",
    "attention out",
    "mlp in",
    "mlp out",
    "LoRA A",
    "LoRA B",
    "norm",
    "bias",
    "head",
    "convolution",
    "other",
)
# Modules that compute queries, keys or values, by the last part of their names.
_QKV = re.compile(
    r"w?qkv|[qkv]|w[qkv]|c_attn|q_attn|query|key|value|query_key_value|in_proj|to_[qkv]|.*[qkv]_(proj|lin)"
)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_HEAD = re.compile(r"(lm_|embed_|mlm_)?head|score|classifier|cls")
# For square matrices and stacked experts, whose shape does not show the kind.
_MLP_IN = re.compile(
    r"c_fc|fc1|fc_in|lin1|linear1|up_proj|gate_proj|gate_up_proj|wi(_\d+)?|w1|w3|dense_h_to_4h|intermediate"
)
_POSITIONS = re.compile(r"wpe|pos", re.IGNORECASE)


class BlockName(NamedTuple):
    """One parameter of a model.

    Attributes:
        name: its name in the model, without the prefix of ``torch.compile``.
        kind: one of ``KINDS``.
        layer: the number of its layer, or ``None`` outside the layers.
    """

    name: str
    kind: str
    layer: int | None


def block_names(model: nn.Module) -> dict[Tensor, BlockName]:
    """The name, kind and layer of every parameter, in the model's order. A tied parameter has its first name.

    Args:
        model: the model. It may be compiled or wrapped for data parallelism.
    """
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or _is_engine(model):
        model = model.module  # type: ignore[assignment]
    return {p: _describe(name, p, module) for name, p, module in _owned(model)}


def _is_engine(model: nn.Module) -> bool:
    return type(model).__module__.partition(".")[0] == "deepspeed"


def _owned(model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module]]:
    """Every parameter with its name and the module that holds it."""
    modules = dict(model.named_modules())
    for name, p in model.named_parameters():
        yield name.replace("_orig_mod.", ""), p, modules[name.rpartition(".")[0]]


def _describe(name: str, p: Tensor, module: nn.Module) -> BlockName:
    parts = name.split(".")
    layer = next((int(part) for part in parts if part.isdecimal()), None)
    return BlockName(name, _kind(parts, p, module, layer), layer)


def _kind(parts: list[str], p: Tensor, module: nn.Module, layer: int | None) -> str:
    if {"lora_A", "lora_embedding_A"} & set(parts):
        return "LoRA A"
    if {"lora_B", "lora_embedding_B"} & set(parts):
        return "LoRA B"
    path, leaf = [part for part in parts[:-1] if part != "base_layer"], parts[-1]  # PEFT's name of a wrapped layer
    if "bias" in leaf:
        return "bias"
    if "norm" in type(module).__name__.lower():
        return "norm"
    if isinstance(module, nn.Embedding):
        return "position embedding" if _POSITIONS.search(path[-1] if path else "") else "embedding"
    if _POSITIONS.match(leaf):
        return "position embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    if p.dim() < 2:
        return "other"
    # A direct parameter, such as torch's in_proj_weight or a stack of experts, has the module's role in its own name.
    own = leaf.removesuffix("_weight") if leaf != "weight" else path[-1] if path else ""
    if any(_ATTENTION.search(part) for part in (path if leaf != "weight" else path[:-1])):
        return "attention qkv" if _QKV.fullmatch(own) else "attention out"
    if own in ("gate", "router"):  # the router of a mixture of experts
        return "other"
    if layer is None:
        return "head" if _HEAD.fullmatch(own) else "other"
    inputs, outputs = _features(module)
    if inputs == outputs:
        return "mlp in" if any(_MLP_IN.fullmatch(part) for part in (own, *path[-2:-1])) else "mlp out"
    return "mlp in" if inputs < outputs else "mlp out"


def _features(module: nn.Module) -> tuple[int, int]:
    """The inputs and outputs of a linear layer of torch or transformers (``Conv1D``), or (0, 0) for other modules."""
    if hasattr(module, "nx") and hasattr(module, "nf"):
        return int(module.nx), int(module.nf)  # type: ignore[arg-type]
    return int(getattr(module, "in_features", 0)), int(getattr(module, "out_features", 0))
