"""The tables of README.md, rewritten from `recipes/results/*.json`: `python -m recipes.readme_tables [--check]`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. With `--check` nothing is written and the exit status
is 1 if a table does not agree with the results.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_sai.bench.paper import TABLES_1_AND_3
from hf_sai.bench.shapes import model
from recipes.common import write_text
from recipes.sweep_report import larger_is_better

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "recipes" / "results"
METRICS = {"bleu": "BLEU", "nist": "NIST", "meteor": "METEOR", "rouge_l": "ROUGE-L", "cider": "CIDEr"}


def result(name: str) -> dict[str, Any]:
    """A file of `recipes/results/` by its name without `.json`."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def best_rate(best: dict[str, Any]) -> str:
    """A sweep's best learning rate of an optimizer, and whether a better one may lie outside the grid."""
    return f"{best['point']['learning_rate']:g}{' (edge)' if best['at_edge'] else ''}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def e2e() -> str:
    """The paper's Table 4 from our own small base: each optimizer at its best learning rate, mean over the seeds."""
    content = result("e2e_table")
    rows = []
    for run, best in content["best"].items():
        finals = [row for row in content["finals"] if row["run"] == run]
        rate = best_rate(best)
        losses = [row["value"] for row in finals]
        if not finals or None in losses:
            lost = f"{sum(x is None for x in losses)} of {len(finals)} seeds diverged" if finals else "not run"
            rows.append([run, rate, lost, *("-" for _ in METRICS), "-", "-"])
            continue
        spread = f"{statistics.fmean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"
        scores = [f"{statistics.fmean(row['scores'][metric] for row in finals):.3f}" for metric in METRICS]
        milliseconds = statistics.median(row["optimizer_ms"] for row in finals)
        state = finals[0]["optimizer_state_bytes"]
        rows.append([run, rate, spread, *scores, f"{state / 1e3:.0f}", f"{milliseconds:.2f}"])
    table = markdown(["", "lr", "dev loss (seeds)", *METRICS.values(), "state kB", "step ms"], rows)
    seeds, base = len({row["seed"] for row in content["finals"]}), content["base_options"]
    return (
        f"{table}\n\nLoRA r {base['lora_r']} on a GPT-2 of 1 M parameters that our pretraining recipe made, real E2E "
        f"set, {content['finals'][0]['steps']} steps of {base['per_device_train_batch_size']} texts, every test input "
        f"generated and scored; the best of {len(content['runs']) // len(content['best'])} learning rates by dev loss, "
        f"then {seeds} seeds of it: mean and range of the loss, mean of the scores, median "
        f"time of the optimizer's step. {content['machine']['cpu']}, torch {content['versions']['torch']}."
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


def _step_rows(record: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """What a benchmark measured of a model in float32, by optimizer."""
    return {
        row["optimizer"]: row
        for one in record["results"]
        for row in one["rows"]
        if (one["model"], one["dtype"]) == (name, "float32") and row["step_ms"] is not None
    }


def speed() -> str:
    """Steps of GPT-2 124M on a CPU, on all cores and on one: time, ratio to AdamW's fused kernel, first step, state."""
    records = [result("bench_cpu"), result("bench_cpu_1thread")]
    measured = [_step_rows(record, "gpt2") for record in records]
    threads = [record["results"][0]["threads"] for record in records]
    header = ["GPT-2 124M, float32"]
    for n in threads:
        header += [f"ms, {n} thread{'s' if n > 1 else ''} (quartiles)", "/ AdamW fused"]
    rows = []
    for optimizer in dict.fromkeys([*measured[0], *measured[1]]):
        cells = []
        for of in measured:
            row = of.get(optimizer)
            if row is None:
                cells += ["-", "-"]
                continue
            spread = "" if row["quartiles_ms"] is None else " ({:.0f} to {:.0f})".format(*row["quartiles_ms"])
            cells += [f"{row['step_ms']:.0f}{spread}", f"{row['step_ms'] / of['adamw_fused']['step_ms']:.2f}"]
        any_row = measured[0].get(optimizer) or measured[1][optimizer]
        rows.append(
            [any_row["title"], *cells, f"{any_row['first_step_ms']:.0f}", f"{any_row['state_bytes'] / 1e6:.0f}"]
        )
    table = markdown([*header, "first step ms", "state MB"], rows)
    steps = max(row["steps"] for row in measured[0].values())
    loads = " and ".join(f"{record['load_average_before'][0]:.1f}" for record in records)
    return (
        f"{table}\n\nMedian of {steps} steps or fewer, the fast ones in turn in one process; the first step allocates "
        f"the state, and ours calibrates; {records[0]['machine']['cpu']}, torch {records[0]['versions']['torch']}, "
        f"load average at the start {loads}."
    )


_IN_PAPER = {"SGD-SaI": "sgd_sai", "SGDM": "sgd_fused", "AdamW": "adamw_fused", "Adam": "adam_fused"}
_IN_PAPER |= {"Adam-Mini": "adam_mini", "Prodigy": "prodigy"}


def speed_cuda() -> str:
    """Steps on a GPU: ours of GPT-2 XL, where they have been measured, and the paper's, from another machine."""
    names = ["gpt2-xl", "vit-h-14", "vit-s-16", "llama-2-7b"]
    measured = (RESULTS / "bench_cuda.json").exists()
    record = result("bench_cuda") if measured else {"results": []}
    ours = _step_rows(record, names[0])
    rows = []
    for title, optimizer in _IN_PAPER.items():
        papers = [TABLES_1_AND_3[name, title] for name in names]
        rows.append(
            [
                title,
                f"{ours[optimizer]['step_ms']:.1f}" if optimizer in ours else "not measured",
                *(f"{'out of memory' if p.step_ms is None else f'{p.step_ms:g}'}, {p.state_gb:g}" for p in papers),
            ]
        )
    titles = [model(name).title for name in names]
    table = markdown(["float32", f"{titles[0]} here, ms", *(f"{title}, paper: ms, state GB" for title in titles)], rows)
    where = f"Here: {record['results'][0]['device']}. " if measured else ""
    return f"{table}\n\n{where}Paper: another machine, an A100 80GB (Tables 1 and 3)."


# The jobs of the learning-rate study, and the sweeps that have runs of each.
_JOBS = {
    "from scratch, clipped": ("lr_text", "lr_text_zero", "lr_text_floor"),
    "from scratch, not clipped": ("lr_text_noclip",),
    "from scratch, twice as wide, clipped": ("lr_text_wide",),
    "LoRA, clipped": ("lr_lora", "lr_lora_zero", "lr_lora_floor"),
    "LoRA, not clipped": ("lr_lora_noclip",),
}
_OF_BEST = 0.05  # nats: a learning rate whose loss is this close to the best one will do


def rates() -> str:
    """The learning-rate study: of each optimizer and job the least loss, where it is, and which other rates will do."""
    cells: dict[str, dict[str, str]] = {}
    for job, sweeps in _JOBS.items():
        for content in map(result, sweeps):
            for run, best in content["best"].items():
                value = float(best["value"])
                points = [(r["point"]["learning_rate"], r["value"]) for r in content["runs"] if r["run"] == run]
                good = [rate for rate, found in points if found is not None and found <= value + _OF_BEST]
                diverged = sum(found is None for _, found in points)
                cells.setdefault(run, {})[job] = (
                    f"{value:.3f} at {best_rate(best)}"
                    f"{f', {min(good):g} to {max(good):g}' if len(good) > 1 else ''}"
                    f"{f', {diverged} of {len(points)} div.' if diverged else ''}"
                )
    theirs_first = sorted(cells, key=lambda run: run.startswith("SGD-SaI"))
    return markdown(["", *_JOBS], [[run, *(cells[run].get(job, "-") for job in _JOBS)] for run in theirs_first])


def digits() -> str:
    """The small ViT on scikit-learn's digits: every learning rate of each optimizer, clipped and not."""
    content = result("digits_sweep")
    rows = []
    for run in content["best"]:
        for clip, words in ((1.0, "clipped"), (0.0, "not clipped")):
            points = sorted(
                (r["point"]["learning_rate"], r["value"])
                for r in content["runs"]
                if r["run"] == run and r["point"]["max_grad_norm"] == clip
            )
            tried = [f"{rate:g}: {'div.' if v is None else f'{100 * v:.1f}'}" for rate, v in points]
            best = max((v for _, v in points if v is not None), default=None)
            rows.append([run, words, "div." if best is None else f"{100 * best:.1f}", ", ".join(tried) or "not run"])
    table = markdown(["", "gradient norm", "best top-1, %", "top-1, %, by learning rate"], rows)
    return f"{table}\n\n{content['machine']['cpu']}, torch {content['versions']['torch']}, one seed, 10 epochs."


def pretraining() -> str:
    """The sweep of the 5 M parameter GPT-2: every learning rate at 1 M tokens, the best of each at 5 M."""
    content = result("pretrain5m_sweep")
    finals = {row["run"]: row for row in content["finals"]}
    rows = []
    for run, best in content["best"].items():
        points = sorted((r["point"]["learning_rate"], r["value"]) for r in content["runs"] if r["run"] == run)
        tried = ", ".join(f"{rate:g}: {'div.' if value is None else f'{value:.2f}'}" for rate, value in points)
        final = finals.get(run)
        long = "not run" if final is None else "div." if final["value"] is None else f"{final['value']:.3f}"
        size = next(r["optimizer_state_bytes"] for r in content["runs"] if r["run"] == run)
        rows.append([run, f"{best['point']['learning_rate']:g}", tried, long, f"{size / 2**20:.1f}"])
    table = markdown(["", "best lr", "loss at 1 M tokens by lr", "at 5 M tokens", "state MiB"], rows)
    return (
        f"{table}\n\n{len(content['runs'])} of the {content['planned']} runs of the sweep so far, one seed; "
        f"{content['machine']['cpu']}, torch {content['versions']['torch']}."
    )


def architectures() -> str:
    """Small models from scratch: each optimizer at the best of its learning rates, mean and range over the seeds."""
    jobs = {
        "ViT, CIFAR": "vit_cifar_sweep",
        "ResNet-18, CIFAR": "resnet18_cifar_sweep",
        "ConvNeXt, CIFAR": "convnext_cifar_sweep",
        "LSTM, text": "lstm_sweep",
    }
    contents = {job: result(name) for job, name in jobs.items()}
    rows = []
    for run in next(iter(contents.values()))["best"]:
        cells = []
        for content in contents.values():
            if (best := content["best"].get(run)) is None:
                cells.append("-")
                continue
            found = [row["value"] for row in content["finals"] if row["run"] == run] or [best["value"]]
            as_text = _percent if larger_is_better(content["metric"]) else "{:.3f}".format
            value = "div." if None in found else as_text(statistics.fmean(found))
            whole = len(found) > 1 and None not in found
            spread = f" ({as_text(min(found))} to {as_text(max(found))})" if whole else ""
            cells.append(f"{value}{spread} at {best_rate(best)}")
        rows.append([run, *cells])
    table = markdown(["", *(f"{job}: {'loss' if 'LSTM' in job else 'top-1 %'}" for job in jobs)], rows)
    tries = " or ".join(sorted({str(len(c["runs"]) // len(c["best"])) for c in contents.values()}))
    content = contents["LSTM, text"]
    return (
        f"{table}\n\nThe best of {tries} learning rates each; where a range is given, mean and range over the seeds. "
        f"{content['machine']['cpu']}, torch {content['versions']['torch']}."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def robust() -> str:
    """The paper's Table 2 for the small ViT on digits: best accuracy, and that over the whole grid."""
    content = result("digits_robust")
    rows = []
    for run, best in content["best"].items():
        grid = [100 * (row["value"] or 0.0) for row in content["runs"] if row["run"] == run]
        peak = [100 * (row["value"] or 0.0) for row in content["finals"] if row["run"] == run]
        near = sum(value >= 100 * float(best["value"]) - 5 for value in grid)
        at = ", ".join(f"{axis.replace('_', ' ')} {value:g}" for axis, value in best["point"].items())
        rows.append(
            [
                run,
                f"{statistics.fmean(peak):.1f} ± {statistics.stdev(peak):.1f}",
                f"{statistics.fmean(grid):.1f} ± {statistics.stdev(grid):.1f}",
                f"{near} of {len(grid)}",
                f"{at}{' (edge)' if 'learning_rate' in best['at_edge'] else ''}",
            ]
        )
    table = markdown(["", "peak, %", "over the grid, %", "within 5 of its best", "best at"], rows)
    seeds = len({row["seed"] for row in content["finals"]})
    return (
        f"{table}\n\nTop-1: mean and standard deviation over {seeds} seeds of the best point, and over the points of "
        f"the grid; a run that diverges counts as 0. {content['machine']['cpu']}, torch {content['versions']['torch']}."
    )


def pareto() -> str:
    """Optimizer state against loss: each optimizer at the best of its learning rates, the least loss first."""
    text, lora = result("pareto_text"), result("pareto_lora")
    rows = []
    for run, best in sorted(text["best"].items(), key=lambda item: float(item[1]["value"])):
        cells = []
        for content in (text, lora):
            best = content["best"][run]
            sizes = [r["optimizer_state_bytes"] for r in content["runs"] if r["run"] == run]
            cells += [f"{best['value']:.3f}", best_rate(best), f"{sizes[0] / 1e3:.0f}"]
        rows.append([run, *cells])
    table = markdown(["", "from scratch: loss", "best lr", "state kB", "LoRA: loss", "best lr", "state kB"], rows)
    machine, version = text["machine"]["cpu"], text["versions"]["torch"]
    return f"{table}\n\nThree learning rates each, one seed; {machine}, torch {version}."


def gsnr() -> str:
    """g-SNR / sqrt(d) over the blocks of a kind and the measured steps of each pretraining run."""
    record = result("gsnr_5m")
    titles = {
        "base": "16 sequences a step",
        "batch4": "4 sequences",
        "kaiming": "Kaiming weights",
        "orthogonal": "orthogonal weights",
        "adamw": "AdamW trains",
    }
    runs = record["runs"]
    rows = []
    for kind, found in runs[0]["kinds"].items():
        spreads = [run["kinds"][kind]["to_sqrt_d"] for run in runs]
        rows.append([kind, str(found["blocks"]), *(f"{low:.3f} to {high:.3f}" for low, _, high in spreads)])
    table = markdown(["", "blocks", *(titles[run["run"]] for run in runs)], rows)
    small = [kind for kind in runs[0]["kinds"] if kind in ("norm", "bias")]
    large = [kind for kind in runs[0]["kinds"] if kind not in small]
    low, high = limits(runs, large, "to_sqrt_d")
    small_low, small_high = limits(runs, small, "to_sqrt_d")
    ratio_low, ratio_high = limits(runs, [*large, *small], "drift_over_mean")
    common = [factor for run in runs for factor in run["common_drift"] or []]
    tokens, steps = [run["tokens"] for run in runs], [run["measured_steps"] for run in runs]
    return (
        f"{table}\n\nGPT-2 of {runs[0]['parameters'] / 1e6:.1f} M parameters on English prose, the first "
        f"{min(tokens):,} to {max(tokens):,} tokens, {min(steps)} to {max(steps)} measured steps a run, one seed. "
        f"Matrices and embeddings lie within {100 * max(high - 1, 1 - low):.2f} % of sqrt(d) in every run and step, "
        f"norms and biases at {small_low:.2f} to {small_high:.2f} times it. A re-calibration under "
        f'`scaling="adamw"` would multiply all scales by one factor, {min(common):.2f} to {max(common):.2f}, as '
        f"gradients have grown or shrunk, and each by {ratio_low:.2f} to {ratio_high:.2f} besides."
    )


def limits(runs: list[dict[str, Any]], kinds: list[str], key: str) -> tuple[float, float]:
    """Least and largest value of `key` over some kinds of block, in the runs that have it."""
    found = [run["kinds"][kind][key] for run in runs for kind in kinds if run["kinds"][kind][key]]
    return min(low for low, _, _ in found), max(high for _, _, high in found)


TABLES: dict[str, Callable[[], str]] = {
    "e2e": e2e,
    "diffusion": diffusion,
    "rates": rates,
    "digits": digits,
    "robust": robust,
    "architectures": architectures,
    "pareto": pareto,
    "gsnr": gsnr,
    "pretraining": pretraining,
    "speed": speed,
    "speed_cuda": speed_cuda,
}


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
