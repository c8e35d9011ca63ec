"""The diffusion LoRA recipe on tiny random pipelines: what trains, resume, processes, diffusers' loaders, errors."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("diffusers")
from diffusers import AutoencoderKL, StableDiffusionPipeline

from recipes.common.errors import UserError
from recipes.common.optimizers import OptimizerArguments
from recipes.diffusion import grid as contact_sheet
from recipes.diffusion import train as recipe
from recipes.diffusion.config import DiffusionArguments
from recipes.diffusion.data import open_image
from recipes.diffusion.model import load_pipeline
from recipes.diffusion.tiny import tiny_pipeline
from recipes.diffusion.train import add_trained_parts, fine_tune

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("a", "photo", "of", "dog", "toy", "red", "blue")
# Sums in another order: four steps of plain SGD carry a float32's unit roundoff of 6e-8 on to 2e-4 of what training
# has moved a weight, on one thread, on two and on four. A run without the flips is 3 away, one whose gradients are
# added up where they should be averaged more than 2.
TOLERANCE = 1e-2
# Linear in the gradient, unlike SGD-SaI, whose scales make up for a gradient that is wrong by a factor.
PLAIN_SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 100.0}
pytestmark = pytest.mark.xdist_group("diffusion")  # one process makes the tiny models once


def random_vae(latent_channels: int = 4) -> AutoencoderKL:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=latent_channels, **blocks
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Stable Diffusion: pictures of 16 pixels, latents of 8."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    pipe = tiny_pipeline(WORDS, 8, (8, 16), (False, True), 32, vae=random_vae(), prediction_type="epsilon")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of different shapes, with captions."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = []
    for i, (height, width) in enumerate([(16, 16), (20, 40), (50, 30)]):
        Image.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a photo of {'red' if i else 'blue'} <V>"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def train(model_folder: Path, data_folder: Path, tmp_path: Path) -> Callable[..., tuple[dict[str, Any], Path]]:
    """Runs the recipe for four steps; returns the record and the output folder."""

    def run_it(
        name: str = "out", optimizer: dict[str, Any] | None = None, **settings: Any
    ) -> tuple[dict[str, Any], Path]:
        folder = tmp_path / name
        given = {
            "model": str(model_folder),
            "data": str(data_folder),
            "output_dir": str(folder),
            "concept_init": ["dog"],
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "inference_steps": 2,
            "logging_steps": 1,
            **settings,
        }
        args = OptimizerArguments(**{"learning_rate": 1e-2, "lr_scheduler_type": "constant", **(optimizer or {})})
        return fine_tune(DiffusionArguments(**given), args), folder

    return run_it


@pytest.fixture
def trained_pipe(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Holds the pipelines that the recipe loads while a test runs."""
    seen: list[Any] = []

    def load(*args: Any) -> Any:
        seen.append(load_pipeline(*args))
        return seen[-1]

    monkeypatch.setattr(recipe, "load_pipeline", load)
    return seen


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The LoRA and the new rows, where there are any, that a run has saved."""
    saved = load_file(folder / "lora/pytorch_lora_weights.safetensors")
    rows = folder / "lora/learned_embeds.safetensors"
    return {**saved, **load_file(rows)} if rows.exists() else saved


def largest_difference(one: Path, other: Path, start: Path) -> float:
    """The largest difference of two runs' weights, in units of how far the first has moved the tensor it is in.

    Args:
        start: a run of the same settings whose steps move nothing.
    """
    a, b, before = weights(one), weights(other), weights(start)
    assert a.keys() == b.keys() == before.keys()
    return max(float((a[k] - b[k]).abs().max() / (a[k] - before[k]).abs().max()) for k in a)


def test_only_lora_and_new_rows_train(train: Any, trained_pipe: list[Any], model_folder: Path) -> None:
    """Everything else is bitwise as it was, and both halves of every LoRA move under SGD-SaI."""
    train(text_lora=True)
    before = load_pipeline(str(model_folder))
    config = DiffusionArguments(data="", concept_init=["dog"], text_lora=True)
    add_trained_parts(before, config)
    for part, count in (("unet", 2 * 4 * 2 * 4), ("text_encoder", 2 * 4 * 2 + 1), ("vae", 0)):
        start = dict(getattr(before, part).named_parameters())
        now = dict(getattr(trained_pipe[0], part).named_parameters())
        moved = {name for name, p in now.items() if not torch.equal(p, start[name])}
        assert moved == {name for name in start if "lora_" in name or ".rows." in name}
        assert len(moved) == count


def test_resume_is_bitwise(train: Any) -> None:
    """Also with dropout, whose random numbers are the only ones not made from the sample's number."""
    settings = {"save_steps": 2, "lora_dropout": 0.2, "text_lora": True}
    whole, folder = train("whole", **settings)
    resumed, again = train("again", resume_from_checkpoint=str(folder / "checkpoint-000002"), **settings)
    assert resumed["steps"] == whole["steps"] == 4
    assert resumed["history"] == whole["history"]
    a, b = weights(folder), weights(again)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_killed_save_is_not_resumed(train: Any) -> None:
    """What a killed save leaves behind is neither found nor in the way; `last` is the newest whole checkpoint."""
    whole, folder = train(save_steps=2, save_total_limit=1)
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-000004"]
    broken = folder / "checkpoint-000006"  # not renamed, so without the file that is written last
    shutil.copytree(folder / "checkpoint-000004", broken)
    (broken / "progress.json").unlink()
    resumed, _ = train(save_steps=2, save_total_limit=1, resume_from_checkpoint="last", max_steps=6)
    assert resumed["history"][:4] == whole["history"]
    assert [h["step"] for h in resumed["history"]] == [1, 2, 3, 4, 5, 6]


