"""Measure the g-SNR of every block of a causal language model on one batch of text, as SGD-SaI does to calibrate.

  hf-sai gsnr --model gpt2 --data corpus.parquet
  hf-sai gsnr --config 5m --tokenizer gpt2 --data corpus.txt --init default kaiming --batch-size 4 16 64

For one model and batch, this prints a table of blocks and a table of kinds of blocks. For several initialisations or
batch sizes, it prints one table of kinds, side by side. Smaller batches are the first sequences of the larger ones.
All gradients are from before any training. To measure g-SNR during training, use `gsnr_every` and `lr_scheduler_type`
of recipes/pretrain/train.py, or GSNRCallback(every=N) in any Trainer.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_sai.initialisation import SCHEMES
from hf_sai.options import SCALINGS

NAME = "gsnr"
HELP = "g-SNR of a model's blocks on one batch of text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="NAME", help="a causal language model: a folder, or a name on the hub")
    model.add_argument(
        "--config",
        metavar="NAME",
        help="new weights instead: the folder or hub name of a configuration, or a size of GPT-2 "
        "(tiny, 5m, small, medium, large, xl)",
    )
    parser.add_argument(
        "--data", metavar="FILE", required=True, help="a .txt, .jsonl or .parquet file, or a hub data set"
    )
    parser.add_argument("--text-column", default="text", metavar="NAME", help="for jsonl, parquet, hub (default: text)")
    parser.add_argument("--tokenizer", metavar="NAME", help="default: the model's; required with a size of GPT-2")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8], metavar="N", help="sequences (default: 8)")
    parser.add_argument("--block-size", type=int, default=256, metavar="N", help="tokens per sequence (default: 256)")
    parser.add_argument(
        "--init", nargs="+", choices=SCHEMES, default=["default"], help="initializes linear layers, with --config"
    )
    parser.add_argument("--lora-r", type=int, metavar="R", help="add LoRA of this rank and measure only its blocks")
    parser.add_argument("--scaling", choices=SCALINGS, default=SCALINGS[0], help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of new weights (default: 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; default: cuda if available")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results to this file")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="plot the results (.png, .svg, .pdf)")


def run(args: argparse.Namespace) -> None:
    import torch

    from hf_sai.gsnr_plots import plot_kinds
    from hf_sai.monitor import write_json
    from hf_sai.probe import GPT2_SIZES, add_lora, fresh_model, load_model, load_tokenizer, probe, read_documents
    from hf_sai.probe import token_batch as make_batch

    _check(args, sizes=GPT2_SIZES)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    name = args.model or args.config
    option = "--tokenizer" if args.tokenizer else "--model" if args.model else "--config"
    tokenizer = load_tokenizer(args.tokenizer or name, option)
    documents = read_documents(args.data, args.text_column)
    batch = make_batch(tokenizer, documents, max(args.batch_size), args.block_size, "--data").to(device)
    results: list[dict[str, Any]] = []
    for scheme in args.init:
        for size in args.batch_size:
            model = load_model(name) if args.model else fresh_model(name, tokenizer, scheme, args.seed)
            _check_fits(model, batch, args.block_size)
            if args.lora_r:
                model = add_lora(model, args.lora_r, args.seed)
            probed = probe(model.to(device), batch[:size], args.scaling)
            setting = {"init": scheme, "batch_size": size, "tokens": size * args.block_size}
            results.append({**setting, "loss": probed.loss, "steps": probed.steps, "blocks": probed.blocks})
    if len(results) == 1:
        print(block_table(results[0]["blocks"]), end="\n\n")
    print(kind_table(results))
    if args.json:
        write_json(args.json, _content(args, len(tokenizer), results))
    if args.plot:
        titles = [_title(result) for result in results]
        for path, result, title in zip(_paths(args.plot, titles), results, titles, strict=True):
            print(plot_kinds(result["blocks"], path, f"{Path(name).name}, {title}"))


def _check(args: argparse.Namespace, sizes: Any) -> None:
    for option, values in (("--batch-size", args.batch_size), ("--lora-r", [args.lora_r or 1])):
        if min(values) < 1:
            raise ValueError(f"{option} must be at least 1, got {min(values)}")
    if args.block_size < 2:
        raise ValueError(f"--block-size must be at least 2, got {args.block_size}")
    if args.model and args.init != ["default"]:
        raise ValueError(f"--init {' '.join(args.init)} would overwrite the weights of --model; use --config instead")
    if args.config in sizes and not args.tokenizer:
        raise ValueError(f"--config {args.config} needs --tokenizer: a folder, or a name on the hub (gpt2)")


def _check_fits(model: Any, batch: Any, length: int) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(f"--block-size must be at most the model's {positions} positions, got {length}")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if int(batch.max()) >= vocabulary:
        raise ValueError(
            f"--tokenizer: the text has token {int(batch.max())}, but the model has {vocabulary} tokens; "
            "use the model's own tokenizer"
        )


def block_table(blocks: Sequence[dict[str, Any]]) -> str:
    """The table of blocks, with one line per block in the model's order."""
    lines = [["name", "kind", "shape", "numel", "g-SNR", "/ sqrt(d)", "scale"]]
    for block in blocks:
        numbers = ["not calibrated: its gradient is zero"]
        if block["gsnr"] is not None:
            ratio = block["gsnr"] / math.sqrt(block["numel"])
            numbers = [f"{block['gsnr']:.4g}", f"{ratio:.4f}", f"{block['scale']:.4g}"]
        shape = "x".join(map(str, block["shape"]))
        lines.append([block["name"], block["kind"], shape, f"{block['numel']:,}", *numbers])
    return _columns(lines, left=3)


