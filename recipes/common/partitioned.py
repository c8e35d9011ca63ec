"""The optimizer of the partitioning study: the rule of SGD-SaI with blocks of any size that share a scale.

It is as short as it can be, for models that one process holds whole; `hf_sai.SGDSaI` is the one to train with.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from hf_sai import param_groups
from hf_sai.blocks import block_names
from recipes.common.errors import UserError

# What shares a scale, from everything to nothing. A convolution is the matrix (outputs, inputs x kernel), a vector is a
# block; so is a matrix that belongs to no head or to no layer. channel: the indices of a matrix's longer dimension.
PARTITIONS = ("model", "layer", "tensor", "head", "channel", "row_column", "element")
_EPS = 1e-8
# By the names of GPT-2, Llama and ViT: what makes queries, keys and values, and what stands after attention.
_HEADS_OUT = re.compile(r"\.(c_attn|[qkv]_proj|query|key|value)\.")
_HEADS_IN = re.compile(r"attn\.(c_proj|o_proj)\.|attention\.(o_proj|output\.dense)\.")

# How a tensor falls into blocks: the shape that it is viewed in, and for each factor of the scale the dimensions of
# the view that it is averaged over.
Layout = tuple[tuple[int, ...], list[tuple[int, ...]]]


class Partitioned(Optimizer):
    """Momentum of gradients that are divided by the root mean square of their block.

    The root mean square is averaged over the first `window` usable gradients of a block and then stays; with `running`
    it follows, with a memory of as many gradients. Token rows, momentum and decay are as in `docs/method.md`; all
    elements have one bound.

    Args:
        model: its parameters with `requires_grad` are trained.
        lr: in AdamW's units.
        weight_decay: of matrices and larger tensors.
        partition: one of `PARTITIONS`.
        running: measure in every step, not only in the first `window`.
        momentum: in [0, 1).
        window: in gradients.
        bound: of a scaled element's absolute value.

    Raises:
        UserError: an unknown partition, or `head` for a model whose configuration has no heads.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        weight_decay: float = 0.0,
        *,
        partition: str = "row_column",
        running: bool = False,
        momentum: float = 0.9,
        window: int = 60,
        bound: float = 30.0,
    ) -> None:
        if partition not in PARTITIONS:
            raise UserError(f"optim_args: partition must be one of {', '.join(PARTITIONS)}, got {partition!r}")
        names = block_names(model)
        heads = _head_dimensions(model) if partition == "head" else {}
        self._layouts = {p: _layout(p, partition, heads.get(p)) for p in names}
        shared = {p: names[p].layer if partition == "layer" else 0 if partition == "model" else None for p in names}
        options = {"lr": lr, "running": running, "momentum": momentum, "window": window, "bound": bound}
        super().__init__(param_groups(model, weight_decay), options)
        self._blocks: dict[Any, list[Tensor]] = {}
        for p in (p for group in self.param_groups for p in group["params"]):
            self._blocks.setdefault(p if shared[p] is None else shared[p], []).append(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. A tensor whose gradient is all zero keeps its scale and its momentum."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Those of now: `load_state_dict`, which accelerate calls as it prepares an optimizer, replaces the groups.
        groups = {p: group for group in self.param_groups for p in group["params"]}
        for members in self._blocks.values():
            usable = [(p, p.grad, groups[p]) for p in members if p.grad is not None and bool(p.grad.any())]
            if usable:
                self._accumulate(self.state[members[0]], usable)
            for p in members:
                if p.grad is not None and "momentum" in self.state[p]:
                    p.mul_(1 - groups[p]["lr"] * groups[p]["weight_decay"])
                    p.sub_(groups[p]["lr"] * self.state[p]["momentum"])
        return loss

    def _accumulate(self, block: dict[str, Any], usable: list[tuple[Tensor, Tensor, dict[str, Any]]]) -> None:
        """Take the gradients of a block into its scale, and scaled into the momentum of each tensor."""
        group = usable[0][2]
        block["step"] = t = block.get("step", 0) + 1
        measuring = group["running"] or t <= group["window"]
        measured = self._measure([(p, grad) for p, grad, _ in usable])
        means = block.get("rms") or [torch.zeros_like(rms) for rms in measured]
        weight = 1 / min(t, group["window"]) if measuring else 0.0
        block["rms"] = [
            torch.where((mean > 0) | (group["token_rows"] and measuring), mean + weight * (rms - mean), rms)
            for mean, rms in zip(means, measured, strict=True)
        ]
        first, *second = block["rms"]
        scale = 1 / (first + _EPS)
        for columns in second:
            scale = scale / (columns + _EPS) * columns.square().mean().sqrt()
        for p, grad, own in usable:
            state = self.state[p]
            scaled = (scale * grad.reshape(self._layouts[p][0])).clamp_(-own["bound"], own["bound"])
            mean = state.setdefault("momentum", torch.zeros_like(p))
            mean.lerp_(scaled.view_as(p), (1 - own["momentum"]) / (1 - own["momentum"] ** t))

    def _measure(self, usable: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """The root mean square of a block, or of each block of a tensor; of rows and columns two."""
        if len(usable) > 1:
            squares = torch.stack([grad.square().sum() for _, grad in usable]).sum()
            return [(squares / sum(grad.numel() for _, grad in usable)).sqrt().view(1)]
        p, grad = usable[0]
        shape, factors = self._layouts[p]
        squares = grad.reshape(shape).square()
        return [(squares.mean(dims, keepdim=True) if dims else squares).sqrt() for dims in factors]


def _layout(p: Tensor, partition: str, head: tuple[int, int] | None) -> Layout:
    """The blocks of a tensor; `head`: the dimension that heads divide, and the size of a head."""
    if partition == "element":
        return tuple(p.shape), [()]
    if head is not None:
        dim, size = head
        rows, columns = p.shape
        if dim == 0:
            return (rows // size, size, columns), [(1, 2)]
        return (rows, columns // size, size), [(0, 2)]
    if p.dim() > 1 and partition in ("channel", "row_column"):
        rows, columns = len(p), p[0].numel()
        longer: tuple[int, ...] = (1,) if rows >= columns else (0,)
        return (rows, columns), [(1,), (0,)] if partition == "row_column" else [longer]
    return (p.numel(),), [(0,)]


def _head_dimensions(model: nn.Module) -> dict[Tensor, tuple[int, int]]:
    """Of the matrices around attention, LoRA's too: the dimension that heads divide, and the size of a head.

    Queries, keys and values have heads in their outputs; the layer after attention has them in its inputs. Of LoRA's
    pair A has the inputs and B the outputs.
    """
    config: Any = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        raise UserError("optim_args: partition=head needs a model whose configuration has num_attention_heads")
    size = config.hidden_size // heads
    modules = dict(model.named_modules())
    found: dict[Tensor, tuple[int, int]] = {}
    for name, p in model.named_parameters():
        outputs = 1 if isinstance(modules[name.rpartition(".")[0]], Conv1D) else 0
        if p.dim() == 2 and _HEADS_OUT.search(name) and "lora_A" not in name:
            found[p] = (outputs, size)
        elif p.dim() == 2 and _HEADS_IN.search(name) and "lora_B" not in name:
            found[p] = (1 - outputs, size)
    return found
