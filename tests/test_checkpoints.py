"""What is saved is whole, what is not whole is not resumed from."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sai import SaITrainer, SaITrainingArguments, SGDSaI
from hf_sai.checkpoints import atomic_folder, last_whole_checkpoint, why_not_whole


@pytest.fixture
def run(tmp_path: Path, make_gpt2: Callable[..., Any], token_dataset: list[dict[str, Tensor]]) -> Path:
    """The output folder of a Trainer with checkpoint-2 and checkpoint-4."""
    make_trainer(tmp_path / "run", make_gpt2, token_dataset).train()
    return tmp_path / "run"


def make_trainer(folder: Path, make_gpt2: Callable[..., Any], rows: list[dict[str, Tensor]]) -> SaITrainer:
    settings: dict[str, Any] = {"save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 4}
    quiet: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return SaITrainer(make_gpt2(), SaITrainingArguments(str(folder), **settings, **quiet), train_dataset=rows)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


FILES = ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"]


def test_a_checkpoint_with_a_cut_file_is_not_whole(run: Path) -> None:
    newest = run / "checkpoint-4"
    assert why_not_whole(newest) is None
    assert last_whole_checkpoint(run) == str(newest)
    for name in FILES:
        content = (newest / name).read_bytes()
        for size in (0, 5, len(content) // 2, len(content) - 2):
            cut(newest / name, size)
            assert last_whole_checkpoint(run) == str(run / "checkpoint-2"), (name, size)
            (newest / name).write_bytes(content)
    (newest / "trainer_state.json").unlink()
    assert last_whole_checkpoint(run) == str(run / "checkpoint-2")


def test_a_checkpoint_under_another_name_is_not_whole(run: Path) -> None:
    """As when a checkpoint was copied by hand: resuming would take other steps than the name says."""
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-9")
    (run / "checkpoint-x").mkdir()
    assert last_whole_checkpoint(run) == str(run / "checkpoint-4")


@pytest.mark.parametrize(
    ("ranks", "missing"), [([0], 1), ([0, 1], None), ([0, 2], 1), ([4, 5], None), ([0, 1, 2, 3, 4, 6], 5)]
)
def test_every_process_must_have_saved_its_random_state(run: Path, ranks: list[int], missing: int | None) -> None:
    """Of the processes that wrote it. How many there are now does not matter."""
    newest = run / "checkpoint-4"
    state = (newest / "rng_state.pth").read_bytes()
    (newest / "rng_state.pth").unlink()
    assert why_not_whole(newest) is None
    for rank in ranks:
        (newest / f"rng_state_{rank}.pth").write_bytes(state)
    assert why_not_whole(newest) == (None if missing is None else f"rng_state_{missing}.pth is missing")


def test_files_of_the_user_do_not_matter(run: Path) -> None:
    newest = run / "checkpoint-4"
    for name in ("ema.bin", "model_ema.safetensors", "mine.pt", "rng.pth", "optimizer_backup.pt", "notes.json"):
        (newest / name).write_bytes(b"no zip file")
    torch.save({"a": torch.ones(2)}, newest / "legacy.pt", _use_new_zipfile_serialization=False)
    assert last_whole_checkpoint(run) == str(newest)


def test_all_files_of_a_model_in_several_must_be_there(run: Path) -> None:
    newest = run / "checkpoint-4"
    index = newest / "model.safetensors.index.json"
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (newest / "model.safetensors").rename(newest / names[0])
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    assert why_not_whole(newest) == f"{names[1]} is missing"
    shutil.copy(newest / names[0], newest / names[1])
    assert why_not_whole(newest) is None
    cut(newest / names[1], 20)
    assert why_not_whole(newest) == f"{names[1]} is truncated"
    shutil.copy(newest / names[0], newest / names[1])
    index.write_text('{"weight')
    assert why_not_whole(newest) == "a file listed in model.safetensors.index.json, which is truncated, is missing"


def test_what_is_passed_over_is_a_warning_with_the_reason(
    run: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def messages() -> list[str]:
        caplog.clear()
        assert last_whole_checkpoint(run) == str(run / "checkpoint-2")
        assert all(record.levelno == logging.WARNING for record in caplog.records)
        return [record.getMessage() for record in caplog.records]

    newest = run / "checkpoint-4"
    logger = logging.getLogger("transformers.hf_sai")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)  # which versions of transformers do differently
    cut(newest / "optimizer.pt", 100)
    told = [f"skipping the incomplete checkpoint {newest}: "]
    assert messages() == [told[0] + "optimizer.pt is truncated"]
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-9")
    (newest / "trainer_state.json").write_text("{")
    assert messages() == [
        f"skipping the incomplete checkpoint {run / 'checkpoint-9'}: trainer_state.json is from step 2",
        told[0] + "trainer_state.json is truncated",
    ]
    shutil.rmtree(run / "checkpoint-9")
    (newest / "trainer_state.json").unlink()
    assert messages() == [told[0] + "trainer_state.json, which is written last, is missing"]
    shutil.rmtree(newest)
    assert messages() == []


def test_a_checkpoint_written_over_another_ones_keeps_no_random_state_of_it(
    run: Path, make_gpt2: Callable[..., Any], token_dataset: list[dict[str, Tensor]]
) -> None:
    for rank in range(2):
        shutil.copy(run / "checkpoint-2" / "rng_state.pth", run / "checkpoint-2" / f"rng_state_{rank}.pth")
    make_trainer(run, make_gpt2, token_dataset).train()
    assert [path.name for path in (run / "checkpoint-2").glob("rng_state*")] == ["rng_state.pth"]


def test_no_checkpoint(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path) is None
    assert last_whole_checkpoint(tmp_path / "missing") is None


def test_the_trainer_resumes_from_the_last_whole_one(
    run: Path, make_gpt2: Callable[..., Any], token_dataset: list[dict[str, Tensor]]
) -> None:
    whole = torch.load(run / "checkpoint-4" / "optimizer.pt", weights_only=True)
    (run / "checkpoint-4" / "trainer_state.json").unlink()
    trainer = make_trainer(run, make_gpt2, token_dataset)
    steps: list[int] = []
    trainer.create_optimizer().register_step_post_hook(lambda *_: steps.append(1))
    trainer.train(resume_from_checkpoint=True)
    assert len(steps) == 2
    for index, state in trainer.optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(value, whole["state"][index][key])


def test_the_trainer_says_when_there_is_nothing_whole(
    run: Path, make_gpt2: Callable[..., Any], token_dataset: list[dict[str, Tensor]]
) -> None:
    for step in (2, 4):
        cut(run / f"checkpoint-{step}" / "optimizer.pt", 100)
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        make_trainer(run, make_gpt2, token_dataset).train(resume_from_checkpoint=True)


def test_an_overwritten_checkpoint_is_not_whole_while_it_is_written(
    run: Path, make_gpt2: Callable[..., Any], token_dataset: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(run, make_gpt2, token_dataset)
    seen = []
    save = trainer._save_optimizer_and_scheduler
    monkeypatch.setattr(
        trainer,
        "_save_optimizer_and_scheduler",
        lambda folder: (seen.append(why_not_whole(folder) is None), save(folder)),
    )
    trainer.train()
    assert seen == [False, False]
    assert why_not_whole(run / "checkpoint-4") is None


def test_atomic_folder(tmp_path: Path) -> None:
    target = tmp_path / "out" / "step-1"

    def fail() -> None:
        with atomic_folder(target) as scratch:
            (scratch / "half").write_text("x")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        fail()
    assert not target.exists()
    with atomic_folder(target) as scratch:
        (scratch / "all").write_text("x")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["all"]
    assert [path.name for path in target.parent.iterdir()] == ["step-1"]
    with pytest.raises(FileExistsError, match="a different name"), atomic_folder(target):
        pass


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_distributed_checkpoint_resumes_bitwise(dtype: torch.dtype, tmp_path: Path) -> None:
    """Saved after step 2 of 5; the third layer has had no gradient by then, the fourth is not trained. Loaded twice."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def start(seed: int) -> tuple[Any, SGDSaI]:
        torch.manual_seed(seed)
        model = nn.ModuleList(nn.Linear(6, 6) for _ in range(4)).to(dtype)
        model[3].requires_grad_(False)
        return model, SGDSaI(model.parameters(), lr=1e-2)

    def go(model: Any, optimizer: SGDSaI, steps: range) -> None:
        for step in steps:
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
            for layer in model[: 3 if step > 2 else 2]:
                x = torch.tanh(layer(x))
            optimizer.zero_grad()
            x.square().mean().backward()
            optimizer.step()

    def parts(model: nn.Module, optimizer: SGDSaI) -> dict[str, Any]:
        return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))

    whole, whole_optimizer = start(0)
    go(whole, whole_optimizer, range(5))
    model, optimizer = start(0)
    go(model, optimizer, range(2))
    dcp.save(parts(model, optimizer), checkpoint_id=tmp_path / "saved")
    resumed, resumed_optimizer = start(1)
    resumed_optimizer.param_groups[0]["lr"] = 9.0
    for _ in range(2):
        saved = parts(resumed, resumed_optimizer)
        dcp.load(saved, checkpoint_id=tmp_path / "saved")
        set_state_dict(resumed, resumed_optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    go(resumed, resumed_optimizer, range(2, 5))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert whole_optimizer.state.get(p, {}).keys() == resumed_optimizer.state.get(q, {}).keys()
        for key, value in whole_optimizer.state.get(p, {}).items():
            assert torch.equal(value, resumed_optimizer.state[q][key])
