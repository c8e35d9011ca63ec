"""The public signatures, as tests/signatures.txt has them: a change of one is a change of that file.

``python tests/test_signatures.py`` rewrites the file.
"""

import inspect
from pathlib import Path
from typing import Any

import hf_sai

SNAPSHOT = Path(__file__).with_name("signatures.txt")


def _is_ours(member: Any) -> bool:
    return callable(member) and getattr(member, "__module__", "").startswith("hf_sai")


def public_callables() -> dict[str, Any]:
    """The public names, and the methods of their classes that hf_sai defines."""
    named = {}
    for name in hf_sai.__all__:
        public = getattr(hf_sai, name)
        if name != "SaITrainingArguments":  # its fields are those of the installed transformers
            named[name] = public
        for method in vars(public) if inspect.isclass(public) else ():
            if not method.startswith("_") and _is_ours(getattr(public, method)):
                named[f"{name}.{method}"] = getattr(public, method)
    return named


def signature(public: Any) -> str:
    """Names, kinds and defaults; annotations are left to mypy, since their text differs between Python versions."""
    whole = inspect.signature(public)
    bare = [p.replace(annotation=p.empty) for p in whole.parameters.values()]
    return str(whole.replace(parameters=bare, return_annotation=whole.empty))


def snapshot() -> str:
    return "".join(f"{name}{signature(public)}\n" for name, public in public_callables().items())


def test_the_public_signatures_are_those_of_the_snapshot() -> None:
    assert snapshot() == SNAPSHOT.read_text(encoding="utf-8"), "if this is meant: python tests/test_signatures.py"


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot(), encoding="utf-8")
