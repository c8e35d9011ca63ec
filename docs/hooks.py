"""What the site adds to mkdocs: docstrings of public names are checked, and the records are listed."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import griffe
import yaml

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "recipes" / "results"
RECORDS = "<!-- records -->"
# In strict mode mkdocs counts the warnings of these loggers as errors.
logger = logging.getLogger("mkdocs.plugins.hf_sai")


def api_names() -> list[str]:
    """The dotted path of every name that the API page shows, members included."""
    blocks = re.findall(r"^::: (\S+)\n((?: {4}.*\n)*)", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    names = []
    for name, options in blocks:
        members = yaml.safe_load(options)["options"].get("members", []) if options else []
        names += [name, *(f"{name}.{member}" for member in members)]
    return names


class PublicDocstrings(griffe.Extension):
    """Warns of a public name without a docstring or outside the API page; turns Sphinx's roles into links."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        shown = api_names()
        for name in set(pkg.exports or ()) - {path.rpartition(".")[2] for path in shown}:
            logger.warning("%s.%s is public and docs/api.md does not show it", pkg.name, name)
        pages: dict[str, str] = {}
        for path in shown:
            found = find(pkg, path)
            if found is None or found.docstring is None:
                logger.warning("%s is on the API page and has no docstring", path)
            else:
                pages[found.canonical_path] = path
        for canonical in pages:
            found = find(pkg, canonical)
            assert found is not None
            assert found.docstring is not None
            # griffe reads `Examples:` as code and `Example:` as prose.
            text = found.docstring.value.replace("Example:\n", "Examples:\n")
            found.docstring.value = with_links(text, found, pkg, pages)


def with_links(text: str, place: griffe.Object, pkg: griffe.Module, pages: dict[str, str]) -> str:
    """The text with ``:func:`name``` as a link to the API page, or as code where that page does not show the name."""

    def link(match: re.Match[str]) -> str:
        name = match["name"]
        try:
            found = find(pkg, name if name.startswith(f"{pkg.name}.") else place.resolve(name))
        except griffe.NameResolutionError:
            found = None
        if found is None:
            logger.warning("%s refers to %s, which hf_sai does not have", place.path, match[0])
            return match[0]
        code = f"`{name}`"
        return f"[{code}][{pages[found.canonical_path]}]" if found.canonical_path in pages else code

    return re.sub(r":(?:class|func|meth|mod):`(?P<name>[\w.]+)`", link, text)


def find(pkg: griffe.Module, path: str) -> griffe.Object | None:
    """The object at a dotted path of the package, wherever it is defined."""
    try:
        found: Any = pkg[path.removeprefix(f"{pkg.name}.")]
    except KeyError:
        return None
    found = found.final_target if found.is_alias else found
    # `hf_sai.param_groups` is a function and the module that it is from.
    return found[found.name] if found.is_module and found.name in found.members else found


def on_page_markdown(markdown: str, **_: Any) -> str:
    """List the records where a page asks for it."""
    return markdown.replace(RECORDS, records()) if RECORDS in markdown else markdown


def records() -> str:
    """Every JSON record in recipes/results/ with the machine and the versions that it names, as a table."""
    rows = ["| record | made by | machine | torch |", "| --- | --- | --- | --- |"]
    for path in sorted(RESULTS.glob("**/*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            record = {}
        machine = record.get("machine") or {}
        runs = [run for run in record.get("runs") or () if isinstance(run, dict)]
        cpus = dict.fromkeys(str(run["cpu"]) for run in runs if "cpu" in run)
        cells = [
            f"`{path.relative_to(RESULTS)}`",
            next((f"`{record[key]}`" for key in ("command", "recipe", "benchmark") if record.get(key)), "-"),
            ", ".join([*machine.get("gpus", ()), *([machine["cpu"]] if "cpu" in machine else cpus)]) or "-",
            str((record.get("versions") or {}).get("torch", "-")),
        ]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)
