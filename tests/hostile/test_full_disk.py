"""A disk that is full: the error says so, what was there stays whole, and what was begun goes on once there is room."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_table import listing
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from hf_sai import SaITrainer, SaITrainingArguments
from hf_sai.checkpoints import atomic_folder, last_whole_checkpoint
from hf_sai.plots import plot_losses
from recipes.common.errors import UserError
from recipes.common.files import check_writable, write_json, write_text
from recipes.pretrain.data import tokenize_corpus
from recipes.pretrain.text import Corpus

SIZE = 256 * 1024


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Fill a disk up to `leave` bytes; the file to delete to make room."""
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        with suppress(OSError):
            while file.write(bytes(4096)):
                pass
        assert file.tell() > SIZE // 2
        file.truncate(max(0, file.tell() - leave))
    return ballast


def test_texts_and_figures_stay_whole(disk: Path) -> None:
    history = {"run": [{"step": i, "loss": 1 / (i + 1)} for i in range(50)]}
    write_text(disk / "report.md", "old")
    write_json(disk / "record.json", {"old": 1})
    plot_losses(history, disk / "losses.png")
    fill(disk, leave=8192)
    before = listing(disk)
    for attempt in (
        lambda: write_text(disk / "report.md", "new" * 10_000),
        lambda: write_json(disk / "record.json", ["new"] * 10_000),
        lambda: plot_losses(history, disk / "losses.png", "new"),
    ):
        with pytest.raises(OSError, match="No space left on device") as caught:
            attempt()
        assert caught.value.errno == errno.ENOSPC
        assert listing(disk) == before


def test_a_failing_write_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, where nothing may be mounted."""
    write_text(tmp_path / "report.md", "old")
    opened = os.fdopen

    def half(handle: int, *args: Any, **kwargs: Any) -> Any:
        file = opened(handle, *args, **kwargs)
        write = file.write

        class Full:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: Any) -> None:
                file.close()

            def write(self, content: bytes) -> None:
                write(content[: len(content) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return Full()

    monkeypatch.setattr(os, "fdopen", half)
    with pytest.raises(OSError, match="No space left on device"):
        write_text(tmp_path / "report.md", "new")
    assert (tmp_path / "report.md").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


def test_a_full_disk_is_found_before_a_run(disk: Path) -> None:
    fill(disk, leave=0)
    before = listing(disk)
    with pytest.raises(UserError, match=r"^output_dir: cannot write in .* \(No space left on device\); give another"):
        check_writable("output_dir", disk)
    assert listing(disk) == before


def test_a_checkpoint_of_a_bare_loop_is_whole_or_absent(disk: Path) -> None:
    def save(step: int) -> Path:
        with atomic_folder(disk / f"step-{step}") as scratch:
            torch.save({"weights": torch.full((10_000,), float(step))}, scratch / "model.pt")
        return disk / f"step-{step}"

    save(1)
    before = listing(disk / "step-1")
    ballast = fill(disk, leave=8192)
    with pytest.raises((OSError, RuntimeError)):  # torch's writer raises RuntimeError
        save(2)
    assert not (disk / "step-2").exists()
    assert listing(disk / "step-1") == before
    ballast.unlink()
    assert torch.load(save(2) / "model.pt", weights_only=True)["weights"][0] == 2
    assert sorted(path.name for path in disk.iterdir()) == ["step-1", "step-2"]


class Small(nn.Module):
    """Twelve parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4, bias=False)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layer(x) - labels).square().mean()}


def trainer(folder: Path, steps: int) -> SaITrainer:
    torch.manual_seed(0)
    model = Small()
    rows = [{"x": torch.randn(3), "labels": torch.randn(4)} for _ in range(16)]
    args = SaITrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=2,
        lr_scheduler_type="constant",  # the linear one would depend on `steps`
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return SaITrainer(model, args, train_dataset=rows)


def test_a_trainer_goes_on_from_the_last_whole_checkpoint(disk: Path, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", 6)
    whole.train()
    run = disk / "run"
    trainer(run, 2).train()
    ballast = fill(disk, leave=12_000)
    with pytest.raises((OSError, RuntimeError)):
        trainer(run, 6).train(resume_from_checkpoint=True)
    assert last_whole_checkpoint(run) == str(run / "checkpoint-2")
    ballast.unlink()
    resumed = trainer(run, 6)
    resumed.train(resume_from_checkpoint=True)
    assert last_whole_checkpoint(run) == str(run / "checkpoint-6")
    assert torch.equal(resumed.model.layer.weight, whole.model.layer.weight)


@pytest.fixture
def words() -> Tokenizer:
    vocabulary = {f"w{i}": i for i in range(1000)}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, "<end>": 1000}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def test_tokenising_goes_on_when_there_is_room(
    disk: Path, tmp_path: Path, words: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.pretrain.data.BATCH_CHARACTERS", 20_000)
    text = "\n\n".join(" ".join(f"w{(i * j) % 1000}" for j in range(3000)) for i in range(1, 40))
    (tmp_path / "a.txt").write_text(text)
    corpus = Corpus(train_files=[str(tmp_path / "a.txt")], validation_fraction=0.0)

    def tokens(cache: Path) -> bytes:
        return bytes(tokenize_corpus(corpus, words, 1000, cache)["train"].path.read_bytes())

    expected = tokens(tmp_path / "cache")
    assert len(expected) > 200_000
    ballast = fill(disk, leave=120_000)
    with pytest.raises(OSError, match="No space left on device"):
        tokens(disk)
    [begun] = disk.glob("tokens-*/train.bin")
    assert 0 < begun.stat().st_size < len(expected)
    ballast.unlink()
    assert tokens(disk) == expected


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"])
@pytest.mark.parametrize("hurt", [zeros, lambda path: path.write_bytes(b"\x08" + bytes(7) + b'{"a": 1}')])
def test_what_a_power_cut_leaves_is_not_whole(name: str, hurt: Callable[[Path], None], tmp_path: Path) -> None:
    """A file of the right length that holds zeros, or a header that is JSON and none."""
    trainer(tmp_path, 4).train()
    hurt(tmp_path / "checkpoint-4" / name)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
