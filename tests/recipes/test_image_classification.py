"""The image recipe end to end on toy images, its data, models and augmentation; the LSTM beside it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification

from hf_sai.state import scale_shapes
from recipes.common import classifier
from recipes.common.classifier import ClassifierArguments, ClassifierTrainer, read_config
from recipes.common.errors import UserError
from recipes.images import train as job
from recipes.images.augment import OPERATIONS, mix, rand_augment, random_resized_crop, shift_and_flip
from recipes.images.data import ImageArguments, load_images
from recipes.images.models import MODELS, ImageModelArguments, SmallImageResNet, build_model
from recipes.lstm import train as lstm

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "recipes" / "images" / "configs").rglob("*.yaml"))
DATA = Path(os.environ.get("HF_SAI_DATA", ROOT / ".." / "shared" / "data")).resolve()
TINY = {
    "vit_s16": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "patch_size": 4,
    },
    "resnet18": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    # At transformers' layer scale of 1e-6 the gradients inside a block are a millionth of the others: SGD-SaI, whose
    # step follows the gradient's size, moves its norms by less than float32 holds until the scales have grown.
    "convnext_small_images": {
        "num_stages": 2,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_scale_init_value": 0.1,
    },
}


def picture(label: int, rng: np.random.Generator, size: int = 16) -> Image.Image:
    """Noise that is brighter in the channel of its class: a set that any classifier can separate."""
    pixels = rng.integers(0, 100, (size, size, 3))
    pixels[:, :, label] += 120
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """60 training and 30 test images as parquet, and the same pixels as folders of PNG files."""
    home = tmp_path_factory.mktemp("images")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["r", "g", "b"])})
    rng = np.random.default_rng(0)
    (home / "parquet").mkdir()
    for split, count in (("train", 60), ("test", 30)):
        labels = [row % 3 for row in range(count)]
        images = [picture(label, rng) for label in labels]
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = home / "folders" / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{row:03}.png")
        split_set = datasets.Dataset.from_dict({"img": images, "label": labels}, features=features)
        split_set.to_parquet(home / "parquet" / f"{split}-00000-of-00001.parquet")
    return home


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture
def config(home):
    return {
        "dataset": str(home / "parquet"),
        "model": "vit_s16",
        "model_options": TINY["vit_s16"],
        "optim": "sgd_sai",
        "learning_rate": 1e-2,
        "weight_decay": 0.01,
        "per_device_train_batch_size": 12,
        "num_train_epochs": 4,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }


def losses(record):
    return [row["loss"] for split in ("train", "validation") for row in record["curves"][split]]


# --- the whole recipe ------------------------------------------------------------------------------------------------


def test_learns_what_can_be_separated_and_reports_it_truly(config, tmp_path):
    record = job.run({**config, "output_dir": str(tmp_path)})
    assert record["final"]["eval_top1"] == record["best"]["eval_top1"] == 1.0
    assert not record["diverged"]
    assert record == json.loads((tmp_path / "record.json").read_text())
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (record["steps"], record["epochs"], record["data"]["classes"]) == (4 * 5, 4.0, 3)
    assert [row["epoch"] for row in record["curves"]["validation"]] == [1.0, 2.0, 3.0, 4.0]
    assert record["speed"]["steps_timed"] == 4 * 5 - 2
    assert str(tmp_path.parent) not in json.dumps(record)

    model = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    options = read_config((ImageArguments, ImageModelArguments, ClassifierArguments), config, None)[0]
    batch = load_images(options, 0).validation.__getitems__(list(range(30)))
    with torch.no_grad():
        loss = cross_entropy(model(batch["pixel_values"]).logits, batch["labels"]).item()
    assert record["final"]["eval_loss"] == pytest.approx(loss, rel=1e-5)  # float32, summed in another order
    blocks = list(model.parameters())
    group = {"scaling": "adamw", "token_rows": False}
    scales = sum(shape.numel() for p in blocks for shape in scale_shapes(p.shape, group).values())
    # Momentum and scales in float32; g-SNR and the count of each block.
    assert record["optimizer_state_bytes"] == 4 * (sum(p.numel() for p in blocks) + scales) + 12 * len(blocks)


@pytest.mark.parametrize("model", ["vit_s16", "resnet18"])
def test_killed_in_mid_epoch_and_resumed_is_the_run_never_killed(config, model, tmp_path, monkeypatch):
    config |= {"model": model, "model_options": TINY[model], "num_train_epochs": 3, "flip": True, "crop_padding": 2}
    config |= {"mixup": 0.2, "save_strategy": "steps", "save_steps": 7, "label_smoothing_factor": 0.1}
    whole = job.run({**config, "output_dir": str(tmp_path / "whole")})
    step = ClassifierTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 9:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    config["output_dir"] = str(tmp_path / "run")
    monkeypatch.setattr(ClassifierTrainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        job.run(config)
    monkeypatch.setattr(ClassifierTrainer, "training_step", step)
    with pytest.raises(UserError, match=r"holds checkpoint-7 of an earlier run.*--resume_from_checkpoint last"):
        job.run(config)
    resumed = job.run({**config, "resume_from_checkpoint": "auto"})
    assert losses(resumed) == losses(whole)
    load = SmallImageResNet if model == "resnet18" else AutoModelForImageClassification
    first, second = (load.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "run"))
    assert all(torch.equal(first[name], second[name]) for name in first)  # bitwise


def test_many_runs_in_one_process_are_quiet_leave_nothing_and_do_not_meet(config, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)  # looked up again
    config |= {"num_train_epochs": 1, "flip": True, "crop_padding": 1}
    job.run(config)  # the set is in the cache of `datasets` now
    capfd.readouterr()
    first = job.run(config)
    job.run({**config, "seed": 4, "optim": "adamw_torch"})
    again = job.run(config)
    assert losses(first) == losses(again)
    assert first["optimizer_state_bytes"] == again["optimizer_state_bytes"]
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_save_model_false_leaves_record_and_curves_only(config, tmp_path):
    job.run({**config, "max_steps": 2, "save_model": False, "output_dir": str(tmp_path)})
    assert {path.name for path in tmp_path.iterdir()} == {"record.json", "curves.png"}


def test_every_optimizer_sees_the_same_images_and_starts_from_the_same_weights(config, monkeypatch):
    seen = {}
    step = ClassifierTrainer.training_step

    def recorded(self, model, inputs, *args, **kwargs):
        found = seen.setdefault(str(self.args.optim), [next(model.parameters()).detach().clone()])
        found.append(inputs["pixel_values"].clone())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(ClassifierTrainer, "training_step", recorded)
    for optim in ("sgd_sai", "adamw_torch", "sgdm"):
        job.run({**config, "optim": optim, "max_steps": 7, "flip": True, "crop_padding": 2})
    first, *others = seen.values()
    assert len(others) == 2
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("model", ["vit_s16", "resnet18"])
def test_adam_mini_trains_image_models_whose_tensors_have_more_than_two_axes(config, model):
    config |= {"model": model, "model_options": TINY[model], "optim": "adam_mini", "learning_rate": 3e-3}
    record = job.run(config)
    assert losses(record)[-1] < 0.7 * losses(record)[0]  # from log 3; ours are at 0 by then


def test_a_step_is_the_same_in_one_batch_or_in_accumulated_parts(config):
    config |= {"num_train_epochs": 2, "crop_padding": 2, "logging_steps": 5, "learning_rate": 1e-3}
    one = job.run(config)
    parts = job.run({**config, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3})
    # float32 sums in another order, relative errors of 2**-23 that ten steps carry on; 1e-4 is 840 of them, 2 are seen
    assert losses(parts) == pytest.approx(losses(one), rel=1e-4)


def test_diverged_run_stops_and_its_answers_are_wrong(config):
    record = job.run({**config, "optim": "sgdm", "learning_rate": 1e20, "max_grad_norm": 0.0})
    assert record["diverged"]
    assert record["steps"] < 20
    assert record["final"]["eval_top1"] == 0.0
    assert record["best"]["eval_loss"] is None


def test_rate_falls_in_steps_after_the_warm_up(config, monkeypatch):
    rates = []
    log = ClassifierTrainer.log

    def recorded(self, logs, *args, **kwargs):
        rates.extend([logs["learning_rate"]] if "learning_rate" in logs else [])
        return log(self, logs, *args, **kwargs)

    monkeypatch.setattr(ClassifierTrainer, "log", recorded)
    change = {"lr_decay_epochs": 1, "lr_decay_factor": 0.5, "num_train_epochs": 3, "warmup_fraction": 0.2}
    job.run({**config, **change, "eval_strategy": "no", "learning_rate": 1.0, "max_grad_norm": 0.01})
    # 5 steps an epoch, of all 15 a fifth is warm-up, from 0 as in transformers' schedules
    assert rates == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, *[0.5] * 5, *[0.25] * 5])


def test_no_decay_on_biases_and_norms():
    model = build_model(ImageModelArguments("resnet18", TINY["resnet18"]), 16, 3, 3)
    decayed = ClassifierTrainer.get_decay_parameter_names(None, model)
    kinds = {type(model.get_submodule(name.rpartition(".")[0])) for name in decayed}
    assert kinds == {nn.Conv2d, nn.Linear}
    assert all(name.endswith("weight") for name in decayed)


@pytest.mark.distributed
def test_two_processes_are_one_with_twice_the_batch(config, tmp_path):
    config |= {"num_train_epochs": 2, "crop_padding": 2, "flip": True, "learning_rate": 1e-3}
    one = job.run(config)
    config |= {"per_device_train_batch_size": 6, "output_dir": str(tmp_path / "two")}
    (tmp_path / "two.yaml").write_text(json.dumps(config))  # JSON is YAML
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
    command = [*launch, "-m", "recipes.images", str(tmp_path / "two.yaml")]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=800, text=True).stdout
    two = json.loads((tmp_path / "two" / "record.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)  # see the test of accumulation
    assert printed.count("top-1") == 1


# --- SGD-SaI on every architecture -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", sorted(TINY))
def test_sgd_sai_trains_every_block(config, model, monkeypatch):
    before, after = _blocks(monkeypatch)
    job.run({**config, "model": model, "model_options": TINY[model], "max_steps": 3})
    _assert_trained(before, after)


def test_sgd_sai_trains_every_block_of_an_lstm(tmp_path, monkeypatch):
    before, after = _blocks(monkeypatch)
    (tmp_path / "text.txt").write_text("hello, world. " * 40)
    options = {"text": str(tmp_path / "text.txt"), "sequence_length": 8, "hidden_size": 8, "embedding_size": 4}
    lstm.run({**options, "max_steps": 3, "use_cpu": True, "disable_tqdm": True})
    assert len(before) == 1 + 2 * 4 + 2  # embedding, two layers, head
    _assert_trained(before, after)


def _blocks(monkeypatch):
    """Weights by name before the first step and, when the run is over, after the last; and the optimizer's state."""
    before, after = {}, {}
    train, record = ClassifierTrainer.train, classifier.build_record

    def started(self, *args, **kwargs):
        before.update({name: p.detach().clone() for name, p in self.model.named_parameters()})
        return train(self, *args, **kwargs)

    def finished(recipe, trainer, *args):
        state = getattr(trainer.optimizer, "optimizer", trainer.optimizer).state
        after.update({name: (p.detach().clone(), state[p]) for name, p in trainer.model.named_parameters()})
        return record(recipe, trainer, *args)

    monkeypatch.setattr(ClassifierTrainer, "train", started)
    monkeypatch.setattr(classifier, "build_record", finished)
    return before, after


