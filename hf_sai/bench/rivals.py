"""The optimizers in the comparison, each built from named parameters. Their other settings do not affect the speed."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_sai.bench.shapes import Model
from hf_sai.calibration import WINDOW
from hf_sai.optimizer import SGDSaI

Named = list[tuple[str, Tensor]]


class Rival(NamedTuple):
    """An optimizer of the comparison.

    Attributes:
        title: its name in tables.
        make: builds it from the model's shapes and the named parameters.
        in_paper: its name in the paper's tables.
        only: the only device type on which it is compared, or None for all.
        numbers: the approximate number of state values per parameter.
        settling: the number of steps before an ordinary one. SGD-SaI measures every gradient in its window.
    """

    title: str
    make: Callable[[Model, Named], Any]
    in_paper: str | None = None
    only: str | None = None
    numbers: float = 1.0
    settling: int = 0


def _of(cls: Callable[..., Any], **options: Any) -> Callable[[Model, Named], Any]:
    return lambda model, named: cls([p for _, p in named], **options)


def _sgd_sai(title: str, only: str | None = None, **options: Any) -> Rival:
    """SGD-SaI as the Trainer builds it, with embeddings as token rows."""

    def make(model: Model, named: Named) -> SGDSaI:
        tokens = [p for name, p in named if _is_embedding(name)]
        rest = [p for name, p in named if not _is_embedding(name)]
        groups: list[dict[str, Any]] = [{"params": rest}, {"params": tokens, "token_rows": True}]
        return SGDSaI([group for group in groups if group["params"]], lr=1e-4, **options)

    return Rival(f"SGD-SaI (hf_sai){title}", make, "SGD-SaI", only, settling=WINDOW + 1)


def _installed(module: str, name: str) -> Any:
    """Import a class of an optional package. Raise ImportError if the package is not installed."""
    return getattr(import_module(module), name)


def _authors(model: Model, named: Named) -> Any:
    return _installed("sgd_sai", "SGD_sai")([p for _, p in named], lr=1e-4)


def _adam_mini(model: Model, named: Named) -> Any:
    cls = _installed("adam_mini", "Adam_mini")
    return cls(named, lr=1e-4, dim=model.dim, n_heads=model.heads, verbose=False)


def _prodigy(model: Model, named: Named) -> Any:
    return _installed("prodigyopt", "Prodigy")([p for _, p in named])


def _bitsandbytes(model: Model, named: Named) -> Any:
    return _installed("bitsandbytes.optim", "AdamW8bit")([p for _, p in named], lr=1e-4)


def _torchao(model: Model, named: Named) -> Any:
    return _installed("torchao.optim", "AdamW8bit")([p for _, p in named], lr=1e-4)


class _Together:
    """Several optimizers as one, because Muon only accepts matrices."""

    def __init__(self, *optimizers: Any) -> None:
        self._optimizers = optimizers

    @property
    def state(self) -> dict[Any, Any]:
        return {p: entry for optimizer in self._optimizers for p, entry in optimizer.state.items()}

    def step(self) -> None:
        for optimizer in self._optimizers:
            optimizer.step()


def _muon(model: Model, named: Named) -> Any:
    matrices = [p for name, p in named if p.dim() == 2 and not _is_embedding(name)]
    others = [p for name, p in named if p.dim() != 2 or _is_embedding(name)]
    parts: list[Any] = [torch.optim.Muon(matrices, lr=1e-4)] if matrices else []
    return _Together(*parts, *([torch.optim.AdamW(others, lr=1e-4, fused=True)] if others else []))


def _is_embedding(name: str) -> bool:
    return any(part in name for part in ("wte", "wpe", "embed", "token", "head"))


_SGD = partial(torch.optim.SGD, lr=1e-4, momentum=0.9)

RIVALS: dict[str, Rival] = {
    "sgd_sai": _sgd_sai(""),
    # Weight decay costs time only on a CPU. The Trainer's default is no weight decay.
    "sgd_sai_no_decay": _sgd_sai(", no weight decay", only="cpu", weight_decay=0.0),
    "sgd_sai_foreach": _sgd_sai(", foreach", foreach=True),
    "sgd_sai_per_tensor": _sgd_sai(", per tensor", only="cuda", foreach=False, fused=False),
    "sgd_sai_bf16": _sgd_sai(", bfloat16 momentum", momentum_dtype="bfloat16"),
    "sgd_sai_int8": _sgd_sai(", int8 momentum", momentum_dtype="int8"),
    "sgd_sai_authors": Rival("SGD-SaI (authors' release)", _authors, "SGD-SaI"),
    "sgd_foreach": Rival("SGD momentum, foreach", _of(_SGD, foreach=True), "SGDM"),
    "sgd_fused": Rival("SGD momentum, fused", _of(_SGD, fused=True), "SGDM"),
    "adam_foreach": Rival("Adam, foreach", _of(torch.optim.Adam, lr=1e-4, foreach=True), "Adam", numbers=2),
    "adam_fused": Rival("Adam, fused", _of(torch.optim.Adam, lr=1e-4, fused=True), "Adam", numbers=2),
    "adamw_foreach": Rival("AdamW, foreach", _of(torch.optim.AdamW, lr=1e-4, foreach=True), "AdamW", numbers=2),
    "adamw_fused": Rival("AdamW, fused", _of(torch.optim.AdamW, lr=1e-4, fused=True), "AdamW", numbers=2),
    "adamw_8bit_bnb": Rival("AdamW 8-bit (bitsandbytes)", _bitsandbytes),
    # torchao compiles its step, which takes minutes on a CPU.
    "adamw_8bit_torchao": Rival("AdamW 8-bit (torchao)", _torchao, only="cuda"),
    "adafactor": Rival("Adafactor", _of(torch.optim.Adafactor, lr=1e-4)),
    "adam_mini": Rival("Adam-mini", _adam_mini, "Adam-Mini"),
    "prodigy": Rival("Prodigy", _prodigy, "Prodigy", numbers=4),
    "muon": Rival("Muon (matrices) and AdamW", _muon),
}