def test_resume_refuses_another_batch_or_lora(train: Any) -> None:
    _, folder = train(save_steps=2)
    for settings, rule in (({"per_device_train_batch_size": 3}, "samples a step"), ({"lora_r": 4}, "another LoRA")):
        with pytest.raises(UserError, match=rule):
            train("other", resume_from_checkpoint=str(folder / "checkpoint-000002"), **settings)
    with pytest.raises(UserError, match="there is no whole checkpoint in output_dir"):
        train("other", resume_from_checkpoint="last")


def test_accumulation_caches_and_checkpointing_change_nothing(train: Any) -> None:
    """A batch of 2 is 2 batches of 1; latents may be encoded beforehand, activations computed again: the same sums."""
    settings = {"flip": True, "optimizer": PLAIN_SGD}
    _, plain = train("plain", **settings)
    _, start = train("start", flip=True, optimizer={**PLAIN_SGD, "learning_rate": 0.0}, max_steps=1)
    _, accumulated = train("accumulated", **settings, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    _, cached = train("cached", **settings, cache_latents=True)
    _, again = train("again", **settings, gradient_checkpointing=True)
    for other in (accumulated, cached, again):
        assert largest_difference(plain, other, start) < TOLERANCE
    _, not_flipped = train("not flipped", optimizer=PLAIN_SGD)
    assert largest_difference(plain, not_flipped, start) > 10 * TOLERANCE  # what a fault looks like


def test_cached_prompts_change_nothing(train: Any) -> None:
    """Captions may be encoded beforehand where nothing of the text trains."""
    settings = {"concept_tokens": ["none"], "concept_init": None, "optimizer": PLAIN_SGD}
    one, other = (train(f"cache-{cached}", cache_prompts=cached, **settings)[1] for cached in (False, True))
    _, start = train("start", **{**settings, "optimizer": {**PLAIN_SGD, "learning_rate": 0.0}}, max_steps=1)
    assert largest_difference(one, other, start) < TOLERANCE


def test_several_tokens(train: Any, data_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    """Each has rows and a file of its own, all train, and stock diffusers loads them one by one."""
    data = tmp_path / "two"
    shutil.copytree(data_folder, data)
    (data / "metadata.jsonl").write_text((data / "metadata.jsonl").read_text().replace("<V>", "<V> <S>"))
    prompts = ["a photo of <V> <S>"]
    _, folder = train(
        data=str(data),
        concept_tokens=["<V>", "<S>"],
        concept_init=["random+dog", "toy"],
        validation_prompts=prompts,
        optimizer={"learning_rate": 0.3},
    )
    saved = [
        load_file(folder / "lora" / name) for name in ("learned_embeds.safetensors", "learned_embeds_1.safetensors")
    ]
    assert [{key: tuple(row.shape) for key, row in rows.items()} for rows in saved] == [
        {"<V>": (2, 32)},
        {"<S>": (1, 32)},
    ]
    pipe = StableDiffusionPipeline.from_pretrained(model_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    start = pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer.encode("toy")[1]]
    assert (saved[1]["<S>"][0] - start).abs().max() > 1e-3
    pipe.load_lora_weights(folder / "lora")
    for name in ("learned_embeds.safetensors", "learned_embeds_1.safetensors"):
        pipe.load_textual_inversion(folder / "lora", weight_name=name)
    [picture] = pipe(prompts, generator=torch.Generator().manual_seed(0), num_inference_steps=2).images
    drawn = np.asarray(open_image(folder / "samples/step-000004/00.png")).astype(int)
    assert abs(np.asarray(picture).astype(int) - drawn).max() <= 1


def test_clipping_is_to_the_norm(train: Any) -> None:
    """SGD is linear in its gradient, so a first step clipped to half the norm is half as long."""
    sgd = {"optim": "sgd", "learning_rate": 1.0}
    moved = []
    for norm in (1e-3, 2e-3):
        _, folder = train(f"clip-{norm}", max_steps=1, max_grad_norm=norm, optimizer=sgd)
        moved.append({k: v for k, v in weights(folder).items() if "lora.up" in k or "lora_B" in k})
    assert moved[0]
    for name, short in moved[0].items():
        torch.testing.assert_close(2 * short, moved[1][name], rtol=1e-4, atol=1e-9)


@pytest.mark.distributed
def test_two_processes_equal_one_with_twice_the_batch(
    train: Any, model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """Under the shipped launcher configuration, weights and logged losses are those of one process."""
    record, single = train("single", per_device_train_batch_size=4)
    _, start = train("start", per_device_train_batch_size=4, optimizer={"learning_rate": 0.0}, max_steps=1)
    settings = {
        "model": model_folder,
        "data": data_folder,
        "output_dir": tmp_path / "double",
        "concept_init": "dog",
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "tensorboard",
    }
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        ROOT / "accelerate_configs/cpu.yaml",
    ]
    command += ["-m", "recipes.diffusion", *(f"--{key}={value}" for key, value in settings.items())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "double/record.json").read_text())
    assert found["processes"] == 2
    assert found["samples_per_step"] == record["samples_per_step"] == 4
    assert largest_difference(single, tmp_path / "double", start) < TOLERANCE
    for mine, theirs in zip(record["history"], found["history"], strict=True):
        assert mine.keys() == theirs.keys()
        assert all(theirs[k] == pytest.approx(mine[k], rel=1e-4) for k in mine)  # 1e-7 is what is seen


def test_diffusers_loads_the_same_pixels(train: Any, model_folder: Path) -> None:
    """A fresh stock pipeline draws what the training process drew, with alpha other than r and two vectors."""
    _, folder = train(
        optimizer={"learning_rate": 0.3},
        text_lora=True,
        lora_r=4,
        lora_alpha=8,
        concept_init=["random+dog"],
        validation_prompts=["a photo of <V>"],
    )
    drawn = np.asarray(open_image(folder / "samples/step-000004/00.png")).astype(int)
    pipe = StableDiffusionPipeline.from_pretrained(model_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        [picture] = pipe("a photo of <V>", generator=generator, num_inference_steps=2).images
        return np.asarray(picture).astype(int)

    base = draw()
    pipe.load_lora_weights(folder / "lora")
    pipe.load_textual_inversion(folder / "lora")
    assert abs(draw() - drawn).max() <= 1  # of 255: rounding
    assert abs(base - drawn).max() > 5


def test_samples_grid_and_card(train: Any) -> None:
    """Samples before, during and after training; the grid has a row for each; the card says how it was trained."""
    record, folder = train(
        validation_prompts=["a photo of <V>", "a red <V>"], validation_steps=2, report_to="tensorboard"
    )
    drawn = sorted(str(p.relative_to(folder / "samples")) for p in folder.glob("samples/*/*.png"))
    assert drawn == [f"step-{step:06d}/{i:02d}.png" for step in (0, 2, 4) for i in (0, 1)]
    sheet = open_image(folder / "lora/grid.png")
    assert sheet.height > 3 * 128
    assert sheet.width > 2 * 128
    card = (folder / "lora/README.md").read_text()
    for text in ("sgd_sai", "| learning rate | 0.01 |", "load_textual_inversion", "grid.png", "`<V>`"):
        assert text in card
    assert record["concept"] == {"<V>": "dog"}
    events = b"".join(p.read_bytes() for p in folder.rglob("events.out.tfevents*"))
    assert b"validation" in events  # the grid
    assert b"loss/t0" in events


def test_grid_of_several_runs(train: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A row for each run, labelled by its optimizer and learning rate; other prompts are refused."""
    runs = [str(train(name, max_steps=1, validation_prompts=["a red <V>"])[1]) for name in ("one", "two")]
    picture = tmp_path / "both.png"
    monkeypatch.setattr(sys, "argv", ["grid.py", "--runs", *runs, "--output", str(picture), "--cell", "40"])
    contact_sheet.main()
    assert open_image(picture).height > 2 * 40
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--report_to", "tensorboard"])
    contact_sheet.main()
    [events] = (tmp_path / "logs").rglob("events.out.tfevents*")
    assert b"validation" in events.read_bytes()
    assert contact_sheet.last_samples(Path(runs[0]))[0] == "sgd_sai 0.01"
    record = Path(runs[1]) / "record.json"
    record.write_text(record.read_text().replace("a red <V>", "a blue <V>"))
    with pytest.raises(UserError, match="has other prompts than"):
        contact_sheet.main()


def test_prior_preservation_keeps_the_class(train: Any) -> None:
    """Class images are drawn once, and their loss joins with its weight."""
    record, folder = train(prior_prompt="a photo of dog", prior_images=2, prior_weight=0.5)
    made = sorted(folder.glob("prior-*/*"))
    assert [p.name for p in made] == ["00000.png", "00001.png"]
    times = [p.stat().st_mtime_ns for p in made]
    train(prior_prompt="a photo of dog", prior_images=2, overwrite_output_dir=True)
    assert [p.stat().st_mtime_ns for p in made] == times
    train(prior_prompt="a toy", prior_images=1, overwrite_output_dir=True)  # those of another prompt are others
    assert len(list(folder.glob("prior-*/*"))) == 3
    without, _ = train("without")
    assert record["history"][0]["loss"] != without["history"][0]["loss"]


@pytest.mark.parametrize(
    ("optim", "lr"), [("adamw", 1e-3), ("scaled_adamw", 1e-3), ("prodigy", 1.0), ("sgd_sai", 1e-2)]
)
def test_every_optimizer_trains(train: Any, optim: str, lr: float) -> None:
    if optim == "prodigy":
        pytest.importorskip("prodigyopt")
    record, folder = train(optimizer={"optim": optim, "learning_rate": lr}, max_steps=2)
    assert record["config"]["optim"] == {"adamw": "adamw_torch"}.get(optim, optim)
    assert all(torch.isfinite(w).all() for w in weights(folder).values())
    assert any(w.abs().max() > 0 for name, w in weights(folder).items() if "lora_B" in name or "lora.up" in name)


def test_half_precision_keeps_what_trains_in_float32(train: Any, trained_pipe: list[Any]) -> None:
    AcceleratorState._reset_state()  # a process has one precision, other tests float32
    train(mixed_precision="bf16", validation_prompts=["a photo of <V>"], gradient_checkpointing=True, max_steps=2)
    dtypes = {p.requires_grad: p.dtype for p in trained_pipe[0].unet.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    AcceleratorState._reset_state()


def test_real_photographs(train: Any) -> None:
    """The concept set as shipped: captions with `<V>`, metadata.jsonl."""
    data = Path(os.environ.get("HF_SAI_DATA", ROOT.parent / "shared/data")) / "concept/dog6"
    if not data.is_dir():
        pytest.skip("no concept images here")
    record, folder = train(data=str(data), max_steps=2)
    assert record["images"] == 5
    assert record["captions"] == ["a photo of <V> dog"]
    assert weights(folder)["<V>"].shape == (1, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"concept_init": None}, "concept_init is needed"),
        ({"concept_init": ["zebra"]}, "'zebra' for <V> must be one token"),
        ({"concept_init": ["dog", "toy"]}, "one entry for each of 1 concept tokens, got 2"),
        ({"concept_tokens": ["dog"], "data": "captioned"}, "'dog' is already a token"),
        ({"concept_tokens": ["<W>"]}, "no caption contains the concept token <W>"),
        ({"resolution": 20}, "resolution must be a multiple of 8 for this model, got 20"),
        ({"cache_latents": True, "random_crop": True}, "cache_latents needs the same crop"),
        ({"cache_prompts": True}, "cache_prompts needs text encoders that do not train"),
        ({"mixed_precision": "fp16"}, "fp16 needs a GPU; use bf16 or no on a CPU"),
        ({"report_to": "tensorbord"}, "report_to: .*tensorbord"),
        ({"optimizer": {"lr_scheduler_type": "cosin"}}, "lr_scheduler_type must be one of linear, .*, got 'cosin'"),
        ({"clip_model": "none/such", "validation_prompts": ["a <V>"]}, "clip_model: could not load 'none/such'"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of no, fp16, bf16, got 'fp8'"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"model": "missing_unet"}, "lacks unet"),
        ({"model": "other_vae"}, "the VAE's latents have 3"),
        ({"model": "other_text"}, "text of width 32, the text encoder's is 16"),
        ({"model": "no_index"}, "no model_index.json"),
    ],
)
def test_errors(train: Any, model_folder: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """Each names what is wrong; nothing is written."""
    name = settings.get("model")
    if name:
        folder = tmp_path / name
        shutil.copytree(model_folder, folder)
        if name == "missing_unet":
            shutil.rmtree(folder / "unet")
        elif name == "no_index":
            (folder / "model_index.json").unlink()
        elif name == "other_vae":
            random_vae(latent_channels=3).save_pretrained(folder / "vae")
        else:
            other = tiny_pipeline(WORDS, 8, (8, 16), (False, True), 16)
            other.text_encoder.save_pretrained(folder / "text_encoder")
        settings = {**settings, "model": str(folder)}
    if settings.get("data") == "captioned":
        folder = tmp_path / "captioned"
        folder.mkdir()
        Image.new("RGB", (16, 16)).save(folder / "0.png")
        (folder / "0.txt").write_text("a photo of dog")
        settings = {**settings, "data": str(folder)}
    AcceleratorState._reset_state()  # a process has one precision
    with pytest.raises(UserError, match=message):
        train(**settings)
    AcceleratorState._reset_state()
    assert not list(tmp_path.glob("out/*"))


def test_an_optimizer_or_tracker_that_is_not_installed(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install; accelerate itself would train on with a warning."""

    def missing(*_: Any) -> None:
        raise ImportError("You need to install `bitsandbytes`")  # transformers' words; it may be installed here

    monkeypatch.setattr(recipe, "build_optimizer", missing)
    with pytest.raises(UserError, match="adamw_8bit is not available here: You need to install `bitsandbytes`"):
        train(optimizer={"optim": "adamw8bit"})
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(UserError, match="report_to: wandb is not installed: pip install wandb"):
        train(report_to="wandb")


def test_a_diverged_run_says_so_once(train: Any, caplog: pytest.LogCaptureFixture) -> None:
    record, _ = train(optimizer={"optim": "sgd", "learning_rate": 1e30})
    assert not np.isfinite(record["history"][-1]["loss"])
    assert caplog.text.count("lower learning_rate or set max_grad_norm") == 1