def _assert_trained(before, after):
    assert before.keys() == after.keys()
    for name, (values, state) in after.items():
        assert state["gsnr"] > 0, name
        assert not torch.equal(values, before[name]), name


def test_lstm_learns_a_text_that_repeats(tmp_path):
    (tmp_path / "text.txt").write_text("abcdefgh" * 100)
    options = {"text": str(tmp_path / "text.txt"), "sequence_length": 16, "hidden_size": 16, "embedding_size": 8}
    record = lstm.run(
        {**options, "layers": 1, "learning_rate": 3e-2, "num_train_epochs": 12, "use_cpu": True, "disable_tqdm": True}
    )
    assert record["final"]["eval_top1"] == 1.0  # every character follows from the one before
    assert record["data"] == {"train_sequences": 44, "validation_sequences": 4, "classes": 8}


@pytest.mark.parametrize(
    ("text", "change", "message"),
    [
        ("abc", {}, "text: 3 characters are too few.*shorter sequence_length"),
        (b"\xff\xfe", {}, "text: .* must be UTF-8"),
        ("abc", {"text": "/no/such.txt"}, "text: /no/such.txt cannot be read: No such file"),
        ("abc", {"layers": 0}, "layers must be at least 1, got 0"),
    ],
)
def test_bad_options_of_the_lstm_are_explained(tmp_path, text, change, message):
    path = tmp_path / "text.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        lstm.run({"text": str(path), "use_cpu": True, **change})


