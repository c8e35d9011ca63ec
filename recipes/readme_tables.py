"""The tables of README.md, rewritten from `recipes/results/*.json`: `python recipes/readme_tables.py [--check]`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. With `--check` nothing is written and the exit status
is 1 if a table does not agree with the results.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.common import write_text

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "recipes" / "results"
METRICS = {"bleu": "BLEU", "nist": "NIST", "meteor": "METEOR", "rouge_l": "ROUGE-L", "cider": "CIDEr"}


def result(name: str) -> dict[str, Any]:
    """A file of `recipes/results/` by its name without `.json`."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def e2e() -> str:
    """LoRA on the real E2E set from our own small base: SGD-SaI beside AdamW, at one learning rate."""
    records = {"SGD-SaI": result("e2e_5m_sgd_sai"), "AdamW": result("e2e_5m_adamw")}
    rows = [
        [
            name,
            f"{record['config']['learning_rate']:g}",
            f"{record['eval_loss']:.3f}",
            *(f"{record['scores'][metric]:.3f}" for metric in METRICS),
            f"{record['optimizer_state_bytes'] / 1e3:.0f}",
        ]
        for name, record in records.items()
    ]
    table = markdown(["", "lr", "val. loss", *METRICS.values(), "state kB"], rows)
    one = records["SGD-SaI"]
    return (
        f"{table}\n\nLoRA r {one['config']['lora_r']} on a GPT-2 of {one['parameters'] / 1e6:.1f} M parameters that "
        f"our pretraining recipe made (loss before: {one['base_eval_loss']:.3f}), real E2E set, {one['steps']:,} steps "
        f"of {one['config']['per_device_train_batch_size']} texts, all {one['test_mrs']} test inputs generated and "
        f"scored, one seed; {one['machine']['cpu']}, torch {one['versions']['torch']}."
    )


def diffusion() -> str:
    """Concept LoRA on the toy Stable Diffusion of `make demo-diffusion`: every run of the record."""
    record = result("diffusion_demo")
    shares = ("object", "colour", "place", "nothing")
    rows = [
        [
            f"{run['optimizer']} at {run['learning_rate']:g}",
            f"{100 * run['all']:.0f} % ({' to '.join(f'{100 * end:.0f}' for end in run['all_interval'])})",
            ", ".join(f"{100 * share:.0f} %" for share in run["all_by_seed"]),
            *(f"{100 * run[share]:.0f} %" for share in shares),
            f"{run['optimizer_state_bytes'] / 1e3:.0f}",
        ]
        for run in record["runs"]
    ]
    header = ["", "all right", "by seed", "object", "colour", "place", "nothing seen", "state kB"]
    table = markdown(header, rows)
    config, base = record["config"], record["base"]
    words, start = (
        100 * base[name]["all"] for name in ("the concept by its words, never drawn", "the word that <V> starts from")
    )
    return (
        f"{table}\n\nShares of {record['runs'][0]['samples']} samples, with a binomial 95 % interval, which does not "
        f"know how runs differ: see the shares by training seed. {config['size']}x{config['size']} pixels, "
        f"{config['lora_steps']} steps of five pictures. Without a LoRA: {words:.0f} % by the words "
        f'"{record["concept"]}", {start:.0f} % by the word that `<V>` starts from. All of it took '
        f"{record['cpu_seconds'] / 60:.0f} minutes of one core ({record['machine']['cpu']}), "
        f"{record['seconds'] / 60:.0f} by the clock."
    )


TABLES: dict[str, Callable[[], str]] = {"e2e": e2e, "diffusion": diffusion}


def rewritten(text: str) -> str:
    """README's text with every table as the results have it.

    Raises:
        KeyError: for a table of unknown name.
    """
    block = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return block.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", text)


def main() -> None:
    """Rewrite README.md, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a table disagrees")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    new = rewritten(text)
    if parser.parse_args().check:
        sys.exit(f"{readme.name} does not agree with recipes/results: run this without --check" if new != text else 0)
    write_text(readme, new)


if __name__ == "__main__":
    main()
