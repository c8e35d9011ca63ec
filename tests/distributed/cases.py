"""What the launched tests train: a model of awkward shapes, one training loop, one way to read the results."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

BATCH, LENGTH, VOCABULARY = 8, 6, 11
LATE_STEP = 12


class Net(nn.Module):
    """Blocks that shard unevenly, one of one element, a LoRA pair, one with a constant gradient, one idle at first."""

    def __init__(self) -> None:
        super().__init__()
        hidden = 13
        self.embed = nn.Embedding(VOCABULARY, 7)
        self.up = nn.Linear(7, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.lora_a = nn.Linear(7, 3, bias=False)
        self.lora_b = nn.Linear(3, hidden, bias=False)
        self.gain = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.zeros(6))
        self.late = nn.Linear(hidden, hidden)
        self.down = nn.Linear(hidden, 5)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, tokens: Tensor, use_late: bool) -> Tensor:
        x = self.embed(tokens)
        h = torch.tanh(self.norm(self.up(x) + self.lora_b(self.lora_a(x))))
        if use_late:
            h = h + torch.tanh(self.late(h))
        # Every element of `shift` has the same gradient.
        return self.gain * self.down(h) + self.shift.sum()


class TwoLayers(nn.Module):
    """What tensor parallelism splits: columns, then rows; the norm between the blocks is replicated."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 20)
        self.down = nn.Linear(20, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: Tensor, use_late: bool) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(self.norm(self.embed(tokens))))))


def settings(scaling: str) -> dict[str, Any]:
    """What SGDSaI is made with."""
    return {"lr": 1e-2 if scaling == "adamw" else 1e-3, "scaling": scaling}


def groups(model: nn.Module, scaling: str) -> list[dict[str, Any]]:
    """The embedding, whose rows are tokens under ``"adamw"``, and all the rest."""
    tokens = [p for name, p in model.named_parameters() if name.endswith("embed.weight")]
    rest = [p for p in model.parameters() if all(p is not q for q in tokens)]
    return [{"params": tokens, "token_rows": scaling == "adamw"}, {"params": rest}]


def build(
    cls: type[nn.Module] = Net, dtype: torch.dtype = torch.float32, seed: int = 0, frozen: Sequence[str] = ()
) -> nn.Module:
    torch.manual_seed(seed)
    model = cls().to(dtype)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return model


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Tokens (BATCH, LENGTH) and targets (BATCH, LENGTH, 5) of one step."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    return tokens, torch.randn(BATCH, LENGTH, 5, generator=generator).to(dtype)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    rows: slice = slice(None),
    forward: nn.Module | None = None,
    late_step: int = LATE_STEP,
) -> None:
    """Train on ``rows`` of each step's batch; the mean over equal shards is the mean over the batch."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        tokens, targets = batch(step, dtype)
        optimizer.zero_grad()
        output = (forward or model)(tokens[rows], use_late=step >= late_step)
        (output - targets[rows]).square().mean().backward()
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    """The global value of a tensor, as float64."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().double()


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gsnrs(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The g-SNR of each block, as this process knows it; blocks without one are 0."""
    return {
        name: float(optimizer.state[p]["gsnr"]) if "gsnr" in optimizer.state.get(p, {}) else 0.0
        for name, p in model.named_parameters()
    }


def scales(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[float]]:
    """The scale of each channel of each block; none of the authors' release, which keeps none."""
    named = [(name, optimizer.state.get(p, {})) for name, p in model.named_parameters()]
    return {key: x for name, state in named for key, x in scales_of(name, state).items()}


def scales_of(name: str, state: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Those of one block, of which the rows and the columns are channels if its rows are tokens."""
    keys = [key for key in ("scale", "column_scale") if key in state]
    return {f"{name} {key}": whole(state[key]).flatten().tolist() for key in keys}


def weights(model: nn.Module) -> dict[str, list[float]]:
    return {name: whole(p).flatten().tolist() for name, p in model.named_parameters()}


def largest_relative_error(found: dict[str, float], expected: dict[str, float]) -> float:
    """Over all blocks; 0 for two that are equal, also where both are 0."""
    assert found.keys() == expected.keys()
    pairs = [(found[name], expected[name]) for name in found]
    return max(0.0 if x == y else abs(x - y) / max(abs(y), 1e-300) for x, y in pairs)


def largest_error_of_scales(found: dict[str, list[float]], expected: dict[str, list[float]]) -> float:
    """The relative one, over all channels of all blocks."""
    assert {name: len(x) for name, x in found.items()} == {name: len(x) for name, x in expected.items()}
    flat = [
        {(name, i): x for name, values in given.items() for i, x in enumerate(values)} for given in (found, expected)
    ]
    return largest_relative_error(*flat)  # type: ignore[arg-type]


def largest_difference(found: dict[str, list[float]], expected: dict[str, list[float]]) -> float:
    assert found.keys() == expected.keys()
    return max(abs(x - y) for name in found for x, y in zip(found[name], expected[name], strict=True))


class Recorder(TorchDispatchMode):
    """Counts collectives and remembers the largest tensor that was newly allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: dict[str, int] = {}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # the operations on local tensors come by next
        namespace, _, name = func._schema.name.partition("::")
        if "c10d" in namespace and "wait" not in name:
            self.collectives[name] = self.collectives.get(name, 0) + 1
        known = {t.untyped_storage()._cdata for t in _tensors((args, kwargs)) if not isinstance(t, FakeTensor)}
        result = func(*args, **(kwargs or {}))
        for t in _tensors(result):
            if not isinstance(t, FakeTensor) and t.untyped_storage()._cdata not in known:
                self.largest = max(self.largest, t.numel())
        return result


def _tensors(tree: Any) -> Iterator[Tensor]:
    for leaf in torch.utils._pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf
