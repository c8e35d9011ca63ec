"""The demo, small: recipes/e2e/demo.py from its first word to its report."""

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from recipes.common import models
from recipes.common.e2e_data import E2EData, Group, Row, group, load_e2e
from recipes.common.errors import UserError
from recipes.e2e import demo
from recipes.e2e import train as recipe
from recipes.e2e.toy_base import END_OF_TEXT, pretraining_rows, train_tokenizer
from recipes.e2e.toy_data import write_sample

TINY = ["--steps", "6", "--pretrain_steps", "8", "--test_mrs", "7"]


@pytest.fixture(autouse=True)
def _precision() -> Iterator[None]:
    """The demo computes in bf16 where the processor can: accelerate would keep that for every later test."""
    yield
    AcceleratorState._reset_state()


def start(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, dict[str, str]]]:
    """The report, and its table by optimizer and column."""
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output_dir", str(folder), *TINY, *words])
    demo.main()
    text = (folder / "report.md").read_text()
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in text.splitlines() if line.startswith("|")]
    return text, {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def check(text: str, results: dict[str, dict[str, str]], said: str, folder: Path) -> None:
    assert list(results) == ["SGD-SaI", "AdamW"]
    columns = ["loss before", "loss after", "BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr", "state MB", "step ms"]
    assert list(results["AdamW"])[1:10] == columns
    assert results["SGD-SaI"]["loss before"] == results["AdamW"]["loss before"]
    for name in ("reference", "base model", "SGD-SaI", "AdamW"):
        assert text.count(f"- {name}: ") == said.count(f"- {name}: ") == demo.SHOWN
    pictures = re.findall(r"\]\((.+?\.png)\)", text)
    assert pictures == ["losses.png", "SGD-SaI/gsnr.png"]
    assert all((folder / name).stat().st_size > 5000 for name in pictures)
    assert f"report: {folder / 'report.md'}\nplots: {folder / 'losses.png'}, " in said


@pytest.mark.parametrize("own_data", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_toy_base_ends_with_sentences_a_table_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], own_data: bool
) -> None:
    words = ["--base", "toy"]
    if not own_data:
        words += ["--data", str(write_sample(tmp_path / "given", 20, 4, 8))]
    text, results = start(words, tmp_path / "out", monkeypatch)
    captured = capfd.readouterr()
    check(text, results, captured.out, tmp_path / "out")
    # LoRA of rank 4 on two c_attn of width 128: 4 * (128 + 384) numbers each
    ours, theirs = (float(results[name]["state MB"]) for name in ("SGD-SaI", "AdamW"))
    # Momentum, a scale for each row and column, and two numbers for each of four matrices.
    assert ours == pytest.approx((2 * 4 * 512 * 4 + 2 * (512 + 8) * 4 + 4 * 12) / 1e6, abs=6e-4)
    assert theirs == pytest.approx(2 * 2 * 4 * 512 * 4 / 1e6, abs=6e-4)
    # No warning, no bar, no log of a library: at most lines of progress.
    noise = [line for line in captured.err.splitlines() if not re.fullmatch(r"\w+: \d+ of \d+ .+ s left", line)]
    assert noise == []
    assert "{'" not in captured.out


@pytest.fixture
def tiny_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In SmolLM2's place a Llama of one layer, 32 wide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(pretraining_rows(load_e2e(str(write_sample(tmp_path / "words", 20, 4, 4))), 200))
    size = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 32}
    ends = {f"{name}_token_id": tokenizer.eos_token_id for name in ("bos", "eos", "pad")}
    model = LlamaForCausalLM(LlamaConfig(**size, **ends, vocab_size=len(tokenizer), max_position_embeddings=256))
    folder = tmp_path / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(demo, "smollm2_folder", lambda: folder)
    monkeypatch.setattr(models, "smollm2_folder", lambda: folder)
    return folder


def test_smollm2_is_the_base_unless_another_is_asked_for(
    tiny_smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The toy's test scores with the real ones, which start Java.
    monkeypatch.setattr(recipe, "score", lambda outputs, groups, metrics: dict.fromkeys(metrics, 0.5))
    text, results = start([], tmp_path / "out", monkeypatch)
    check(text, results, capsys.readouterr().out, tmp_path / "out")
    assert "LoRA of SmolLM2-135M-Instruct on generated sentences" in text
    assert not (tmp_path / "out" / "base").exists()
    # q_proj and v_proj, 32 to 32: rank 4 times 64 numbers each, and AdamW keeps two of each in four bytes
    assert float(results["AdamW"]["state MB"]) == pytest.approx(2 * 2 * 4 * 64 * 4 / 1e6, abs=6e-4)


def test_out_of_reach_it_says_so_in_a_line_and_takes_the_toy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Any:
        raise UserError("smollm2: neither the hub nor the package index gives the model")

    monkeypatch.setattr(demo, "smollm2_folder", fail)
    monkeypatch.setattr(demo, "pretrain", lambda rows, tokenizer, steps, folder: folder)
    found = demo.base_model(
        demo.DemoArguments(output_dir=str(tmp_path)), E2EData([Row("name[a]", "b")] * 9, [], []), demo.Clock()
    )
    assert found == ("toy", str(tmp_path / "base"))
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "neither the hub nor the package index" in line]) == 1
    assert "The toy base takes its place." in "".join(lines)


def test_a_part_of_the_set_is_chosen_by_chance_and_keeps_all_references(tmp_path: Path) -> None:
    data = load_e2e(str(write_sample(tmp_path / "all", 40, 8, 30)))
    size = dataclasses.replace(demo.BASES["smollm2"], steps=2, eval_rows=5, test_mrs=9)
    part = load_e2e(str(demo.write_part(data, tmp_path / "part", size)))
    assert (len(part.train), len(part.validation)) == (8, 5)
    chosen = group(part.test)
    assert len(chosen) == 9
    assert all(one in group(data.test) for one in chosen)
    assert [one.mr for one in chosen] != [one.mr for one in group(data.test)[:9]]


def test_the_sentences_name_each_model() -> None:
    groups = [Group("name[a]", ["a is b.", "b is a."])]
    outputs = {"base model": {"name[a]": ""}, "SGD-SaI": {"name[a]": "x  y"}, "AdamW": {"name[a]": "a is b."}}
    wanted = ["name[a]", "- reference: a is b.", "- base model: (nothing)", "- SGD-SaI: x y", "- AdamW: a is b."]
    assert demo.sentences(groups, outputs).splitlines() == wanted


def test_pretraining_never_sees_the_task(tmp_path: Path) -> None:
    data = load_e2e(str(write_sample(tmp_path, 30, 4, 4)))
    rows = pretraining_rows(data, 400)
    assert len(rows) == 400
    texts = {row.reference for row in data.train}
    own = [row for row in rows if row.reference in texts]
    assert len(own) == 40
    assert all(row.mr == "" for row in own)
    held_out = {row.reference for row in [*data.validation, *data.test]} - texts
    assert not held_out & {row.reference for row in rows}
    assert train_tokenizer([Row("", "a b"), Row("name[c]", "d")]).eos_token == END_OF_TEXT


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"data": "/nowhere"}, "data: '/nowhere' is not a folder"),
        ({"base": "toyy"}, "base must be smollm2 or toy, got 'toyy'; did you mean 'toy'?"),
    ],
)
def test_bad_input(kwargs: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        demo.DemoArguments(**kwargs)  # type: ignore[arg-type]
