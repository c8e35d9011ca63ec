"""The site: every name on the API page has a docstring whose example runs; mkdocs refuses what is wrong."""

import doctest
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import hf_sai
from hf_sai.release import GradientRelease
from hf_sai.table import GSNRRow

griffe = pytest.importorskip("griffe")  # of the extra docs

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
assert spec
assert spec.loader
hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks)

NAMES = hooks.api_names()
PACKAGE = griffe.load("hf_sai", search_paths=[ROOT], resolve_aliases=True)
METRIC = "hf_sai.metrics.E2E_NLG"  # test_metrics.py runs its example, where evaluate is loaded with an empty cache


def docstring(name: str) -> str:
    found = hooks.find(PACKAGE, name)
    assert found
    assert found.docstring, f"{name} has no docstring"
    return found.docstring.value


def test_the_api_page_has_every_public_name() -> None:
    assert set(hf_sai.__all__) <= {name.rpartition(".")[2] for name in NAMES}


# ---------------------------------------------------------------- examples


class Checker(doctest.OutputChecker):
    """Compares what an example shows; an example that shows nothing may print."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_[a-z]+)?` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", [name for name in NAMES if name != METRIC])
def test_the_example_of_a_docstring_runs(
    name: str,
    make_gpt2: Callable[..., Any],
    token_dataset: list[dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the module that has the docstring, with the names that the API page says there are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    text = docstring(name)
    assert "\nExample:\n" in text, f"{name} has no example"
    names = {
        **{public: getattr(hf_sai, public) for public in hf_sai.__all__},
        "GSNRRow": GSNRRow,
        "GradientRelease": GradientRelease,
        "Trainer": Trainer,
        "TrainingArguments": TrainingArguments,
        "hf_sai": hf_sai,
        "nn": torch.nn,
        "torch": torch,
        "model": make_gpt2(),
        "data": token_dataset,
        "args": hf_sai.SaITrainingArguments("out", max_steps=1),
    }
    test = doctest.DocTestParser().get_doctest(text.partition("\nExample:\n")[2], names, name, None, 0)
    assert test.examples
    output: list[str] = []
    results = doctest.DocTestRunner(checker=Checker(), verbose=False).run(test, out=output.append)
    assert results.failed == 0, "".join(output)


# ---------------------------------------------------------------- the site


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """The site as `make docs` builds it."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        check=False,
    )


def test_the_site_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    """It builds without a warning, shows every name and record, and no page loads anything from another server."""
    run = build(ROOT, tmp_path)
    assert run.returncode == 0, run.stderr
    assert "WARNING" not in run.stderr
    pages = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    loaded = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//""")
    assert {path: found for path, page in pages.items() if (found := loaded.findall(page))} == {}
    api = pages[tmp_path / "api.html"]
    assert [name for name in NAMES if f'id="{name}"' not in api] == []
    assert not re.search(r":(?:class|func|meth|mod):", api)
    results = pages[tmp_path / "results.html"]
    assert [path for path in hooks.RESULTS.glob("*.json") if path.name not in results] == []


def test_mkdocs_refuses_what_is_wrong(tmp_path: Path) -> None:
    """A broken link, a broken anchor, a public name without a docstring or off the API page, a wrong reference."""
    for folder in ("docs", "hf_sai"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)

    def replace(file: str, old: str, new: str) -> None:
        text = (tmp_path / file).read_text(encoding="utf-8")
        assert old in text
        (tmp_path / file).write_text(text.replace(old, new), encoding="utf-8")

    replace("docs/recipes.md", "# Recipes\n", "# Recipes\n\n[one](nowhere.md) [two](speed.md#nowhere)\n")
    replace("docs/api.md", "::: hf_sai.create_sgd_sai\n", "")
    replace("hf_sai/registration.py", "started under :mod:`hf_sai.launch`", "started under :mod:`hf_sai.start`")
    table = (tmp_path / "hf_sai" / "table.py").read_text(encoding="utf-8")
    bare, found = re.subn(r'(def gsnr_table\(.*?:\n) {4}""".*?"""\n', r"\1", table, count=1, flags=re.DOTALL)
    assert found
    (tmp_path / "hf_sai" / "table.py").write_text(bare, encoding="utf-8")
    run = build(tmp_path, tmp_path / "site")
    assert run.returncode != 0
    warnings = [line for line in run.stderr.splitlines() if line.startswith("WARNING")]
    for expected in (
        r"recipes\.md.*nowhere\.md",
        r"recipes\.md.*speed\.md#nowhere",
        r"hf_sai\.create_sgd_sai is public",
        r"hf_sai\.gsnr_table .*no docstring",
        r"hf_sai\.registration\.register refers to .*hf_sai\.start",
    ):
        assert [line for line in warnings if re.search(expected, line)], f"{expected} is not in {run.stderr}"
