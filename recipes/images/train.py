"""Train an image classifier from scratch: `python -m recipes.images CONFIG.yaml [--option value ...]`.

Vision transformers, ResNets and depthwise CNNs of transformers, on ImageNet, CIFAR, any folder or parquet file of
images, or scikit-learn's digits (the paper's Tables 2 and 3, Figures 5 and 10). Runs alone or under `accelerate launch
--config_file accelerate_configs/NAME.yaml`; training, resume and trackers are the Trainer's. `run` is the same
in-process, for sweeps.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.common.classifier import ClassifierArguments, read_config, summary, train_classifier
from recipes.common.errors import start_logging
from recipes.images.data import ImageArguments, load_images
from recipes.images.models import ImageModelArguments, build_model

CONFIG_TYPES = (ImageArguments, ImageModelArguments, ClassifierArguments)


def run(config: str | Path | Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """Train as `config` says and return the run's record (see `classifier.build_record`).

    May be called many times in one process: each run sets the seed and leaves nothing outside `output_dir`.

    Args:
        config: a YAML file, a mapping of options, or command-line words. Without `output_dir` nothing is written;
            with it and `save_model: false` only `record.json` and `curves.png` are.

    Raises:
        UserError: bad input; the message names the option, the rule and the remedy.
    """
    images, model, args = read_config(CONFIG_TYPES, config, __doc__)
    data = load_images(images, args.seed)
    return train_classifier(
        "images",
        lambda: build_model(model, data.image_size, data.channels, data.classes),
        data.train,
        data.validation,
        args,
        (images, model),
        {
            "train_images": len(data.train),
            "validation_images": len(data.validation),
            "classes": data.classes,
            "channels": data.channels,
            "image_size": data.image_size,
            "mean": data.mean,
            "std": data.std,
        },
    )


def main() -> None:
    start_logging()
    record = run(sys.argv[1:])
    if int(os.environ.get("RANK", "0")) == 0:  # one line, not one of each process
        print(summary(record))
