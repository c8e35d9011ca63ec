"""Initializes weights with one of the classic schemes, to show their effect on g-SNR."""

import torch
from torch import nn

SCHEMES = ("default", "xavier", "kaiming", "orthogonal")


@torch.no_grad()
def initialise(model: nn.Module, scheme: str) -> None:
    """Initialize the weights of every linear layer again, in place, with torch's random numbers.

    Embeddings, output projections tied to them, norms and biases keep their values, so the schemes differ only in the
    linear layers.

    Args:
        model: a model with ``torch.nn.Linear`` or transformers' ``Conv1D`` layers, in any floating-point dtype.
        scheme: ``"default"`` changes nothing. ``"xavier"`` and ``"kaiming"`` are normal with variance
            2 / (fan_in + fan_out) and 2 / fan_in (torch's gain for ReLU). ``"orthogonal"`` has orthonormal rows or
            columns.

    Raises:
        ValueError: for an unknown scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"the initialisation scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    if scheme == "default":
        return
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        transposed = hasattr(module, "nx") and hasattr(module, "nf")  # Conv1D stores (inputs, outputs)
        if not (isinstance(module, nn.Linear) or transposed) or module.weight in embeddings:
            continue
        weight: torch.Tensor = module.weight.T if transposed else module.weight  # type: ignore[assignment]
        if scheme == "xavier":
            nn.init.xavier_normal_(weight)
        elif scheme == "kaiming":
            nn.init.kaiming_normal_(weight, nonlinearity="relu")
        else:
            nn.init.orthogonal_(weight)
