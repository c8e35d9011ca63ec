"""No file can run code, no text can become markup, no record or card tells who ran it and where."""

import ast
import html.parser
import json
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hf_sai import SaITrainer, SaITrainingArguments
from recipes.common.e2e_data import Group, load_e2e
from recipes.common.errors import UserError
from recipes.common.models import load_model
from recipes.common.optimizers import RecipeArguments
from recipes.common.provenance import run_record
from recipes.common.records import machine, versions
from recipes.e2e.demo import sentences
from recipes.e2e.toy_data import write_sample
from recipes.e2e.train import E2EArguments, fine_tune, model_card
from recipes.pretrain.compare import compare
from recipes.pretrain.train import read_config

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("hf_sai", "recipes") for path in (ROOT / folder).rglob("*.py"))

# ---------------------------------------------------------------- the source

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {
    **dict.fromkeys(("eval", "exec", "os.system", "os.popen", "tempfile.mktemp"), "runs or races what it is given"),
    **dict.fromkeys(("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"), "builds Python objects"),
    **dict.fromkeys(("np.load", "numpy.load", "pd.read_pickle", "torch.hub.load"), "may unpickle"),
    **dict.fromkeys(("tarfile.open", "shutil.unpack_archive"), "writes where the archive says"),
}


def unsafe(source: str) -> list[str]:
    """What in a module can run code from a file, as `line: why`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{node.lineno}: imports {name}" for name in names if name.partition(".")[0] in UNSAFE_MODULES]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in UNSAFE_CALLS:
            found.append(f"{node.lineno}: {name} {UNSAFE_CALLS[name]}")
        if name == "torch.load" and keywords.get("weights_only") != "True":
            found.append(f"{node.lineno}: torch.load without weights_only=True")
        if keywords.get("shell", "False") != "False":
            found.append(f"{node.lineno}: {name} through a shell")
        of_hub = name.startswith("Auto") and name.endswith(".from_pretrained")  # by default it asks on the terminal
        if keywords.get("trust_remote_code", "None" if of_hub else "False") != "False":
            found.append(f"{node.lineno}: {name} runs code of the hub unasked")
        if name == "yaml.compose" and keywords.get("Loader") != "yaml.SafeLoader":
            found.append(f"{node.lineno}: {name} without the safe loader")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import dill.source",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.Loader)",
        "subprocess.run(command, shell=True)",
        "load_dataset(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name)",
        "eval(text)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_scan_finds(source: str) -> None:
    assert unsafe(source)


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_no_file_can_run_code(path: Path) -> None:
    found = unsafe(path.read_text(encoding="utf-8"))
    if path.name == "launch.py":  # runs the script that the user names, as Python itself would
        found = [line for line in found if not line.endswith("exec runs or races what it is given")]
    assert not found


def test_no_option_trusts_code_of_the_hub() -> None:
    for kind in (E2EArguments, RecipeArguments, SaITrainingArguments):
        assert not [name for name in kind.__dataclass_fields__ if "trust" in name]


# ---------------------------------------------------------------- files that want to run


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """The folder that a payload makes; a payload that is unpickled does make it."""
    mark = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(mark)))
    mark.rmdir()
    yield mark
    assert not mark.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_cannot_run_code(
    name: str,
    mark: Path,
    tmp_path: Path,
    make_gpt2: Callable[..., Any],
    token_dataset: list[dict[str, Tensor]],
) -> None:
    def trainer() -> SaITrainer:
        quiet: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
        args = SaITrainingArguments(
            str(tmp_path / "run"), max_steps=2, save_steps=1, per_device_train_batch_size=4, **quiet
        )
        return SaITrainer(make_gpt2(), args, train_dataset=token_dataset)

    trainer().train()
    torch.save(Payload(mark), tmp_path / "run" / "checkpoint-1" / name)
    with pytest.raises(pickle.UnpicklingError, match=r"(?i)weights.only"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_weights_cannot_run_code(mark: Path, tmp_path: Path, make_gpt2: Callable[..., Any], tokenizer: Any) -> None:
    base = tmp_path / "base"
    make_gpt2().save_pretrained(base)
    tokenizer.save_pretrained(base)
    (base / "model.safetensors").unlink()
    torch.save(Payload(mark), base / "pytorch_model.bin")
    with pytest.raises((UserError, pickle.UnpicklingError)):
        load_model(str(base))


def test_code_beside_a_model_is_not_run(
    mark: Path, tmp_path: Path, make_gpt2: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = tmp_path / "base"
    make_gpt2().save_pretrained(base)
    tokenizer.save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "mine.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Mine: ...\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked although nobody is there to answer"))
    with pytest.raises(UserError, match=r"model: could not load .*(?i:trust_remote_code|custom code)"):
        load_model(str(base))


# ---------------------------------------------------------------- reports

NASTY = "<script>alert(1)</script>[x](javascript:alert(2))![y](http://h/p.png)|`<img src=x onerror=z>`\n\n# T\n---\n"
INLINE = {"text", "text_special", "softbreak", "em_open", "em_close", "strong_open", "strong_close", "code_inline"}


def inline_kinds(markdown: str) -> set[str]:
    """The kinds of inline markup that a reader of this Markdown sees."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table"]).parse(markdown)
    assert not [token for token in tokens if token.type == "html_block"]
    return {child.type for token in tokens for child in token.children or []}


