"""Measures the g-SNR and scale of every block of a causal language model on one batch."""

import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_sai.blocks import BlockName, block_names
from hf_sai.initialisation import initialise
from hf_sai.optimizer import SGDSaI
from hf_sai.table import gsnr_table

# The layers, heads and width of GPT-2. "5m" has 5.4 M parameters with a vocabulary of 8,192 and 512 positions.
GPT2_SIZES = {
    "tiny": (2, 4, 128),
    "5m": (4, 4, 256),
    "small": (12, 12, 768),
    "medium": (24, 16, 1024),
    "large": (36, 20, 1280),
    "xl": (48, 25, 1600),
}
_SEQUENCES_AT_ONCE = 8  # gradients of larger batches are accumulated, with the same result
_SUFFIXES = (".txt", ".jsonl", ".parquet")


class Probed(NamedTuple):
    """The result of a probe.

    Attributes:
        loss: the mean loss over the batch's tokens, in nats.
        steps: the number of gradients until every block was calibrated. It is 2 with LoRA, because the first gradient
            of A is zero.
        blocks: ``name``, ``kind``, ``layer``, ``shape``, ``numel``, ``gsnr`` and ``scale`` of each block. The last two
            are ``None`` if the gradient stayed zero.
    """

    loss: float
    steps: int
    blocks: list[dict[str, Any]]