# --- data ------------------------------------------------------------------------------------------------------------


def batch_of(split, order=None):
    """All of a split in one batch, ordered by pixels: a folder's order is not that of a parquet file."""
    batch = split.__getitems__(list(range(len(split))))
    keys = [tuple(image.flatten()[:4].tolist()) for image in batch["pixel_values"]]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return batch["pixel_values"][order], batch["labels"][order]


def test_parquet_and_folders_give_the_same_tensors(home):
    parquet, folders = (load_images(ImageArguments(str(home / kind)), 0) for kind in ("parquet", "folders"))
    assert (parquet.classes, parquet.image_size, parquet.channels) == (3, 16, 3)
    assert (parquet.mean, parquet.std) == (folders.mean, folders.std)
    for split in ("train", "validation"):
        for ours, theirs in zip(batch_of(getattr(parquet, split)), batch_of(getattr(folders, split)), strict=True):
            assert torch.equal(ours, theirs)
    values = parquet.train.__getitems__(list(range(60)))["pixel_values"]
    assert values.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert values.std((0, 2, 3), correction=0).tolist() == pytest.approx([1, 1, 1], rel=1e-5)


def test_preloaded_and_decoded_when_asked_for_are_the_same_pixels(home):
    options = {"dataset": str(home / "parquet"), "image_size": 8, "validation_resize": 12}
    ahead, later = (load_images(ImageArguments(**options, preload=preload), 0) for preload in (True, False))
    for split in ("train", "validation"):
        pixels = []
        for data in (ahead, later):
            mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (data.mean, data.std))
            batch = getattr(data, split).__getitems__([5, 0, 7])
            pixels.append((batch["pixel_values"] * std + mean) * 255)
        assert torch.equal(pixels[0].round(), pixels[1].round())
    single = later.validation[5]
    assert torch.equal(single["pixel_values"], later.validation.__getitems__([5])["pixel_values"][0])