class Tags(html.parser.HTMLParser):
    """Collects the tags of a page and their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {f"{name}={value}" if name in ("href", "src") else name for name, value in attrs}


def pretraining_record(**config: Any) -> dict[str, Any]:
    row = {"step": 1, "tokens": 10, "seconds": 1.0, "loss": 2.0}
    return {
        "config": {"optim": "sgd_sai", "learning_rate": 0.1, **config},
        "curves": {"train": [row], "validation": [row]},
        "final": {"train_loss": 2.0},
        "speed": {},
        "tokens": 10,
        "optimizer_state_bytes": 1,
        "machine": {"cpu": NASTY},
        "versions": {"torch": NASTY},
    }


def test_the_comparison_page_holds_no_foreign_markup(tmp_path: Path) -> None:
    paths = []
    for name, config in {"plain": {}, "nasty": {"optim": NASTY, "optim_args": "$\\frac$", NASTY: NASTY}}.items():
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(pretraining_record(**config)))
    page = compare([*paths, paths[1]], tmp_path / "page", title=NASTY)
    tags = Tags((page / "comparison.html").read_text())
    assert tags.names.isdisjoint({"script", "a", "iframe", "object", "form"})
    assert not [
        a for a in tags.attributes if a.startswith("on") or (a.startswith("src=") and "data:image/png" not in a)
    ]
    assert "&lt;script&gt;" in (page / "comparison.html").read_text()
    assert inline_kinds((page / "comparison.md").read_text()) <= INLINE | {"image"}
    images = [line for line in (page / "comparison.md").read_text().splitlines() if line.startswith("![")]
    assert [line.rpartition("](")[2] for line in images] == ["curves.png)", "costs.png)"]


def e2e_record(**config: Any) -> dict[str, Any]:
    settings = {"model": "base", "data": "set", "optim": "sgd_sai", "learning_rate": 0.1, "weight_decay": 0.0, **config}
    versions = {"hf_sai": "0"}
    return {
        "config": settings,
        "base_model": settings["model"],
        "base_weights": None,
        "scores": {"bleu": 0.5},
        "test_mrs": 3,
        "steps": 4,
        "eval_loss": 1.0,
        "versions": versions,
    }


def test_the_card_of_an_adapter_holds_no_foreign_markup() -> None:
    card = model_card(e2e_record(model=NASTY, data=NASTY, optim_args=NASTY), E2EArguments())
    assert inline_kinds(card.text) <= INLINE
    assert len([line for line in card.text.splitlines() if line.startswith("#")]) == 1
    assert (card.data.base_model, card.data.library_name) == (NASTY, "peft")  # YAML keeps it one value


def test_the_card_of_a_concept_holds_no_foreign_markup() -> None:
    from recipes.diffusion.card import model_card as concept_card
    from recipes.diffusion.config import DiffusionArguments

    record = e2e_record(model='x"); import os; os.system("id") #' + NASTY, optim_args=NASTY)
    record |= {"captions": [NASTY], "images": 1, "samples_per_step": 1, "text_encoders": 1, "concept": {"<V>": "dog"}}
    card = concept_card(record, DiffusionArguments(data="x", concept_init=["dog"]), "grid.png")
    assert inline_kinds(card.text) <= INLINE | {"image"}
    code = card.text.partition("```python\n")[2].partition("```")[0]
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert set(calls) == {
        "DiffusionPipeline.from_pretrained",
        "pipe.load_lora_weights",
        "pipe.load_textual_inversion",
    }


def test_texts_of_the_set_are_text_in_the_demo_report() -> None:
    from recipes.common.records import markdown_text

    report = sentences([Group(NASTY, [NASTY])], {"SGD-SaI": {NASTY: NASTY}}, markdown_text)
    assert inline_kinds(report) <= INLINE
    assert "# T" not in report.splitlines()


# ---------------------------------------------------------------- who and where

SECRETS = {
    "HF_TOKEN": "hf_SecretTokenOfTheHub",
    "WANDB_API_KEY": "0123456789secretofwandb",
    "USER": "zaphodbeeblebrox",
    "LOGNAME": "zaphodbeeblebrox",
    "HOSTNAME": "heartofgold",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of a user with secrets in the environment."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    home = tmp_path / "zaphodbeeblebrox"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    return home


def private(home: Path) -> set[bytes]:
    words = {*SECRETS.values(), str(home), str(home.parent), "hf_another_secret"}
    if len(socket.gethostname()) > 4:
        words.add(socket.gethostname())
    return {word.encode() for word in words}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_run_tells_nothing_of_its_user(home: Path, make_gpt2: Callable[..., Any]) -> None:
    """The whole E2E recipe, model and data below the home folder; then every file that it leaves."""
    data = write_sample(home / "data", train_mrs=8, dev_mrs=2, test_mrs=2)
    bpe = ByteLevelBPETokenizer()
    texts = [row.reference for row in load_e2e(str(data)).train]
    bpe.train_from_iterator(texts, vocab_size=300, special_tokens=["<end>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<end>", eos_token="<end>")
    make_gpt2(vocab_size=300, n_positions=512).save_pretrained(home / "base")
    tokenizer.save_pretrained(home / "base")
    config = E2EArguments(
        model=str(home / "base"), data=str(data), metrics=["bleu"], num_beams=1, max_new_tokens=4, max_test_mrs=2
    )
    args = RecipeArguments(
        output_dir=str(home / "out"),
        run_name="zaphodbeeblebrox-1",
        hub_token="hf_another_secret",
        hub_model_id="zaphodbeeblebrox/adapter",
        push_to_hub=False,
        resume_from_checkpoint=None,
        max_steps=2,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    fine_tune(config, args)
    assert {"record.json", "predictions.tsv", "adapter/README.md"} <= {
        path.relative_to(home / "out").as_posix() for path in (home / "out").rglob("*")
    }
    telling = {
        path.name
        for path in (home / "out").rglob("*")
        if path.is_file() and any(word in path.read_bytes() for word in private(home))
    }
    # PEFT finds a local base model by this path; with a name on the hub nothing is left.
    assert telling <= {"adapter_config.json"}


def test_records_hold_no_path_of_any_setting(home: Path) -> None:
    (home / "texts").mkdir()
    (home / "texts" / "a.txt").write_text("text")
    words = [
        *("--train_files", "~/texts/a.txt", str(home / "texts" / "a.txt"), "texts/a.txt"),
        f"--output_dir={home / 'out'}",
        f"--cache_dir={home / 'cache'}",
        "--tokenizer=texts",
        "--hub_token=hf_another_secret",
        "--resume_from_checkpoint=auto",
        "--use_cpu",
    ]
    record = run_record("pretrain", read_config(words))
    text = json.dumps(record)
    assert record["config"]["train_files"] == ["a.txt"] * 3
    assert not [word for word in private(home) if word.decode() in text]


def test_machine_and_versions_tell_nothing(home: Path) -> None:
    text = json.dumps([machine(), versions()])
    assert not [word for word in private(home) if word.decode() in text]
