"""The architecture as a test: what importing costs, and who may import whom."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_sai"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# The rooms that are about one library; everything else imports it, if at all, where it is used.
ROOMS = {
    "transformers": {
        "hf_sai.callbacks",
        "hf_sai.from_args",
        "hf_sai.registration",
        "hf_sai.resume",
        "hf_sai.trainer",
        "hf_sai.training_args",
    },
    "triton": {"hf_sai.fused", "hf_sai.triton_kernels"},
    "matplotlib": set(),
    "accelerate": set(),
    "peft": set(),
    "trl": set(),
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, everywhere: bool = False) -> set[str]:
    """The modules that a file imports when it is imported, or ``everywhere``.

    Everywhere is also in functions, under TYPE_CHECKING, by ``importlib`` and lazily by the table of the package.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if not everywhere and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if not everywhere and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if everywhere and isinstance(child, ast.Call) and "import_module" in ast.unparse(child.func):
                found.update(a.value for a in child.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                found.add(child.module or "")
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    return set(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout))


def test_importing_the_package_loads_torch_and_nothing_heavier() -> None:
    ours = loaded_by("import hf_sai.table\nfrom hf_sai import SGDSaI")
    extra = {name.partition(".")[0] for name in ours - loaded_by("import torch")}
    assert "torch" in ours
    assert {name for name in extra - sys.stdlib_module_names if not name.startswith("_")} == {"hf_sai"}
    # Seconds of import time that only a compiled step needs.
    assert "torch._dynamo" not in ours


def test_the_public_names_resolve() -> None:
    import hf_sai

    assert set(hf_sai.__all__) <= set(dir(hf_sai))
    for name in hf_sai.__all__:
        assert getattr(hf_sai, name).__name__ == name
    with pytest.raises(AttributeError, match="'hf_sai' has no attribute 'SGDSAI'"):
        _ = hf_sai.SGDSAI


@pytest.mark.parametrize("library", ROOMS)
def test_optional_libraries_are_imported_where_they_belong(library: str) -> None:
    importers = {
        module_name(path) for path in SOURCES if any(name.partition(".")[0] == library for name in imports(path))
    }
    assert importers <= ROOMS[library]


@pytest.mark.parametrize("everywhere", [False, True], ids=["when imported", "everywhere"])
def test_imports_run_one_way(everywhere: bool) -> None:
    """No circle, not even one that an import in a function or under TYPE_CHECKING would hide."""
    # What the package itself offers lazily stands above everything in it.
    paths = [path for path in SOURCES if not everywhere or path != PACKAGE / "__init__.py"]
    names = {module_name(path) for path in paths}
    below = {module_name(path): imports(path, everywhere) & names - {module_name(path)} for path in paths}
    placed: set[str] = set()
    while remaining := names - placed:
        ground = {name for name in remaining if below[name] <= placed}
        assert ground, f"these import each other in a circle: { {name: below[name] - placed for name in remaining} }"
        placed |= ground


def test_the_list_in_contributing_is_complete_and_in_the_order_of_imports() -> None:
    """What stands further down in it uses only what stands above."""
    rows = [line.split("|")[1] for line in (PACKAGE.parent / "CONTRIBUTING.md").read_text().splitlines() if "|" in line]
    listed = [name for row in rows if "hf_sai/" in row for name in re.findall(r"`(?:hf_sai/)?(\w+)(?:\.py|/)`", row)]
    rooms = {name.split(".")[1] for path in SOURCES if "." in (name := module_name(path))}
    assert sorted(listed) == sorted(rooms)
    for path in SOURCES:
        user = module_name(path).split(".")[1:2]
        for used in imports(path):
            parts = used.split(".")
            if user and parts[0] == "hf_sai" and parts[1:] and parts[1] in rooms:
                assert listed.index(parts[1]) <= listed.index(user[0]), f"{path.name} imports {used}"


RECIPES = PACKAGE.parent / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.py")), ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_a_job_imports_no_other_job(path: Path) -> None:
    """Only `common` and its own modules, in functions too; `common` imports no job. `studies` stand above the jobs."""
    own = path.relative_to(RECIPES).parts[0].removesuffix(".py")
    used = {name.split(".")[1] for name in imports(path, everywhere=True) if name.startswith("recipes.")}
    assert own == "studies" or used <= {"common", own}