def kind_table(results: Sequence[dict[str, Any]]) -> str:
    """The table of kinds: the median and range of g-SNR / sqrt(d) of the blocks of each kind, for each setting."""
    kinds = list(dict.fromkeys(block["kind"] for result in results for block in result["blocks"]))
    lines = [["g-SNR / sqrt(d)", "blocks", *(_title(result) for result in results)]]
    for kind in kinds:
        line = [kind, str(sum(block["kind"] == kind for block in results[0]["blocks"]))]
        for result in results:
            ratios = ratios_of(result["blocks"], kind)
            line.append(_spread(ratios) if ratios else "-")
        lines.append(line)
    lines.append(["loss", "", *(f"{result['loss']:.3f}" for result in results)])
    return _columns(lines, left=1)


def ratios_of(blocks: Sequence[dict[str, Any]], kind: str) -> list[float]:
    """g-SNR / sqrt(d) of the calibrated blocks of a kind."""
    chosen = [block for block in blocks if block["kind"] == kind and block["gsnr"] is not None]
    return [block["gsnr"] / math.sqrt(block["numel"]) for block in chosen]


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _title(result: dict[str, Any]) -> str:
    return f"{result['init']}, batch {result['batch_size']}"


def _paths(path: Path, titles: Sequence[str]) -> list[Path]:
    """The path itself for one figure, or one path for each setting."""
    if len(titles) == 1:
        return [path]
    return [path.with_stem(f"{path.stem}_{title.replace(', batch ', '_')}") for title in titles]


def _columns(lines: Sequence[Sequence[str]], left: int) -> str:
    """Format lines as text with ``left`` left-aligned columns. The last cell of a short line does not set a width."""
    full = len(lines[0])
    widths = [max(len(line[i]) for line in lines if len(line) == full or i < len(line) - 1) for i in range(full)]
    return "\n".join(
        "  ".join(
            text.ljust(widths[i]) if i < left or len(line) < full else text.rjust(widths[i])
            for i, text in enumerate(line)
        ).rstrip()
        for line in lines
    )


def _content(args: argparse.Namespace, vocabulary: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of the `--json` file, with names without local folders and numbers of six digits."""
    from importlib import metadata

    versions = {package: metadata.version(package) for package in ("hf_sai", "torch", "transformers")}
    for result in results:
        result["blocks"] = [
            {key: float(f"{x:.6g}") if isinstance(x, float) else x for key, x in block.items()}
            for block in result["blocks"]
        ]
    return {
        "model": Path(args.model or args.config).name,
        "fresh_weights": bool(args.config),
        "data": Path(args.data).name,
        "vocabulary": vocabulary,
        "block_size": args.block_size,
        "lora_r": args.lora_r,
        "scaling": args.scaling,
        "seed": args.seed,
        "versions": versions,
        "results": results,
    }
