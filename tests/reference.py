"""The default rule in float64, one block at a time and as plainly as it can be written: the twin of SGDSaI."""

import torch
from torch import Tensor


def scale_of_elements(state: dict[str, Tensor]) -> Tensor:
    """What each element of a block's gradient is multiplied by, in float64; broadcasts against the block."""
    scale, columns = state["scale"].double(), state.get("column_scale")
    return scale if columns is None else scale * columns.double() * columns.double().pow(-2).mean().sqrt()


class Reference:
    """``SGDSaI(scaling="adamw")`` for one tensor; ``token_rows`` as in a param group."""

    def __init__(self, p: Tensor, lr: float, momentum: float, weight_decay: float, token_rows: bool = False) -> None:
        self.p, self.lr, self.momentum, self.weight_decay = p.double().clone(), lr, momentum, weight_decay
        self.token_rows, self.count, self.m = token_rows, 0, torch.zeros_like(self.p)
        matrix = self.p.flatten(1) if p.dim() > 1 else self.p.view(1, -1)
        self.dim = 1 if p.dim() <= 2 or matrix.shape[0] >= matrix.shape[1] else 0
        self.shape, self.rms = matrix.shape, torch.zeros_like(matrix.sum(self.dim, keepdim=True))
        self.columns = torch.zeros_like(matrix.sum(0, keepdim=True))

    def step(self, grad: Tensor, number: int) -> None:
        """The optimizer's step ``number``, from 1."""
        g = grad.double().view(self.shape)
        if not self.count and not g.any():
            self.p *= 1 - self.lr * self.weight_decay
            return
        early, usable = self.count < 60, bool(g.any())
        self.count += early and usable
        if (early and usable) or (number % 10 == 0 and (usable or not early)):
            self.rms = self._average(self.rms, g.square().mean(self.dim, keepdim=True).sqrt())
            self.columns = self._average(self.columns, g.square().mean(0, keepdim=True).sqrt())
        t = self.count if usable and early and self.count < 60 else None
        weight = 1 - self.momentum if t is None else (1 - self.momentum) / (1 - self.momentum**t)
        u = g / (self.rms + 1e-8)
        if self.p.dim() == 2:
            u = u / self.columns * self.columns.square().mean().sqrt()
        limit = 30 if self.token_rows else 2
        u = u.clamp(-limit, limit).view_as(self.p)
        self.m += weight * (u - self.m)
        self.p *= 1 - self.lr * self.weight_decay
        self.p -= self.lr * self.m

    def _average(self, mean: Tensor, rms: Tensor) -> Tensor:
        """Zeros count in token rows; elsewhere the first one that is not zero is the mean."""
        seen = (mean > 0) | self.token_rows
        average = torch.where(seen, mean + (rms - mean) / self.count, rms)
        return average if self.token_rows else torch.where(rms > 0, average, mean)
