"""Hostile recipe configurations, sweeps, run records, checkpoints of the diffusion recipe, and output folders."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hostile_table import Attempt, Case

from hf_sai.plots import plot_losses
from recipes.common.config import parse_config
from recipes.common.errors import UserError
from recipes.common.files import check_writable, write_text
from recipes.common.optimizers import RecipeArguments
from recipes.common.run_folder import checkpoint_to_resume
from recipes.diffusion.checkpoint import last_checkpoint, load_checkpoint
from recipes.diffusion.config import DiffusionArguments
from recipes.e2e.train import E2EArguments, check_scoring, fine_tune
from recipes.pretrain.compare import compare
from recipes.pretrain.train import read_config
from recipes.sweep.run import Sweep


def yaml_file(content: bytes) -> Callable[[Path], Attempt]:
    """The E2E recipe's configuration from a file."""

    def prepare(folder: Path) -> Attempt:
        path = folder / "run.yaml"
        path.write_bytes(content)
        words = ["--config", str(path), "--output_dir", str(folder / "out"), "--use_cpu"]
        return Attempt(lambda: parse_config([E2EArguments, RecipeArguments], words))

    return prepare


YAML: dict[str, tuple[bytes, str]] = {
    "a typo": (b"learning_rat: 1e-3", "unknown key 'learning_rat'; did you mean 'learning_rate'"),
    "a dash for an underscore": (b"learning-rate: 1e-3", "unknown key 'learning-rate'; did you mean 'learning_rate'"),
    "a key twice": (b"seed: 1\nlora_r: 4\nseed: 2", "has the key 'seed' twice; leave one of them out"),
    "a number for a key": (b"1: 2", "unknown key 1"),
    "a list": (b"- seed: 1", "must hold `key: value` lines, got a list"),
    "a word": (b"seed", "must hold `key: value` lines, got a str"),
    "broken": (b"seed: [1", "run.yaml is not valid YAML"),
    "a tab": (b"a:\n\t- b", "run.yaml is not valid YAML"),
    "Latin-1": (b"model: caf\xe9", "run.yaml must be UTF-8: .*0xe9"),
    "zeros": (bytes(9), "run.yaml is not valid YAML"),
    "code": (b"model: !!python/object/apply:os.system ['false']", "run.yaml is not valid YAML"),
    "no such day": (b"model: 2026-02-31", "run.yaml is not valid YAML: day "),
    "thousands of brackets": (b"model: " + b"[" * 5000, "run.yaml is not valid YAML"),
    "nothing for a number": (b"seed:", "seed must have a value; leave the line out for the default"),
    "nothing for a checked number": (b"lora_r: null", "lora_r must have a value"),
    "an option in a list": (b"metrics: [bleu, --seed=5]", "metrics: an item must not start with '-', got '--seed=5'"),
    "a list in a list": (b"metrics: [[bleu]]", "metrics must be a flat list, got a list in it"),
    "a mapping inside itself": (b"lr_scheduler_kwargs: &a {b: *a}", "lr_scheduler_kwargs cannot be passed on as JSON"),
    "a list for a number": (b"seed: [1, 2]", "unknown option '2'"),
    "a word for a number": (b"learning_rate: fast", "argument --learning_rate.*: invalid float value: 'fast'"),
    "true for a number": (b"seed: true", "argument --seed: invalid int value: 'True'"),
    "half a row": (b"max_train_rows: 1.5", "argument --max_train_rows.*: invalid int value: '1.5'"),
    "no rows": (b"max_train_rows: 0", "max_train_rows must be at least 1, or left out for all, got 0"),
    "alpha 0": (b"lora_alpha: 0", "lora_alpha must be at least 1, got 0"),
    "dropout 1": (b"lora_dropout: 1", r"lora_dropout must be in \[0, 1\), got 1\.0"),
    "dropout NaN": (b"lora_dropout: .nan", r"lora_dropout must be in \[0, 1\), got nan"),
    "length penalty infinite": (b"length_penalty: .inf", "length_penalty must be finite, got inf"),
    "a schedule that is none": (b"lr_scheduler_type: linaer", "linaer"),
    "half precision twice": (b"fp16: true\nbf16: true", "(?i)fp16.*bf16|bf16.*fp16"),
    "an optimizer that is none": (b"optim: sgd_say", "unknown optimizer 'sgd_say'; did you mean 'sgd_sai'.*known: "),
    "bad optim_args": (b"optim_args: momentum=2", r"momentum must be in \[0, 1\), got 2\.0"),
    "optim_args a bad mapping": (b"optim_args: {momentum: 2}", r"momentum must be in \[0, 1\), got 2\.0"),
}


