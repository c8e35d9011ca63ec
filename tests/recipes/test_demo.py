"""The demo, small: recipes/demo.py from its first word to its report."""

import re
import sys
from pathlib import Path

import pytest

from recipes import demo
from recipes.common import UserError
from recipes.data import Row, load_e2e
from recipes.toy_e2e import write_sample

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # without a GPU, pinning memory does nothing but warn
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


@pytest.mark.parametrize("own_data", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_one_command_ends_with_a_table_sentences_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], own_data: bool
) -> None:
    words = ["--output_dir", str(tmp_path / "out"), "--steps", "6", "--pretrain_steps", "8", "--test_mrs", "5"]
    if not own_data:
        words += ["--data", str(write_sample(tmp_path / "given", 20, 4, 8))]
    monkeypatch.setattr(sys, "argv", ["demo.py", *words])
    demo.main()
    text = (tmp_path / "out" / "report.md").read_text()
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in text.splitlines() if line.startswith("|")]
    assert rows[0][:2] == ["optimizer", "validation loss"]
    assert rows[0][2:7] == ["bleu", "nist", "meteor", "rouge_l", "cider"]
    results = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    assert set(results) == {"SGD-SaI", "AdamW"}
    # LoRA of rank 4 on two c_attn of width 128: 4 * (128 + 384) numbers each
    ours, theirs = (float(results[name]["optimizer state MB"]) for name in ("SGD-SaI", "AdamW"))
    # Momentum, a scale for each row and column, and two numbers for each of four matrices.
    assert ours == pytest.approx((2 * 4 * 512 * 4 + 2 * (512 + 8) * 4 + 4 * 12) / 1e6, abs=6e-4)
    assert theirs == pytest.approx(2 * 2 * 4 * 512 * 4 / 1e6, abs=6e-4)
    assert text.count("- reference: ") == demo.SHOWN
    assert text.count("- SGD-SaI: ") == text.count("- AdamW: ") == demo.SHOWN
    pictures = re.findall(r"\]\((.+?\.png)\)", text)
    assert pictures == ["losses.png", "SGD-SaI/gsnr.png"]
    assert all((tmp_path / "out" / name).stat().st_size > 5000 for name in pictures)
    said = capsys.readouterr().out
    assert f"report: {tmp_path / 'out' / 'report.md'}" in said
    assert "Validation loss of the base before fine-tuning" in said


def test_pretraining_never_sees_the_task(tmp_path: Path) -> None:
    data = load_e2e(str(write_sample(tmp_path, 30, 4, 4)))
    rows = demo.pretraining_rows(data, 400)
    assert len(rows) == 400
    texts = {row.reference for row in data.train}
    own = [row for row in rows if row.reference in texts]
    assert len(own) == 40
    assert all(row.mr == "" for row in own)
    held_out = {row.reference for row in [*data.validation, *data.test]} - texts
    assert not held_out & {row.reference for row in rows}
    assert demo.train_tokenizer([Row("", "a b"), Row("name[c]", "d")]).eos_token == demo.END_OF_TEXT


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [({"steps": 0}, "steps must be at least 1, got 0"), ({"data": "/nowhere"}, "data: '/nowhere' is not a folder")],
)
def test_bad_input(kwargs: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        demo.DemoArguments(**kwargs)  # type: ignore[arg-type]