def probe(model: nn.Module, batch: Tensor, scaling: str) -> Probed:
    """Calibrate an SGDSaI on a batch. This takes one or two optimizer steps, so discard the model afterwards.

    A block whose first gradient is zero (LoRA's A, while B is zero) is calibrated in a second step on the same batch.

    Args:
        model: a transformers model that returns logits, in evaluation mode (no dropout).
        batch: token ids, (sequences, length), int64. Every token except the first of a sequence is predicted.
        scaling: the scaling of SGDSaI.

    Raises:
        ValueError: if the loss is not finite.
    """
    optimizer = SGDSaI([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0, scaling=scaling)
    losses: list[float] = []
    while len(losses) < 2:
        optimizer.zero_grad()
        losses.append(_backward(model, batch))
        optimizer.step()
        rows = gsnr_table(optimizer, model)
        if all(row.calibrated for row in rows):
            break
    described = {block.name: block for block in block_names(model).values()}
    return Probed(losses[0], len(losses), [_as_block(row, described[row.name]) for row in rows])


def _as_block(row: Any, named: BlockName) -> dict[str, Any]:
    gsnr, scale = (row.gsnr, row.scale) if row.calibrated else (None, None)
    shape = {"shape": list(row.shape), "numel": row.numel}
    return {"name": row.name, "kind": named.kind, "layer": named.layer, **shape, "gsnr": gsnr, "scale": scale}


def _backward(model: nn.Module, batch: Tensor) -> float:
    total = 0.0
    for part in torch.split(batch, _SEQUENCES_AT_ONCE):
        logits = model(input_ids=part).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
        loss = losses / (batch.shape[0] * (batch.shape[1] - 1))
        torch.autograd.backward(loss)
        total += loss.item()
    if not math.isfinite(total):
        raise ValueError(
            f"the loss of the batch is {total}: the model's weights are damaged or their precision is too low"
        )
    return total


# --- models ----------------------------------------------------------------------------------------------------------


def load_tokenizer(name: str, option: str) -> Any:
    """Load a tokenizer by hub name or folder. ``option`` is the source of ``name`` in error messages."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{option}: no tokenizer found for {name!r}, neither as a folder nor on the hub; "
            "pass --tokenizer with a folder or a hub name that has one"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{option}: the tokenizer {name!r} has no end-of-text token to put between documents")
    return tokenizer


def load_model(name: str) -> nn.Module:
    """Load a causal language model with its weights, in float32, by hub name or folder."""
    from transformers import AutoModelForCausalLM

    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(f"--model: there is no folder {name!r}; pass a folder, a hub name, or --config")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model: no causal language model found for {name!r}, neither as a folder nor on the hub "
            f"({str(error).splitlines()[0]}); pass a folder, or --config for new weights"
        ) from error
    in_float32: nn.Module = model.float().eval()
    return in_float32


def fresh_model(name: str, tokenizer: Any, scheme: str, seed: int) -> nn.Module:
    """Build a causal language model with new weights, in float32.

    Args:
        name: one of ``GPT2_SIZES`` (1,024 positions, the tokenizer's vocabulary), or the folder or hub name of a
            configuration.
        tokenizer: the tokenizer, which determines the vocabulary size.
        scheme: a scheme of :func:`hf_sai.initialisation.initialise`.
        seed: the seed of the weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

    if name in GPT2_SIZES:
        layers, heads, width = GPT2_SIZES[name]
        special = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config: Any = GPT2Config(vocab_size=len(tokenizer), n_layer=layers, n_head=heads, n_embd=width, **special)
    else:
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--config: no model configuration found for {name!r}, neither as a folder nor on the hub; "
                f"pass a folder, or a size of GPT-2: {', '.join(GPT2_SIZES)}"
            ) from error
    torch.manual_seed(seed)
    family: Any = AutoModelForCausalLM
    model: nn.Module = family.from_config(config, trust_remote_code=False)
    initialise(model.float(), scheme)
    return model.eval()


def add_lora(model: nn.Module, rank: int, seed: int) -> nn.Module:
    """Freeze the model and add LoRA of this rank to the layers that PEFT selects for its architecture."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    conv1d = any(hasattr(module, "nx") and hasattr(module, "nf") for module in model.modules())
    adapted: nn.Module = get_peft_model(
        model,
        LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=8 * rank, fan_in_fan_out=conv1d),
    )
    return adapted.eval()


# --- text ------------------------------------------------------------------------------------------------------------


def token_batch(tokenizer: Any, documents: Iterator[str], sequences: int, length: int, option: str) -> Tensor:
    """The first tokens of the documents, as (sequences, length) int64. An end-of-text token follows each document."""
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
        if len(ids) >= sequences * length:
            return torch.tensor(ids[: sequences * length]).view(sequences, length)
    raise ValueError(
        f"{option}: a batch needs {sequences} x {length} tokens, but the text has {len(ids)}; "
        "provide more text, or reduce --batch-size or --block-size"
    )


def read_documents(source: str, column: str) -> Iterator[str]:
    """Read the documents of a local file, or of the training split of a data set on the hub.

    Args:
        source: a ``.txt``, ``.jsonl`` or ``.parquet`` file, or a name on the hub. Empty lines separate the documents of
            a ``.txt`` file. ``.txt`` and ``.jsonl`` files may be gzipped (``.gz``).
        column: the column with the text in a jsonl file, a parquet file or a data set.
    """
    path = Path(source)
    suffix = Path(source.removesuffix(".gz")).suffix
    if not path.is_file():
        if suffix in _SUFFIXES:
            raise ValueError(f"--data: there is no file {source!r}")
        yield from _hub_documents(source, column)
    elif suffix not in _SUFFIXES:
        raise ValueError(f"--data: the file must end in one of {', '.join(_SUFFIXES)}, got {source!r}")
    elif suffix == ".parquet":
        yield from _parquet_documents(path, column)
    else:
        yield from _text_documents(path, suffix, column)


def _text_documents(path: Path, suffix: str, column: str) -> Iterator[str]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    paragraphs: list[str] = []
    with opener(path, "rt", encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if suffix == ".jsonl" and not line.isspace():
                    yield _of_row(line, f"--data: {path}, line {number}", column)
                elif line.isspace():
                    yield "".join(paragraphs)
                    paragraphs = []
                else:
                    paragraphs.append(line)
        except UnicodeDecodeError as error:
            raise ValueError(f"--data: {path} must be UTF-8: {error}; convert it, for example with iconv") from error
    if paragraphs:
        yield "".join(paragraphs)


def _of_row(line: str, where: str, column: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    text = row.get(column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        content = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: no text {column!r} in {content}; set --text-column")
    return text


def _parquet_documents(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise ValueError(f"--data: {path} has no column {column!r}, only {', '.join(names)}; set --text-column")
            for batch in file.iter_batches(batch_size=64, columns=[column]):
                yield from (str(text) for text in batch.column(0).to_pylist() if text is not None)
    except pyarrow.ArrowException as error:
        raise ValueError(f"--data: {path} must be a whole Parquet file: {error}") from error


def _hub_documents(name: str, column: str) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        for row in rows:
            if column not in row:
                raise KeyError(f"it has no column {column!r}, only {', '.join(row)}; set --text-column")
            yield row[column]
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(
            f"--data: {name!r} is not a local file and could not be read from the hub "
            f"({str(error).splitlines()[0][:200]}); pass a local {', '.join(_SUFFIXES)} file, or check the network"
        ) from error