def words(read: Callable[[list[str]], Any], *given: str) -> Callable[[Path], Attempt]:
    return lambda folder: Attempt(lambda: read([*given, f"--output_dir={folder / 'out'}"]))


PRETRAINING: dict[str, tuple[list[str], str]] = {
    "no text": ([], r"exactly one of train_files \(local\) and dataset \(on the hub\) must be given"),
    "validation of all": (["--validation_fraction=1"], r"validation_fraction must be in \[0, 1\), got 1\.0"),
    "a negative split": (["--split_seed=-1"], r"split_seed must be in \[0, 2\*\*64\), got -1"),
    "no documents": (["--max_documents=0"], "max_documents must be at least 1, or left out for all, got 0"),
    "a size that is none": (["--model_size=huge"], "model_size must be one of tiny, 5m, .*, got 'huge'"),
    "heads that do not divide": (["--n_head=5"], "n_embd must be a multiple of n_head, got 768 and 5"),
    "no layers": (["--n_layer=0"], "n_layer must be at least 1, got 0"),
    "a block of one": (["--block_size=1"], r"block_size must be from 2 to n_positions \(1024\), got 1: raise"),
    "no processes": (["--tokenizer_processes=0"], "tokenizer_processes must be at least 1, got 0"),
    "no tokens": (["--max_tokens=0"], "max_tokens must be at least 1, or left out, got 0"),
    "a warm-up of all": (["--warmup_fraction=1"], r"warmup_fraction must be in \[0, 1\), got 1\.0"),
}
DIFFUSION: dict[str, tuple[dict[str, Any], str]] = {
    "a choice that is none": ({"on_bad_image": "ignore"}, "on_bad_image must be one of skip, stop, got 'ignore'"),
    "no rank": ({"lora_r": 0}, "lora_r must be at least 1, got 0"),
    "alpha 0": ({"lora_alpha": 0.0}, r"lora_alpha must be finite and above 0, or left out for lora_r, got 0\.0"),
    "a NaN weight": ({"prior_weight": float("nan")}, "prior_weight must be finite and at least 0, got nan"),
    "a NaN norm": ({"max_grad_norm": float("nan")}, "max_grad_norm must be finite and at least 0, got nan"),
    "a NaN guidance": ({"guidance_scale": float("nan")}, "guidance_scale must be finite, got nan"),
    "no start for a token": ({"concept_init": None}, r"concept_init is needed: .* such as the class \(dog\)"),
    "a token that is code": ({"concept_tokens": ['<V>")\n']}, "concept_tokens must be words without quotes, .*got"),
    "a token twice": ({"concept_tokens": ["<V>", "<V>"]}, "concept_tokens must differ from one another"),
}
SWEEP = {"recipe": "pretrain", "base": "b.yaml", "runs": {"a": {"grid": {"learning_rate": [1]}}}}
SWEEP |= {"output": "out", "results": "results"}
SWEEPS: dict[str, tuple[Any, str]] = {
    "a list": ([1], "must hold `key: value` lines, got a list"),
    "a typo": ({**SWEEP, "option": 1}, "unknown key 'option'; did you mean 'options'"),
    "nothing": ({}, "lacks recipe, base, runs, output, results"),
    "no processes": ({**SWEEP, "processes": 0}, "processes must be a whole number of at least 1, got 0"),
    "runs a list": ({**SWEEP, "runs": ["a"]}, r"runs must be `key: value` lines, got \['a'\]"),
    "a run that is a word": ({**SWEEP, "runs": {"a": "b"}}, "runs: a must have `options`, `grid` and `seeds`, got 'b'"),
    "a rate for rates": (
        {**SWEEP, "runs": {"a": {"grid": {"learning_rate": 1}}}},
        "runs: a: grid: learning_rate must be a list of values, got 1",
    ),
    "a seed for seeds": ({**SWEEP, "seeds": 1}, "seeds must be a list of whole numbers, got 1"),
    "a recipe of no name": ({**SWEEP, "recipe": ["gpt2"]}, r"recipe must be one of .*, got \['gpt2'\]"),
}
RECORD: dict[str, Any] = {
    "config": {"optim": "sgd_sai", "learning_rate": 0.1},
    "curves": {"train": [{"step": 1, "tokens": 1, "seconds": 1, "loss": 1}], "validation": []},
    "final": {},
    "speed": {},
    "tokens": 1,
    "optimizer_state_bytes": 1,
}
RECORDS: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{", r"record\.json must be a run record in JSON"),
    "no text": (b"\xff\xfe", r"record\.json must be a run record in JSON"),
    "a thousand brackets": (b"[" * 100_000, r"record\.json must be a run record in JSON"),
    "a list": (b"[]", "must be a record of recipes.pretrain, but lacks config, curves"),
    "of another recipe": (b'{"config": {}}', "must be a record of recipes.pretrain, but lacks curves"),
}
for _key, _value in {"config": [], "curves": {"train": [{}]}, "final": 3, "tokens": "many", "speed": None}.items():
    RECORDS[f"{_key} damaged"] = (json.dumps({**RECORD, _key: _value}).encode(), r"record\.json is damaged: \w+Error")
