"""Hostile inputs to the Trainer integration: optim_args strings, training arguments, resuming."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile_table import Attempt, Case
from torch import nn

from hf_sai import GSNRCallback, SaITrainer, SaITrainingArguments, create_sgd_sai, sgd_sai_from_args

QUIET: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}


def arguments(folder: Path, **settings: Any) -> SaITrainingArguments:
    return SaITrainingArguments(str(folder / "run"), **QUIET, **settings)


_VALID = "valid keys: momentum, eps, scaling, maximize, foreach, fused, momentum_dtype, stochastic_rounding"
OPTIM_ARGS: dict[str, tuple[Any, str]] = {
    "unknown key": ("momentun=0.9", rf"no key 'momentun' \(did you mean momentum\?\); {_VALID}"),
    "Adam's key": ("betas=0.9", f"no key 'betas'; {_VALID}"),
    "no value": ("momentum=", "must be key=value pairs separated by commas, got 'momentum=' in"),
    "no sign": ("momentum", "must be key=value pairs separated by commas, got 'momentum' in"),
    "trailing comma": ("momentum=0.9,", "must be key=value pairs separated by commas, got '' in 'momentum=0.9,'"),
    "semicolon": ("momentum=0.9;eps=1e-8", "momentum must be a number, got '0.9;eps=1e-8'"),
    "twice": ("eps=1e-8,eps=1e-6", "sets eps twice in 'eps=1e-8,eps=1e-6'; remove one of them"),
    "the learning rate": ("lr=0.1", "cannot set lr: set learning_rate of the training arguments instead"),
    "weight decay": ("weight_decay=0.1", "cannot set weight_decay: set weight_decay of the training arguments"),
    "a word": ("momentum=high", "momentum must be a number, got 'high'"),
    "NaN": ("momentum=nan", r"momentum must be in \[0, 1\), got nan"),
    "out of range": ("momentum=1", r"momentum must be in \[0, 1\), got 1\.0"),
    "infinite": ("eps=1e999", "eps must be a finite number >= 0, got inf"),
    "unknown scaling": ("scaling=adam", r"scaling must be one of .*, got 'adam' \(did you mean adamw\?\)"),
    "unknown switch": ("foreach=maybe", "foreach must be one of true, false, none, got 'maybe'"),
    "unknown dtype": ("momentum_dtype=int3", "momentum_dtype must be .*, got 'int3'"),
    "a word that is gone": ("clip_threshold=1", "clip_threshold was removed: scaling='adamw'"),
    "a scaling that is gone": ("scaling=floor", "scaling=floor was removed: use scaling='adamw'"),
    "code": ("momentum=__import__('os')", "momentum must be a number, got"),
    "a list": (["momentum=0.9"], r"must be a mapping or a string of key=value pairs, got \['momentum=0\.9'\]"),
    "a mapping out of range": ({"momentum": 1}, r"momentum must be in \[0, 1\), got 1\.0"),
    "a mapping of lists": (
        {"momentum": [0.9]},
        r"momentum must be a number, a word, true, false or null, got \[0\.9\]",
    ),
}


def with_optim_args(optim_args: Any) -> Callable[[Path], Attempt]:
    return lambda folder: Attempt(lambda: arguments(folder, optim_args=optim_args))


def trainer(act: Callable[[SaITrainer], Any], **settings: Any) -> Callable[[Path], Attempt]:
    """An attempt on a Trainer, whose weights must stay as they were."""

    def prepare(folder: Path) -> Attempt:
        model = nn.Linear(2, 2)
        made = SaITrainer(model, arguments(folder, **settings), train_dataset=[{"x": 1.0}])
        return Attempt(lambda: act(made), lambda: [p.tolist() for p in model.parameters()])

    return prepare


def no_whole_checkpoint(folder: Path) -> Attempt:
    (folder / "run" / "checkpoint-2").mkdir(parents=True)
    (folder / "run" / "checkpoint-2" / "optimizer.pt").write_bytes(b"half")
    return trainer(lambda made: made.train(resume_from_checkpoint=True))(folder)


def checkpoint_without(what: str) -> Callable[[Path], Attempt]:
    def prepare(folder: Path) -> Attempt:
        checkpoint = folder / "run" / "checkpoint-2"
        checkpoint.mkdir(parents=True)
        for name in {"optimizer.pt", "scheduler.pt", "trainer_state.json"} - {what}:
            (checkpoint / name).write_bytes(b"")
        return trainer(lambda made: made.train(resume_from_checkpoint=str(checkpoint)))(folder)

    return prepare


CASES: list[Case] = [
    *(
        Case(f"optim_args: {name}", with_optim_args(given), ValueError, says)
        for name, (given, says) in OPTIM_ARGS.items()
    ),
    *(
        Case(
            f"learning_rate {rate}",
            lambda folder, rate=rate: Attempt(lambda: sgd_sai_from_args(arguments(folder, learning_rate=rate))),
            ValueError,
            rf"^lr must be a finite number >= 0, got {says}$",
        )
        for rate, says in ((-1.0, r"-1\.0"), (float("nan"), "nan"))
    ),
    Case(
        "create_sgd_sai: args a dict",
        lambda _: Attempt(lambda: create_sgd_sai(nn.Linear(2, 2), {"learning_rate": 0.1}, 10)),
        ValueError,
        "args must be transformers.TrainingArguments, got dict; without them use hf_sai.param_groups",
    ),
    Case(
        "create_sgd_sai: model a list of parameters",
        lambda folder: Attempt(lambda: create_sgd_sai(list(nn.Linear(2, 2).parameters()), arguments(folder), 10)),
        ValueError,
        "model must be a torch.nn.Module, got list",
    ),
    Case(
        "sgd_sai_from_args: args None",
        lambda _: Attempt(lambda: sgd_sai_from_args(None)),
        ValueError,
        "args must be transformers.TrainingArguments, got NoneType",
    ),
    Case(
        "sgd_sai_from_args: model a list",
        lambda folder: Attempt(lambda: sgd_sai_from_args(arguments(folder), [])),
        ValueError,
        "model must be a torch.nn.Module, got list",
    ),
    *(
        Case(f"GSNRCallback: {name}", lambda _, given=given: Attempt(lambda: GSNRCallback(**given)), ValueError, says)
        for name, given, says in (
            ("every 0", {"every": 0}, "every must be a whole number of at least 1 optimizer step, .* got 0"),
            ("every 1.5", {"every": 1.5}, "every must be a whole number of at least 1 optimizer step, .* got 1.5"),
            ("file None", {"file": None}, "file must be a file name for the record in output_dir, got None"),
            ("trainer a dict", {"trainer": {}}, "trainer must be a transformers.Trainer, or None, got dict"),
        )
    ),
    Case(
        "create_sgd_sai: num_training_steps 0",
        lambda folder: Attempt(lambda: create_sgd_sai(nn.Linear(2, 2), arguments(folder), 0)),
        ValueError,
        "num_training_steps must be at least 1, got 0",
    ),
    Case(
        "nothing whole to resume",
        no_whole_checkpoint,
        ValueError,
        r"resume_from_checkpoint=True found no complete checkpoint in '.*run'",
    ),
    Case(
        "resume without optimizer",
        checkpoint_without("optimizer.pt"),
        ValueError,
        "checkpoint-2' contains no optimizer state; to continue from its weights only, load them with from_pre",
    ),
    Case(
        "resume without scheduler",
        checkpoint_without("scheduler.pt"),
        ValueError,
        "checkpoint-2' contains no scheduler state; to continue from its weights only",
    ),
]
