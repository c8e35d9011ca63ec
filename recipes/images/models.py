"""transformers' image classifiers with fresh weights, by the names of the paper's sizes, each changeable by options."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, ResNetForImageClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from recipes.common.errors import UserError, did_you_mean
from recipes.images.cells import CELLS, CellConfig

# Name -> transformers' model type and what differs from its defaults.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_s16": ("vit", {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "patch_size": 16}),
    "vit_h14": (
        "vit",
        {
            "hidden_size": 1280,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "intermediate_size": 5120,
            "patch_size": 14,
        },
    ),
    "vit_small_images": (  # 0.2 M parameters; patches of 4 pixels: 64 of them in an image of CIFAR
        "vit",
        {
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "patch_size": 4,
        },
    ),
    "resnet18": (
        "resnet",
        {
            "layer_type": "basic",
            "depths": [2, 2, 2, 2],
            "embedding_size": 64,
            "hidden_sizes": [64, 128, 256, 512],
        },
    ),
    "resnet18_thin": (  # a quarter of the width, 0.7 M parameters
        "resnet",
        {
            "layer_type": "basic",
            "depths": [2, 2, 2, 2],
            "embedding_size": 16,
            "hidden_sizes": [16, 32, 64, 128],
        },
    ),
    "convnext_tiny": ("convnext", {}),
    "convnext_small_images": (  # depthwise 7x7 convolutions
        "convnext",
        {"patch_size": 2, "num_stages": 3, "depths": [2, 2, 2], "hidden_sizes": [32, 64, 128]},
    ),
}
SMALL_IMAGE = 64  # pixels; below it a ResNet starts with one 3x3 convolution and no pooling, as is usual for CIFAR


@dataclass
class ImageModelArguments:
    """The model."""

    model: str = field(
        default="vit_s16", metadata={"help": f"One of {', '.join(MODELS)}, or cell_N (recipes/images/cells.py)."}
    )
    model_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Fields of transformers' configuration, as JSON, instead of the model's."}
    )

    def __post_init__(self) -> None:
        if self.model not in MODELS and _cell(self.model) is None:
            near = did_you_mean(self.model, MODELS)
            raise UserError(
                f"model must be one of {', '.join(MODELS)}, or cell_N with N below {CELLS}, got {self.model!r}{near}"
            )
        if isinstance(self.model_options, str):
            try:
                self.model_options = json.loads(self.model_options)
            except json.JSONDecodeError as error:
                raise UserError(f"model_options must be JSON, got {self.model_options!r} ({error})") from error
        if not isinstance(self.model_options, dict | None):
            raise UserError(f"model_options must map names to values, got {self.model_options!r}")


def _cell(name: str) -> int | None:
    """The number in `cell_N`; None for another name and for a number that no cell has."""
    word, _, number = name.partition("_")
    return int(number) if word == "cell" and number.isdecimal() and int(number) < CELLS else None


class SmallImageResNet(ResNetForImageClassification):
    """A ResNet whose stem keeps the size of the image: one 3x3 convolution of stride 1, no pooling.

    `SmallImageResNet.from_pretrained(folder)` loads it back; transformers' own class would miss the stem.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        stem: Any = self.resnet.embedder
        stem.embedder.convolution = nn.Conv2d(
            config.num_channels, config.embedding_size, kernel_size=3, padding=1, bias=False
        )
        self._init_weights(stem.embedder.convolution)
        stem.pooler = nn.Identity()


def build_model(options: ImageModelArguments, image_size: int, channels: int, classes: int) -> PreTrainedModel:
    """The model with fresh weights from torch's random state.

    Args:
        options: name and changes.
        image_size: side in pixels.
        channels: 1 or 3.
        classes: number of labels.

    Raises:
        UserError: an option that the model's configuration does not have or cannot take, an image size that it
            cannot cut into patches.
    """
    kind, chosen = MODELS.get(options.model) or (CellConfig.model_type, {"cell": _cell(options.model)})
    default = CONFIG_MAPPING[kind]()
    given: Any = options.model_options or {}
    for key in given:
        if not hasattr(default, key):
            near = did_you_mean(key, default.to_dict())
            raise UserError(f"model_options: {options.model} has no option {key!r}{near}")
    fields = {**chosen, **given, "num_channels": channels, "num_labels": classes}
    if hasattr(default, "image_size"):
        fields["image_size"] = image_size
    try:
        config = AutoConfig.for_model(kind, **fields)
        _check_size(config, image_size)
        if kind == "resnet" and image_size < SMALL_IMAGE:
            model: PreTrainedModel = SmallImageResNet(config)
        else:
            model = AutoModelForImageClassification.from_config(config)
    except UserError:
        raise
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UserError(f"model_options: {error}") from error
    if any(_overruns(module) for module in model.modules()):
        raise UserError(
            f"model_options: {options.model} halves an image of fewer than 8 channels by a 1x1 convolution, whose "
            "backward on a CPU writes past its memory (oneDNN 3.12); give embedding_size and hidden_sizes of at least 8"
        )
    # the layout that convolutions are fastest in, on GPUs and on CPUs; it changes no value
    channels_last: PreTrainedModel = model.to(memory_format=torch.channels_last)  # type: ignore[call-arg]
    return channels_last


def _overruns(module: nn.Module) -> bool:
    """Whether oneDNN may write past the end of a buffer in this layer's backward, which ends the process later."""
    if not isinstance(module, nn.Conv2d):
        return False
    return module.kernel_size == (1, 1) and module.stride != (1, 1) and module.in_channels < 8


def _check_size(config: Any, image_size: int) -> None:
    patch = getattr(config, "patch_size", None)
    if patch is None:
        return
    unit = patch * 2 ** (config.num_stages - 1) if config.model_type == "convnext" else patch
    if image_size % unit:
        what = "patch_size and the halvings of its stages" if unit != patch else "patch_size"
        raise UserError(
            f"image_size must be a multiple of {unit} ({what}), got {image_size}: "
            "give another image_size, or another patch_size in model_options"
        )
