"""SGD-SaI for the Hugging Face stack: SGD with momentum and a scale for each channel, measured on the first gradients.

Importing this package loads only torch. A name that needs transformers, triton or matplotlib imports it on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_sai.optimizer import SGDSaI
from hf_sai.param_groups import param_groups

if TYPE_CHECKING:
    from hf_sai.callbacks import GSNRCallback
    from hf_sai.from_args import create_sgd_sai, sgd_sai_from_args
    from hf_sai.registration import register
    from hf_sai.release import release_gradients
    from hf_sai.table import gsnr_table
    from hf_sai.trainer import SaITrainer
    from hf_sai.training_args import SaITrainingArguments

__version__ = "0.1.0"

__all__ = [
    "GSNRCallback",
    "SGDSaI",
    "SaITrainer",
    "SaITrainingArguments",
    "create_sgd_sai",
    "gsnr_table",
    "param_groups",
    "register",
    "release_gradients",
    "sgd_sai_from_args",
]

_LAZY = {
    "GSNRCallback": "hf_sai.callbacks",
    "SaITrainer": "hf_sai.trainer",
    "SaITrainingArguments": "hf_sai.training_args",
    "create_sgd_sai": "hf_sai.from_args",
    "gsnr_table": "hf_sai.table",
    "register": "hf_sai.registration",
    "release_gradients": "hf_sai.release",
    "sgd_sai_from_args": "hf_sai.from_args",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