def test_a_set_without_a_validation_split_is_cut_the_same_way_for_every_seed(home):
    options = ImageArguments(str(home / "parquet" / "train-only"), validation_fraction=0.25)
    folder = Path(options.dataset)
    folder.mkdir(exist_ok=True)
    (folder / "part.parquet").write_bytes((home / "parquet" / "train-00000-of-00001.parquet").read_bytes())
    first, second = load_images(options, 0), load_images(options, 1)
    assert (len(first.train), len(first.validation)) == (45, 15)
    assert torch.equal(first.validation.images, second.validation.images)
    together = torch.cat([first.train.images, first.validation.images]).flatten(1)
    assert len(together.unique(dim=0)) == 60


def test_digits_of_scikit_learn():
    pytest.importorskip("sklearn")
    data = load_images(ImageArguments("digits", validation_fraction=0.2), 0)
    assert (len(data.train), len(data.validation)) == (1438, 359)
    assert (data.classes, data.channels, data.image_size) == (10, 1, 8)


def test_digits_are_one_channel_of_eight_pixels(config, monkeypatch):
    images, target = np.linspace(0, 16, 20 * 64).reshape(20, 8, 8), np.arange(20) % 10
    digits = SimpleNamespace(data=images.reshape(20, 64), images=images, target=target)
    module = SimpleNamespace(load_digits=lambda: digits)
    monkeypatch.setitem(sys.modules, "sklearn", SimpleNamespace(datasets=module))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", module)
    data = load_images(ImageArguments("digits"), 0)
    pixels = torch.cat([data.train.images, data.validation.images]).double()
    assert (pixels.shape, pixels.min().item(), pixels.max().item()) == ((20, 8, 8, 1), 0, 255)
    labels = torch.cat([data.train.labels, data.validation.labels])
    order = pixels[:, 0, 0, 0].argsort()
    assert labels[order].tolist() == target.tolist()
    options = {**TINY["vit_s16"], "patch_size": 2}
    record = job.run({**config, "dataset": "digits", "model_options": options, "max_steps": 2})
    assert (record["data"]["channels"], record["data"]["image_size"], record["data"]["classes"]) == (1, 8, 10)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"`digits` needs the package scikit-learn: pip install scikit-learn"):
        load_images(ImageArguments("digits"), 0)


