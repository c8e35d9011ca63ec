"""What a stranger has: a clone, other clones, an install without extras, none of our data."""

import hashlib
import importlib
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.common import public_data, sample_text
from recipes.common.config import find_config, parse_config, read_yaml
from recipes.common.errors import UserError
from recipes.common.models import check_model, hub_name
from recipes.lstm.train import LSTMArguments, load_text
from recipes.pretrain.text import Corpus
from recipes.pretrain.train import read_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "recipes").glob("*/configs/**/*.yaml"))


def run(words: list[str], folder: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.fixture(scope="module")
def clones(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two clones; a recipe of each says where it and what it imports come from."""
    found = []
    for name in ("mine", "other"):
        clone = tmp_path_factory.mktemp(name)
        for part in ("recipes", "hf_sai"):
            shutil.copytree(ROOT / part, clone / part, ignore=shutil.ignore_patterns("results", "__pycache__"))
        (clone / "recipes" / "where.py").write_text(
            "import hf_sai\nfrom recipes import common\n\nprint(hf_sai.__file__, common.__file__, sep='\\n')\n"
        )
        found.append(clone)
    return found[0], found[1]


def test_a_module_runs_from_any_folder_with_the_clone_installed(clones: tuple[Path, Path], tmp_path: Path) -> None:
    said = run(["-m", "recipes.where"], tmp_path, clones[0])
    assert said.stdout.splitlines()[1] == str(clones[0] / "recipes" / "common" / "__init__.py"), said.stderr
    said = run(["-m", "recipes.where"], clones[1], clones[0])  # in a clone: that one
    assert said.stdout.splitlines()[1] == str(clones[1] / "recipes" / "common" / "__init__.py"), said.stderr


HIDE = """
import importlib.abc, runpy, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("peft", "yaml"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

import importlib.util
whole = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in ("peft", "yaml") else whole(name, *a)
sys.meta_path.insert(0, Hidden())
"""


def test_an_install_without_the_extra_names_what_it_lacks(tmp_path: Path) -> None:
    """As a program one line and status 2, imported an error; both name the packages, neither an extra."""
    wanted = "the recipes need pyyaml, peft: python -m pip install pyyaml peft"
    (tmp_path / "hide.py").write_text(HIDE)
    said = run(["-c", "import hide, recipes.sweep.run"], tmp_path, tmp_path, ROOT)
    alone = "the recipes need pyyaml: python -m pip install pyyaml"
    assert said.stderr.strip().splitlines()[-1] == f"ModuleNotFoundError: {alone}"
    start = "import hide, sys, runpy; sys.argv = ['-m']; runpy.run_module('recipes.sweep', run_name='__main__')"
    said = run(["-c", start], tmp_path, tmp_path, ROOT)
    assert (said.stderr.strip(), said.returncode) == (f"error: {wanted}", 2)


def test_no_extra_of_a_package_that_the_index_lacks_is_printed() -> None:
    for path in (ROOT / "recipes").rglob("*.py"):
        assert not re.findall(r"hf_sai\[\w+\]", path.read_text(encoding="utf-8")), path.name


PROGRAMS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for path in (ROOT / "recipes").rglob("*.py")
    if "\n    run_main(" in path.read_text("utf-8")
)
LIBRARIES = (
    *("torch", "numpy", "evaluate", "datasets", "transformers", "accelerate", "peft", "trl"),
    *("yaml", "filelock", "tqdm", "PIL", "matplotlib"),
)


def test_ctrl_c_while_libraries_are_imported_is_one_line(tmp_path: Path) -> None:
    """Each program stops in its first import of a library, which takes a minute."""
    for name in LIBRARIES:
        (tmp_path / f"{name}.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    started = [["-m", name, "x.yaml"] for name in PROGRAMS]
    assert len(started) > 15
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, **pipes) for words in started]
    for process, words in zip(processes, started, strict=True):
        assert process.stdout.readline() == "importing\n", words
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert time.monotonic() - start < 20, words  # at once, but for a loaded machine; the import takes a minute
        assert process.returncode == 130, words
        wanted = f"interrupted; nothing is saved yet, start it again with: python {' '.join(words)}"
        assert said.strip() == wanted, words


def test_a_worker_that_imports_leaves_ctrl_c_to_its_parent() -> None:
    with multiprocessing.get_context("spawn").Pool(1, importlib.import_module, ("recipes",)) as pool:
        assert pool.apply(signal.getsignal, (signal.SIGINT,)) == signal.SIG_IGN


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_names_no_place_of_ours(path: Path) -> None:
    """Data are on the hub, made here, or in `$HF_SAI_DATA` under a name of which an error says where it is."""
    text = path.read_text(encoding="utf-8")
    assert "../" not in text
    for name in re.findall(r"\$HF_SAI_DATA/(\w+)", text):
        assert name in public_data.SOURCES


def test_data_that_are_not_there_are_named_with_their_public_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_SAI_DATA", str(tmp_path))
    rule = rf"train_files: there is no '{tmp_path}/tinyshakespeare/input.txt'; set HF_SAI_DATA to the folder that "
    with pytest.raises(UserError, match=rule + r"holds tinyshakespeare/input.txt, or .* karpathy/char-rnn on GitHub"):
        read_config("tiny_shakespeare.yaml")
    monkeypatch.delenv("HF_SAI_DATA")
    monkeypatch.setattr(public_data, "data_folder", lambda: tmp_path / "none")
    with pytest.raises(UserError, match=r"there is no '.*none/tiny.*' \(HF_SAI_DATA is not set\); set HF_SAI_DATA"):
        read_config("tiny_shakespeare.yaml")


def test_data_that_are_there_are_found_and_an_option_in_their_place_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_SAI_DATA", str(tmp_path))
    corpus, _, _ = read_config(["tiny_shakespeare.yaml", "--train_files", "other.txt"])
    assert corpus.train_files == ["other.txt"]
    (tmp_path / "pretrain").mkdir()
    for name in ("train-0.parquet", "validation.parquet"):
        (tmp_path / "pretrain" / name).touch()
    corpus, _, _ = read_config("pretrain5m_adamw.yaml")
    assert corpus.train_files == [f"{tmp_path}/pretrain/train-*.parquet"]
    assert corpus.validation_files == [f"{tmp_path}/pretrain/validation.parquet"]


def test_a_shipped_configuration_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = ROOT / "recipes" / "pretrain" / "configs" / "first_look.yaml"
    assert find_config("first_look.yaml") == find_config("first_look") == shipped
    assert read_yaml("first_look.yaml")["train_files"] == ["sample"]
    (tmp_path / "first_look.yaml").write_text("seed: 1\n")  # one of the user's comes first
    assert read_yaml("first_look.yaml") == {"seed": 1}
    with pytest.raises(UserError, match=r"config file nosuch.yaml: No such file"):
        read_yaml("nosuch.yaml")


def test_the_first_word_is_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("train_files: [a.txt]\n")
    (corpus,) = parse_config([Corpus], [str(tmp_path / "c.yaml"), "--split_seed", "3"])
    assert (corpus.train_files, corpus.split_seed) == (["a.txt"], 3)


def test_the_sample_is_the_same_megabyte_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SAI_CACHE", str(tmp_path))
    text = sample_text.sample_file().read_text(encoding="utf-8")
    assert text == sample_text.sample_text()
    assert 0.95e6 < len(text) < 1.1e6
    assert text.isascii()
    assert hashlib.sha256(text.encode()).hexdigest() == DIGEST
    stories = text.strip().split("\n\n")
    assert len(set(stories)) == len(stories) == sample_text.STORIES
    assert "{" not in text
    assert "  " not in text
    assert len(list(Corpus(["sample"]).documents())) > 50
    train, validation, characters = load_text(LSTMArguments("sample"))
    assert len(train) + len(validation) == pytest.approx(len(text) / 128, abs=2)
    assert characters == len(set(text))


DIGEST = "a0bdd10a3ca87a9884d5423cd6c5f86917c46de6a2817a4e4dbaa3d6a1a56d78"


def test_the_first_look_trains_with_nothing_but_the_clone(tmp_path: Path) -> None:
    environment = {"HF_SAI_CACHE": str(tmp_path / "cache"), "HF_SAI_DATA": str(tmp_path / "none")}
    words = ["--max_tokens", "20480", "--eval_steps", "10", "--max_eval_blocks", "8", "--vocab_size", "400"]
    command = [sys.executable, "-m", "recipes.pretrain", "first_look.yaml", *words]
    own = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    subprocess.run(command, cwd=tmp_path, env=own, check=True, capture_output=True, timeout=200)
    record = yaml.safe_load((tmp_path / "outputs" / "first_look" / "record.json").read_text())
    assert record["steps"] == 10
    assert record["final"]["eval_loss"] < 5.9  # ln 400 is 5.99


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("name", ["./nosuch", "../nosuch", "/nosuch", "~/nosuch", "a/b/c", "nosuch/", ""])
def test_what_can_only_be_a_folder_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(UserError, match=f"model: there is no folder '{re.escape(name)}'; give a folder that holds"):
        check_model(name)


def test_a_base_that_another_recipe_makes_is_named_so() -> None:
    with pytest.raises(UserError, match=r"model: there is no folder 'outputs/lab_base'; make it first"):
        check_model("outputs/lab_base")


def test_a_card_names_hub_models_only(tmp_path: Path) -> None:
    assert hub_name("owner/name") == "owner/name"
    assert hub_name("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert hub_name(str(tmp_path)) is None