RECORDS["a loss damaged"] = (
    json.dumps({**RECORD, "curves": {"train": [{"tokens": 1, "seconds": 1, "loss": "low"}]}}).encode(),
    "is damaged: ValueError: could not convert string to float: 'low'; run the recipe again",
)


def file(name: str, content: Any, act: Callable[[Path], Any]) -> Callable[[Path], Attempt]:
    """Write a file (JSON, which is YAML too, unless it is bytes) and act on it."""

    def prepare(folder: Path) -> Attempt:
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return Attempt(lambda: act(folder / name))

    return prepare


def checkpoint(progress: bytes, **files: bytes) -> Callable[[Path], Attempt]:
    """A checkpoint of the diffusion recipe, to load where a step has 4 samples."""

    def prepare(folder: Path) -> Attempt:
        saved = folder / "checkpoint-000002"
        saved.mkdir()
        (saved / "progress.json").write_bytes(progress)

        def load_state(_: str) -> None:
            raise RuntimeError("PytorchStreamReader failed")

        accelerator = SimpleNamespace(load_state=load_state)
        return Attempt(lambda: load_checkpoint(accelerator, saved, samples_per_step=4))

    return prepare


CHECKPOINTS: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{", r"progress\.json is damaged: .*; resume from another one"),
    "no step": (b'{"samples_per_step": 4}', r"progress\.json is damaged: KeyError\('step'\)"),
    "no history": (
        b'{"samples_per_step": 4, "step": 2, "history": 0}',
        r"progress\.json is damaged: .* history a list",
    ),
    "another batch": (
        b'{"samples_per_step": 8, "step": 2, "history": []}',
        "saved at 8 samples a step, this run has 4",
    ),
    "a cut file": (b'{"samples_per_step": 4, "step": 2, "history": []}', "is damaged or of another run: PytorchStr"),
}


