"""What a run prints: recipes/common/progress.py."""

import io
import sys
import warnings

import pytest
from transformers.utils import logging as transformers_logging

from recipes.common import progress as module
from recipes.common.progress import Lines, progress, quiet


def test_a_file_gets_a_line_at_most_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    shown = progress(100, "train", "steps")
    assert isinstance(shown, Lines)
    for _ in range(100):
        clock[0] += 0.3
        shown.update()
    shown.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "train: 34 of 100 steps, about 20 s left",
        "train: 68 of 100 steps, about 10 s left",
    ]


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    shown = progress(4, "train", "steps")
    shown.update(4)
    shown.close()
    said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "train: " in said
    assert "\n" not in said
    assert said.split("\r")[-2].strip() == ""


def test_quiet_hides_warnings_of_libraries_only() -> None:
    before = transformers_logging.get_verbosity()
    with warnings.catch_warnings(record=True) as said, quiet():
        assert transformers_logging.get_verbosity() == transformers_logging.ERROR
        assert not transformers_logging.is_progress_bar_enabled()
        warnings.warn("something is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("SGDSaI: all gradients are zero", stacklevel=1)
    assert transformers_logging.get_verbosity() == before
    assert transformers_logging.is_progress_bar_enabled()
    assert [str(one.message) for one in said] == ["SGDSaI: all gradients are zero"]
