"""README.md agrees with the results, with the Makefile and with the files it names."""

import re
from pathlib import Path

from recipes import readme_tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_agree_with_the_results() -> None:
    assert re.findall(r"<!-- table: (\w+) -->", README), "README.md has no table of results"
    assert readme_tables.rewritten(README) == README, "run: python -m recipes.readme_tables"


def test_a_changed_number_is_noticed() -> None:
    block = re.search(r"<!-- table: \w+ -->\n.*?<!-- end -->", README, re.DOTALL)
    assert block
    number = re.search(r"\d\.\d+", block[0])
    assert number
    altered = block[0].replace(number[0], "9.999", 1)
    assert readme_tables.rewritten(altered) == block[0]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", README, re.MULTILINE)) <= targets


def test_named_files_exist() -> None:
    named = set(re.findall(r"\b((?:recipes|accelerate_configs|hf_sai|tests)/[\w/.-]+\.(?:py|yaml|json|png))", README))
    assert named
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_the_bare_loop_clips_the_gradient_norm() -> None:
    """The Trainer clips by default; a loop that is told to swap the optimizer must not be worse off."""
    block = re.search(r"\*\*A bare loop\*\*:\n\n```diff\n(.*?)```", README, re.DOTALL)
    assert block
    lines = [line[1:].split("#")[0].strip() for line in block[1].splitlines() if line[0] != "-"]
    order = [lines.index(line) for line in ("loss.backward()", "optimizer.step()")]
    assert order[0] < lines.index("torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)") < order[1]
