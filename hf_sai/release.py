"""Gradient release: each parameter is updated inside ``backward``, and its gradient is freed at once.

Only one parameter's gradient is in memory at a time. Full fine-tuning needs memory for the parameters, the momentum,
one gradient and the activations. There is still one optimizer, so learning-rate schedulers, ``state_dict`` and
``gsnr_table`` work as usual. The result is bitwise equal to that of ordinary steps. ``step`` only ends the step.

An update inside backward comes too early for the following:

- Gradient accumulation: the parameters would change between micro-batches. A second backward before ``step`` raises an
  error.
- Clipping by the global norm: the norm is known only after the last gradient. ``clip_grad_norm_`` finds no gradients
  and does nothing, and ``SaITrainer`` refuses ``max_grad_norm > 0``. ``scaling="adamw"`` bounds updates without
  clipping.
- DDP and FSDP: gradients are reduced over processes after they have been accumulated.
- ``GradScaler``: it knows only after the last gradient whether one has overflowed. Use bfloat16.
- ``scaling="max"``: it compares the first gradients of all blocks.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_sai.checks import block_name
from hf_sai.optimizer import SGDSaI
from hf_sai.options import check_model
from hf_sai.shards import is_dtensor


class GradientRelease:
    """Hooks that update each parameter as soon as its gradient is complete. ``remove()`` removes them.

    Args:
        optimizer: the optimizer of the model.
        model: a model that contains every parameter of the optimizer.
        track_norm: compute the global gradient norm of each backward, on the device.

    Raises:
        ValueError: for a model or parameters whose gradients are reduced over processes, ``scaling="max"``, or an
            optimizer that already releases gradients.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = SGDSaI(model.parameters(), lr=1e-3)
        >>> release = GradientRelease(optimizer, model)
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> model.weight.grad is None
        True
        >>> optimizer.step()
        >>> release.remove()
    """

    def __init__(self, optimizer: SGDSaI, model: nn.Module, *, track_norm: bool = False) -> None:
        if not isinstance(optimizer, SGDSaI):
            raise ValueError(
                f"optimizer must be an SGDSaI, got {type(optimizer).__name__}; only SGDSaI releases gradients"
            )
        check_model(model)
        if optimizer.releases_gradients:
            raise ValueError("release_gradients is already active; call remove() on its handle first")
        _check_model(optimizer, model)
        self._optimizer = optimizer
        self._track_norm = track_norm
        self._released: set[Tensor] = set()
        self._squares: list[Tensor] = []
        self._norm: Tensor | None = None
        # The hooks look up the groups on each call, because loading a state dict replaces them.
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._hook(i, j))
            for i, group in enumerate(optimizer.param_groups)
            for j, p in enumerate(group["params"])
            if p.requires_grad
        ]
        optimizer._release = self

    def remove(self) -> None:
        """Remove the hooks. Afterwards backward keeps gradients again, and ``step`` updates the parameters.

        Example:
            >>> model = torch.nn.Linear(4, 2)
            >>> optimizer = SGDSaI(model.parameters(), lr=1e-3)
            >>> release_gradients(optimizer, model).remove()
            >>> optimizer.releases_gradients
            False
        """
        for hook in self._hooks:
            hook.remove()
        if self._optimizer._release is self:
            self._optimizer._release = None

    def norm(self) -> Tensor | None:
        """The global norm of the gradients of the last backward.

        Returns:
            A float32 scalar on the device of the parameters, or None if the norm is not tracked.

        Example:
            >>> model = torch.nn.Linear(1, 1)
            >>> release = release_gradients(SGDSaI(model.parameters(), lr=1e-3), model, track_norm=True)
            >>> (3 * model(torch.ones(1, 1))).sum().backward()
            >>> release.norm()  # the gradients of weight and bias are 3
            tensor(4.2426)
        """
        if self._squares:
            device = self._squares[0].device
            self._norm = torch.stack([x.to(device) for x in self._squares]).sum().sqrt()
        return self._norm

    def clear(self) -> None:
        """Discard a backward that did not finish. Parameters that it has updated stay updated."""
        self._released.clear()
        self._squares.clear()

    def finish(self) -> None:
        """End the step.

        Raises:
            RuntimeError: under GradScaler, or for a gradient that the hooks did not see.
        """
        optimizer = self._optimizer
        for group in optimizer.param_groups:
            for j, p in enumerate(group["params"]):
                if p.grad is not None:
                    raise RuntimeError(
                        f"{block_name(group, j)} has a gradient that release_gradients did not see: it was set by "
                        "hand, or the parameter did not require one when the hooks were created; call remove(), then "
                        "release_gradients again"
                    )
        self.norm()
        self.clear()

    def _hook(self, i: int, j: int) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def release(p: Tensor) -> None:
            optimizer = self._optimizer
            if p in self._released:
                raise RuntimeError(
                    f"{block_name(optimizer.param_groups[i], j)} got a second gradient before step(): "
                    "release_gradients updates parameters inside backward, so gradients cannot be accumulated; call "
                    "step() after each backward (gradient_accumulation_steps=1), and checkpoint activations with "
                    "use_reentrant=False"
                )
            self._released.add(p)
            if self._track_norm and p.grad is not None:
                self._squares.append(torch.linalg.vector_norm(p.grad, dtype=torch.float32).square())
            optimizer._step_parameter(i, j)
            p.grad = None

        return release


def release_gradients(optimizer: SGDSaI, model: nn.Module, *, track_norm: bool = False) -> GradientRelease:
    """Update each parameter inside ``backward`` and free its gradient at once. ``step`` then only ends the step.

    Args:
        optimizer: the optimizer of the model.
        model: a model that contains every parameter of the optimizer.
        track_norm: store the global gradient norm of each backward in ``optimizer.released_norm``.

    Returns:
        A handle. Its ``remove()`` restores ordinary steps.

    Raises:
        ValueError: see :class:`GradientRelease`.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = SGDSaI(model.parameters(), lr=1e-3)
        >>> release = release_gradients(optimizer, model)
        >>> model(torch.ones(3, 4)).sum().backward()  # updates weight and bias
        >>> optimizer.step()
    """
    return GradientRelease(optimizer, model, track_norm=track_norm)


def _check_model(optimizer: SGDSaI, model: nn.Module) -> None:
    """Raise ValueError for the cases that the docstring of this module excludes."""
    held = set(model.parameters())
    for group in optimizer.param_groups:
        if group["scaling"] == "max":
            raise ValueError(
                "release_gradients does not work with scaling='max', which compares the first gradients of all "
                "blocks; use scaling='adamw' or 'raw'"
            )
        for i, p in enumerate(group["params"]):
            if p not in held:
                raise ValueError(f"release_gradients: the model does not contain {block_name(group, i)}")
            if is_dtensor(p):
                raise ValueError(_REDUCED.format(what="a sharded model (FSDP)"))
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(_REDUCED.format(what="DistributedDataParallel"))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
        if processes > 1:
            raise ValueError(_REDUCED.format(what=f"{processes} processes"))


_REDUCED = (
    "release_gradients does not work with {what}: it updates each parameter as soon as its own process has the "
    "gradient, before gradients are reduced over processes; train on one device, or without release_gradients"
)
