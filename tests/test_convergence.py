"""A tiny GPT-2 after 50 steps on a text made here, in float64: the loss is the one that is written here.

Whoever changes the update on purpose writes the new losses, and says why in CHANGELOG.md.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_sai import SGDSaI

STEPS = 50
WORDS = ("the cat", "a dog", "one bird", "sees", "hears", "likes", "the tree", "a house", "one river")


def text(sentences: int = 400) -> torch.Tensor:
    """Sentences of subject, verb and object as characters, chosen by a linear congruence, which no library changes."""
    state, parts = 1, []
    for _ in range(sentences):
        for first in (0, 3, 6):
            state = (1103515245 * state + 12345) % 2**31
            parts.append(WORDS[first + (state >> 16) % 3])
        parts.append(".")
    return torch.tensor([ord(c) % 64 for c in " ".join(parts)])


def final_loss(make_gpt2: Callable[..., Any], make: Callable[..., torch.optim.Optimizer]) -> float:
    """The mean loss of the last five of 50 steps. Weights are drawn by sines, so that no generator matters."""
    model = make_gpt2(dtype=torch.float64).eval()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            if p.ndim > 1:
                p.copy_(0.03 * torch.sin(torch.arange(1.0, p.numel() + 1, dtype=p.dtype) * (i + 2) ** 2).view(p.shape))
    optimizer, tokens, losses = make(model.parameters()), text(), []
    for step in range(STEPS):
        batch = torch.stack([tokens[s : s + 32] for s in range(step * 97, step * 97 + 8 * 32, 32)])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-5:]) / 5


@pytest.mark.parametrize(
    ("optimizer", "expected"), [(SGDSaI, 2.424796), (torch.optim.AdamW, 2.504149)], ids=["SGD-SaI", "AdamW"]
)
def test_the_loss_after_50_steps(
    optimizer: type[torch.optim.Optimizer], expected: float, make_gpt2: Callable[..., Any]
) -> None:
    # transformers takes the loss in float32, as SGDSaI its scales: sums in another order differ by 1e-7.
    loss = final_loss(make_gpt2, lambda params: optimizer(params, lr=3e-3, weight_decay=0.0))
    assert loss == pytest.approx(expected, rel=1e-4)