def below_a_file(act: Callable[[Path], Any]) -> Callable[[Path], Attempt]:
    """Act on a path below a regular file, where nobody can write, root included."""

    def prepare(folder: Path) -> Attempt:
        (folder / "file").write_text("mine")
        return Attempt(lambda: act(folder / "file" / "out"))

    return prepare


def e2e(path: Path) -> None:
    """The recipe itself: it must fail before it looks for the model, which is not there."""
    args = RecipeArguments(output_dir=str(path), use_cpu=True)
    fine_tune(E2EArguments(model="no/such", data="no/such", metrics=["bleu"]), args)


HISTORY = {"run": [{"step": 1, "loss": 1.0}]}
_CANNOT_WRITE = r"cannot write in '.*out' \(Not a directory\); give another folder"
CASES: list[Case] = [
    *(Case(f"yaml: {name}", yaml_file(content), UserError, says) for name, (content, says) in YAML.items()),
    *(
        Case(
            f"pretraining: {name}",
            words(read_config, *(["--train_files=a.txt", *given] if given else [])),
            UserError,
            says,
        )
        for name, (given, says) in PRETRAINING.items()
    ),
    *(
        Case(
            f"diffusion: {name}",
            lambda _, given=given: Attempt(
                lambda: DiffusionArguments(**{"data": "x", "concept_init": ["dog"], **given})
            ),
            UserError,
            says,
        )
        for name, (given, says) in DIFFUSION.items()
    ),
    *(
        Case(f"sweep: {name}", file("s.yaml", content, Sweep.read), UserError, says)
        for name, (content, says) in SWEEPS.items()
    ),
    *(
        Case(
            f"record: {name}",
            file("record.json", content, lambda path: compare([path], path.parent / "page")),
            UserError,
            says,
        )
        for name, (content, says) in RECORDS.items()
    ),
    *(Case(f"progress: {name}", checkpoint(given), UserError, says) for name, (given, says) in CHECKPOINTS.items()),
    Case(
        "yaml: no file",
        words(lambda w: parse_config(E2EArguments, ["--config", "no.yaml", *w])),
        UserError,
        "No such f",
    ),
    Case(
        "yaml: a folder",
        words(lambda w: parse_config(E2EArguments, ["--config", "/", *w])),
        UserError,
        "Is a directory",
    ),
    Case(
        "compare: nothing", lambda folder: Attempt(lambda: compare([], folder)), UserError, "at least one record.json"
    ),
    Case(
        "diffusion: nothing to resume",
        lambda folder: Attempt(lambda: checkpoint_to_resume("last", folder, lambda: last_checkpoint(folder))),
        UserError,
        "resume_from_checkpoint: there is no whole checkpoint in output_dir",
    ),
    Case(
        "metrics: a typo",
        lambda _: Attempt(lambda: check_scoring(["blue"])),
        UserError,
        "metrics must be of bleu, .*, got 'blue'; did you mean 'bleu'",
    ),
    Case("not writable: the E2E recipe", below_a_file(e2e), UserError, f"^output_dir: {_CANNOT_WRITE}"),
    Case(
        "not writable: a folder",
        below_a_file(lambda path: check_writable("record", path)),
        UserError,
        f"^record: {_CANNOT_WRITE}",
    ),
    Case(
        "not writable: a text", below_a_file(lambda path: write_text(path / "a.json", "x")), NotADirectoryError, "file"
    ),
    Case(
        "not writable: a plot",
        below_a_file(lambda path: plot_losses(HISTORY, path / "a.png")),
        NotADirectoryError,
        "file",
    ),
    Case(
        "a plot of nothing",
        lambda folder: Attempt(lambda: plot_losses({"run": [{"step": 1, "loss": float("nan")}]}, folder / "a.png")),
        ValueError,
        "no run has a finite loss to draw; runs: run",
    ),
]
