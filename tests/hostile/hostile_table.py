"""The form of the table: a hostile input, the error it must give, and what must be as before afterwards."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_sai import SGDSaI


class Attempt(NamedTuple):
    """`call` must fail; what `state` returns must be equal before and after."""

    call: Callable[[], Any]
    state: Callable[[], Any] = lambda: None


class Case(NamedTuple):
    """One row of the table.

    Attributes:
        name: what is wrong.
        prepare: puts the input into an empty folder and returns the attempt.
        error: the exact type.
        says: a regular expression that the message must match: value, rule and, where there is one, remedy.
    """

    name: str
    prepare: Callable[[Path], Attempt]
    error: type[Exception]
    says: str


def listing(folder: Path) -> dict[str, str]:
    """Every file and folder below `folder`, hidden ones too, with a digest of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def frozen(value: Any) -> Any:
    """A copy that compares bit for bit: tensors as dtype, shape and bytes."""
    if isinstance(value, Tensor):
        raw = value.detach().contiguous().flatten().view(torch.uint8)
        return str(value.dtype), tuple(value.shape), bytes(raw.tolist())
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    return [frozen(item) for item in value] if isinstance(value, list | tuple) else value


def state_of(optimizer: SGDSaI) -> Any:
    """Parameters, param groups and state, to compare before and after."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return frozen([groups, params, [dict(optimizer.state[p]) if p in optimizer.state else None for p in params]])


def stepped(**options: Any) -> SGDSaI:
    """An optimizer of the blocks "a" (6 elements) and "b" (2 x 6) after one step."""
    torch.manual_seed(0)
    named = [("a", nn.Parameter(torch.randn(6))), ("b", nn.Parameter(torch.randn(2, 6)))]
    optimizer = SGDSaI(named, **options)
    for _, p in named:
        p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer


def on(optimizer: SGDSaI, act: Callable[[SGDSaI], Any]) -> Attempt:
    """An attempt on an optimizer, which must stay as it was."""
    return Attempt(lambda: act(optimizer), lambda: state_of(optimizer))


def each(
    cases: dict[str, tuple[Any, str]], prepare: Callable[[Any], Attempt], error: type[Exception]
) -> Iterator[Case]:
    """Cases of one kind: name -> (input, message)."""
    for name, (given, says) in cases.items():
        yield Case(name, lambda _, given=given: prepare(given), error, says)
