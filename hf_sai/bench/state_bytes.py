"""The size of an optimizer's state on this process."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def optimizer_state_bytes(optimizer: Any) -> int:
    """The size in bytes of the tensors in the optimizer's state on this process. Shared tensors count once.

    For a sharded tensor, the local part counts. For a quantised tensor, its component tensors count.

    Args:
        optimizer: an object with ``state`` like torch's optimizers, or accelerate's wrapper around one.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    distinct = {(t.device, t.data_ptr(), t.numel(), t.dtype): t for t in _tensors(list(optimizer.state.values()))}
    return sum(t.numel() * t.element_size() for t in distinct.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every plain tensor inside containers, sharded tensors and quantised tensors."""
    if isinstance(value, Tensor):
        if hasattr(value, "to_local"):  # DTensor
            yield from _tensors(value.to_local())
        elif hasattr(value, "__tensor_flatten__"):  # a quantised tensor is a subclass made of several tensors
            for name in value.__tensor_flatten__()[0]:
                yield from _tensors(getattr(value, name))
        else:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item)
