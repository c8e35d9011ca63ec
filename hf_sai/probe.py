"""One batch through a causal language model, and what SGDSaI makes of it: the g-SNR and scale of every block."""

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

# layers, heads, width of GPT-2; "5m" with a vocabulary of 8,192 and 512 positions has 5.4 M parameters
GPT2_SIZES = {
    "tiny": (2, 4, 128),
    "5m": (4, 4, 256),
    "small": (12, 12, 768),
    "medium": (24, 16, 1024),
    "large": (36, 20, 1280),
    "xl": (48, 25, 1600),
}
_SEQUENCES_AT_ONCE = 8  # larger batches are accumulated, which gives the same gradient
_SUFFIXES = (".txt", ".jsonl", ".parquet")


class Probed(NamedTuple):
    """What a batch says of a model.

    Attributes:
        loss: the mean over the batch's tokens, in nats.
        steps: gradients until every block was calibrated: 2 with LoRA, whose A has none at the first.
        blocks: for each block ``name``, ``kind``, ``layer``, ``shape``, ``numel``, ``gsnr`` and ``scale``; the last two
            are ``None`` where the gradient stayed zero.
    """

    loss: float
    steps: int
    blocks: list[dict[str, Any]]


def probe(model: nn.Module, batch: Tensor, scaling: str) -> Probed:
    """Calibrate an SGDSaI on a batch. The model takes one or two optimizer steps: throw it away afterwards.

    A block whose first gradient is zero (LoRA's A, while B is zero) is calibrated at a second step on the same batch.

    Args:
        model: a transformers model that returns logits, in evaluation mode (no dropout).
        batch: token ids, (sequences, length), int64; each token but a sequence's first is predicted.
        scaling: SGDSaI's.

    Raises:
        ValueError: when the loss is not finite.
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
    """A tokenizer by hub name or folder; ``option`` is what the error calls the source of ``name``."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{option}: there is no tokenizer at {name!r}, in a folder or within reach on the hub; "
            "give a folder or a name that has one with --tokenizer"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{option}: the tokenizer {name!r} has no end-of-text token to put between documents")
    return tokenizer


def load_model(name: str) -> nn.Module:
    """A causal language model with its weights, in float32, by hub name or folder."""
    from transformers import AutoModelForCausalLM

    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(f"--model: there is no folder {name!r}; give a folder, a hub name, or --config")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model: {name!r} is not a causal language model in a folder or within reach on the hub "
            f"({str(error).splitlines()[0]}); give a folder, or --config for fresh weights"
        ) from error
    found: nn.Module = model.float().eval()
    return found


def fresh_model(name: str, tokenizer: Any, scheme: str, seed: int) -> nn.Module:
    """A causal language model with fresh weights, in float32.

    Args:
        name: one of ``GPT2_SIZES`` (1,024 positions, the tokenizer's vocabulary), or the folder or hub name of a
            configuration.
        tokenizer: for its vocabulary.
        scheme: of :func:`hf_sai.initialisation.initialise`.
        seed: of the weights.
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
                f"--config: {name!r} is not a model's configuration in a folder or within reach on the hub; "
                f"give a folder, or a size of GPT-2: {', '.join(GPT2_SIZES)}"
            ) from error
    torch.manual_seed(seed)
    family: Any = AutoModelForCausalLM
    model: nn.Module = family.from_config(config, trust_remote_code=False)
    initialise(model.float(), scheme)
    return model.eval()


def add_lora(model: nn.Module, rank: int, seed: int) -> nn.Module:
    """The model frozen, with LoRA of that rank on the layers that PEFT chooses for its family."""
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
    """The first tokens of the documents, an end-of-text token after each, as (sequences, length) int64."""
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
        if len(ids) >= sequences * length:
            return torch.tensor(ids[: sequences * length]).view(sequences, length)
    raise ValueError(
        f"{option}: a batch needs {sequences} x {length} tokens, the text has {len(ids)}: "
        "give more text, or a smaller --batch-size or --block-size"
    )


def read_documents(source: str, column: str) -> Iterator[str]:
    """The documents of a local file, or of the training split of a data set on the hub.

    Args:
        source: a ``.txt`` (documents end at empty lines), ``.jsonl`` (both also with ``.gz``) or ``.parquet`` file, or
            a name on the hub.
        column: of the text, in a jsonl file, a parquet file and a data set.
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
        found = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: no text {column!r} in {found}; name it with --text-column")
    return text


def _parquet_documents(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise ValueError(
                    f"--data: {path} has no column {column!r}, it has {', '.join(names)}; name it with --text-column"
                )
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
                raise KeyError(f"it has no column {column!r} but {', '.join(row)}; name it with --text-column")
            yield row[column]
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(
            f"--data: {name!r} is not a local file and could not be read from the hub "
            f"({str(error).splitlines()[0][:200]}): give a local {', '.join(_SUFFIXES)} file, or check the network"
        ) from error
