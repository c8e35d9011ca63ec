"""The wheel's long description: whoever reads it has the wheel, and no clone."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import hf_sai
from hf_sai.cli import main

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TEXT = (ROOT / PROJECT["project"]["readme"]).read_text(encoding="utf-8")
TOKENS = [inner for token in MarkdownIt().parse(TEXT) for inner in (token, *(token.children or []))]
CODE = "\n".join(token.content for token in TOKENS if token.type in ("code_inline", "fence"))


def test_no_link_or_picture_is_relative() -> None:
    targets = [token.attrGet(name) for token in TOKENS for name in ("href", "src") if token.attrGet(name)]
    assert targets
    assert [target for target in targets if not str(target).startswith("https://")] == []
    assert not re.search(r"<\s*(a|img)\b", TEXT), "HTML links are not looked at"


def test_nothing_is_named_that_the_wheel_lacks() -> None:
    packaged = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert packaged == ["hf_sai"]
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - set(packaged)
    assert [name for name in folders if re.search(rf"\b{re.escape(name)}/", CODE)] == []
    assert not re.search(r"\bmake [a-z]", CODE), "the Makefile is not in the wheel"
    files = {path.name for path in ROOT.iterdir() if path.is_file()}
    assert [name for name in files if name in TEXT] == []


def test_what_it_names_is_there() -> None:
    for token in TOKENS:
        if token.type == "fence" and token.info == "python":
            for node in ast.walk(ast.parse(token.content)):
                if isinstance(node, ast.ImportFrom) and node.module == "hf_sai":
                    assert {alias.name for alias in node.names} <= set(hf_sai.__all__)
    for module in set(re.findall(r"\bhf_sai((?:\.[a-z_]+)+)", CODE)):
        assert importlib.util.find_spec(f"hf_sai{module}")
    extras = re.search(r"The extra `(\w+)` .*?, `(\w+)` .*?,\s`(\w+)`", TEXT, re.DOTALL)
    assert extras
    assert set(extras.groups()) <= PROJECT["project"]["optional-dependencies"].keys()


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^hf-sai (\w+)", CODE, re.MULTILINE))))
def test_its_commands_are_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    usage = capsys.readouterr().out
    line = re.search(rf"^hf-sai {command} .*", CODE, re.MULTILINE)
    assert line
    assert [option for option in re.findall(r"--[a-z-]+", line[0]) if option not in usage] == []
