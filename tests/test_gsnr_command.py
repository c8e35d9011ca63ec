"""`hf-sai gsnr` and the figures: the numbers of an SGDSaI on the same batch, and errors that name the option."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel

from hf_sai.cli import main
from hf_sai.gsnr_plots import common_drift, plot_drift, plot_kinds, plot_over_time
from hf_sai.initialisation import SCHEMES, initialise
from hf_sai.probe import probe, read_documents

TEXT = "the quick brown fox jumps over the lazy dog.\nand on it goes, line by line!\n\n" * 40


@pytest.fixture
def folder(tmp_path: Path, make_gpt2: Callable[..., Any], tokenizer: Any) -> Path:
    """A model with its tokenizer, and text of every format."""
    model = tmp_path / "model"
    make_gpt2(vocab_size=len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in TEXT.split("\n\n") if x))
    return tmp_path


def words(folder: Path, *more: str, data: str = "text.txt") -> list[str]:
    return ["gsnr", "--data", str(folder / data), "--block-size", "16", "--device", "cpu", *more]


def results(folder: Path, *more: str) -> dict[str, Any]:
    assert main([*words(folder, *more), "--json", str(folder / "out.json")]) == 0
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


def test_the_numbers_of_one_batch(folder: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = results(folder, "--model", str(folder / "model"), "--batch-size", "12", "--scaling", "raw")
    ids: list[int] = []
    for document in read_documents(str(folder / "text.txt"), "text"):
        ids += [*tokenizer(document, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    batch = torch.tensor(ids[: 12 * 16]).view(12, 16)
    model = GPT2LMHeadModel.from_pretrained(folder / "model").eval()
    loss = nn.functional.cross_entropy(model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    (result,) = found["results"]
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert [block["name"] for block in result["blocks"]] == [name for name, _ in model.named_parameters()]
    for block, p in zip(result["blocks"], model.parameters(), strict=True):
        # float32 gradients, summed over 12 sequences in two parts here and in one there
        wanted = float(p.grad.double().norm() / p.grad.double().std())
        assert block["gsnr"] == block["scale"] == pytest.approx(wanted, rel=1e-4)
        assert (block["shape"], block["numel"]) == (list(p.shape), p.numel())
    assert str(folder) not in json.dumps(found), "no path of this machine"
    printed = capsys.readouterr().out
    assert "transformer.h.1.attn.c_attn.weight" in printed
    assert "attention qkv" in printed


def test_formats_say_the_same(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), folder / "text.parquet")
    documents = [list(read_documents(str(folder / f"text.{suffix}"), "text")) for suffix in ("jsonl", "parquet", "txt")]
    assert documents[0] == documents[1] == [x.rstrip("\n") for x in documents[2]]


def test_initialisations_and_batch_sizes_side_by_side(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--config", str(folder / "model"), "--init", "default", "orthogonal", "--batch-size", "2", "4"]
    found = results(folder, *model, "--plot", str(folder / "kinds.png"))
    settings = [(result["init"], result["batch_size"], result["tokens"]) for result in found["results"]]
    assert settings == [("default", 2, 32), ("default", 4, 64), ("orthogonal", 2, 32), ("orthogonal", 4, 64)]
    names = {f"kinds_{init}_{size}.png" for init, size, _ in settings}
    assert names <= {path.name for path in folder.iterdir()}
    printed = capsys.readouterr().out
    assert "orthogonal, batch 4" in printed
    assert "transformer.h.1" not in printed


# peft 0.21 reads an attribute that transformers 5.23 deprecates
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_lora_whose_a_waits_for_a_second_gradient(folder: Path) -> None:
    found = results(folder, "--model", str(folder / "model"), "--lora-r", "2")
    (result,) = found["results"]
    assert result["steps"] == 2
    assert {block["kind"] for block in result["blocks"]} == {"LoRA A", "LoRA B"}
    assert all(block["gsnr"] > 0 for block in result["blocks"])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--model", "no/such-model"], "--model: no tokenizer found for 'no/such-model'.*--tokenizer"),
        (
            ["--model", "no/such-model", "--tokenizer", "MODEL"],
            "--model: no causal language model found for .*--config",
        ),
        (
            ["--config", "no/such", "--tokenizer", "MODEL"],
            "--config: no model configuration found for 'no/such'.*tiny, 5m",
        ),
        (["--config", "tiny"], "--config tiny needs --tokenizer"),
        (["--model", "MODEL", "--init", "xavier"], "--init xavier would overwrite the weights of --model"),
        (["--model", "MODEL", "--block-size", "99"], "--block-size must be at most the model's 32 positions, got 99"),
        (["--model", "MODEL", "--block-size", "1"], "--block-size must be at least 2, got 1"),
        (["--model", "MODEL", "--batch-size", "4", "0"], "--batch-size must be at least 1, got 0"),
        (["--model", "MODEL", "--lora-r", "-1"], "--lora-r must be at least 1, got -1"),
        (["--model", "MODEL", "--batch-size", "9999"], "--data: a batch needs 9999 x 16 tokens, but the text has"),
        (["--model", "MODEL", "--data", "no/such-data"], "--data: 'no/such-data' is not a local file and could not be"),
        (["--model", "MODEL", "--data", "no.txt"], "--data: there is no file 'no.txt'"),
        (["--model", "MODEL", "--data", "bad.txt"], "--data: .*bad.txt must be UTF-8.*iconv"),
        (["--model", "MODEL", "--data", "bad.jsonl"], "--data: .*bad.jsonl, line 1: not JSON"),
        (["--model", "MODEL", "--data", "text.jsonl", "--text-column", "x"], "no text 'x' in 'text'; set --text"),
        (["--model", "MODEL", "--data", "bad.parquet"], "--data: .*bad.parquet must be a whole Parquet file"),
        (["--model", "MODEL", "--device", "abacus"], "--device abacus cannot be used"),
        (["--model", "MODEL", "--data", "model"], "--data: '.*model' is not a local file"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    given: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for name in ("bad.txt", "bad.jsonl", "bad.parquet"):
        (folder / name).write_bytes(b"{\xff\xfe" if name == "bad.txt" else b"{nothing\n")
    given = [str(folder / "model") if word == "MODEL" else word for word in given]
    assert main(words(folder, *given, "--json", str(folder / "out.json"))) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]  # transformers shows how far it has loaded
    assert re.search(says, line), line
    assert line.startswith("hf-sai gsnr: error: ")
    assert not (folder / "out.json").exists()


def test_a_loss_of_nan_is_refused(make_gpt2: Callable[..., Any]) -> None:
    model = make_gpt2()
    model.transformer.wte.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="the loss of the batch is nan"):
        probe(model, torch.ones(1, 4, dtype=torch.int64), "raw")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes(scheme: str, make_gpt2: Callable[..., Any]) -> None:
    model, before = make_gpt2(n_embd=64), make_gpt2(n_embd=64).state_dict()
    model.lm_head = nn.Linear(64, 96, bias=False)  # an output projection of its own, with torch's orientation
    torch.manual_seed(1)
    initialise(model, scheme)
    c_fc, head = model.transformer.h[0].mlp.c_fc.weight.detach(), model.lm_head.weight.detach()
    assert c_fc.shape == (64, 256)  # Conv1D: inputs first
    kept = [name for name in before if "wte" in name or "wpe" in name or "ln_" in name or "bias" in name]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in kept)
    # standard errors of a standard deviation over 16,384 and 6,144 elements: 0.6 and 0.9 %
    stds = {"xavier": math.sqrt(2 / (64 + 256)), "kaiming": math.sqrt(2 / 64), "default": 0.02}
    if scheme == "orthogonal":
        torch.testing.assert_close(c_fc @ c_fc.T, torch.eye(64), atol=1e-5, rtol=0)
        torch.testing.assert_close(head.T @ head, torch.eye(64), atol=1e-5, rtol=0)
    else:
        assert c_fc.std().item() == pytest.approx(stds[scheme], rel=0.03)
    if scheme == "kaiming":
        assert head.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.04)


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of default, xavier, kaiming, orthogonal, got 'he'"):
        initialise(nn.Linear(2, 2), "he")


# ---------------------------------------------------------------- figures


def record(drift: list[float | None] | None = None) -> dict[str, Any]:
    block = {"shape": [4], "numel": 4, "gsnr": 2.0, "scale": 1.0, "gsnr_now": [2.0, None, 2.1], "drift": drift}
    places = [("embedding", None), ("attention qkv", 0), ("bias", 0), ("mlp out", 5), ("attention qkv", 5)]
    blocks = [{**block, "name": f"$_{i}", "kind": kind, "layer": layer} for i, (kind, layer) in enumerate(places)]
    return {"format": 1, "every": 2, "steps": [1, 3, 5], "blocks": blocks}


def test_figures(tmp_path: Path) -> None:
    with_drift = record([1.0, None, 0.5])
    paths = [
        plot_kinds(with_drift["blocks"], tmp_path / "deep" / "kinds.png", "a $ title"),
        plot_over_time(with_drift, tmp_path / "time.svg"),
        plot_drift(with_drift, tmp_path / "drift.png"),
    ]
    assert [path.read_bytes()[:4] for path in paths] == [b"\x89PNG", b"<?xm", b"\x89PNG"]
    assert common_drift(with_drift) == pytest.approx([1.0, 1.0, 0.5])
    drawn = paths[1].read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("shallow: layer 0", "deep: layer 5", "outside the layers"))
    assert "middle" not in drawn, "two layers have none"


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no drift: it is from an optimizer without scales"):
        plot_drift(record(), tmp_path / "a.png")
    empty = {**record(), "steps": [], "blocks": []}
    for draw in (plot_over_time, plot_drift):
        with pytest.raises(ValueError, match="no measurement: the run ended before its first optimizer step"):
            draw(empty, tmp_path / "a.png")
    with pytest.raises(ValueError, match="no block has a g-SNR"):
        plot_kinds([{**block, "gsnr": None} for block in record()["blocks"]], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