@pytest.mark.skipif(not (DATA / "cifar_like").is_dir(), reason="needs HF_SAI_DATA")
def test_cifar_like():
    data = load_images(ImageArguments(str(DATA / "cifar_like")), 0)
    assert (len(data.train), len(data.validation), data.classes, data.image_size) == (5000, 1000, 10, 32)
    assert data.train.labels.bincount().tolist() == [500] * 10


def write_set(folder, split, **labels):
    """A parquet file of images and columns of whole numbers."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(1)
    count = len(next(iter(labels.values())))
    content = {"image": [picture(0, rng) for _ in range(count)], **labels}
    features = datasets.Features({"image": datasets.Image(), **{name: datasets.Value("int64") for name in labels}})
    datasets.Dataset.from_dict(content, features=features).to_parquet(folder / f"{split}.parquet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_column": "labl"}, r"label_column: .* has no column 'labl', only .*did you mean 'label'"),
        ({"image_column": "label"}, "image_column: 'label' holds no images"),
        ({"validation_split": "valid"}, "validation_split: .* has no split 'valid', only"),
        ({"train_split": "all"}, "train_split: .* has no split 'all', only"),
        ({"dataset": "EMPTY"}, r"dataset: .* holds neither \*.parquet files nor images"),
        ({"resume_from_checkpoint": "auto"}, "resume_from_checkpoint needs output_dir"),
        ({"dataset": "/no/such/folder"}, "dataset: '/no/such/folder' is no folder"),
        ({"dataset": "nobody/nothing"}, "dataset: could not load nobody/nothing"),
        ({"model": "vit_s32"}, "model must be one of vit_s16, .*got 'vit_s32'; did you mean 'vit_s16'"),
        ({"model_options": {"hiden_size": 8}}, "vit_s16 has no option 'hiden_size'; did you mean 'hidden_size'"),
        ({"model_options": {"patch_size": 5}}, r"image_size must be a multiple of 5 \(patch_size\), got 16"),
        ({"model_options": "{"}, "model_options must be JSON"),
        (
            {"model": "resnet18", "model_options": {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]}},
            "model_options: resnet18 halves an image of fewer than 8 channels.*give embedding_size and hidden_sizes",
        ),
        ({"model_options": {"hidden_size": "wide"}}, "model_options: "),
        ({"optim": "sgd_say"}, "did you mean 'sgd_sai'"),
        ({"randaugment_layers": 2}, "need `preload: false`"),
        ({"preload": False}, "`preload: false` needs image_size"),
        ({"crop_smallest": 1.5}, r"crop_smallest must be in \(0, 1\], got 1.5"),
        ({"lr_decay_epochs": 0}, "lr_decay_epochs must be above 0"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "persistent_workers must be false"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_options_are_explained(config, tmp_path, change, message):
    (tmp_path / "empty").mkdir()
    if change.get("dataset") == "EMPTY":
        change = {"dataset": str(tmp_path / "empty")}
    with pytest.raises(UserError, match=message):
        job.run({**config, **change, "max_steps": 1})


def test_bad_labels_and_sizes_are_explained(tmp_path):
    write_set(tmp_path / "range", "train", label=[0, 1, 2, 0])
    write_set(tmp_path / "range", "test", label=[0, 3])
    with pytest.raises(UserError, match="label of image 1 of the test split must be from 0 to 2, got 3"):
        load_images(ImageArguments(str(tmp_path / "range")), 0)
    write_set(tmp_path / "unlabelled", "train", label=[0, -1, 2, 0])
    with pytest.raises(UserError, match=r"label of image 1 of the train split must be a whole number.*got -1"):
        load_images(ImageArguments(str(tmp_path / "unlabelled"), validation_split="train"), 0)
    write_set(tmp_path / "several", "train", label=[0, 1, 1], labels=[0, 0, 0])
    (tmp_path / "several" / "more.parquet").touch()
    with pytest.raises(UserError, match=r"dataset: more.parquet names no split, as other files.*begin its name"):
        load_images(ImageArguments(str(tmp_path / "several")), 0)
    (tmp_path / "several" / "more.parquet").unlink()
    with pytest.raises(UserError, match=r"label_column: .* has several that fit: \['label', 'labels'\]; name one"):
        load_images(ImageArguments(str(tmp_path / "several")), 0)
    folder = tmp_path / "sizes"
    for label in (0, 1):
        (folder / str(label)).mkdir(parents=True)
        for row in range(4):
            picture(label, np.random.default_rng(row), 16 + 8 * (row % 2)).save(folder / str(label) / f"{row}.png")
    with pytest.raises(UserError, match=r"image_size: image \d of the train split is \d\dx\d\d, not .* like those"):
        load_images(ImageArguments(str(folder)), 0)
    assert load_images(ImageArguments(str(folder), image_size=16), 0).train.images.shape[1:] == (16, 16, 3)
    (folder / "0" / "0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"image \d of the train split cannot be read|could not load"):
        load_images(ImageArguments(str(folder), image_size=16), 0)


# --- augmentation ----------------------------------------------------------------------------------------------------


def test_shift_and_flip_is_what_a_loop_does():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (5, 6, 7, 3), generator=generator, dtype=torch.uint8)
    offsets = torch.randint(0, 5, (5, 2), generator=generator)
    flips = torch.tensor([True, False, True, False, True])
    result = shift_and_flip(pixels, offsets, flips, 2)
    for row in range(5):
        padded = torch.zeros(10, 11, 3, dtype=torch.uint8)
        padded[2:8, 2:9] = pixels[row]
        top, left = offsets[row].tolist()
        expected = padded[top : top + 6, left : left + 7]
        assert torch.equal(result[row], expected.flip(1) if flips[row] else expected)


def test_what_an_image_becomes_depends_on_seed_epoch_and_image_only(home):
    def batches(seed, epoch, size, **options):
        data = load_images(ImageArguments(str(home / "parquet"), **options), seed).train
        data.set_epoch(epoch)
        parts = [data.__getitems__(list(range(start, start + size))) for start in range(0, 12, size)]
        return torch.cat([part["pixel_values"] for part in parts])

    for options in (
        {"crop_padding": 2, "flip": True},
        {"preload": False, "image_size": 16, "crop_smallest": 0.3, "flip": True, "randaugment_layers": 2},
    ):
        first = batches(0, 1, 4, **options)
        assert torch.equal(first, batches(0, 1, 12, **options))
        assert not torch.equal(first, batches(0, 2, 4, **options))
        assert not torch.equal(first, batches(1, 1, 4, **options))


def test_mixup_blends_images_and_names_both_labels():
    batch = {"pixel_values": torch.arange(4.0).view(4, 1, 1, 1), "labels": torch.arange(4)}
    mixed = mix(batch, 0.2, np.random.default_rng(5))
    share = mixed["share"][0].item()
    assert 0 <= share <= 1
    assert mixed["other_labels"].tolist() == [3, 0, 1, 2]
    expected = share * torch.tensor([0.0, 1, 2, 3]) + (1 - share) * torch.tensor([3.0, 0, 1, 2])
    torch.testing.assert_close(mixed["pixel_values"].flatten(), expected)


def test_mixup_loss_is_the_blend_of_two_losses():
    logits = torch.randn(4, 3)
    labels, others, share = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 1, 2]), torch.full((4,), 0.3)
    trainer = ClassifierTrainer.__new__(ClassifierTrainer)
    trainer.args = ClassifierArguments(use_cpu=True, label_smoothing_factor=0.1)
    inputs = {"labels": labels, "other_labels": others, "share": share}
    loss = trainer.compute_loss(lambda: {"logits": logits}, inputs)
    soft = 0.3 * nn.functional.one_hot(labels, 3) + 0.7 * nn.functional.one_hot(others, 3)
    torch.testing.assert_close(loss, cross_entropy(logits, soft, label_smoothing=0.1))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_randaugment_operations(mode):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(20, 120, (24, 24, 3)).astype(np.uint8)).convert(mode)
    assert len(OPERATIONS) == 14
    for name, operation in OPERATIONS.items():
        for level in (-1.0, 0.0, 1.0):
            changed = operation(image, level)
            assert (changed.size, changed.mode) == (image.size, mode), name
            if level == 0 and name not in ("autocontrast", "equalize"):
                assert changed.tobytes() == image.tobytes(), name
            if level == 1 and name not in ("identity", *(["color"] if mode == "L" else [])):
                assert changed.tobytes() != image.tobytes(), name
    assert rand_augment(image, 3, 10, rng).size == image.size
    assert rand_augment(image, 0, 10, rng) is image


def test_random_resized_crop_draws_the_areas_asked_for():
    rows, columns = np.mgrid[0:64, 0:64]
    image = Image.fromarray(np.stack([4 * rows, 4 * columns, 0 * rows], 2).astype(np.uint8))
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(200):
        crop = np.asarray(random_resized_crop(image, 16, 0.25, rng), dtype=float)
        assert crop.shape == (16, 16, 3)
        # ends of the gradients: the crop's sides, less one pixel of the 16 they were resized to
        height, width = ((crop[..., c].max() - crop[..., c].min()) / 4 * 16 / 15 for c in (0, 1))
        areas.append(height * width / 64**2)
    assert 0.2 < min(areas) < 0.35
    assert 0.85 < max(areas) < 1.1


# --- models and configurations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "classes", "parameters"),
    [  # the sizes that the papers of the models and their usual implementations have
        ("vit_s16", 224, 1000, 22_050_664),
        ("vit_h14", 224, 1000, 632_045_800),
        ("resnet18", 224, 1000, 11_689_512),
        ("resnet18", 32, 10, 11_173_962),
        ("convnext_tiny", 224, 1000, 28_589_128),
    ],
)
def test_models_have_their_published_sizes(name, size, classes, parameters):
    with torch.device("meta"):
        model = build_model(ImageModelArguments(name), size, 3, classes)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_small_images_keep_their_size_in_the_stem_of_a_resnet():
    model = build_model(ImageModelArguments("resnet18", TINY["resnet18"]), 32, 3, 10)
    assert model.resnet.embedder(torch.zeros(1, 3, 32, 32)).shape == (1, 8, 32, 32)
    weights = model.resnet.embedder.embedder.convolution.weight
    assert weights.std().item() == pytest.approx((2 / (8 * 9)) ** 0.5, rel=0.3)  # Kaiming, fan out, of 216 draws


def test_every_configuration_is_read(monkeypatch):
    monkeypatch.setattr("recipes.common.config.expand", lambda value: (value, None))  # the data need not be here
    assert len(CONFIGS) == 7
    for path in CONFIGS:
        words = [str(path), "--use_cpu", "true"]  # bf16 is refused where there is no GPU, unless that is meant
        _, model, args = read_config((ImageArguments, ImageModelArguments, ClassifierArguments), words, None)
        assert model.model in (*MODELS, "cell_4321")
        assert args.keep
    assert read_config((lstm.LSTMArguments, ClassifierArguments), "lstm_shakespeare.yaml", None)
